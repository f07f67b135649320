"""Products of a segment's map with states, for grouped heads: value head j belongs to key head j // (HV // H).

M [..., H, K, K], a state or its gradient [..., HV, K, V], reads P [B, T, H, K], outputs [B, T, HV, V].
"""

__all__ = ["apply", "apply_transposed", "read", "read_transposed"]


def apply(M, S):
    """M S."""
    heads = M.shape[-3]
    return (M.unsqueeze(-3) @ S.unflatten(-3, (heads, -1))).flatten(-4, -3)


def apply_transposed(M, dS):
    """M^T dS."""
    return apply(M.mT, dS)


def read(P, S):
    """P S for every token: what outputs owe to the state that the segment is entered with."""
    heads = P.shape[2]
    side_by_side = S.unflatten(1, (heads, -1)).transpose(2, 3).flatten(3)  # [B, H, K, HV / H * V]
    o = P.transpose(1, 2).to(S.dtype) @ side_by_side
    return o.unflatten(-1, (-1, S.shape[-1])).permute(0, 2, 1, 3, 4).flatten(2, 3)


def read_transposed(P, do, dtype):
    """P^T dO summed over tokens, in ``dtype``: the gradient that outputs give to the entering state."""
    heads = P.shape[2]
    side_by_side = do.unflatten(2, (heads, -1)).flatten(3).transpose(1, 2).to(dtype)  # [B, H, T, HV / H * V]
    dS = P.permute(0, 2, 3, 1).to(dtype) @ side_by_side
    return dS.unflatten(-1, (-1, do.shape[-1])).transpose(2, 3).flatten(1, 2)
