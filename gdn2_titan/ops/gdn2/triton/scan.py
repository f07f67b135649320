"""Kernels: from chunk to chunk, the state in registers. One program per sequence, value head and slice of V.

    forward    R = A (Z - E S)    O = Q S + A_qk R    S <- total * S + Kt^T R
    reverse    dR = A_qk^T dO + Kt dS    dZ = A^T dR    dS <- total * dS + Q^T dO - E^T dZ

Where nothing is erased E and A are None: R = Z, dZ = dR.

Everything with an axis of V is held transposed, [BV, C] and [BV, K]: S, R and their like are then always the left
operand of a product, which tensor cores take from the registers that the product before left it in.
"""

import triton
import triton.language as tl

from ...triton.products import cast, dot, sigmoid
from .rows import C
from .state import load_state, part_size, store_state

__all__ = ["reverse_kernel", "scan_kernel", "segment_kernel"]


@triton.jit
def _span(n, packed, ends, cu_seqlens, T, NT):
    """First chunk, number of chunks, first token and number of tokens of sequence n."""
    if packed > 0:
        before = tl.load(ends + n - 1, mask=n > 0, other=0)
        chunks = (tl.load(ends + n) - before).to(tl.int32)
        start = tl.load(cu_seqlens + n)
        length = (tl.load(cu_seqlens + n + 1) - start).to(tl.int32)
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
def _store_part(state, S, i: tl.constexpr, cols, V: tl.constexpr, K: tl.constexpr, PART: tl.constexpr):
    """Part i of a state, S [BV, PART], to the state turned [V, K]."""
    channels = i * PART + tl.arange(0, PART)
    tl.store(state + cols[:, None] * K + channels[None, :], S, mask=(cols < V)[:, None] & (channels < K)[None, :])


@triton.jit
def _part(x, i: tl.constexpr, BK: tl.constexpr):
    """Part i of x [C, BK]: [C, PART]."""
    channels = i * part_size(BK) + tl.arange(0, part_size(BK))
    return tl.load(x + tl.arange(0, C)[:, None] * BK + channels[None, :])


@triton.jit
def _part_transposed(x, i: tl.constexpr, BK: tl.constexpr):
    """Part i of x [C, BK]: [PART, C]."""
    channels = i * part_size(BK) + tl.arange(0, part_size(BK))
    return tl.load(x + channels[:, None] + tl.arange(0, C)[None, :] * BK)


@triton.jit
def _decay_of_part(total, i: tl.constexpr, BK: tl.constexpr):
    """Part i of total [BK]."""
    return tl.load(total + i * part_size(BK) + tl.arange(0, part_size(BK)))


