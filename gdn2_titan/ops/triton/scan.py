"""Kernels: from chunk to chunk, the state in registers. One program per sequence, value head and slice of V.

forward    R = A (Z - E S)    O = Q S + A_qk R    S <- total * S + Kt^T R
reverse    dR = A_qk^T dO + Kt dS    dZ = A^T dR    dS <- total * dS + Q^T dO - E^T dZ
"""

import triton
import triton.language as tl

from .products import cast, dot
from .rows import C, load_rows, store_rows

__all__ = ["reverse_kernel", "scan_kernel"]


@triton.jit
def _span(n, ends, cu_seqlens, T, NT, PACKED: tl.constexpr):
    """First chunk, number of chunks, first token and number of tokens of sequence n."""
    if PACKED:
        before = tl.load(ends + n - 1, mask=n > 0, other=0)
        chunks = tl.load(ends + n) - before
        start = tl.load(cu_seqlens + n).to(tl.int64)
        length = tl.load(cu_seqlens + n + 1).to(tl.int64) - start
    else:
        before = n.to(tl.int64) * NT
        chunks = NT
        start = n.to(tl.int64) * T
        length = T
    return before, chunks, start, length


@triton.jit
def _state_block(n, hv, cols, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr):
    """Offsets [BK, BV] into states [N, HV, K, V] and their mask. n: sequence or chunk."""
    rows = tl.arange(0, BK)
    offsets = (n.to(tl.int64) * HV + hv) * K * V + rows[:, None] * V + cols[None, :]
    return offsets, (rows < K)[:, None] & (cols < V)[None, :]


@triton.jit
def scan_kernel(
    Q, E, Kt, total, A_qk, A, v, w, initial_state, cu_seqlens, ends, T, NT,
    o, final_state, R, states,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    PACKED: tl.constexpr, SIGMOID: tl.constexpr, PRECISION: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Q, E, Kt, total, A_qk, A: from ``prepare_kernel``; v, w [B * T, HV, V]; initial_state [N, HV, K, V] or None.

    Writes o [B * T, HV, V] and final_state [N, HV, K, V], or for the backward R [B * T, HV, V] and states
    [NC, HV, K, V], the state that each chunk enters with; whichever is given."""
    n = tl.program_id(1) // HV
    hv = tl.program_id(1) % HV
    h = hv // (HV // H)
    cols = tl.program_id(0) * BV + tl.arange(0, BV)
    dtype: tl.constexpr = Q.dtype.element_ty
    chunk, chunks, start, length = _span(n, ends, cu_seqlens, T, NT, PACKED)
    rows = tl.arange(0, C)
    wide = rows[:, None] * BK + tl.arange(0, BK)[None, :]
    tall = tl.arange(0, BK)[:, None] + rows[None, :] * BK
    square = rows[:, None] * C + rows[None, :]

    block, inside = _state_block(n, hv, cols, HV, K, V, BK)
    S = tl.zeros([BK, BV], tl.float32)
    if initial_state is not None:
        S += tl.load(initial_state + block, mask=inside, other=0.0).to(tl.float32)
    for c in range(chunks):
        count = length - c * C
        prepared = (chunk + c).to(tl.int64) * H + h
        tokens = ((start + c * C) * HV + hv) * V
        S_in = cast(S, dtype)
        if states is not None:
            block, inside = _state_block(chunk + c, hv, cols, HV, K, V, BK)
            tl.store(states + block, S_in, mask=inside)
        gate = load_rows(w + tokens, HV * V, cols, V, count, C)
        if SIGMOID:
            gate = tl.sigmoid(gate)
        r = gate * load_rows(v + tokens, HV * V, cols, V, count, C)
        r -= dot(tl.load(E + prepared * C * BK + wide), S_in, PRECISION)
        r = cast(dot(tl.load(A + prepared * C * C + square), cast(r, dtype), PRECISION), dtype)
        if R is not None:
            store_rows(R + tokens, r, HV * V, cols, V, count, C)
        if o is not None:
            out = dot(tl.load(Q + prepared * C * BK + wide), S_in, PRECISION)
            out += dot(tl.load(A_qk + prepared * C * C + square), r, PRECISION)
            store_rows(o + tokens, out, HV * V, cols, V, count, C)
        S *= tl.load(total + prepared * BK + tl.arange(0, BK))[:, None]
        S += dot(tl.load(Kt + prepared * C * BK + tall), r, PRECISION)
    if final_state is not None:
        block, inside = _state_block(n, hv, cols, HV, K, V, BK)
        tl.store(final_state + block, S, mask=inside)


@triton.jit
def reverse_kernel(
    Q, E, Kt, total, A_qk, A, do, dfinal_state, cu_seqlens, ends, T, NT,
    dZ, dstates, dinitial_state,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """do [B * T, HV, V] and dfinal_state [N, HV, K, V], each None where zero.

    Writes dZ [B * T, HV, V], dstates [NC, HV, K, V], the gradient of the state that each chunk leaves with, and
    dinitial_state [N, HV, K, V] where given."""
    n = tl.program_id(1) // HV
    hv = tl.program_id(1) % HV
    h = hv // (HV // H)
    cols = tl.program_id(0) * BV + tl.arange(0, BV)
    dtype: tl.constexpr = Q.dtype.element_ty
    chunk, chunks, start, length = _span(n, ends, cu_seqlens, T, NT, PACKED)
    rows = tl.arange(0, C)
    wide = rows[:, None] * BK + tl.arange(0, BK)[None, :]
    tall = tl.arange(0, BK)[:, None] + rows[None, :] * BK
    turned = rows[:, None] + rows[None, :] * C

    block, inside = _state_block(n, hv, cols, HV, K, V, BK)
    dS = tl.zeros([BK, BV], tl.float32)
    if dfinal_state is not None:
        dS += tl.load(dfinal_state + block, mask=inside, other=0.0).to(tl.float32)
    for back in range(chunks):
        c = chunks - 1 - back
        count = length - c * C
        prepared = (chunk + c).to(tl.int64) * H + h
        tokens = ((start + c * C) * HV + hv) * V
        dS_out = cast(dS, dtype)
        block, inside = _state_block(chunk + c, hv, cols, HV, K, V, BK)
        tl.store(dstates + block, dS_out, mask=inside)
        dr = dot(tl.load(Kt + prepared * C * BK + wide), dS_out, PRECISION)
        dS *= tl.load(total + prepared * BK + tl.arange(0, BK))[:, None]
        if do is not None:
            dout = cast(load_rows(do + tokens, HV * V, cols, V, count, C), dtype)
            dr += dot(tl.load(A_qk + prepared * C * C + turned), dout, PRECISION)
            dS += dot(tl.load(Q + prepared * C * BK + tall), dout, PRECISION)
        dz = cast(dot(tl.load(A + prepared * C * C + turned), cast(dr, dtype), PRECISION), dtype)
        store_rows(dZ + tokens, dz, HV * V, cols, V, count, C)
        dS -= dot(tl.load(E + prepared * C * BK + tall), dz, PRECISION)
    if dinitial_state is not None:
        block, inside = _state_block(n, hv, cols, HV, K, V, BK)
        tl.store(dinitial_state + block, cast(dS, dinitial_state.dtype.element_ty), mask=inside)
