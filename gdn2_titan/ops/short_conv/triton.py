"""The short convolution on a GPU: one launch forward, two backward. Its definition is in ``ops.causal_conv1d``.

A program takes BD channels of a tile of consecutive tokens and walks over them in time. It carries the window, the
S = W - 1 inputs before the current token, so that every row is read once and nothing is shared between threads. A
reset, or the start of a packed sequence, replaces the window there and then: what it hides is never multiplied.

A walk has ROWS rows, of which a tile owns those that it writes: forward all but the S rows before them, which fill the
window; backward also all but the S rows after them, whose gradients reach back into the tile. Sums over tokens, for
the weight and the bias, go by tile into a buffer of their own that the second launch adds up, always in one order.

The states at the two ends of each sequence, S rows, belong to programs of their own in the same launch.

Shapes: x, y and their gradients [B, T, D]; states [N, D, S]; weight [D, W]; a row or one entry of a window [BD] fp32.
"""

import torch
import triton
import triton.language as tl

from ..triton import launching
from ..triton.products import cast

__all__ = ["backward", "forward"]

# Rows of a walk. Not candidates to tune: there is a partial sum for every walk.
FORWARD_ROWS = 32
BACKWARD_ROWS = 64


@triton.jit
def _channels(d, D, present):
    """The mask d < D, all False unless present, a scalar."""
    # As a bound, not as d < D & present: Triton 3.9's interpreter makes integers of a scalar truth that it spreads out.
    return d < tl.where(present, D, 0)


@triton.jit
def _zeros(COUNT: tl.constexpr, BD: tl.constexpr):
    rows = ()
    for _ in tl.static_range(COUNT):
        rows = rows + (tl.zeros((BD,), tl.float32),)
    return rows


@triton.jit
def _columns(x, n, d, D, COUNT: tl.constexpr):
    """x [N, D, COUNT] -> its entry n as COUNT rows, oldest first."""
    rows = ()
    for i in tl.static_range(COUNT):
        rows = rows + (tl.load(x + (n.to(tl.int64) * D + d) * COUNT + i, mask=d < D, other=0.0).to(tl.float32),)
    return rows


@triton.jit
def _state(x, n, d, D, S: tl.constexpr, BD: tl.constexpr):
    if x is None:
        return _zeros(S, BD)
    else:
        return _columns(x, n, d, D, S)


@triton.jit
def _row(x, stride, t, low, high, d, D):
    """Row t of x [T, D] in its dtype, zero unless low <= t < high."""
    return tl.load(x + t.to(tl.int64) * stride + d, mask=_channels(d, D, (low <= t) & (t < high)), other=0.0)


@triton.jit
def _group(x, stride, t, low, high, d, D, COUNT: tl.constexpr):
    """Rows t to t + COUNT - 1, all asked for before the first is used, so that the waits for memory overlap."""
    rows = ()
    for i in tl.static_range(COUNT):
        rows = rows + (_row(x, stride, t + i, low, high, d, D),)
    return rows


@triton.jit
def _flags(resets, t, T, COUNT: tl.constexpr):
    """Whether each of the tokens t to t + COUNT - 1 begins a document."""
    flags = ()
    for i in tl.static_range(COUNT):
        if resets is None:
            flags = flags + (False,)
        else:
            flags = flags + (tl.load(resets + t + i, mask=(0 <= t + i) & (t + i < T), other=0) != 0,)
    return flags


@triton.jit
def _sequence_at(t, low, cu_seqlens, N):
    """The packed sequence that token t lies in, one of low .. N - 1: the last that begins at or before it."""
    high = N
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(cu_seqlens + middle) <= t
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def _bounds(n, cu_seqlens, T):
    """First token of sequence n and the one after its last."""
    if cu_seqlens is None:
        return tl.full((), 0, tl.int32), T
    else:
        return tl.load(cu_seqlens + n).to(tl.int32), tl.load(cu_seqlens + n + 1).to(tl.int32)


@triton.jit
def _sequence_of_walk(b, first, T, N, cu_seqlens):
    """The sequence that a walk through batch row b begins in, and its bounds. first: the walk's first token, which
    may lie before 0."""
    n = b
    if cu_seqlens is not None:
        n = _sequence_at(tl.maximum(first, 0), tl.full((), 0, tl.int32), cu_seqlens, N)
    start, end = _bounds(n, cu_seqlens, T)
    return n, start, end


