"""Kernels: from chunk to chunk, the state in registers. One program per sequence, value head and slice of V.

    forward    R = A (Z - E S)    O = Q S + A_qk R    S <- total * S + Kt^T R
    reverse    dR = A_qk^T dO + Kt dS    dZ = A^T dR    dS <- total * dS + Q^T dO - E^T dZ

Everything with an axis of V is held transposed, [BV, C] and [BV, K]: S, R and their like are then always the left
operand of a product, which tensor cores take from the registers that the product before left it in.
"""

import triton
import triton.language as tl

from ...triton.products import cast, dot, sigmoid
from .rows import C

__all__ = ["reverse_kernel", "scan_kernel", "segment_kernel"]


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
def _program(HV: tl.constexpr, SLICES: tl.constexpr):
    """Sequence, value head and slice of this program; the slices of one head are neighbours in the grid."""
    row = tl.program_id(0) // SLICES
    return row // HV, row % HV, tl.program_id(0) % SLICES


@triton.jit
def _state_block(n, hv, cols, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr):
    """Offsets [BV, BK] into states [N, HV, K, V], and their mask."""
    rows = tl.arange(0, BK)
    offsets = (n.to(tl.int64) * HV + hv) * K * V + rows[None, :] * V + cols[:, None]
    return offsets, (rows < K)[None, :] & (cols < V)[:, None]


@triton.jit
def _store_state(states, S, chunk, hv, cols, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr):
    """S [BV, BK] of a chunk to states [NC, HV, V, K]."""
    rows = tl.arange(0, BK)
    place = (chunk.to(tl.int64) * HV + hv) * V * K + cols[:, None] * K + rows[None, :]
    tl.store(states + place, S, mask=(cols < V)[:, None] & (rows < K)[None, :])


@triton.jit
def _load_transposed(x, stride, cols, V, count):
    """C rows of x, transposed [BV, C], zeros from row count on."""
    rows = tl.arange(0, C)
    inside = (cols < V)[:, None] & (rows < count)[None, :]
    return tl.load(x + rows[None, :] * stride + cols[:, None], mask=inside, other=0.0)


@triton.jit
def _store_transposed(x, value, stride, cols, V, count):
    """The inverse of ``_load_transposed``."""
    rows = tl.arange(0, C)
    inside = (cols < V)[:, None] & (rows < count)[None, :]
    tl.store(x + rows[None, :] * stride + cols[:, None], cast(value, x.dtype.element_ty), mask=inside)


