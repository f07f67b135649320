"""Kernel: every gradient of a chunk that needs no other chunk, one program per chunk and key head.

With the states at both ends of the chunk, and R and dZ from the scans,

    dQ = dO S_in^T    dE = -dZ S_in^T    dKt = R dS_out^T    dA_qk = dO R^T    dT = -dZ R^T

summed over the value heads that read the key head; dv = dZ * w, dw = dZ * v. Q and A_qk hold the scale. What Q, E, Kt,
A_qk and T gain goes to q, b, k and g down the tree.
"""

import triton
import triton.language as tl

from .prepare import load_half
from .products import cast, dot
from .rows import C, chunk_of, inverse_norms, load_reset, load_rows, store_rows
from .tree import HALF, after, corner, level, pairs, sum_over, up_to

__all__ = ["gradient_kernel"]


@triton.jit
def _halves(x, D: tl.constexpr):
    """The first and the last HALF rows of x [C, D]."""
    return tl.split(tl.permute(tl.reshape(x, [2, HALF, D]), (1, 2, 0)))


@triton.jit
def _load_block(square, row: tl.constexpr, column: tl.constexpr):
    """A block [HALF, HALF] of a square [C, C]."""
    i, j = pairs()
    return tl.load(square + (row * HALF + i) * C + column * HALF + j)