@triton.jit
def _updated(S, total, decay, r, x, part, BK: tl.constexpr, PRECISION: tl.constexpr):
    """total * S + r x of r [BV, C] and x [C, BK] or None for 0; total [BK] or None for 1. decay, part: the first parts
    of total and x, which have been asked for before they are needed, as the others are here."""
    PARTS: tl.constexpr = BK // part_size(BK)
    out = ()
    for i in tl.static_range(PARTS):
        kept = S[i]
        if total is not None:
            kept *= decay[None, :]
            if i + 1 < PARTS:
                decay = _decay_of_part(total, i + 1, BK)
        if x is not None:
            now = part
            if i + 1 < PARTS:
                part = _part(x, i + 1, BK)
            kept += dot(r, now, PRECISION)
        out += (kept,)
    return out


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
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    SIGMOID: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state, as parts, that the chunks leave which S enters. v, w: None where no value is written."""
    dtype: tl.constexpr = Q.dtype.element_ty
    PART: tl.constexpr = part_size(BK)
    rows = tl.arange(0, C)
    transposed = rows[:, None] + rows[None, :] * C
    if v is not None:
        tokens = (start * HV + hv) * V
        next_v = _load_transposed(v + tokens, HV * V, cols, V, length)
        next_w = _load_transposed(w + tokens, HV * V, cols, V, length)
    for c in range(chunks):
        count = length - c * C
        prepared = (chunk + c).to(tl.int64) * H + h
        wide = prepared * C * BK
        tokens = ((start + c * C) * HV + hv) * V
        if o is not None:
            out = tl.zeros([BV, C], tl.float32)
        decay = _decay_of_part(total + prepared * BK, 0, BK)  # here, and not at its use: products hide the wait
        if E is not None:
            next_e = _part_transposed(E + wide, 0, BK)
        if o is not None:
            next_q = _part_transposed(Q + wide, 0, BK)
        for i in tl.static_range(BK // PART):
            S_in = cast(S[i], dtype)
            if states is not None:
                _store_part(states + ((chunk + c).to(tl.int64) * HV + hv) * V * K, S_in, i, cols, V, K, PART)
            if i == 0:
                if v is not None:
                    gate = next_w.to(tl.float32)
                    if SIGMOID:
                        gate = sigmoid(gate)
                    r = gate * next_v.to(tl.float32)
                    # Those of the next chunk are asked for before the products of this one or, with a state in parts,
                    # where registers for them are free.
                    ahead = tokens + C * HV * V
                    if PART == BK:
                        next_v = _load_transposed(v + ahead, HV * V, cols, V, count - C)
                        next_w = _load_transposed(w + ahead, HV * V, cols, V, count - C)
                else:
                    r = tl.zeros([BV, C], tl.float32)
            if E is not None:
                e = next_e
            if o is not None:
                q = next_q
            if i + 1 < BK // PART:
                if E is not None:
                    next_e = _part_transposed(E + wide, i + 1, BK)
                if o is not None:
                    next_q = _part_transposed(Q + wide, i + 1, BK)
            if E is not None:
                r -= dot(S_in, e, PRECISION)
            if o is not None:
                out += dot(S_in, q, PRECISION)
        part = _part(Kt + wide, 0, BK)
        r = cast(r, dtype)
        if A is not None:
            r = cast(dot(r, tl.load(A + prepared * C * C + transposed), PRECISION), dtype)
        if v is not None and PART < BK:
            next_v = _load_transposed(v + ahead, HV * V, cols, V, count - C)
            next_w = _load_transposed(w + ahead, HV * V, cols, V, count - C)
        if R is not None:
            _store_transposed(R + tokens, r, HV * V, cols, V, count)
        if o is not None:
            out += dot(r, tl.load(A_qk + prepared * C * C + transposed), PRECISION)
            _store_transposed(o + tokens, out, HV * V, cols, V, count)
        S = _updated(S, total + prepared * BK, decay, r, Kt + wide, part, BK, PRECISION)
    return S


@triton.jit(do_not_specialize=["has_initial", "packed", "T", "NT"])
def scan_kernel(
    Q, E, Kt, total, A_qk, A, v, w, initial_state, has_initial, packed, cu_seqlens, ends, T, NT,
    o, final_state, R, states,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    SIGMOID: tl.constexpr, PRECISION: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Q, E, Kt, total, A_qk, A: from ``prepare_kernel``; v, w [B * T, HV, V]; initial_state [N, HV, K, V] in fp32,
    read where has_initial is 1, else zeros.

    Writes o [B * T, HV, V] and final_state [N, HV, K, V], or for the backward R [B * T, HV, V], unless nothing is
    erased, and states [NC, HV, V, K], the state that each chunk enters with; whichever is given."""
    n, hv, piece = _program(HV, (V + BV - 1) // BV)
    cols = piece * BV + tl.arange(0, BV)
    chunk, chunks, start, length = _span(n, packed, ends, cu_seqlens, T, NT)
    state = (n.to(tl.int64) * HV + hv) * K * V
    if initial_state is not None:
        initial_state += state
    S = load_state(initial_state, has_initial, cols, V, K, BK, BV)
    S = _run(
        S, Q, E, Kt, total, A_qk, A, v, w, o, R, states, hv // (HV // H), hv, cols, chunk, chunks, start, length,
        H, HV, K, V, BK, BV, SIGMOID, PRECISION,
    )  # fmt: skip
    if final_state is not None:
        store_state(final_state + state, S, cols, V, K, BK)


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


@triton.jit
def _decay(
    Q, total, read, h, cols, chunk, chunks, start, length,
    H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """What the chunks leave of a state's rows cols [BV] where nothing is erased; writes those columns of read."""
    rows = tl.arange(0, C)
    inside = cols < BK
    kept = tl.full([BV], 1.0, tl.float32)
    for c in range(chunks):
        count = length - c * C
        prepared = (chunk + c).to(tl.int64) * H + h
        tokens = ((start + c * C) * H + h) * K
        tall = cols[:, None] + rows[None, :] * BK
        q = tl.load(Q + prepared * C * BK + tall, mask=inside[:, None], other=0.0)
        _store_transposed(read + tokens, q.to(tl.float32) * kept[:, None], H * K, cols, K, count)
        kept *= tl.load(total + prepared * BK + cols, mask=inside, other=0.0)
    return kept


# What the kernels of this file share in their signatures is spelled out: Triton reads each one by itself.
@triton.jit(do_not_specialize=["T", "NT"])
def segment_kernel(
    Q, E, Kt, total, A_qk, A, v, w, resets, T, NT,
    o, contribution, read, transition,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    SIGMOID: tl.constexpr, PRECISION: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """``scan_kernel`` from a state of zeros, and beside it, in the programs after those of a head's values, what the
    tokens do to any state: the same without values from the identity, K columns for each key head. Where nothing is
    erased it only decays.

    Writes o [B * T, HV, V] and contribution [N, HV, K, V], read [B * T, H, K] and transition [N, H, K, K]."""
    tiles: tl.constexpr = (V + BV - 1) // BV
    n, hv, tile = _program(HV, tiles + (K + BV - 1) // BV)
    h = hv // (HV // H)
    values = tile < tiles
    if not values and hv % (HV // H) > 0:
        return
    chunk, chunks, start, length = _span(n, 0, None, None, T, NT)
    state = transition + (n.to(tl.int64) * H + h) * K * K
    width = K
    if values:
        S = _run(
            load_state(None, 0, tile * BV, V, K, BK, BV), Q, E, Kt, total, A_qk, A, v, w, o, None, None,
            h, hv, tile * BV + tl.arange(0, BV), chunk, chunks, start, length, H, HV, K, V, BK, BV, SIGMOID, PRECISION,
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
        kept = tl.full([BV], 1.0, tl.float32)
        if E is None:
            kept = _decay(Q, total, read, h, cols, chunk, alive, start, length, H, K, BK, BV)
        PART: tl.constexpr = part_size(BK)
        S = ()
        for i in tl.static_range(BK // PART):
            S += (tl.where(cols[:, None] == i * PART + tl.arange(0, PART)[None, :], kept[:, None], 0.0),)
        if E is not None:
            S = _run(
                S, Q, E, Kt, total, A_qk, A, None, None, read, None, None,
                h, h, cols, chunk, alive, start, length, H, H, K, K, BK, BV, SIGMOID, PRECISION,
            )  # fmt: skip
        for c in range(alive, chunks):
            tokens = ((start + c * C) * H + h) * K
            _store_transposed(read + tokens, tl.zeros([BV, C], tl.float32), H * K, cols, K, length - c * C)
    cols = tile * BV + tl.arange(0, BV)
    store_state(state, S, cols, width, K, BK)


@triton.jit(do_not_specialize=["has_dfinal", "wants_dinitial", "packed", "T", "NT"])
def reverse_kernel(
    Q, E, Kt, total, A_qk, A, do, dfinal_state, has_dfinal, packed, cu_seqlens, ends, T, NT,
    dZ, dstates, dinitial_state, wants_dinitial,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """do [B * T, HV, V] or None where zero; dfinal_state [N, HV, K, V] in fp32, read where has_dfinal is 1, else zeros.

    Writes dZ [B * T, HV, V], dstates [NC, HV, V, K], the gradient of the state that each chunk leaves with, and
    dinitial_state [N, HV, K, V] in fp32 where wants_dinitial is 1."""
    n, hv, piece = _program(HV, (V + BV - 1) // BV)
    h = hv // (HV // H)
    cols = piece * BV + tl.arange(0, BV)
    dtype: tl.constexpr = Q.dtype.element_ty
    chunk, chunks, start, length = _span(n, packed, ends, cu_seqlens, T, NT)
    PART: tl.constexpr = part_size(BK)
    rows = tl.arange(0, C)
    square = rows[:, None] * C + rows[None, :]

    state = (n.to(tl.int64) * HV + hv) * K * V
    dS = load_state(dfinal_state + state, has_dfinal, cols, V, K, BK, BV)
    if do is not None:
        tokens = ((start + (chunks - 1) * C) * HV + hv) * V
        left = tl.where(chunks > 0, length - (chunks - 1) * C, 0)  # an empty sequence has no last chunk to read
        next_do = _load_transposed(do + tokens, HV * V, cols, V, left)
    for back in range(chunks):
        c = chunks - 1 - back
        count = length - c * C
        prepared = (chunk + c).to(tl.int64) * H + h
        wide = prepared * C * BK
        decays = total + prepared * BK
        tokens = ((start + c * C) * HV + hv) * V
        if do is not None:
            dout = cast(next_do, dtype)
            next_do = _load_transposed(do + (tokens - C * HV * V), HV * V, cols, V, tl.where(c > 0, C, 0))
        dr = tl.zeros([BV, C], tl.float32)
        decay = _decay_of_part(decays, 0, BK)
        next_k = _part_transposed(Kt + wide, 0, BK)
        for i in tl.static_range(BK // PART):
            dS_out = cast(dS[i], dtype)
            _store_part(dstates + ((chunk + c).to(tl.int64) * HV + hv) * V * K, dS_out, i, cols, V, K, PART)
            k = next_k
            if i + 1 < BK // PART:
                next_k = _part_transposed(Kt + wide, i + 1, BK)
            dr += dot(dS_out, k, PRECISION)
        if do is not None:
            dr += dot(dout, tl.load(A_qk + prepared * C * C + square), PRECISION)
            dS = _updated(dS, decays, decay, dout, Q + wide, _part(Q + wide, 0, BK), BK, PRECISION)
            decays = None
        erased = None
        part = None
        if E is not None:
            erased = E + wide
            part = _part(erased, 0, BK)
        dz = cast(dr, dtype)
        if A is not None:
            dz = cast(dot(dz, tl.load(A + prepared * C * C + square), PRECISION), dtype)
        _store_transposed(dZ + tokens, dz, HV * V, cols, V, count)
        dS = _updated(dS, decays, decay, cast(-dz.to(tl.float32), dtype), erased, part, BK, PRECISION)
    if wants_dinitial > 0:
        store_state(dinitial_state + state, dS, cols, V, K, BK)