@triton.jit
def _enter(
    t, reset, window, age, n, start, end, d, D, T, N, initial_state, cu_seqlens, S: tl.constexpr, BD: tl.constexpr
):
    """Step on to token t: the window that it sees, and which sequence it is in. age: how far back its own document
    and sequence reach, or more: the token j before it is visible if j <= age."""
    age += 1
    if cu_seqlens is not None:
        if (t == end) & (t < T):
            n = _sequence_at(t, n + 1, cu_seqlens, N)
            start, end = _bounds(n, cu_seqlens, T)
    if cu_seqlens is not None or initial_state is not None:
        if t == start:
            window = _state(initial_state, n, d, D, S, BD)
            age = tl.zeros_like(age)
    if reset:
        window = _zeros(S, BD)
        age = tl.zeros_like(age)
    return window, age, n, start, end


@triton.jit
def _pre_activation(taps, weights, bias, W: tl.constexpr):
    pre = taps[0] * weights[0] + bias
    for i in tl.static_range(1, W):
        pre += taps[i] * weights[i]
    return pre


@triton.jit
def _dpre(dy, taps, weights, bias, W: tl.constexpr, SILU: tl.constexpr):
    """Gradient of the pre-activation."""
    dpre = dy.to(tl.float32)
    if SILU:
        pre = _pre_activation(taps, weights, bias, W)
        gate = tl.sigmoid(pre)
        dpre *= gate * (1 + pre * (1 - gate))
    return dpre


@triton.jit
def _parameters(weight, bias, d, D, W: tl.constexpr):
    weights = _columns(weight, tl.full((), 0, tl.int32), d, D, W)
    if bias is None:
        return weights, 0.0
    else:
        return weights, tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)


