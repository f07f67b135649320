"""Closed-form FLOPs of the op: what FlopCounterMode reports and what the models' MFU counts.

A multiply-add is two. Only matrix products count. C is the chunk; V here is the value size of all value heads that read
one key head. Triangular products count their lower half.
"""

__all__ = ["CHUNK", "backward_flops", "forward_flops", "segment_flops"]

CHUNK = 64  # the chunk every implementation works in (DESIGN section 3)


def _terms(tokens, heads, key_dim, value_dim):
    C, K, V = CHUNK, key_dim, value_dim
    return tokens * heads, {"intra": 2 * C * K + 2 * C * C // 3, "CK": 2 * C * K, "CV": 2 * C * V, "KV": 2 * K * V}


def _recompute(term, erases):
    """A_qk, T and the inverse; Y and U; R and S_out. Where nothing is erased, A_qk and S_out."""
    if not erases:
        return term["CK"] // 2 + term["KV"]
    return term["intra"] + term["CK"] + term["CV"] + 2 * term["KV"]


def forward_flops(tokens: int, heads: int, key_dim: int, value_dim: int, erases: bool = True) -> int:
    """tokens = B * T, heads = key heads, value_dim = HV / H * V; erases: whether b is given."""
    scale, term = _terms(tokens, heads, key_dim, value_dim)
    return scale * (_recompute(term, erases) + term["KV"] + term["CV"])


def segment_flops(tokens: int, heads: int, key_dim: int, value_dim: int, erases: bool) -> int:
    """Of a segment as a map: K more columns, which without an erase gate are known without a product."""
    return forward_flops(tokens, heads, key_dim, value_dim + erases * key_dim, erases)


def backward_flops(
    tokens: int, heads: int, key_dim: int, value_dim: int, known: bool = False, erases: bool = True
) -> int:
    """Recomputation included: dR, dS_in, dA_qk, dQ, dKt, dY, dE, dZ, dT and the decayed products' gradients; where
    nothing is erased those of dA_qk, dQ, dKt, dZ and dS_in alone.

    known: whether A_qk and A come from the forward."""
    scale, term = _terms(tokens, heads, key_dim, value_dim)
    if not erases:  # without A, R is Z
        gradients = 4 * term["KV"] + 2 * term["CV"] + term["CK"]
        return scale * (_recompute(term, erases) - known * (term["CK"] // 2) + gradients)
    gradients = 6 * term["KV"] + 4 * term["CV"] + 2 * term["CK"] + 4 * CHUNK * key_dim
    return scale * (_recompute(term, erases) - known * term["intra"] + gradients)
