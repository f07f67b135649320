"""Kernel: every gradient of a chunk that needs no other chunk, one program per chunk and key head.

With the states at both ends of the chunk, and R and dZ from the scans,

    dQ = dO S_in^T    dE = -dZ S_in^T    dKt = R dS_out^T    dA_qk = dO R^T    dT = -dZ R^T

summed over the value heads that read the key head; dv = dZ * w, dw = dZ * v. Q and A_qk hold the scale. What Q, E, Kt,
A_qk and T gain goes to q, b, k and g by the factors that ``prepare`` made them with.

Where nothing is erased, R is None: there are no dE and dT, and R = Z = w * v is made of w and v.
"""

import triton  # noqa: I001 - or each name of the long list below takes a line
import triton.language as tl

from ...triton.products import LOG2E, cast, dot, exp2, sigmoid
from .decays import (
    FROM, MASKS, UP_TO, WEIGHTS, documents_of, factors_of, matrix_of, row_and_column, step_number, steps_of,
    sum_over, sums_of,
)  # fmt: skip
from .rows import (
    C, among, chunk_of, erase_of, load_bounded_gate, load_gate, load_reset, load_rows, load_stored, log_decay_of,
    program, store_rows,
)  # fmt: skip

__all__ = ["gradient_kernel"]


