"""Closed-form FLOPs of the op: what FlopCounterMode reports and what the models' MFU counts.

A multiply-add is two. Only matrix products count. C is the chunk; V here is the value size of all value heads that read
one key head. Triangular products count their lower half.
"""

__all__ = ["CHUNK", "backward_flops", "forward_flops"]

CHUNK = 64  # the chunk every implementation works in (DESIGN section 3)


def _terms(tokens, heads, key_dim, value_dim):
    C, K, V = CHUNK, key_dim, value_dim
    return tokens * heads, {"intra": 2 * C * K + 2 * C * C // 3, "CK": 2 * C * K, "CV": 2 * C * V, "KV": 2 * K * V}


def _recompute(term):
    """A_qk, T and the inverse; Y and U; R and S_out."""
    return term["intra"] + term["CK"] + term["CV"] + 2 * term["KV"]


def forward_flops(tokens: int, heads: int, key_dim: int, value_dim: int) -> int:
    """tokens = B * T, heads = key heads, value_dim = HV / H * V."""
    scale, term = _terms(tokens, heads, key_dim, value_dim)
    return scale * (_recompute(term) + term["KV"] + term["CV"])


def backward_flops(tokens: int, heads: int, key_dim: int, value_dim: int) -> int:
    """Recomputation included: dR, dS_in, dA_qk, dQ, dKt, dY, dE, dZ, dT and the decayed products' gradients."""
    scale, term = _terms(tokens, heads, key_dim, value_dim)
    gradients = 6 * term["KV"] + 4 * term["CV"] + 2 * term["CK"] + 4 * CHUNK * key_dim
    return scale * (_recompute(term) + gradients)