@triton.jit
def _square_gradients(
    do, R, dZ, v, w, dv, dw, squares, start, count, h,
    H: tl.constexpr, HV: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, SIGMOID: tl.constexpr,
    dtype: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dA_qk and dT into squares [2, C, C], and on the way dv and dw."""
    dproducts = tl.zeros([C, C], tl.float32)
    dtriangle = tl.zeros([C, C], tl.float32)
    for member in range(HV // H):
        tokens = (start * HV + h * (HV // H) + member) * V
        for first in range(0, V, BV):
            cols = first + tl.arange(0, BV)
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
    place = squares + rows[:, None] * C + rows[None, :]
    tl.store(place, cast(dproducts, dtype))
    tl.store(place + C * C, cast(dtriangle, dtype))


@triton.jit
def _state_gradients(
    do, R, dZ, states, dstates, i_c, start, count, h, cols,
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
            r = cast(load_rows(R + tokens, HV * V, across, V, count, C), dtype)
            dKt += dot(r, dS_out, PRECISION)
            dz = cast(load_rows(dZ + tokens, HV * V, across, V, count, C), dtype)
            dE -= dot(dz, S_in, PRECISION)
            if do is not None:
                dout = cast(load_rows(do + tokens, HV * V, across, V, count, C), dtype)
                dQ += dot(dout, S_in, PRECISION)
    return dQ, dE, dKt, dtotal


@triton.jit
def _down(
    q, e, k, decay, dq, de, dk, dlog, squares, half: tl.constexpr, levels,
    dtype: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the gradients of q and e decayed from the start of the half, of k decayed to its end, of the log of the
    half's whole decay [BS], and of A_qk and T (squares), to those of q, e, k and the log-decays [HALF, BS].

    A factor turns the gradient of a decayed row into that of the row; the product of that with the row is the gradient
    of the factor's log."""
    i, j = pairs()
    before = tl.exp(sum_over(up_to(i, j), decay, SPLIT, PRECISION))
    dq *= before
    de *= before
    dk *= tl.exp(sum_over(after(i, j), decay, SPLIT, PRECISION))
    ddecay = sum_over(up_to(j, i), q * dq + e * de, SPLIT, PRECISION)
    ddecay += sum_over(after(j, i), k * dk, SPLIT, PRECISION) + dlog[None, :]
    dproducts = _load_block(squares, half, half)
    dtriangle = _load_block(squares + C * C, half, half)
    for depth in range(levels):
        factor = tl.exp(sum_over(level(i, j, depth), decay, SPLIT, PRECISION))
        corner_products = tl.where(corner(i, j, depth), dproducts, 0.0)
        corner_triangle = tl.where(corner(i, j, depth), dtriangle, 0.0)
        columns = cast(k * factor, dtype)
        dq_level = dot(corner_products, columns, PRECISION) * factor
        de_level = dot(corner_triangle, columns, PRECISION) * factor
        dk_level = dot(tl.trans(corner_products), cast(q * factor, dtype), PRECISION)
        dk_level += dot(tl.trans(corner_triangle), cast(e * factor, dtype), PRECISION)
        dk_level *= factor
        dlog_level = q * dq_level + e * de_level + k * dk_level
        ddecay += sum_over(level(j, i, depth), dlog_level, SPLIT, PRECISION)
        dq += dq_level
        de += de_level
        dk += dk_level
    diagonal = tl.sum(tl.where(i == j, dproducts.to(tl.float32), 0.0), 1)[:, None]  # of A_qk: it knows no decay
    return dq + diagonal * k, de, dk + diagonal * q, ddecay


@triton.jit
def _store_half(
    dq_p, dk_p, dg_p, db_p, q, k, erase, decay, raw, dq, de, dk, ddecay, A_log, resets, stride, cols, K, count, scale,
    GATE: tl.constexpr, SIGMOID: tl.constexpr, ERASE: tl.constexpr,
):  # fmt: skip
    """Write the gradients of half a chunk's inputs. Returns the products of dq and dk with q and k [HALF], the
    gradient of A_log, and that of dt_bias [BS]."""
    dk += de * erase
    derase = de * k
    if SIGMOID:
        derase *= erase * (1.0 - erase / ERASE)
    store_rows(dq_p, scale * dq, stride, cols, K, count, HALF)
    store_rows(dk_p, dk, stride, cols, K, count, HALF)
    store_rows(db_p, derase, stride, cols, K, count, HALF)
    if resets is not None:
        ddecay = tl.where(load_reset(resets, count, HALF)[:, None], 0.0, ddecay)
    dlog_A = 0.0
    if GATE:
        ddecay = tl.where((tl.arange(0, HALF) < count)[:, None], ddecay, 0.0)
        dlog_A = tl.sum(ddecay * decay)
        ddecay *= -tl.exp(tl.load(A_log).to(tl.float32)) * tl.sigmoid(raw)
    store_rows(dg_p, ddecay, stride, cols, K, count, HALF)
    return tl.sum(q * dq, 1), tl.sum(k * dk, 1), dlog_A, tl.sum(ddecay, 0)


@triton.jit
def _without_radial(dx, x, stride, norm, radial, K: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr, count):
    """Make the gradient of x / |x|, stored in dx, the one of x. radial [HALF]: its product with x / |x|."""
    for first in range(0, BK, BS):
        cols = first + tl.arange(0, BS)
        unit = load_rows(x, stride, cols, K, count, HALF) * norm[:, None]
        grad = load_rows(dx, stride, cols, K, count, HALF)
        store_rows(dx, norm[:, None] * (grad - unit * radial[:, None]), stride, cols, K, count, HALF)


@triton.jit
def gradient_kernel(
    q, k, v, g, b, w, A_log, dt_bias, resets, cu_seqlens, ends, T, NT, N, scale, levels,
    do, R, dZ, states, dstates, squares,
    dq, dk, dv, dg, db, dw, dA_log, ddt_bias,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    PACKED: tl.constexpr, L2NORM: tl.constexpr, GATE: tl.constexpr, SIGMOID: tl.constexpr, ERASE: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Inputs as ``chunk_gdn2`` takes them, flat over B * T; do or None; R, dZ, states, dstates: from the scans;
    squares [NC, H, 2, C, C]: scratch.

    Writes dq .. dw in the shape of their inputs, and for each chunk its part of dA_log [NC, H] and ddt_bias
    [NC, H, K], fp32, where given. BS channels of K at a time. Suffixes 1 and 2: the halves of the chunk."""
    i_c = tl.program_id(0)
    h = tl.program_id(1)
    n, start, count = chunk_of(i_c, ends, cu_seqlens, T, NT, N, PACKED)
    if count == 0:
        return
    dtype: tl.constexpr = R.dtype.element_ty
    stride: tl.constexpr = H * K
    half: tl.constexpr = HALF * H * K
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
    resets2 = resets
    if resets is not None:
        resets += start
        resets2 = resets + HALF
    if GATE:
        A_log += h
        if dt_bias is not None:
            dt_bias += h * K
    norm_q1, norm_q2, norm_k1, norm_k2 = None, None, None, None
    if L2NORM:
        norm_q1 = inverse_norms(q, stride, K, BK, BS, count, HALF)
        norm_q2 = inverse_norms(q + half, stride, K, BK, BS, count - HALF, HALF)
        norm_k1 = inverse_norms(k, stride, K, BK, BS, count, HALF)
        norm_k2 = inverse_norms(k + half, stride, K, BK, BS, count - HALF, HALF)
    radial_q1 = tl.zeros([HALF], tl.float32)
    radial_q2 = tl.zeros([HALF], tl.float32)
    radial_k1 = tl.zeros([HALF], tl.float32)
    radial_k2 = tl.zeros([HALF], tl.float32)
    dlog_A = 0.0
    i, j = pairs()

    squares += block * 2 * C * C
    _square_gradients(do, R, dZ, v, w, dv, dw, squares, start, count, h, H, HV, V, BV, SIGMOID, dtype, PRECISION)
    tl.debug_barrier()  # below, threads read from the squares what others wrote

    for first in range(0, BK, BS):
        cols = first + tl.arange(0, BS)
        dQ, dE, dKt, dtotal = _state_gradients(
            do, R, dZ, states, dstates, i_c, start, count, h, cols, H, HV, K, V, BS, BV, dtype, PRECISION
        )
        dq1, dq2 = _halves(dQ, BS)
        de1, de2 = _halves(dE, BS)
        dk1, dk2 = _halves(dKt, BS)

        # The corner that joins the halves, and the decay over each half that the other's rows or columns carry.
        _, k1, _, decay, _ = load_half(
            q, k, g, b, A_log, dt_bias, resets, norm_q1, norm_k1, stride, cols, K, count, scale,
            L2NORM, GATE, SIGMOID, ERASE,
        )  # fmt: skip
        total1 = tl.exp(tl.sum(decay, 0))
        columns = k1 * tl.exp(sum_over(after(i, j), decay, SPLIT, PRECISION))
        q2, k2, erase, decay, raw = load_half(
            q + half, k + half, g + half, b + half, A_log, dt_bias, resets2, norm_q2, norm_k2, stride, cols, K,
            count - HALF, scale, L2NORM, GATE, SIGMOID, ERASE,
        )  # fmt: skip
        total2 = tl.exp(tl.sum(decay, 0))
        before = tl.exp(sum_over(up_to(i, j), decay, SPLIT, PRECISION))
        rows_q = q2 * before
        rows_e = erase * k2 * before
        dlog1 = total1 * (tl.sum(rows_q * dq2 + rows_e * de2, 0) + total2 * dtotal)
        dlog2 = total2 * (tl.sum(columns * dk1, 0) + total1 * dtotal)
        columns = cast(columns, dtype)
        dproducts = _load_block(squares, 1, 0)
        dtriangle = _load_block(squares + C * C, 1, 0)
        dq2 = dq2 * total1[None, :] + dot(dproducts, columns, PRECISION)
        de2 = de2 * total1[None, :] + dot(dtriangle, columns, PRECISION)
        dk1 = dk1 * total2[None, :] + dot(tl.trans(dproducts), cast(rows_q, dtype), PRECISION)
        dk1 += dot(tl.trans(dtriangle), cast(rows_e, dtype), PRECISION)

        dq2, de2, dk2, ddecay = _down(
            q2, erase * k2, k2, decay, dq2, de2, dk2, dlog2, squares, 1, levels, dtype, SPLIT, PRECISION
        )
        along_q, along_k, dlog_A2, dbias = _store_half(
            dq + half, dk + half, dg + half, db + half, q2, k2, erase, decay, raw, dq2, de2, dk2, ddecay, A_log,
            resets2, stride, cols, K, count - HALF, scale, GATE, SIGMOID, ERASE,
        )  # fmt: skip
        radial_q2 += along_q
        radial_k2 += along_k

        q1, k1, erase, decay, raw = load_half(  # once more: meanwhile the registers were needed
            q, k, g, b, A_log, dt_bias, resets, norm_q1, norm_k1, stride, cols, K, count, scale,
            L2NORM, GATE, SIGMOID, ERASE,
        )  # fmt: skip
        dq1, de1, dk1, ddecay = _down(
            q1, erase * k1, k1, decay, dq1, de1, dk1, dlog1, squares, 0, levels, dtype, SPLIT, PRECISION
        )
        along_q, along_k, dlog_A1, dbias1 = _store_half(
            dq, dk, dg, db, q1, k1, erase, decay, raw, dq1, de1, dk1, ddecay, A_log,
            resets, stride, cols, K, count, scale, GATE, SIGMOID, ERASE,
        )  # fmt: skip
        radial_q1 += along_q
        radial_k1 += along_k
        dlog_A += dlog_A1 + dlog_A2
        if ddt_bias is not None:
            tl.store(ddt_bias + block * K + cols, dbias + dbias1, mask=cols < K)

    if dA_log is not None:
        tl.store(dA_log + block, dlog_A)
    if L2NORM:
        tl.debug_barrier()  # what follows reads what other threads of the program may have written
        _without_radial(dq, q, stride, norm_q1, radial_q1, K, BK, BS, count)
        _without_radial(dk, k, stride, norm_k1, radial_k1, K, BK, BS, count)
        _without_radial(dq + half, q + half, stride, norm_q2, radial_q2, K, BK, BS, count - HALF)
        _without_radial(dk + half, k + half, stride, norm_k2, radial_k2, K, BK, BS, count - HALF)
