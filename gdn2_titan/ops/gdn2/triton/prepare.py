"""Kernel: everything of a chunk that does not depend on the state, one program per chunk and key head.

Q = scale * exp(G) * q    E = exp(G) * b * k    Kt = exp(G_C - G) * k    total = exp(G_C)
A_qk, times scale too     A = (I + T)^-1
"""

import triton
import triton.language as tl

from ...triton.products import cast, dot
from .rows import C, chunk_of, load_erase, load_log_decay, load_unit, program, store_inverse_norms
from .tree import HALF, from_start, level, off_diagonal, row_and_column, sum_over, to_end

__all__ = ["prepare_kernel"]


@triton.jit
def _half_products(
    q, k, g, b, A_log, dt_bias, resets, norm_q, norm_k, stride, count, scale, levels,
    K: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr,
    GATE: tl.constexpr, SIGMOID: tl.constexpr, ERASE_SCALE: tl.constexpr,
    dtype: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A_qk and T within half a chunk [HALF, HALF]."""
    i, j = row_and_column(levels)
    products = tl.zeros([HALF, HALF], tl.float32)
    triangle = tl.zeros([HALF, HALF], tl.float32)
    for first in tl.range(0, BK, BS, disable_licm=True):
        cols = first + tl.arange(0, BS)
        qs = scale * load_unit(q, norm_q, stride, cols, K, count, HALF)
        ks = load_unit(k, norm_k, stride, cols, K, count, HALF)
        es = ks * load_erase(b, stride, cols, K, count, SIGMOID, ERASE_SCALE, HALF)
        decay, _ = load_log_decay(g, stride, cols, K, count, A_log, dt_bias, resets, GATE, HALF)
        products += tl.where(i == j, tl.sum(qs * ks, 1)[:, None], 0.0)
        for depth in tl.range(tl.load(levels), disable_licm=True):
            factor = tl.exp(sum_over(level(i, j, depth), decay, SPLIT, PRECISION))
            columns = tl.trans(cast(ks * factor, dtype))
            inside = off_diagonal(i, j, depth)
            products += tl.where(inside, dot(cast(qs * factor, dtype), columns, PRECISION), 0.0)
            triangle += tl.where(inside, dot(cast(es * factor, dtype), columns, PRECISION), 0.0)
    return products, triangle


@triton.jit
def _inverse(T, levels, PRECISION: tl.constexpr):
    """(I + T)^-1 of a strictly lower triangular T [HALF, HALF], joined from the inverses of halves."""
    i, j = row_and_column(levels)
    X = tl.where(i == j, 1.0, 0.0)
    for depth in tl.range(tl.load(levels), disable_licm=True):
        X -= dot(dot(X, tl.where(off_diagonal(i, j, depth), T, 0.0), PRECISION), X, PRECISION)
    return X


@triton.jit
def _store_block(square, row: tl.constexpr, column: tl.constexpr, value, levels):
    """Write a block [HALF, HALF] of a square [C, C]."""
    i, j = row_and_column(levels)
    tl.store(square + (row * HALF + i) * C + column * HALF + j, cast(value, square.dtype.element_ty))


@triton.jit
def prepare_kernel(
    q, k, g, b, A_log, dt_bias, resets, cu_seqlens, ends, T, NT, N, scale, levels,
    Q, E, Kt, total, A_qk, A, norm_q, norm_k,
    H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    PACKED: tl.constexpr, GATE: tl.constexpr, SIGMOID: tl.constexpr, ERASE_SCALE: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """q, k, g, b [B * T, H, K]; Q, E, Kt [NC, H, C, BK]; total [NC, H, BK] fp32; A_qk, A [NC, H, C, C];
    norm_q, norm_k [NC, H, C] fp32: 1 / length of q and k, None where they are used as they are.

    BK: K padded to a power of two, worked on BS channels at a time. Suffixes 1 and 2: the halves of the chunk."""
    i_c, h = program(H)
    n, start, count = chunk_of(i_c, ends, cu_seqlens, T, NT, N, PACKED)
    if count == 0:
        return
    dtype: tl.constexpr = Q.dtype.element_ty
    stride: tl.constexpr = H * K
    half: tl.constexpr = HALF * H * K
    offset = (start * H + h) * K
    q += offset
    k += offset
    g += offset
    b += offset
    resets2 = resets
    if resets is not None:
        resets += start
        resets2 = resets + HALF
    if GATE:
        A_log += h
        if dt_bias is not None:
            dt_bias += h * K
    # A half after the other, then the block that joins them: the sums of one of them at a time are in registers.
    i, j = row_and_column(levels)
    block = i_c.to(tl.int64) * H + h
    norm_q2, norm_k2 = norm_q, norm_k
    if norm_q is not None:
        norm_q += block * C
        norm_k += block * C
        norm_q2 = norm_q + HALF
        norm_k2 = norm_k + HALF
        store_inverse_norms(q, norm_q, stride, K, BK, BS, count, C)
        store_inverse_norms(k, norm_k, stride, K, BK, BS, count, C)
        tl.debug_barrier()  # below, threads read what others wrote
    A_qk += block * C * C
    A += block * C * C
    products, triangle = _half_products(
        q, k, g, b, A_log, dt_bias, resets, norm_q, norm_k, stride, count, scale, levels, K, BK, BS,
        GATE, SIGMOID, ERASE_SCALE, dtype, SPLIT, PRECISION,
    )  # fmt: skip
    inverse1 = _inverse(triangle, levels, PRECISION)
    _store_block(A_qk, 0, 0, products, levels)
    _store_block(A, 0, 0, inverse1, levels)
    products, triangle = _half_products(
        q + half, k + half, g + half, b + half, A_log, dt_bias, resets2, norm_q2, norm_k2, stride, count - HALF,
        scale, levels, K, BK, BS, GATE, SIGMOID, ERASE_SCALE, dtype, SPLIT, PRECISION,
    )  # fmt: skip
    inverse2 = _inverse(triangle, levels, PRECISION)
    _store_block(A_qk, 1, 1, products, levels)
    _store_block(A, 1, 1, inverse2, levels)

    products = tl.zeros([HALF, HALF], tl.float32)
    triangle = tl.zeros([HALF, HALF], tl.float32)
    _store_block(A_qk, 0, 1, products, levels)
    _store_block(A, 0, 1, products, levels)
    for first in tl.range(0, BK, BS, disable_licm=True):
        cols = first + tl.arange(0, BS)
        place = block * C * BK + tl.arange(0, HALF)[:, None] * BK + cols[None, :]
        place2 = place + HALF * BK
        decay, _ = load_log_decay(g, stride, cols, K, count, A_log, dt_bias, resets, GATE, HALF)
        before = tl.exp(sum_over(from_start(i, j, levels), decay, SPLIT, PRECISION))
        qs = scale * load_unit(q, norm_q, stride, cols, K, count, HALF)
        tl.store(Q + place, cast(qs * before, dtype))
        k1 = load_unit(k, norm_k, stride, cols, K, count, HALF)
        erase = load_erase(b, stride, cols, K, count, SIGMOID, ERASE_SCALE, HALF)
        tl.store(E + place, cast(erase * k1 * before, dtype))
        k1 *= tl.exp(sum_over(to_end(i, j, levels), decay, SPLIT, PRECISION))
        total1 = tl.exp(tl.sum(decay, 0))
        columns = tl.trans(cast(k1, dtype))
        decay, _ = load_log_decay(g + half, stride, cols, K, count - HALF, A_log, dt_bias, resets2, GATE, HALF)
        total2 = tl.exp(tl.sum(decay, 0))
        tl.store(Kt + place, cast(k1 * total2[None, :], dtype))
        tl.store(total + block * BK + cols, total1 * total2)
        before = tl.exp(sum_over(from_start(i, j, levels), decay, SPLIT, PRECISION))
        rows = scale * load_unit(q + half, norm_q2, stride, cols, K, count - HALF, HALF) * before
        tl.store(Q + place2, cast(rows * total1[None, :], dtype))
        products += dot(cast(rows, dtype), columns, PRECISION)
        ks = load_unit(k + half, norm_k2, stride, cols, K, count - HALF, HALF)
        rows = load_erase(b + half, stride, cols, K, count - HALF, SIGMOID, ERASE_SCALE, HALF) * ks * before
        tl.store(E + place2, cast(rows * total1[None, :], dtype))
        triangle += dot(cast(rows, dtype), columns, PRECISION)
        tl.store(Kt + place2, cast(ks * tl.exp(sum_over(to_end(i, j, levels), decay, SPLIT, PRECISION)), dtype))
    _store_block(A_qk, 1, 0, products, levels)
    _store_block(A, 1, 0, -dot(dot(inverse2, triangle, PRECISION), inverse1, PRECISION), levels)
