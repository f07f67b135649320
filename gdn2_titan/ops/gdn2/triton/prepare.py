"""Kernel: everything of a chunk that does not depend on the state, one program per chunk and key head.

Q = scale * exp(G) * q    E = exp(G) * b * k    Kt = exp(G_C - G) * k    total = exp(G_C)
A_qk, times scale too     A = (I + T)^-1

Where nothing is erased there is no E, no T, and nothing to invert.
"""

import triton  # noqa: I001 - or each name of the list below takes a line
import triton.language as tl

from ...triton.products import cast, dot, exp2
from .decays import (
    DEPTH, MASKS, WEIGHTS, documents_of, factors_of, matrix_of, off_diagonal, row_and_column, step_number, steps_of,
    sum_over, sums_of,
)  # fmt: skip
from .rows import C, chunk_of, erase_of, inverse_norms, load_stored, log_decay_of, program

__all__ = ["prepare_kernel"]


@triton.jit
def _inverse(T, PRECISION: tl.constexpr):
    """(I + T)^-1 of a strictly lower triangular T [C, C], joined from the inverses of halves."""
    i, j = row_and_column()
    X = tl.where(i == j, 1.0, tl.where(off_diagonal(i, j, 0), -T, 0.0))
    for depth in tl.range(1, DEPTH):
        X -= dot(dot(X, tl.where(off_diagonal(i, j, depth), T, 0.0), PRECISION), X, PRECISION)
    return X


# The signature and the pointers at its start are those of gradient_kernel: Triton passes each one by itself.
@triton.jit(do_not_specialize=["packed", "T", "NT", "N"])
def prepare_kernel(
    q, k, g, b, A_log, dt_bias, resets, packed, cu_seqlens, ends, T, NT, N, scale, lower_bound, matrices,
    Q, E, Kt, total, A_qk, A, norm_q, norm_k,
    H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    GATE: tl.constexpr, SIGMOID: tl.constexpr, ERASE_SCALE: tl.constexpr,
    LIMIT: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """q, k, g, b [B * T, H, K]; Q, E, Kt [NC, H, C, BK]; total [NC, H, BK] fp32; A_qk, A [NC, H, C, C];
    norm_q, norm_k [NC, H, C] fp32: 1 / length of q and k, None where they are used as they are. A_qk and A are None
    where they are known; b, E and A where nothing is erased.

    BK: K padded to a power of two, worked on BS channels at a time."""
    i_c, h = program(H)
    n, start, count = chunk_of(i_c, packed, ends, cu_seqlens, T, NT, N)
    if count == 0:
        return
    dtype: tl.constexpr = Q.dtype.element_ty
    stride: tl.constexpr = H * K
    offset = (start * H + h) * K
    q += offset
    k += offset
    g += offset
    if b is not None:
        b += offset
    if GATE:
        if A_log is not None:
            A_log += h
        if dt_bias is not None:
            dt_bias += h * K
    block = i_c.to(tl.int64) * H + h
    i, j = row_and_column()
    rows = tl.arange(0, C)
    document = None
    newest = None
    if resets is not None:
        resets += start
        document, newest = documents_of(resets, count)
    if norm_q is not None:
        unit_q = inverse_norms(q, stride, K, BK, BS, count, C)
        unit_k = inverse_norms(k, stride, K, BK, BS, count, C)
        tl.store(norm_q + block * C + rows, unit_q)
        tl.store(norm_k + block * C + rows, unit_k)

    products = tl.zeros([C, C], tl.float32)
    triangle = tl.zeros([C, C], tl.float32)
    for first in tl.range(0, BK, BS, disable_licm=True):
        cols = first + tl.arange(0, BS)
        place = block * C * BK + rows[:, None] * BK + cols[None, :]
        g_stored = load_stored(g, stride, cols, K, count, C)
        q_stored = load_stored(q, stride, cols, K, count, C)
        k_stored = load_stored(k, stride, cols, K, count, C)
        if b is not None:
            b_stored = load_stored(b, stride, cols, K, count, C)
        decay, _ = log_decay_of(g_stored, cols, K, count, A_log, dt_bias, resets, lower_bound, GATE, C)
        qs = q_stored.to(tl.float32) * scale
        ks = k_stored.to(tl.float32)
        if norm_q is not None:
            qs *= unit_q[:, None]
            ks *= unit_k[:, None]
        if b is not None:
            es = ks * erase_of(b_stored, SIGMOID, ERASE_SCALE)
        G, rest, log_whole, weak = sums_of(decay, matrices, LIMIT, SPLIT, PRECISION)
        before, after, whole = factors_of(G, rest, log_whole, resets, document, newest)
        tl.store(Q + place, cast(qs * before, dtype))
        if b is not None:
            tl.store(E + place, cast(es * before, dtype))
        tl.store(Kt + place, cast(ks * after, dtype))
        tl.store(total + block * BK + cols, whole)
        if A_qk is not None:
            depth, steps = steps_of(decay, weak, LIMIT)
            for step in tl.range(steps, disable_licm=True):
                number = step_number(depth, step)
                x = 0.5 * (G - rest)
                if not weak:
                    x = sum_over(matrix_of(matrices, WEIGHTS + number), decay, SPLIT, PRECISION)
                factor = exp2(x)
                columns = tl.trans(cast(ks * exp2(tl.where(step == 0, -x, x)), dtype))
                more = dot(cast(qs * factor, dtype), columns, PRECISION)
                if b is not None:
                    more_triangle = dot(cast(es * factor, dtype), columns, PRECISION)
                if not weak:
                    inside = matrix_of(matrices, MASKS + number) > 0.0
                    more = tl.where(inside, more, 0.0)
                    if b is not None:
                        more_triangle = tl.where(inside, more_triangle, 0.0)
                products += more
                if b is not None:
                    triangle += more_triangle
    if A_qk is not None:
        lower = i >= j
        if resets is not None:
            lower = lower & (j >= document[:, None])
        square = block * C * C + i * C + j
        tl.store(A_qk + square, cast(tl.where(lower, products, 0.0), dtype))
        if b is not None:
            tl.store(A + square, cast(_inverse(tl.where(lower & (i > j), triangle, 0.0), PRECISION), dtype))
