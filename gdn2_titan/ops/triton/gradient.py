"""Kernel: every gradient of a chunk that needs no other chunk, one program per chunk and key head.

With the states at both ends of the chunk, R and dZ from the scans, and dO times scale,

    dQ = dO S_in^T    dE = -dZ S_in^T    dKt = R dS_out^T    dA_qk = dO R^T    dT = -dZ R^T    dv = dZ * w    dw = dZ * v

summed over the value heads that read the key head. What Q, E, Kt, A_qk and T gain goes to q, b, k and g down the tree.
"""

import triton
import triton.language as tl

from .products import dot
from .rows import C, chunk_of, inverse_norms, load_log_decay, load_reset, load_rows, store_rows
from .tree import LEVELS, after, corner, level, pairs, sum_over, up_to

__all__ = ["gradient_kernel"]


@triton.jit
def _square_gradients(
    do, R, dZ, v, w, dv, dw, start, count, scale, h,
    H: tl.constexpr, HV: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, SIGMOID: tl.constexpr,
    dtype: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dA_qk and dT [C, C], and on the way dv and dw, written."""
    dproducts = tl.zeros([C, C], tl.float32)
    dtriangle = tl.zeros([C, C], tl.float32)
    for member in range(HV // H):
        tokens = (start * HV + h * (HV // H) + member) * V
        for first in range(0, V, BV):
            cols = first + tl.arange(0, BV)
            r = tl.trans(load_rows(R + tokens, HV * V, cols, V, count).to(dtype))
            dz = load_rows(dZ + tokens, HV * V, cols, V, count)
            dtriangle -= dot(dz.to(dtype), r, PRECISION)
            if do is not None:
                dout = (scale * load_rows(do + tokens, HV * V, cols, V, count)).to(dtype)
                dproducts += dot(dout, r, PRECISION)
            gate = load_rows(w + tokens, HV * V, cols, V, count)
            dgate = dz * load_rows(v + tokens, HV * V, cols, V, count)
            if SIGMOID:
                gate = tl.sigmoid(gate)
                dgate *= gate * (1.0 - gate)
            store_rows(dv + tokens, dz * gate, HV * V, cols, V, count)
            store_rows(dw + tokens, dgate, HV * V, cols, V, count)
    return dproducts, dtriangle


@triton.jit
def _state_gradients(
    do, R, dZ, states, dstates, i_c, start, count, scale, h, cols,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr,
    dtype: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ, dE, dKt [C, BS] and the gradient of total [BS], for the channels cols."""
    dQ = tl.zeros([C, BS], tl.float32)
    dE = tl.zeros([C, BS], tl.float32)
    dKt = tl.zeros([C, BS], tl.float32)
    dtotal = tl.zeros([BS], tl.float32)
    for member in range(HV // H):
        hv = h * (HV // H) + member
        tokens = (start * HV + hv) * V
        state = (i_c.to(tl.int64) * HV + hv) * K * V
        for first in range(0, V, BV):
            across = first + tl.arange(0, BV)
            place = state + across[:, None] + cols[None, :] * V
            inside = (across < V)[:, None] & (cols < K)[None, :]
            S_in = tl.load(states + place, mask=inside, other=0.0)
            dS_out = tl.load(dstates + place, mask=inside, other=0.0)
            dtotal += tl.sum(S_in.to(tl.float32) * dS_out.to(tl.float32), 0)
            r = load_rows(R + tokens, HV * V, across, V, count).to(dtype)
            dKt += dot(r, dS_out, PRECISION)
            dz = load_rows(dZ + tokens, HV * V, across, V, count).to(dtype)
            dE -= dot(dz, S_in, PRECISION)
            if do is not None:
                dout = (scale * load_rows(do + tokens, HV * V, across, V, count)).to(dtype)
                dQ += dot(dout, S_in, PRECISION)
    return dQ, dE, dKt, dtotal


@triton.jit
def _without_radial(dx, x, stride, norm, radial, K: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr, count):
    """Make the gradient of x / |x|, stored in dx, the one of x. radial [C]: its product with x / |x|."""
    for first in range(0, BK, BS):
        cols = first + tl.arange(0, BS)
        unit = load_rows(x, stride, cols, K, count) * norm[:, None]
        grad = load_rows(dx, stride, cols, K, count)
        store_rows(dx, norm[:, None] * (grad - unit * radial[:, None]), stride, cols, K, count)


@triton.jit
def gradient_kernel(
    q, k, v, g, b, w, A_log, dt_bias, resets, cu_seqlens, ends, T, NT, N, scale,
    do, R, dZ, states, dstates,
    dq, dk, dv, dg, db, dw, dA_log, ddt_bias,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    PACKED: tl.constexpr, L2NORM: tl.constexpr, GATE: tl.constexpr, SIGMOID: tl.constexpr, ERASE: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Inputs as ``chunk_gdn2`` takes them, flat over B * T; do or None; R, dZ, states, dstates: from the scans.

    Writes dq .. dw in the shape of their inputs, and for each chunk its part of dA_log [NC, H] and ddt_bias
    [NC, H, K], fp32, where given. BS channels of K at a time."""
    i_c = tl.program_id(0)
    h = tl.program_id(1)
    n, start, count = chunk_of(i_c, ends, cu_seqlens, T, NT, N, PACKED)
    if count == 0:
        return
    dtype: tl.constexpr = R.dtype.element_ty
    offset = (start * H + h) * K
    stride: tl.constexpr = H * K
    block = i_c.to(tl.int64) * H + h
    i, j = pairs()
    if GATE:
        A_log += h
        if dt_bias is not None:
            dt_bias += h * K
    if L2NORM:
        norm_q = inverse_norms(q + offset, stride, K, BK, BS, count)
        norm_k = inverse_norms(k + offset, stride, K, BK, BS, count)
        radial_q = tl.zeros([C], tl.float32)
        radial_k = tl.zeros([C], tl.float32)
    dlog_A = 0.0

    dproducts, dtriangle = _square_gradients(
        do, R, dZ, v, w, dv, dw, start, count, scale, h, H, HV, V, BV, SIGMOID, dtype, PRECISION
    )
    diagonal = tl.sum(tl.where(i == j, dproducts, 0.0), 1)[:, None]  # of A_qk: it knows no decay
    dproducts = dproducts.to(dtype)
    dtriangle = dtriangle.to(dtype)

    for first in range(0, BK, BS):
        cols = first + tl.arange(0, BS)
        dqs, des, dks, dtotal = _state_gradients(
            do, R, dZ, states, dstates, i_c, start, count, scale, h, cols, H, HV, K, V, BS, BV, dtype, PRECISION
        )
        qs = load_rows(q + offset, stride, cols, K, count)
        ks = load_rows(k + offset, stride, cols, K, count)
        if L2NORM:
            qs *= norm_q[:, None]
            ks *= norm_k[:, None]
        erase = load_rows(b + offset, stride, cols, K, count)
        if SIGMOID:
            erase = ERASE * tl.sigmoid(erase)
        es = erase * ks
        decay, raw = load_log_decay(g + offset, stride, cols, K, count, start, A_log, dt_bias, resets, GATE)

        # The factors to the ends of the chunk, then those between halves: each turns the gradient of a decayed row
        # into that of the row, and its product with the row is the gradient of the log of the factor.
        factor = tl.exp(sum_over(up_to(i, j), decay, SPLIT, PRECISION))
        dqs *= factor
        des *= factor
        ddecay = (dtotal * tl.exp(tl.sum(decay, 0)))[None, :]
        ddecay += sum_over(up_to(j, i), qs * dqs + es * des, SPLIT, PRECISION)
        dks *= tl.exp(sum_over(after(i, j), decay, SPLIT, PRECISION))
        ddecay += sum_over(after(j, i), ks * dks, SPLIT, PRECISION)
        for n_level in tl.static_range(LEVELS):
            m: tl.constexpr = 1 << n_level
            factor = tl.exp(sum_over(level(i, j, m), decay, SPLIT, PRECISION))
            corner_products = tl.where(corner(i, j, m), dproducts, 0.0)
            corner_triangle = tl.where(corner(i, j, m), dtriangle, 0.0)
            columns = (ks * factor).to(dtype)
            dq_level = dot(corner_products, columns, PRECISION) * factor
            de_level = dot(corner_triangle, columns, PRECISION) * factor
            dk_level = dot(tl.trans(corner_products), (qs * factor).to(dtype), PRECISION)
            dk_level += dot(tl.trans(corner_triangle), (es * factor).to(dtype), PRECISION)
            dk_level *= factor
            dlog = qs * dq_level + es * de_level + ks * dk_level
            ddecay += sum_over(level(j, i, m), dlog, SPLIT, PRECISION)
            dqs += dq_level
            des += de_level
            dks += dk_level

        dqs += diagonal * ks
        dks += diagonal * qs + des * erase
        derase = des * ks
        if SIGMOID:
            derase *= erase * (1.0 - erase / ERASE)
        store_rows(db + offset, derase, stride, cols, K, count)
        store_rows(dq + offset, dqs, stride, cols, K, count)
        store_rows(dk + offset, dks, stride, cols, K, count)
        if L2NORM:
            radial_q += tl.sum(qs * dqs, 1)
            radial_k += tl.sum(ks * dks, 1)
        if resets is not None:
            ddecay = tl.where(load_reset(resets, start, count)[:, None], 0.0, ddecay)
        if GATE:
            ddecay = tl.where((tl.arange(0, C) < count)[:, None], ddecay, 0.0)
            dlog_A += tl.sum(ddecay * decay)
            ddecay *= -tl.exp(tl.load(A_log).to(tl.float32)) * tl.sigmoid(raw)
            if dt_bias is not None:
                tl.store(ddt_bias + block * K + cols, tl.sum(ddecay, 0), mask=cols < K)
        store_rows(dg + offset, ddecay, stride, cols, K, count)

    if GATE:
        tl.store(dA_log + block, dlog_A)
    if L2NORM:
        tl.debug_barrier()  # what follows reads what other threads of the program may have written
        _without_radial(dq + offset, q + offset, stride, norm_q, radial_q, K, BK, BS, count)
        _without_radial(dk + offset, k + offset, stride, norm_k, radial_k, K, BK, BS, count)