@triton.jit
def _forward_tokens(
    tile, d, x, weight, bias, initial_state, cu_seqlens, resets, y, x_stride_b, x_stride_t, T, D, N,
    W: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    S: tl.constexpr = W - 1
    tiles = tl.cdiv(T, ROWS - S)
    b = tile // tiles
    t0 = tile % tiles * (ROWS - S)
    first = t0 - S
    n, start, end = _sequence_of_walk(b, first, T, N, cu_seqlens)
    b = b.to(tl.int64)
    x += b * x_stride_b
    y += b * T * D
    if resets is not None:
        resets += b * T
    weights, offset = _parameters(weight, bias, d, D, W)
    window = _zeros(S, BD)
    age = tl.full((), W, tl.int32)
    for r in range(0, tl.minimum(ROWS, T - first), GROUP):
        flags = _flags(resets, first + r, T, GROUP)
        rows = _group(x, x_stride_t, first + r, 0, T, d, D, GROUP)
        for i in tl.static_range(GROUP):
            t = first + r + i
            window, age, n, start, end = _enter(
                t, flags[i], window, age, n, start, end, d, D, T, N, initial_state, cu_seqlens, S, BD
            )
            taps = window + (rows[i].to(tl.float32),)
            out = _pre_activation(taps, weights, offset, W)
            if SILU:
                out *= tl.sigmoid(out)
            out = cast(out, y.dtype.element_ty)
            tl.store(y + t.to(tl.int64) * D + d, out, mask=_channels(d, D, (t0 <= t) & (t < T)))
            window = taps[1:]


@triton.jit
def _forward_state(
    n, d, x, initial_state, cu_seqlens, resets, final_state, x_stride_b, x_stride_t, T, D,
    S: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The window after the last token of sequence n: its initial state moved on by at most S tokens."""
    start, end = _bounds(n, cu_seqlens, T)
    if cu_seqlens is None:
        x += n.to(tl.int64) * x_stride_b
        if resets is not None:
            resets += n.to(tl.int64) * T
    window = _state(initial_state, n, d, D, S, BD)
    for i in tl.static_range(S):
        t = end - S + i
        if t >= start:
            if resets is not None:
                if tl.load(resets + t) != 0:
                    window = _zeros(S, BD)
            row = _row(x, x_stride_t, t, start, end, d, D).to(tl.float32)
            window = (window + (row,))[1:]
    for i in tl.static_range(S):
        entry = cast(window[i], final_state.dtype.element_ty)
        tl.store(final_state + (n.to(tl.int64) * D + d) * S + i, entry, mask=d < D)


@triton.jit(do_not_specialize=["B", "T", "N"])
def causal_conv1d_forward_kernel(
    x, weight, bias, initial_state, cu_seqlens, resets, y, final_state, x_stride_b, x_stride_t, B, T, D, N,
    W: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Programs (tile or sequence, block of channels), channels fastest: B * tiles of tokens, then N final states."""
    blocks = tl.cdiv(D, BD)
    d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    tile = tl.program_id(0) // blocks
    tiles = B * tl.cdiv(T, ROWS - W + 1)
    if tile < tiles:
        _forward_tokens(
            tile, d, x, weight, bias, initial_state, cu_seqlens, resets, y, x_stride_b, x_stride_t, T, D, N,
            W, SILU, ROWS, GROUP, BD,
        )  # fmt: skip
    else:
        _forward_state(
            tile - tiles, d, x, initial_state, cu_seqlens, resets, final_state,
            x_stride_b, x_stride_t, T, D, W - 1, BD,
        )  # fmt: skip


@triton.jit
def _backward_tokens(
    tile, d, dy, dfinal_state, x, weight, bias, initial_state, cu_seqlens, resets, dx, partial,
    x_stride_b, x_stride_t, dy_stride_b, dy_stride_t, T, D, N,
    W: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Carries, next to the window, the gradient of each of its entries: what its row has received so far. A row that
    leaves the window has received all, and is written."""
    S: tl.constexpr = W - 1
    OWNED: tl.constexpr = ROWS - 2 * S
    tiles = tl.cdiv(T, OWNED)
    b = tile // tiles
    t0 = tile % tiles * OWNED
    first = t0 - S
    n, start, end = _sequence_of_walk(b, first, T, N, cu_seqlens)
    b = b.to(tl.int64)
    x += b * x_stride_b
    dx += b * T * D
    if dy is not None:
        dy += b * dy_stride_b
    if resets is not None:
        resets += b * T
    weights, offset = _parameters(weight, bias, d, D, W)
    window = _zeros(S, BD)
    dwindow = _zeros(S, BD)
    dweights = _zeros(W, BD)
    dbias = tl.zeros((BD,), tl.float32)
    age = tl.full((), W, tl.int32)
    for r in range(0, tl.minimum(ROWS, T + S - first), GROUP):
        flags = _flags(resets, first + r, T, GROUP)
        rows = _group(x, x_stride_t, first + r, 0, T, d, D, GROUP)
        if dy is None:
            dy_rows = _zeros(GROUP, BD)
        else:
            dy_rows = _group(dy, dy_stride_t, first + r, t0, T, d, D, GROUP)
        for i in tl.static_range(GROUP):
            t = first + r + i
            window, age, n, start, end = _enter(
                t, flags[i], window, age, n, start, end, d, D, T, N, initial_state, cu_seqlens, S, BD
            )
            taps = window + (rows[i].to(tl.float32),)
            # Past the end there is no token, only what is still in the window to be written; its sigmoid may be NaN.
            dpre = tl.where(t < T, _dpre(dy_rows[i], taps, weights, offset, W, SILU), 0.0)
            if (t >= t0) & (t < tl.minimum(t0 + OWNED, T)):
                sums = ()
                for j in tl.static_range(W):
                    sums = sums + (dweights[j] + dpre * taps[j],)
                dweights = sums
                dbias += dpre
            dtaps = ()
            for j in tl.static_range(W):
                old = dwindow[j] if j < S else tl.zeros((BD,), tl.float32)
                dtap = old + dpre * weights[j]
                if j < S and (cu_seqlens is not None or resets is not None):
                    dtap = tl.where(S - j <= age, dtap, old)
                dtaps = dtaps + (dtap,)
            if dfinal_state is not None:
                if t == end - 1:
                    dtaps = _receive(dtaps, _columns(dfinal_state, n, d, D, S), age, S)
            # Of the walk's first rows, before t0, the sums are not whole; they are another tile's.
            whole = cast(dtaps[0], dx.dtype.element_ty)
            tl.store(dx + (t - S).to(tl.int64) * D + d, whole, mask=_channels(d, D, (t0 <= t - S) & (t - S < T)))
            window, dwindow = taps[1:], dtaps[1:]
    SUMS: tl.constexpr = W if bias is None else W + 1
    partial += tile.to(tl.int64) * SUMS * D + d
    for j in tl.static_range(W):
        tl.store(partial + j * D, dweights[j], mask=d < D)
    if bias is not None:
        tl.store(partial + W * D, dbias, mask=d < D)


@triton.jit
def _receive(dtaps, dfinal, age, S: tl.constexpr):
    """Add the gradient of the final state, the taps of the last token less the oldest, where they are visible."""
    received = (dtaps[0],)
    for j in tl.static_range(S):
        received = received + (tl.where(S - 1 - j <= age, dtaps[j + 1] + dfinal[j], dtaps[j + 1]),)
    return received


@triton.jit
def _backward_state(
    n, d, dy, dfinal_state, x, weight, bias, initial_state, cu_seqlens, resets, dinitial_state,
    x_stride_b, x_stride_t, dy_stride_b, dy_stride_t, T, D,
    W: tl.constexpr, SILU: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The gradient of the initial state: from the first S tokens, and from the final state if they are fewer."""
    S: tl.constexpr = W - 1
    start, end = _bounds(n, cu_seqlens, T)
    if cu_seqlens is None:
        x += n.to(tl.int64) * x_stride_b
        if dy is not None:
            dy += n.to(tl.int64) * dy_stride_b
        if resets is not None:
            resets += n.to(tl.int64) * T
    weights, offset = _parameters(weight, bias, d, D, W)
    window = _columns(initial_state, n, d, D, S)
    dstate = _zeros(S, BD)
    visible = start <= end  # always; until a token resets
    for i in tl.static_range(S):
        t = start + i
        if resets is not None:
            visible = visible & (tl.load(resets + t, mask=t < end, other=0) == 0)
        if dy is not None:
            taps = window + (_row(x, x_stride_t, t, start, end, d, D).to(tl.float32),)
            dpre = _dpre(_row(dy, dy_stride_t, t, start, end, d, D), taps, weights, offset, W, SILU)
            sums = ()
            for j in tl.static_range(S):
                dtap = dstate[j]
                if j >= i:
                    dtap = tl.where(visible & (t < end), dtap + dpre * weights[j - i], dtap)
                sums = sums + (dtap,)
            dstate = sums
            window = taps[1:]
    for i in tl.static_range(S):
        dtap = dstate[i]
        if dfinal_state is not None:
            j = i - (end - start)  # where the final state holds this entry of the initial one
            passed = visible & (j >= 0)
            entry = tl.load(dfinal_state + (n.to(tl.int64) * D + d) * S + j, mask=_channels(d, D, passed), other=0.0)
            dtap += entry.to(tl.float32)
        dtap = cast(dtap, dinitial_state.dtype.element_ty)
        tl.store(dinitial_state + (n.to(tl.int64) * D + d) * S + i, dtap, mask=d < D)


@triton.jit(do_not_specialize=["B", "T", "N"])
def causal_conv1d_backward_kernel(
    dy, dfinal_state, x, weight, bias, initial_state, cu_seqlens, resets, dx, dinitial_state, partial,
    x_stride_b, x_stride_t, dy_stride_b, dy_stride_t, B, T, D, N,
    W: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Programs as forward: B * tiles of tokens, then N initial states where there are any.

    partial [B * tiles, W, D], or W + 1 with a bias: each tile's share of dweight and dbias."""
    blocks = tl.cdiv(D, BD)
    d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    tile = tl.program_id(0) // blocks
    tiles = B * tl.cdiv(T, ROWS - 2 * (W - 1))
    if tile < tiles:
        _backward_tokens(
            tile, d, dy, dfinal_state, x, weight, bias, initial_state, cu_seqlens, resets, dx, partial,
            x_stride_b, x_stride_t, dy_stride_b, dy_stride_t, T, D, N, W, SILU, ROWS, GROUP, BD,
        )  # fmt: skip
    elif initial_state is not None:
        _backward_state(
            tile - tiles, d, dy, dfinal_state, x, weight, bias, initial_state, cu_seqlens, resets,
            dinitial_state, x_stride_b, x_stride_t, dy_stride_b, dy_stride_t, T, D, W, SILU, BD,
        )  # fmt: skip


@triton.jit(do_not_specialize=["P"])
def causal_conv1d_sum_kernel(partial, dweight, dbias, P, D, W: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr):
    """partial [P, W or W + 1, D] -> dweight [D, W] and dbias [D]. Programs (W or W + 1, block of channels),
    channels fastest."""
    blocks = tl.cdiv(D, BD)
    d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    i = tl.program_id(0) // blocks
    SUMS: tl.constexpr = W if dbias is None else W + 1
    sums = tl.zeros((BP, BD), tl.float32)
    for p0 in range(0, P, BP):
        p = p0 + tl.arange(0, BP)
        offsets = (p[:, None].to(tl.int64) * SUMS + i) * D + d[None, :]
        sums += tl.load(partial + offsets, mask=(p[:, None] < P) & (d[None, :] < D), other=0.0)
    total = tl.sum(sums, 0)
    if i < W:
        tl.store(dweight + d * W + i, cast(total, dweight.dtype.element_ty), mask=d < D)
    elif dbias is not None:
        tl.store(dbias + d, cast(total, dbias.dtype.element_ty), mask=d < D)


def _config(vector, rows, warps=1):
    """A thread takes that many neighbouring channels, and loads that many rows at a time."""
    return dict(BD=32 * warps * vector, GROUP=rows, num_warps=warps, num_stages=1)


# By bytes of an element of x. The first is the one that the registers leave most loads in flight for.
FORWARD_CONFIGS = {
    2: (_config(4, 8), _config(8, 4), _config(8, 4, warps=4)),
    4: (_config(4, 4), _config(4, 4, warps=4), _config(2, 8)),
}
BACKWARD_CONFIGS = {
    2: (_config(4, 4), _config(8, 2), _config(4, 4, warps=4)),
    4: (_config(4, 4), _config(2, 4), _config(4, 4, warps=4)),
}


def _rows(x):
    """x with neighbouring channels next to each other; the other strides may be any."""
    return x if x is None or x.stride(2) == 1 else x.contiguous()


def _contiguous(*tensors):
    return [None if x is None else x.contiguous() for x in tensors]


def _strides(name, x):
    return {f"{name}_stride_b": 0 if x is None else x.stride(0), f"{name}_stride_t": 0 if x is None else x.stride(1)}


def _inputs(x, weight, bias, initial_state, cu_seqlens, resets):
    """The arguments that both kernels take, by name."""
    weight, bias, initial_state, cu_seqlens, resets = _contiguous(weight, bias, initial_state, cu_seqlens, resets)
    B, T, D = x.shape
    return dict(
        x=x, weight=weight, bias=bias, initial_state=initial_state, cu_seqlens=cu_seqlens,
        resets=None if resets is None else resets.view(torch.uint8),
        B=B, T=T, D=D, N=B if cu_seqlens is None else cu_seqlens.shape[0] - 1,
    ) | _strides("x", x)  # fmt: skip


def forward(x, weight, bias, silu, initial_state, cu_seqlens, resets):
    """y [B, T, D] and final_state [N, D, S], in x's dtype. No float64. cu_seqlens were checked."""
    x = _rows(x)
    inputs = _inputs(x, weight, bias, initial_state, cu_seqlens, resets)
    B, T, D = x.shape
    N, W = inputs["N"], weight.shape[1]
    y, final_state = x.new_empty((B, T, D)), x.new_empty((N, D, W - 1))
    programs = B * triton.cdiv(T, FORWARD_ROWS - W + 1) + N
    launching.launch(
        causal_conv1d_forward_kernel, lambda meta: (programs * triton.cdiv(D, meta["BD"]),),
        FORWARD_CONFIGS[x.element_size()],
        inputs | dict(y=y, final_state=final_state),
        dict(W=W, SILU=silu, ROWS=FORWARD_ROWS),
    )  # fmt: skip
    return y, final_state


def backward(dy, dfinal_state, x, weight, bias, silu, initial_state, cu_seqlens, resets):
    """dx, dweight, dbias and dinitial_state in their inputs' shapes and dtypes, the last two None where there was
    none. dy [B, T, D] and dfinal_state [N, D, S], or None for zeros."""
    x, dy = _rows(x), _rows(dy)
    inputs = _inputs(x, weight, bias, initial_state, cu_seqlens, resets)
    B, T, D = x.shape
    N, W = inputs["N"], weight.shape[1]
    tiles = B * triton.cdiv(T, BACKWARD_ROWS - 2 * (W - 1))
    programs = tiles if initial_state is None else tiles + N
    dx, dweight = x.new_empty((B, T, D)), weight.new_empty((D, W))
    dbias = None if bias is None else bias.new_empty(D)
    dinitial_state = None if initial_state is None else initial_state.new_empty((N, D, W - 1))
    partial = x.new_empty((tiles, W if bias is None else W + 1, D), dtype=torch.float32)
    launching.launch(
        causal_conv1d_backward_kernel, lambda meta: (programs * triton.cdiv(D, meta["BD"]),),
        BACKWARD_CONFIGS[x.element_size()],
        dict(dy=dy, dfinal_state=None if dfinal_state is None else dfinal_state.contiguous())
        | inputs | _strides("dy", dy) | dict(dx=dx, dinitial_state=dinitial_state, partial=partial),
        dict(W=W, SILU=silu, ROWS=BACKWARD_ROWS),
    )  # fmt: skip
    launching.launch(
        causal_conv1d_sum_kernel, lambda meta: (triton.cdiv(D, meta["BD"]) * partial.shape[1],),
        (dict(BP=64, BD=32, num_warps=4, num_stages=1),),
        dict(partial=partial, dweight=dweight, dbias=dbias, P=tiles, D=D), dict(W=W),
    )  # fmt: skip
    return dx, dweight, dbias, dinitial_state
