"""Kernel: everything of a chunk that does not depend on the state, one program per chunk and key head.

Q = exp(G) * q    E = exp(G) * b * k    Kt = exp(G_C - G) * k    total = exp(G_C)    A_qk    A = (I + T)^-1
"""

import triton
import triton.language as tl

from .products import dot
from .rows import C, chunk_of, inverse_norms, load_log_decay, load_rows
from .tree import LEVELS, after, corner, level, pairs, sum_over, up_to

__all__ = ["prepare_kernel"]


@triton.jit
def _inverse(T, PRECISION: tl.constexpr):
    """(I + T)^-1 of a strictly lower triangular T [C, C]: joined from the inverses of halves, which no power of T is."""
    i, j = pairs()
    X = (i == j).to(tl.float32)
    for n in tl.static_range(LEVELS):
        corner_T = tl.where(corner(i, j, 1 << n), T, 0.0)
        X -= dot(dot(X, corner_T, PRECISION), X, PRECISION)
    return X


@triton.jit
def prepare_kernel(
    q, k, g, b, A_log, dt_bias, resets, cu_seqlens, ends, T, NT, N,
    Q, E, Kt, total, A_qk, A,
    H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr,
    PACKED: tl.constexpr, L2NORM: tl.constexpr, GATE: tl.constexpr, SIGMOID: tl.constexpr, ERASE: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q, k, g, b [B * T, H, K]; Q, E, Kt [NC, H, C, BK]; total [NC, H, BK] fp32; A_qk, A [NC, H, C, C].

    BK: K padded to a power of two, worked on BS channels at a time."""
    i_c = tl.program_id(0)
    h = tl.program_id(1)
    n, start, count = chunk_of(i_c, ends, cu_seqlens, T, NT, N, PACKED)
    if count == 0:
        return
    dtype: tl.constexpr = Q.dtype.element_ty
    offset = (start * H + h) * K
    block = i_c.to(tl.int64) * H + h
    i, j = pairs()
    rows = tl.arange(0, C)
    if GATE:
        A_log += h
        if dt_bias is not None:
            dt_bias += h * K
    if L2NORM:
        norm_q = inverse_norms(q + offset, H * K, K, BK, BS, count)
        norm_k = inverse_norms(k + offset, H * K, K, BK, BS, count)

    products = tl.zeros([C, C], tl.float32)
    triangle = tl.zeros([C, C], tl.float32)
    for first in range(0, BK, BS):
        cols = first + tl.arange(0, BS)
        qs = load_rows(q + offset, H * K, cols, K, count)
        ks = load_rows(k + offset, H * K, cols, K, count)
        if L2NORM:
            qs *= norm_q[:, None]
            ks *= norm_k[:, None]
        es = load_rows(b + offset, H * K, cols, K, count)
        if SIGMOID:
            es = ERASE * tl.sigmoid(es)
        es *= ks
        decay, _ = load_log_decay(g + offset, H * K, cols, K, count, start, A_log, dt_bias, resets, GATE)

        products += tl.where(i == j, tl.sum(qs * ks, 1)[:, None], 0.0)
        for n_level in tl.static_range(LEVELS):
            m: tl.constexpr = 1 << n_level
            factor = tl.exp(sum_over(level(i, j, m), decay, SPLIT, PRECISION))
            inside = corner(i, j, m)
            columns = tl.trans((ks * factor).to(dtype))
            products += tl.where(inside, dot((qs * factor).to(dtype), columns, PRECISION), 0.0)
            triangle += tl.where(inside, dot((es * factor).to(dtype), columns, PRECISION), 0.0)

        place = block * C * BK + rows[:, None] * BK + cols[None, :]
        factor = tl.exp(sum_over(up_to(i, j), decay, SPLIT, PRECISION))
        tl.store(Q + place, (qs * factor).to(dtype))
        tl.store(E + place, (es * factor).to(dtype))
        factor = tl.exp(sum_over(after(i, j), decay, SPLIT, PRECISION))
        tl.store(Kt + place, (ks * factor).to(dtype))
        tl.store(total + block * BK + cols, tl.exp(tl.sum(decay, 0)))

    place = block * C * C + i * C + j
    tl.store(A_qk + place, products.to(dtype))
    tl.store(A + place, _inverse(triangle, PRECISION).to(dtype))