@triton.jit
def _run(
    S, Q, E, Kt, total, A_qk, A, v, w, o, R, states, h, hv, cols, chunk, chunks, start, length,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    SIGMOID: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state [BV, BK] that the chunks leave which S enters. v, w: None where no value is written."""
    dtype: tl.constexpr = Q.dtype.element_ty
    rows = tl.arange(0, C)
    channels = tl.arange(0, BK)
    wide = rows[:, None] * BK + channels[None, :]
    tall = channels[:, None] + rows[None, :] * BK
    transposed = rows[:, None] + rows[None, :] * C
    if v is not None:
        tokens = (start * HV + hv) * V
        next_v = _load_transposed(v + tokens, HV * V, cols, V, length)
        next_w = _load_transposed(w + tokens, HV * V, cols, V, length)
    for c in range(chunks):
        count = length - c * C
        prepared = (chunk + c).to(tl.int64) * H + h
        tokens = ((start + c * C) * HV + hv) * V
        S_in = cast(S, dtype)
        if states is not None:
            _store_state(states, S_in, chunk + c, hv, cols, HV, K, V, BK)
        if v is not None:
            gate = next_w.to(tl.float32)
            if SIGMOID:
                gate = sigmoid(gate)
            r = gate * next_v.to(tl.float32)
            # Those of the next chunk, asked for before the products of this one.
            ahead = tokens + C * HV * V
            next_v = _load_transposed(v + ahead, HV * V, cols, V, count - C)
            next_w = _load_transposed(w + ahead, HV * V, cols, V, count - C)
            r -= dot(S_in, tl.load(E + prepared * C * BK + tall), PRECISION)
        else:
            r = -dot(S_in, tl.load(E + prepared * C * BK + tall), PRECISION)
        if o is not None:
            out = dot(S_in, tl.load(Q + prepared * C * BK + tall), PRECISION)
        r = cast(dot(cast(r, dtype), tl.load(A + prepared * C * C + transposed), PRECISION), dtype)
        if R is not None:
            _store_transposed(R + tokens, r, HV * V, cols, V, count)
        if o is not None:
            out += dot(r, tl.load(A_qk + prepared * C * C + transposed), PRECISION)
            _store_transposed(o + tokens, out, HV * V, cols, V, count)
        S *= tl.load(total + prepared * BK + channels)[None, :]
        S += dot(r, tl.load(Kt + prepared * C * BK + wide), PRECISION)
    return S


@triton.jit(do_not_specialize=["T", "NT"])
def scan_kernel(
    Q, E, Kt, total, A_qk, A, v, w, initial_state, cu_seqlens, ends, T, NT,
    o, final_state, R, states,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    PACKED: tl.constexpr, SIGMOID: tl.constexpr, PRECISION: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Q, E, Kt, total, A_qk, A: from ``prepare_kernel``; v, w [B * T, HV, V]; initial_state [N, HV, K, V] or None.

    Writes o [B * T, HV, V] and final_state [N, HV, K, V], or for the backward R [B * T, HV, V] and states
    [NC, HV, V, K], the state that each chunk enters with; whichever is given."""
    n, hv, piece = _program(HV, (V + BV - 1) // BV)
    cols = piece * BV + tl.arange(0, BV)
    chunk, chunks, start, length = _span(n, ends, cu_seqlens, T, NT, PACKED)
    block, inside = _state_block(n, hv, cols, HV, K, V, BK)
    S = tl.zeros([BV, BK], tl.float32)
    if initial_state is not None:
        S += tl.load(initial_state + block, mask=inside, other=0.0).to(tl.float32)
    S = _run(
        S, Q, E, Kt, total, A_qk, A, v, w, o, R, states, hv // (HV // H), hv, cols, chunk, chunks, start, length,
        H, HV, K, V, BK, SIGMOID, PRECISION,
    )  # fmt: skip
    if final_state is not None:
        tl.store(final_state + block, S, mask=inside)


SEARCH = tl.constexpr(1024)


@triton.jit
def _first_reset(resets, length):
    """The first of ``length`` tokens that begins a document; length where none does."""
    first = tl.full([SEARCH], 0, tl.int32) + length
    for begin in range(0, length, SEARCH):
        token = begin + tl.arange(0, SEARCH)
        found = tl.load(resets + token, mask=token < length, other=0) != 0
        first = tl.where(found, tl.minimum(first, token), first)
    return tl.min(first, 0)


# What the kernels of this file share in their signatures is spelled out: Triton reads each one by itself.
@triton.jit(do_not_specialize=["T", "NT"])
def segment_kernel(
    Q, E, Kt, total, A_qk, A, v, w, resets, cu_seqlens, ends, T, NT,
    o, contribution, read, transition,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    PACKED: tl.constexpr, SIGMOID: tl.constexpr, PRECISION: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """``scan_kernel`` from a state of zeros, and beside it, in the programs after those of a head's values, what the
    tokens do to any state: the same without values from the identity, K columns for each key head.

    Writes o [B * T, HV, V] and contribution [N, HV, K, V], read [B * T, H, K] and transition [N, H, K, K]."""
    tiles: tl.constexpr = (V + BV - 1) // BV
    n, hv, tile = _program(HV, tiles + (K + BV - 1) // BV)
    h = hv // (HV // H)
    values = tile < tiles
    if not values and hv % (HV // H) > 0:
        return
    chunk, chunks, start, length = _span(n, ends, cu_seqlens, T, NT, PACKED)
    state = transition + (n.to(tl.int64) * H + h) * K * K
    width = K
    if values:
        S = _run(
            tl.zeros([BV, BK], tl.float32), Q, E, Kt, total, A_qk, A, v, w, o, None, None,
            h, hv, tile * BV + tl.arange(0, BV), chunk, chunks, start, length, H, HV, K, V, BK, SIGMOID, PRECISION,
        )  # fmt: skip
        # Not before _run: of two branches that end alike Triton (3.9) makes one end, and then gives the shared memory
        # of the one to nothing in the other.
        state = contribution + (n.to(tl.int64) * HV + hv) * K * V
        width = V
    else:
        tile -= tiles
        cols = tile * BV + tl.arange(0, BV)
        alive = chunks
        if resets is not None:  # behind the chunk of a reset there is nothing left to multiply
            alive = tl.minimum(chunks, _first_reset(resets + start, length) // C + 1)
        S = _run(
            tl.where(cols[:, None] == tl.arange(0, BK)[None, :], 1.0, 0.0),
            Q, E, Kt, total, A_qk, A, None, None, read, None, None,
            h, h, cols, chunk, alive, start, length, H, H, K, K, BK, SIGMOID, PRECISION,
        )  # fmt: skip
        for c in range(alive, chunks):
            tokens = ((start + c * C) * H + h) * K
            _store_transposed(read + tokens, tl.zeros([BV, C], tl.float32), H * K, cols, K, length - c * C)
    cols = tile * BV + tl.arange(0, BV)
    rows = tl.arange(0, BK)
    inside = (rows < K)[None, :] & (cols < width)[:, None]
    tl.store(state + rows[None, :] * width + cols[:, None], S, mask=inside)


@triton.jit(do_not_specialize=["T", "NT"])
def reverse_kernel(
    Q, E, Kt, total, A_qk, A, do, dfinal_state, cu_seqlens, ends, T, NT,
    dZ, dstates, dinitial_state,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """do [B * T, HV, V] and dfinal_state [N, HV, K, V], each None where zero.

    Writes dZ [B * T, HV, V], dstates [NC, HV, V, K], the gradient of the state that each chunk leaves with, and
    dinitial_state [N, HV, K, V] where given."""
    n, hv, piece = _program(HV, (V + BV - 1) // BV)
    h = hv // (HV // H)
    cols = piece * BV + tl.arange(0, BV)
    dtype: tl.constexpr = Q.dtype.element_ty
    chunk, chunks, start, length = _span(n, ends, cu_seqlens, T, NT, PACKED)
    rows = tl.arange(0, C)
    channels = tl.arange(0, BK)
    wide = rows[:, None] * BK + channels[None, :]
    tall = channels[:, None] + rows[None, :] * BK
    square = rows[:, None] * C + rows[None, :]

    block, inside = _state_block(n, hv, cols, HV, K, V, BK)
    dS = tl.zeros([BV, BK], tl.float32)
    if dfinal_state is not None:
        dS += tl.load(dfinal_state + block, mask=inside, other=0.0).to(tl.float32)
    if do is not None:
        tokens = ((start + (chunks - 1) * C) * HV + hv) * V
        left = tl.where(chunks > 0, length - (chunks - 1) * C, 0)  # an empty sequence has no last chunk to read
        next_do = _load_transposed(do + tokens, HV * V, cols, V, left)
    for back in range(chunks):
        c = chunks - 1 - back
        count = length - c * C
        prepared = (chunk + c).to(tl.int64) * H + h
        tokens = ((start + c * C) * HV + hv) * V
        dS_out = cast(dS, dtype)
        _store_state(dstates, dS_out, chunk + c, hv, cols, HV, K, V, BK)
        dr = dot(dS_out, tl.load(Kt + prepared * C * BK + tall), PRECISION)
        dS *= tl.load(total + prepared * BK + channels)[None, :]
        if do is not None:
            dout = cast(next_do, dtype)
            next_do = _load_transposed(do + (tokens - C * HV * V), HV * V, cols, V, tl.where(c > 0, C, 0))
            dr += dot(dout, tl.load(A_qk + prepared * C * C + square), PRECISION)
            dS += dot(dout, tl.load(Q + prepared * C * BK + wide), PRECISION)
        dz = cast(dot(cast(dr, dtype), tl.load(A + prepared * C * C + square), PRECISION), dtype)
        _store_transposed(dZ + tokens, dz, HV * V, cols, V, count)
        dS -= dot(dz, tl.load(E + prepared * C * BK + wide), PRECISION)
    if dinitial_state is not None:
        tl.store(dinitial_state + block, cast(dS, dinitial_state.dtype.element_ty), mask=inside)