@triton.jit
def _load_R(R, v, w, tokens, stride, cols, V: tl.constexpr, count, SIGMOID: tl.constexpr):
    """C rows of R in fp32. tokens: offset of the first in all three."""
    if R is not None:
        r = load_rows(R + tokens, stride, cols, V, count, C)
    else:
        gate = load_rows(w + tokens, stride, cols, V, count, C)
        if SIGMOID:
            gate = sigmoid(gate)
        r = gate * load_rows(v + tokens, stride, cols, V, count, C)
    return r


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
        r = _load_R(R, v, w, tokens, HV * V, cols, V, count, SIGMOID)
        dz = load_rows(dZ + tokens, HV * V, cols, V, count, C)
        if do is not None:
            dout = cast(load_rows(do + tokens, HV * V, cols, V, count, C), dtype)
        gate = load_rows(w + tokens, HV * V, cols, V, count, C)
        value = load_rows(v + tokens, HV * V, cols, V, count, C)
        columns = tl.trans(cast(r, dtype))
        if R is not None:
            dtriangle -= dot(cast(dz, dtype), columns, PRECISION)
        if do is not None:
            dproducts += dot(dout, columns, PRECISION)
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
    do, R, dZ, v, w, states, dstates, i_c, start, count, h, cols,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr,
    SIGMOID: tl.constexpr, dtype: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For the channels cols: dQ, dE, dKt [C, BS] and the gradient of total [BS]."""
    dQ = tl.zeros([C, BS], tl.float32)
    dE = tl.zeros([C, BS], tl.float32)
    dKt = tl.zeros([C, BS], tl.float32)
    products = tl.zeros([BV, BS], tl.float32)
    SLICES: tl.constexpr = (V + BV - 1) // BV
    for step in tl.range(HV // H * SLICES, disable_licm=True):
        hv = h * (HV // H) + step // SLICES
        tokens = (start * HV + hv) * V
        across = step % SLICES * BV + tl.arange(0, BV)
        place = (i_c.to(tl.int64) * HV + hv) * K * V + across[:, None] * K + cols[None, :]
        inside = among(across, V)[:, None] & among(cols, K)[None, :]
        S_in = tl.load(states + place, mask=inside, other=0.0)
        dS_out = tl.load(dstates + place, mask=inside, other=0.0)
        r = cast(_load_R(R, v, w, tokens, HV * V, across, V, count, SIGMOID), dtype)
        if R is not None:
            dz = cast(load_rows(dZ + tokens, HV * V, across, V, count, C), dtype)
        if do is not None:
            dout = cast(load_rows(do + tokens, HV * V, across, V, count, C), dtype)
        products += S_in.to(tl.float32) * dS_out.to(tl.float32)
        dKt += dot(r, dS_out, PRECISION)
        if R is not None:
            dE -= dot(dz, S_in, PRECISION)
        if do is not None:
            dQ += dot(dout, S_in, PRECISION)
    return dQ, dE, dKt, tl.sum(products, 0)


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
@triton.jit(do_not_specialize=["packed", "T", "NT", "N"])
def gradient_kernel(
    q, k, v, g, b, w, A_log, dt_bias, resets, packed, cu_seqlens, ends, T, NT, N, scale, lower_bound, matrices,
    do, R, dZ, states, dstates, norm_q, norm_k,
    dq, dk, dv, dg, db, dw, dA_log, ddt_bias,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    GATE: tl.constexpr, SIGMOID: tl.constexpr, ERASE_SCALE: tl.constexpr,
    LIMIT: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Inputs as ``chunk_gdn2`` takes them, flat over B * T; do or None; R, dZ, states, dstates: from the scans;
    norm_q, norm_k: from ``prepare_kernel``. b, db and R are None where nothing is erased.

    Writes dq .. dw in the shape of their inputs, and for each chunk its part of dA_log (to be summed over channels too)
    and ddt_bias [NC, H, K], fp32, where given. BS channels of K at a time.

    A factor turns the gradient of a decayed row into that of the row; the product of that with the row is the gradient
    of the factor's log. It is taken with the rows as rounded for the other's product, so that what two tokens gain from
    each other cancels where their decay has no part in it."""
    i_c, h = program(H)
    n, start, count = chunk_of(i_c, packed, ends, cu_seqlens, T, NT, N)
    if count == 0:
        return
    dtype: tl.constexpr = states.dtype.element_ty
    stride: tl.constexpr = H * K
    offset = (start * H + h) * K
    q += offset
    k += offset
    g += offset
    dq += offset
    dk += offset
    dg += offset
    if b is not None:
        b += offset
        db += offset
    block = i_c.to(tl.int64) * H + h
    rows = tl.arange(0, C)
    document = None
    newest = None
    if resets is not None:
        resets += start
        document, newest = documents_of(resets, count)
    if GATE:
        if A_log is not None:
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
    i, j = row_and_column()
    lower = i >= j
    if resets is not None:
        lower = lower & (j >= document[:, None])
    dproducts = cast(tl.where(lower, dproducts, 0.0), dtype)
    if b is not None:
        dtriangle = cast(tl.where(lower & (i > j), dtriangle, 0.0), dtype)

    for first in tl.range(0, BK, BS, disable_licm=True):
        cols = first + tl.arange(0, BS)
        g_stored = load_stored(g, stride, cols, K, count, C)
        q_stored = load_stored(q, stride, cols, K, count, C)
        k_stored = load_stored(k, stride, cols, K, count, C)
        if b is not None:
            b_stored = load_stored(b, stride, cols, K, count, C)
        dqs, des, dks, dtotal = _state_gradients(
            do, R, dZ, v, w, states, dstates, i_c, start, count, h, cols,
            H, HV, K, V, BS, BV, SIGMOID, dtype, PRECISION,
        )  # fmt: skip
        decay, raw = log_decay_of(g_stored, cols, K, count, A_log, dt_bias, resets, lower_bound, GATE, C)
        qs = q_stored.to(tl.float32) * scale
        ks = k_stored.to(tl.float32)
        if norm_q is not None:
            qs *= unit_q[:, None]
            ks *= unit_k[:, None]
        if b is not None:
            es = ks * erase_of(b_stored, SIGMOID, ERASE_SCALE)
        G, rest, log_whole, weak = sums_of(decay, matrices, LIMIT, SPLIT, PRECISION)
        before, after, whole = factors_of(G, rest, log_whole, resets, document, newest)
        dqs *= before
        if b is not None:
            des *= before
        dks *= after
        into_G = qs * dqs
        if b is not None:
            into_G += es * des
        into_rest = ks * dks
        all_gain = whole * dtotal  # of every token
        if weak:
            # Over all tokens of a chunk the step adds up to nothing.
            all_gain += tl.sum(into_G, 0)
            ddecay = into_rest - into_G
        else:
            ddecay = tl.zeros([C, BS], tl.float32)
            for number in tl.range(2, disable_licm=True):
                into = tl.where(number == UP_TO, into_G, into_rest)
                ddecay += sum_over(tl.trans(matrix_of(matrices, number)), into, SPLIT, PRECISION)
        middle = 0.5 * (G - rest)
        depth, steps = steps_of(decay, weak, LIMIT)
        for step in tl.range(steps, disable_licm=True):
            number = step_number(depth, step)
            x = middle
            dA = dproducts
            if b is not None:
                dT = dtriangle
            if not weak:
                x = sum_over(matrix_of(matrices, WEIGHTS + number), decay, SPLIT, PRECISION)
                inside = matrix_of(matrices, MASKS + number) > 0.0
                dA = tl.where(inside, dproducts, 0.0)
                if b is not None:
                    dT = tl.where(inside, dtriangle, 0.0)
            sign = tl.where(step == 0, -1.0, 1.0)
            inverse = exp2(sign * x)
            k_rows = cast(ks * inverse, dtype)
            dA_rows = dot(dA, k_rows, PRECISION)
            if b is not None:
                dT_rows = dot(dT, k_rows, PRECISION)
            factor = exp2(x)
            dqs += dA_rows * factor
            if b is not None:
                des += dT_rows * factor
            q_rows = cast(qs * factor, dtype)
            if b is not None:
                e_rows = cast(es * factor, dtype)
            dk_rows = dot(tl.trans(dA), q_rows, PRECISION)
            if b is not None:
                dk_rows += dot(tl.trans(dT), e_rows, PRECISION)
            dks += dk_rows * inverse
            dx = q_rows.to(tl.float32) * dA_rows
            if b is not None:
                dx += e_rows.to(tl.float32) * dT_rows
            dx += sign * k_rows.to(tl.float32) * dk_rows
            if weak:
                ddecay -= dx
                dx = ddecay
            weights = tl.trans(matrix_of(matrices, tl.where(weak, FROM, WEIGHTS + number)))
            ddecay = tl.where(weak, -1.0, 1.0) * ddecay + sum_over(weights, dx, SPLIT, PRECISION)
        ddecay += all_gain[None, :]

        if b is not None:
            erase = erase_of(load_stored(b, stride, cols, K, count, C), SIGMOID, ERASE_SCALE)
            dks += des * erase
        if norm_q is not None:
            radial_q += tl.sum(dqs * qs, 1)
            dks = unit_k[:, None] * (dks - ks * radial_k[:, None])
        store_rows(dq, dqs * scale, stride, cols, K, count, C)
        store_rows(dk, dks, stride, cols, K, count, C)
        if b is not None:
            des *= ks
            if SIGMOID:
                des *= erase * (1.0 - erase / ERASE_SCALE)
            store_rows(db, des, stride, cols, K, count, C)
        if resets is not None:
            ddecay = tl.where(load_reset(resets, count, C)[:, None], 0.0, ddecay)
        if GATE:
            ddecay = tl.where((rows < count)[:, None], ddecay, 0.0)
            if lower_bound is None:
                tl.store(dA_log + cols, tl.sum(ddecay * decay, 0) / LOG2E, mask=among(cols, K))
                rate, stretch, _, _ = load_gate(A_log)
                ddecay *= -(rate * stretch) * sigmoid(raw)
            else:
                ddecay *= lower_bound * (sigmoid(raw) * sigmoid(-raw))
                if A_log is not None:
                    tl.store(dA_log + cols, tl.sum(ddecay * raw, 0), mask=among(cols, K))
                rate, stretch = load_bounded_gate(A_log)
                ddecay *= rate * tl.minimum(stretch, 1.0)
            if ddt_bias is not None:
                tl.store(ddt_bias + cols, tl.sum(ddecay, 0), mask=among(cols, K))
        store_rows(dg, ddecay, stride, cols, K, count, C)

    if norm_q is not None:
        tl.debug_barrier()  # what follows reads what other threads of the program may have written
        _without_radial(dq, q, unit_q, radial_q, stride, K, BK, BS, count)
