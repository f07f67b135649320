"""Kernel: every gradient of a chunk that needs no other chunk, one program per chunk and key head.

With the states at both ends of the chunk, and R and dZ from the scans,

    dQ = dO S_in^T    dE = -dZ S_in^T    dKt = R dS_out^T    dA_qk = dO R^T    dT = -dZ R^T

summed over the value heads that read the key head; dv = dZ * w, dw = dZ * v. Q and A_qk hold the scale. What Q, E, Kt,
A_qk and T gain goes to q, b, k and g by the factors that ``prepare`` made them with.
"""

import triton  # noqa: I001 - or each name of the long list below takes a line
import triton.language as tl

from ...triton.products import LOG2E, cast, dot, exp2, sigmoid
from .decays import (
    documents_of, factors_of, gradient_of_sums, row_and_column, step_mask, step_weights, steps_of, sum_over, sums_of,
)  # fmt: skip
from .rows import C, chunk_of, load_erase, load_gate, load_log_decay, load_reset, load_rows, program, store_rows

__all__ = ["gradient_kernel"]


@triton.jit
def _square_gradients(
    do, R, dZ, v, w, dv, dw, start, count, h,
    H: tl.constexpr, HV: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, SIGMOID: tl.constexpr,
    dtype: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dA_qk and dT [C, C] as if all were used; dZ * (2 R - Z) summed over values [C]; and on the way dv and dw."""
    dproducts = tl.zeros([C, C], tl.float32)
    dtriangle = tl.zeros([C, C], tl.float32)
    radial = tl.zeros([C], tl.float32)
    SLICES: tl.constexpr = (V + BV - 1) // BV
    for step in tl.range(HV // H * SLICES, disable_licm=True):
        tokens = (start * HV + h * (HV // H) + step // SLICES) * V
        cols = step % SLICES * BV + tl.arange(0, BV)
        r = load_rows(R + tokens, HV * V, cols, V, count, C)
        columns = tl.trans(cast(r, dtype))
        dz = load_rows(dZ + tokens, HV * V, cols, V, count, C)
        dtriangle -= dot(cast(dz, dtype), columns, PRECISION)
        if do is not None:
            dout = cast(load_rows(do + tokens, HV * V, cols, V, count, C), dtype)
            dproducts += dot(dout, columns, PRECISION)
        gate = load_rows(w + tokens, HV * V, cols, V, count, C)
        value = load_rows(v + tokens, HV * V, cols, V, count, C)
        dgate = dz * value
        if SIGMOID:
            gate = sigmoid(gate)
            dgate *= gate * (1.0 - gate)
        radial += tl.sum(dz * (2.0 * r - gate * value), 1)
        store_rows(dv + tokens, dz * gate, HV * V, cols, V, count, C)
        store_rows(dw + tokens, dgate, HV * V, cols, V, count, C)
    return dproducts, dtriangle, radial


@triton.jit
def _state_gradients(
    do, R, dZ, states, dstates, i_c, start, count, h, cols,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr,
    dtype: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For the channels cols: dQ, dE, dKt [C, BS] and the gradient of total [BS]."""
    dQ = tl.zeros([C, BS], tl.float32)
    dE = tl.zeros([C, BS], tl.float32)
    dKt = tl.zeros([C, BS], tl.float32)
    dtotal = tl.zeros([BS], tl.float32)
    SLICES: tl.constexpr = (V + BV - 1) // BV
    for step in tl.range(HV // H * SLICES, disable_licm=True):
        hv = h * (HV // H) + step // SLICES
        tokens = (start * HV + hv) * V
        across = step % SLICES * BV + tl.arange(0, BV)
        place = (i_c.to(tl.int64) * HV + hv) * K * V + across[:, None] * K + cols[None, :]
        inside = (across < V)[:, None] & (cols < K)[None, :]
        S_in = tl.load(states + place, mask=inside, other=0.0)
        dS_out = tl.load(dstates + place, mask=inside, other=0.0)
        dtotal += tl.sum(S_in.to(tl.float32) * dS_out.to(tl.float32), 0)
        r = cast(load_rows(R + tokens, HV * V, across, V, count, C), dtype)
        dKt += dot(r, dS_out, PRECISION)
        dz = cast(load_rows(dZ + tokens, HV * V, across, V, count, C), dtype)
        dE -= dot(dz, S_in, PRECISION)
        if do is not None:
            dout = cast(load_rows(do + tokens, HV * V, across, V, count, C), dtype)
            dQ += dot(dout, S_in, PRECISION)
    return dQ, dE, dKt, dtotal


@triton.jit
def _without_radial(
    dx, x, unit, radial, stride, K: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr, count
):  # fmt: skip
    """Make the gradient of x / |x|, stored in dx, the one of x. unit: 1 / |x|; radial: their product summed [C]."""
    for first in tl.range(0, BK, BS, disable_licm=True):
        cols = first + tl.arange(0, BS)
        grad = load_rows(dx, stride, cols, K, count, C)
        grad -= load_rows(x, stride, cols, K, count, C) * (unit * radial)[:, None]
        store_rows(dx, grad * unit[:, None], stride, cols, K, count, C)


# The signature and the pointers at its start are those of prepare_kernel: Triton passes each one by itself.
@triton.jit(do_not_specialize=["T", "NT", "N"])
def gradient_kernel(
    q, k, v, g, b, w, A_log, dt_bias, resets, cu_seqlens, ends, T, NT, N, scale,
    do, R, dZ, states, dstates, norm_q, norm_k,
    dq, dk, dv, dg, db, dw, dA_log, ddt_bias,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    PACKED: tl.constexpr, GATE: tl.constexpr, SIGMOID: tl.constexpr, ERASE_SCALE: tl.constexpr,
    LIMIT: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Inputs as ``chunk_gdn2`` takes them, flat over B * T; do or None; R, dZ, states, dstates: from the scans;
    norm_q, norm_k: from ``prepare_kernel``.

    Writes dq .. dw in the shape of their inputs, and for each chunk its part of dA_log (to be summed over channels too)
    and ddt_bias [NC, H, K], fp32, where given. BS channels of K at a time.

    A factor turns the gradient of a decayed row into that of the row; the product of that with the row is the gradient
    of the factor's log. It is taken with the rows as rounded for the other's product, so that what two tokens gain from
    each other cancels where their decay has no part in it."""
    i_c, h = program(H)
    n, start, count = chunk_of(i_c, ends, cu_seqlens, T, NT, N, PACKED)
    if count == 0:
        return
    dtype: tl.constexpr = R.dtype.element_ty
    stride: tl.constexpr = H * K
    offset = (start * H + h) * K
    q += offset
    k += offset
    g += offset
    b += offset
    dq += offset
    dk += offset
    dg += offset
    db += offset
    block = i_c.to(tl.int64) * H + h
    rows = tl.arange(0, C)
    i, j = row_and_column()
    lower = i >= j
    document = None
    newest = None
    if resets is not None:
        resets += start
        document, newest = documents_of(resets, count)
        lower = lower & (document[:, None] == document[None, :])
    if GATE:
        A_log += h
        dA_log += block * K
        if dt_bias is not None:
            dt_bias += h * K
            ddt_bias += block * K
    if norm_q is not None:
        unit_q = tl.load(norm_q + block * C + rows)
        unit_k = tl.load(norm_k + block * C + rows)
        radial_q = tl.zeros([C], tl.float32)
    dproducts, dtriangle, radial_k = _square_gradients(
        do, R, dZ, v, w, dv, dw, start, count, h, H, HV, V, min(BV, 32), SIGMOID, dtype, PRECISION
    )
    dproducts = cast(tl.where(lower, dproducts, 0.0), dtype)
    dtriangle = cast(tl.where(lower & (i > j), dtriangle, 0.0), dtype)

    for first in tl.range(0, BK, BS, disable_licm=True):
        cols = first + tl.arange(0, BS)
        dqs, des, dks, dtotal = _state_gradients(
            do, R, dZ, states, dstates, i_c, start, count, h, cols, H, HV, K, V, BS, BV, dtype, PRECISION
        )
        decay, raw = load_log_decay(g, stride, cols, K, count, A_log, dt_bias, resets, GATE, C)
        qs = load_rows(q, stride, cols, K, count, C) * scale
        ks = load_rows(k, stride, cols, K, count, C)
        if norm_q is not None:
            qs *= unit_q[:, None]
            ks *= unit_k[:, None]
        es = ks * load_erase(b, stride, cols, K, count, SIGMOID, ERASE_SCALE, C)
        G, rest, log_whole, weak = sums_of(decay, LIMIT, SPLIT, PRECISION)
        before, after, whole = factors_of(G, rest, log_whole, resets, document, newest)
        dqs *= before
        des *= before
        dks *= after
        into_G = qs * dqs + es * des
        into_rest = ks * dks
        ddecay = tl.zeros([C, BS], tl.float32)
        depth, steps = steps_of(decay, weak, LIMIT)
        for step in tl.range(steps, disable_licm=True):
            x = 0.5 * (G - rest)
            dA = dproducts
            dT = dtriangle
            if not weak:
                i, j = row_and_column()
                x = sum_over(step_weights(i, j, depth, step), decay, SPLIT, PRECISION)
                inside = step_mask(i, j, depth, step)
                dA = tl.where(inside, dproducts, 0.0)
                dT = tl.where(inside, dtriangle, 0.0)
            sign = tl.where(step == 0, -1.0, 1.0)
            inverse = exp2(sign * x)
            k_rows = cast(ks * inverse, dtype)
            dA_rows = dot(dA, k_rows, PRECISION)
            dT_rows = dot(dT, k_rows, PRECISION)
            factor = exp2(x)
            dqs += dA_rows * factor
            des += dT_rows * factor
            q_rows = cast(qs * factor, dtype)
            e_rows = cast(es * factor, dtype)
            dk_rows = dot(tl.trans(dA), q_rows, PRECISION) + dot(tl.trans(dT), e_rows, PRECISION)
            dks += dk_rows * inverse
            dx = q_rows.to(tl.float32) * dA_rows + e_rows.to(tl.float32) * dT_rows
            dx += sign * k_rows.to(tl.float32) * dk_rows
            if weak:
                into_G += 0.5 * dx
                into_rest -= 0.5 * dx
            else:
                i, j = row_and_column()
                ddecay += sum_over(step_weights(j, i, depth, step), dx, SPLIT, PRECISION)
        if weak:
            ddecay += gradient_of_sums(into_G, into_rest, True, SPLIT, PRECISION)
        else:
            ddecay += gradient_of_sums(into_G, into_rest, False, SPLIT, PRECISION)
        ddecay += (whole * dtotal)[None, :]

        erase = load_erase(b, stride, cols, K, count, SIGMOID, ERASE_SCALE, C)
        dks += des * erase
        if norm_q is not None:
            radial_q += tl.sum(dqs * qs, 1)
            dks = unit_k[:, None] * (dks - ks * radial_k[:, None])
        store_rows(dq, dqs * scale, stride, cols, K, count, C)
        store_rows(dk, dks, stride, cols, K, count, C)
        des *= ks
        if SIGMOID:
            des *= erase * (1.0 - erase / ERASE_SCALE)
        store_rows(db, des, stride, cols, K, count, C)
        if resets is not None:
            ddecay = tl.where(load_reset(resets, count, C)[:, None], 0.0, ddecay)
        if GATE:
            ddecay = tl.where((rows < count)[:, None], ddecay, 0.0)
            tl.store(dA_log + cols, tl.sum(ddecay * decay, 0) / LOG2E, mask=cols < K)
            rate, stretch, _, _ = load_gate(A_log)
            ddecay *= -(rate * stretch) * sigmoid(raw)
            if ddt_bias is not None:
                tl.store(ddt_bias + cols, tl.sum(ddecay, 0), mask=cols < K)
        store_rows(dg, ddecay, stride, cols, K, count, C)

    if norm_q is not None:
        tl.debug_barrier()  # what follows reads what other threads of the program may have written
        _without_radial(dq, q, unit_q, radial_q, stride, K, BK, BS, count)
