"""What the maps of segments do to states: M S + D, and P S to outputs. See ``segments``.

Value head j has key head j // (HV // H); the value heads of one key head are laid side by side, one matrix.
"""

import torch
from torch import Tensor

__all__ = ["apart", "by_heads", "fold", "read", "read_transposed", "side_by_side"]


def side_by_side(S: Tensor, heads: int) -> Tensor:
    """States [..., HV, K, V] -> [..., heads, K, HV / heads * V]: what belongs to one key head is one matrix."""
    return S.unflatten(-3, (heads, -1)).transpose(-3, -2).flatten(-2)


def apart(S: Tensor, V: int) -> Tensor:
    """The inverse of ``side_by_side``."""
    return S.unflatten(-1, (-1, V)).transpose(-3, -2).flatten(-4, -3)


def by_heads(x: Tensor, heads: int) -> Tensor:
    """Tokens [B, T, HV, V] -> [B, heads, T, HV / heads * V]."""
    return x.unflatten(2, (heads, -1)).flatten(3).transpose(1, 2)


def fold(M: Tensor, D: Tensor | None, state: Tensor | None, transposed: bool = False) -> tuple[Tensor, Tensor]:
    """S <- M S + D from segment to segment: the states that n of them are entered with [B, n, HV, K, V], and the one
    that the last leaves [B, HV, K, V].

    M [B, n, H, K, K], D [B, n, HV, K, V], None for zeros; state [B, HV, K, V], None for zeros, of which one is given,
    enters the first. transposed: by M^T, from the last segment to the first, as gradients of states go."""
    count, heads, V = M.shape[1], M.shape[2], (state if D is None else D).shape[-1]
    states = [torch.zeros_like(D[:, 0]) if state is None else state]
    for c in reversed(range(count)) if transposed else range(count):
        S = apart((M[:, c].mT if transposed else M[:, c]) @ side_by_side(states[-1], heads), V)
        states.append(S if D is None else S + D[:, c])
    *entered, left = states
    return torch.stack(entered[::-1] if transposed else entered, 1), left


def read(P: Tensor, S: Tensor) -> Tensor:
    """P S for every token [B, T, HV, V], of P [B, T, H, K]: what outputs owe to the entering state [B, HV, K, V].

    Multiplied in P's dtype, as the kernels multiply a state: tensor cores take it."""
    o = P.transpose(1, 2) @ side_by_side(S.to(P.dtype), P.shape[2])
    return o.unflatten(-1, (-1, S.shape[-1])).permute(0, 2, 1, 3, 4).flatten(2, 3)


def read_transposed(P: Tensor, do: Tensor, dtype: torch.dtype) -> Tensor:
    """P^T dO summed over tokens, in ``dtype``: the gradient that outputs give to the entering state."""
    dS = P.permute(0, 2, 3, 1) @ by_heads(do.to(P.dtype), P.shape[2])
    return apart(dS.to(dtype), do.shape[-1])
