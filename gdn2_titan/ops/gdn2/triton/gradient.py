"""Kernel: every gradient of a chunk that needs no other chunk, one program per chunk and key head.

With the states at both ends of the chunk, and R and dZ from the scans,

    dQ = dO S_in^T    dE = -dZ S_in^T    dKt = R dS_out^T    dA_qk = dO R^T    dT = -dZ R^T

summed over the value heads that read the key head; dv = dZ * w, dw = dZ * v. Q and A_qk hold the scale. What Q, E, Kt,
A_qk and T gain goes to q, b, k and g down the tree.
"""

import triton  # noqa: I001 - or each name of the long list below takes a line
import triton.language as tl

from ...triton.products import cast, dot
from .rows import (
    C, chunk_of, load_erase, load_gate, load_log_decay, load_reset, load_rows, load_unit, program, store_rows,
)  # fmt: skip
from .tree import HALF, from_start, level, off_diagonal, opaque, row_and_column, sum_over, to_end

__all__ = ["gradient_kernel"]


@triton.jit
def _block_place(i, j):
    """Where (i, j) of a square [C, C] lies when its four blocks [HALF, HALF] are stored one after the other."""
    return ((i // HALF) * 2 + j // HALF) * HALF * HALF + (i % HALF) * HALF + j % HALF


@triton.jit
def _load_block(square, row: tl.constexpr, column: tl.constexpr, levels):
    """A block [HALF, HALF] of a square."""
    i, j = row_and_column(levels)
    return tl.load(square + (row * 2 + column) * HALF * HALF + i * HALF + j)


@triton.jit
def _load_turned_block(square, row: tl.constexpr, column: tl.constexpr, levels):
    """The same, turned: not by tl.trans, which brings it to the tensor cores one number to a register; nor along its
    columns, which the compiler would choose and turn likewise, did it know them contiguous."""
    i, j = row_and_column(levels)
    return tl.load(square + (row * 2 + column) * HALF * HALF + tl.max_contiguous(j * HALF + i, (1, 1)))


@triton.jit
def _square_gradients(
    do, R, dZ, v, w, dv, dw, squares, levels, start, count, h,
    H: tl.constexpr, HV: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, SIGMOID: tl.constexpr,
    dtype: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dA_qk and dT into squares [2, C, C], and on the way dv and dw."""
    dproducts = tl.zeros([C, C], tl.float32)
    dtriangle = tl.zeros([C, C], tl.float32)
    SLICES: tl.constexpr = (V + BV - 1) // BV
    for step in tl.range(opaque(HV // H * SLICES, levels), disable_licm=True):
        tokens = (start * HV + h * (HV // H) + step // SLICES) * V
        cols = step % SLICES * BV + tl.arange(0, BV)
        r = tl.trans(cast(load_rows(R + tokens, HV * V, cols, V, count, C), dtype))
        dz = load_rows(dZ + tokens, HV * V, cols, V, count, C)
        dtriangle -= dot(cast(dz, dtype), r, PRECISION)
        if do is not None:
            dout = cast(load_rows(do + tokens, HV * V, cols, V, count, C), dtype)
            dproducts += dot(dout, r, PRECISION)
        gate = load_rows(w + tokens, HV * V, cols, V, count, C)
        dgate = dz * load_rows(v + tokens, HV * V, cols, V, count, C)
        if SIGMOID:
            gate = tl.sigmoid(gate)
            dgate *= gate * (1.0 - gate)
        store_rows(dv + tokens, dz * gate, HV * V, cols, V, count, C)
        store_rows(dw + tokens, dgate, HV * V, cols, V, count, C)
    rows = tl.arange(0, C)
    place = squares + _block_place(rows[:, None], rows[None, :])
    tl.store(place, cast(dproducts, dtype))
    tl.store(place + C * C, cast(dtriangle, dtype))


@triton.jit
def _state_gradients(
    do, R, dZ, states, dstates, levels, i_c, start, count, h, cols, half: tl.constexpr,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr,
    dtype: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For the channels cols: dQ, dE, dKt of a half [HALF, BS], dKt of the half before it (zeros where there is none),
    and the gradient of total [BS]. start, count: of the chunk."""
    dQ = tl.zeros([HALF, BS], tl.float32)
    dE = tl.zeros([HALF, BS], tl.float32)
    dKt = tl.zeros([HALF, BS], tl.float32)
    dKt_before = tl.zeros([HALF, BS], tl.float32)
    dtotal = tl.zeros([BS], tl.float32)
    SLICES: tl.constexpr = (V + BV - 1) // BV
    for step in tl.range(opaque(HV // H * SLICES, levels), disable_licm=True):
        hv = h * (HV // H) + step // SLICES
        tokens = ((start + half * HALF) * HV + hv) * V
        state = (i_c.to(tl.int64) * HV + hv) * K * V
        across = step % SLICES * BV + tl.arange(0, BV)
        place = state + across[:, None] * K + cols[None, :]
        inside = (across < V)[:, None] & (cols < K)[None, :]
        S_in = tl.load(states + place, mask=inside, other=0.0)
        dS_out = tl.load(dstates + place, mask=inside, other=0.0)
        dtotal += tl.sum(S_in.to(tl.float32) * dS_out.to(tl.float32), 0)
        r = cast(load_rows(R + tokens, HV * V, across, V, count - half * HALF, HALF), dtype)
        dKt += dot(r, dS_out, PRECISION)
        if half == 1:
            r = cast(load_rows(R + tokens - HALF * HV * V, HV * V, across, V, count, HALF), dtype)
            dKt_before += dot(r, dS_out, PRECISION)
        dz = cast(load_rows(dZ + tokens, HV * V, across, V, count - half * HALF, HALF), dtype)
        dE -= dot(dz, S_in, PRECISION)
        if do is not None:
            dout = cast(load_rows(do + tokens, HV * V, across, V, count - half * HALF, HALF), dtype)
            dQ += dot(dout, S_in, PRECISION)
    return dQ, dE, dKt, dKt_before, dtotal


@triton.jit
def _levels(
    x, k, decay, dx, dk, ddecay, dsquare, turned, levels,
    dtype: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to the gradients of x, k and the log-decays [HALF, BS] what the decayed products x k^T gained: dsquare, and
    turned, the same turned."""
    i, j = row_and_column(levels)
    for depth in tl.range(tl.load(levels), disable_licm=True):
        factor = tl.exp(sum_over(level(i, j, depth), decay, SPLIT, PRECISION))
        inside = tl.where(off_diagonal(i, j, depth), dsquare, 0.0)
        dx_level = dot(inside, cast(k * factor, dtype), PRECISION) * factor
        dk_level = dot(tl.where(off_diagonal(j, i, depth), turned, 0.0), cast(x * factor, dtype), PRECISION) * factor
        ddecay += sum_over(level(j, i, depth), x * dx_level + k * dk_level, SPLIT, PRECISION)
        dx += dx_level
        dk += dk_level
    return dx, dk, ddecay


@triton.jit
def _half_gradient(
    q, k, g, b, A_log, dt_bias, resets, norm_q, norm_k, dq_out, dk_out, dg_out, db_out, dA_log, ddt_bias,
    dq, de, dk, dlog, squares, half: tl.constexpr, levels, stride, cols, K, count, scale,
    GATE: tl.constexpr, SIGMOID: tl.constexpr, ERASE_SCALE: tl.constexpr,
    dtype: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradients of q, k, g, b of half a chunk and its part of those of A_log, by channel, and dt_bias.

    dq, de, dk [HALF, BS]: the gradients of q and e = b * k decayed from the start of the half, and of k decayed to its
    end; dlog [BS]: of the log of the half's whole decay; squares: of A_qk and T.

    A factor turns the gradient of a decayed row into that of the row; the product of that with the row is the gradient
    of the factor's log. Each result is written as soon as it is complete, each input read when it is due: registers."""
    i, j = row_and_column(levels)
    ks = load_unit(k, norm_k, stride, cols, K, count, HALF)
    decay, _ = load_log_decay(g, stride, cols, K, count, A_log, dt_bias, resets, GATE, HALF)
    dk *= tl.exp(sum_over(to_end(i, j, levels), decay, SPLIT, PRECISION))
    ddecay = dlog[None, :] + sum_over(to_end(j, i, levels), ks * dk, SPLIT, PRECISION)
    before = tl.exp(sum_over(from_start(i, j, levels), decay, SPLIT, PRECISION))
    de *= before

    qs = scale * load_unit(q, norm_q, stride, cols, K, count, HALF)
    dq *= before
    ddecay += sum_over(from_start(j, i, levels), qs * dq, SPLIT, PRECISION)
    dsquare = _load_block(squares, half, half, levels)
    turned = _load_turned_block(squares, half, half, levels)
    dq, dk, ddecay = _levels(qs, ks, decay, dq, dk, ddecay, dsquare, turned, levels, dtype, SPLIT, PRECISION)
    diagonal = tl.sum(tl.where(i == j, dsquare.to(tl.float32), 0.0), 1)[:, None]  # of A_qk: it knows no decay
    dk += diagonal * qs
    es = ks * load_erase(b, stride, cols, K, count, SIGMOID, ERASE_SCALE, HALF)
    store_rows(dq_out, scale * (dq + diagonal * ks), stride, cols, K, count, HALF)

    ddecay += sum_over(from_start(j, i, levels), es * de, SPLIT, PRECISION)
    dsquare = _load_block(squares + C * C, half, half, levels)
    turned = _load_turned_block(squares + C * C, half, half, levels)
    de, dk, ddecay = _levels(es, ks, decay, de, dk, ddecay, dsquare, turned, levels, dtype, SPLIT, PRECISION)
    erase = load_erase(b, stride, cols, K, count, SIGMOID, ERASE_SCALE, HALF)
    store_rows(dk_out, dk + de * erase, stride, cols, K, count, HALF)
    de *= ks
    if SIGMOID:
        de *= erase * (1.0 - erase / ERASE_SCALE)
    store_rows(db_out, de, stride, cols, K, count, HALF)

    if resets is not None:
        ddecay = tl.where(load_reset(resets, count, HALF)[:, None], 0.0, ddecay)
    if GATE:
        decay, raw = load_log_decay(g, stride, cols, K, count, A_log, dt_bias, resets, GATE, HALF)
        ddecay = tl.where((tl.arange(0, HALF) < count)[:, None], ddecay, 0.0)
        tl.store(dA_log + cols, tl.sum(ddecay * decay, 0), mask=cols < K)
        rate, stretch, _, _ = load_gate(A_log)
        ddecay *= -(rate * stretch) * tl.sigmoid(raw)
        if ddt_bias is not None:
            tl.store(ddt_bias + cols, tl.sum(ddecay, 0), mask=cols < K)
    store_rows(dg_out, ddecay, stride, cols, K, count, HALF)


@triton.jit
def _without_radial(dx, x, norms, stride, K: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr, count):
    """Make the gradient of x / |x|, stored in dx, the one of x. norms [C]: 1 / |x|."""
    for half in tl.range(C // HALF, disable_licm=True):
        here = half * HALF * stride
        left = count - half * HALF
        radial = tl.zeros([HALF], tl.float32)
        for first in tl.range(0, BK, BS, disable_licm=True):
            cols = first + tl.arange(0, BS)
            unit = load_unit(x + here, norms + half * HALF, stride, cols, K, left, HALF)
            radial += tl.sum(unit * load_rows(dx + here, stride, cols, K, left, HALF), 1)
        for first in tl.range(0, BK, BS, disable_licm=True):
            cols = first + tl.arange(0, BS)
            grad = load_rows(dx + here, stride, cols, K, left, HALF)
            grad -= load_unit(x + here, norms + half * HALF, stride, cols, K, left, HALF) * radial[:, None]
            grad *= tl.load(norms + half * HALF + tl.arange(0, HALF))[:, None]
            store_rows(dx + here, grad, stride, cols, K, left, HALF)


@triton.jit
def gradient_kernel(
    q, k, v, g, b, w, A_log, dt_bias, resets, cu_seqlens, ends, T, NT, N, scale, levels,
    do, R, dZ, states, dstates, norm_q, norm_k, squares,
    dq, dk, dv, dg, db, dw, dA_log, ddt_bias,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    PACKED: tl.constexpr, GATE: tl.constexpr, SIGMOID: tl.constexpr, ERASE_SCALE: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Inputs as ``chunk_gdn2`` takes them, flat over B * T; do or None; R, dZ, states, dstates: from the scans;
    norm_q, norm_k: from ``prepare_kernel``;
    squares [NC, H, 2, C, C]: scratch.

    Writes dq .. dw in the shape of their inputs, and for each half of a chunk its part of dA_log (to be summed over
    channels too) and ddt_bias [NC, H, 2, K], fp32, where given. BS channels of K at a time. Suffixes 1 and 2: the
    halves of the chunk."""
    i_c, h = program(H)
    n, start, count = chunk_of(i_c, ends, cu_seqlens, T, NT, N, PACKED)
    if count == 0:
        return
    dtype: tl.constexpr = R.dtype.element_ty
    stride: tl.constexpr = H * K
    half: tl.constexpr = HALF * H * K
    offset = (start * H + h) * K
    block = i_c.to(tl.int64) * H + h
    resets2 = resets
    if resets is not None:
        resets += start
        resets2 = resets + HALF
    dA_log2, ddt_bias2 = dA_log, ddt_bias
    if GATE:
        A_log += h
        dA_log += block * 2 * K
        dA_log2 = dA_log + K
        if dt_bias is not None:
            dt_bias += h * K
            ddt_bias += block * 2 * K
            ddt_bias2 = ddt_bias + K
    norm_q2, norm_k2 = norm_q, norm_k
    if norm_q is not None:
        norm_q += block * C
        norm_k += block * C
        norm_q2 = norm_q + HALF
        norm_k2 = norm_k + HALF

    squares += block * 2 * C * C
    _square_gradients(
        do, R, dZ, v, w, dv, dw, squares, levels, start, count, h, H, HV, V, BV, SIGMOID, dtype, PRECISION
    )
    tl.debug_barrier()  # below, threads read from the squares what others wrote

    for first in tl.range(0, BK, BS, disable_licm=True):
        cols = first + tl.arange(0, BS)
        offset2 = offset + half
        # Half 2: its rows of A_qk and T also met the columns of half 1, which carry the decay to the middle.
        dqs, des, dks, dk1, dtotal = _state_gradients(
            do, R, dZ, states, dstates, levels, i_c, start, count, h, cols, 1,
            H, HV, K, V, BS, BV, dtype, PRECISION,
        )  # fmt: skip
        i, j = row_and_column(levels)
        decay, _ = load_log_decay(g + offset, stride, cols, K, count, A_log, dt_bias, resets, GATE, HALF)
        total1 = tl.exp(tl.sum(decay, 0))
        columns = load_unit(k + offset, norm_k, stride, cols, K, count, HALF)
        columns *= tl.exp(sum_over(to_end(i, j, levels), decay, SPLIT, PRECISION))
        dlog2 = tl.sum(columns * dk1, 0) + total1 * dtotal
        columns = cast(columns, dtype)
        decay, _ = load_log_decay(g + offset2, stride, cols, K, count - HALF, A_log, dt_bias, resets2, GATE, HALF)
        total2 = tl.exp(tl.sum(decay, 0))
        before = tl.exp(sum_over(from_start(i, j, levels), decay, SPLIT, PRECISION))
        rows = scale * load_unit(q + offset2, norm_q2, stride, cols, K, count - HALF, HALF) * before
        dlog1 = tl.sum(rows * dqs, 0) + total2 * dtotal
        dqs = dqs * total1[None, :] + dot(_load_block(squares, 1, 0, levels), columns, PRECISION)
        rows = load_erase(b + offset2, stride, cols, K, count - HALF, SIGMOID, ERASE_SCALE, HALF) * before
        rows *= load_unit(k + offset2, norm_k2, stride, cols, K, count - HALF, HALF)
        dlog1 = total1 * (dlog1 + tl.sum(rows * des, 0))
        des = des * total1[None, :] + dot(_load_block(squares + C * C, 1, 0, levels), columns, PRECISION)
        tl.debug_barrier()  # or the compiler keeps what was read above, instead of reading it anew
        _half_gradient(
            q + offset2, k + offset2, g + offset2, b + offset2, A_log, dt_bias, resets2, norm_q2, norm_k2,
            dq + offset2, dk + offset2, dg + offset2, db + offset2, dA_log2, ddt_bias2,
            dqs, des, dks, total2 * dlog2, squares,
            1, levels, stride, cols, K, count - HALF, scale, GATE, SIGMOID, ERASE_SCALE, dtype, SPLIT, PRECISION,
        )  # fmt: skip

        # Half 1: its columns met the rows of half 2, which carry the decay from the middle.
        dqs, des, dks, _, _ = _state_gradients(
            do, R, dZ, states, dstates, levels, i_c, start, count, h, cols, 0,
            H, HV, K, V, BS, BV, dtype, PRECISION,
        )  # fmt: skip
        for _ in tl.range(opaque(1, levels), disable_licm=True):  # done with before _half_gradient begins: registers
            i, j = row_and_column(levels)
            decay, _ = load_log_decay(g + offset2, stride, cols, K, count - HALF, A_log, dt_bias, resets2, GATE, HALF)
            dks *= tl.exp(tl.sum(decay, 0))[None, :]
            before = tl.exp(sum_over(from_start(i, j, levels), decay, SPLIT, PRECISION))
            rows = scale * load_unit(q + offset2, norm_q2, stride, cols, K, count - HALF, HALF) * before
            dks += dot(_load_turned_block(squares, 1, 0, levels), cast(rows, dtype), PRECISION)
            rows = load_erase(b + offset2, stride, cols, K, count - HALF, SIGMOID, ERASE_SCALE, HALF) * before
            rows *= load_unit(k + offset2, norm_k2, stride, cols, K, count - HALF, HALF)
            dks += dot(_load_turned_block(squares + C * C, 1, 0, levels), cast(rows, dtype), PRECISION)
        tl.debug_barrier()
        _half_gradient(
            q + offset, k + offset, g + offset, b + offset, A_log, dt_bias, resets, norm_q, norm_k,
            dq + offset, dk + offset, dg + offset, db + offset, dA_log, ddt_bias,
            dqs, des, dks, dlog1, squares,
            0, levels, stride, cols, K, count, scale, GATE, SIGMOID, ERASE_SCALE, dtype, SPLIT, PRECISION,
        )  # fmt: skip

    if norm_q is not None:
        tl.debug_barrier()  # what follows reads what other threads of the program may have written
        _without_radial(dq + offset, q + offset, norm_q, stride, K, BK, BS, count)
        _without_radial(dk + offset, k + offset, norm_k, stride, K, BK, BS, count)
