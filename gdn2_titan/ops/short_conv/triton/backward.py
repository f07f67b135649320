"""The kernels of the backward pass: gradients and each tile's sums; then the sums of these."""

import triton  # noqa: I001 - or each name of the long list below takes a line
import triton.language as tl

from ...triton.products import cast
from .walk import (
    channel_mask, enter, load_bounds, load_columns, load_flags, load_group, load_parameters, load_row,
    pre_activation_gradient, program, sequence_of_walk, the_one, zeros,
)  # fmt: skip

__all__ = ["causal_conv1d_backward_kernel", "causal_conv1d_sum_kernel"]


# Pointers to the batch row are moved here as in the forward kernel: Triton passes each one by itself.
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
    n, start, end = sequence_of_walk(b, first, T, N, cu_seqlens)
    b = b.to(tl.int64)
    x += b * x_stride_b
    dx += b * T * D
    if dy is not None:
        dy += b * dy_stride_b
    if resets is not None:
        resets += b * T
    weights, offset = load_parameters(weight, bias, d, D, W)
    window = zeros(S, BD)
    dwindow = zeros(S, BD)
    dweights = zeros(W, BD)
    dbias = tl.zeros((BD,), tl.float32)
    age = tl.full((), W, tl.int32)
    for r in range(0, tl.minimum(ROWS, T + S - first), GROUP):
        flags = load_flags(resets, first + r, T, GROUP)
        rows = load_group(x, x_stride_t, first + r, 0, T, d, D, GROUP)
        if dy is None:
            dy_rows = zeros(GROUP, BD)
        else:
            dy_rows = load_group(dy, dy_stride_t, first + r, t0, T, d, D, GROUP)
        for i in tl.static_range(GROUP):
            t = first + r + i
            window, age, n, start, end = enter(
                t, flags[i], window, age, n, start, end, d, D, T, N, initial_state, cu_seqlens, S, BD
            )
            taps = window + (rows[i].to(tl.float32),)
            # Past the end there is no token, only what is still in the window to be written; its sigmoid may be NaN.
            dpre = tl.where(t < T, pre_activation_gradient(dy_rows[i], taps, weights, offset, W, SILU), 0.0)
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
                    dtaps = _receive(dtaps, load_columns(dfinal_state, n, d, D, S), age, S)
            # Of the walk's first rows, before t0, the sums are not whole; they are another tile's.
            whole = cast(dtaps[0], dx.dtype.element_ty)
            tl.store(dx + (t - S).to(tl.int64) * D + d, whole, mask=channel_mask(d, D, (t0 <= t - S) & (t - S < T)))
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
    start, end = load_bounds(n, cu_seqlens, T)
    if cu_seqlens is None:
        x += n.to(tl.int64) * x_stride_b
        if dy is not None:
            dy += n.to(tl.int64) * dy_stride_b
        if resets is not None:
            resets += n.to(tl.int64) * T
    weights, offset = load_parameters(weight, bias, d, D, W)
    window = load_columns(initial_state, n, d, D, S)
    dstate = zeros(S, BD)
    visible = start <= end  # always; until a token resets
    for i in tl.static_range(S):
        t = start + i
        if resets is not None:
            visible = visible & (tl.load(resets + t, mask=t < end, other=0) == 0)
        if dy is not None:
            taps = window + (load_row(x, x_stride_t, t, start, end, d, D).to(tl.float32),)
            dpre = pre_activation_gradient(
                load_row(dy, dy_stride_t, t, start, end, d, D), taps, weights, offset, W, SILU
            )
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
            entry = tl.load(dfinal_state + (n.to(tl.int64) * D + d) * S + j, mask=channel_mask(d, D, passed), other=0.0)
            dtap += entry.to(tl.float32)
        dtap = cast(dtap, dinitial_state.dtype.element_ty)
        tl.store(dinitial_state + (n.to(tl.int64) * D + d) * S + i, dtap, mask=d < D)


@triton.jit(do_not_specialize=["B", "T", "N"])
def causal_conv1d_backward_kernel(
    dy_0, dy_1, dy_2, dfinal_state_0, dfinal_state_1, dfinal_state_2, x_0, x_1, x_2, weight_0, weight_1, weight_2,
    bias_0, bias_1, bias_2, initial_state_0, initial_state_1, initial_state_2, cu_seqlens, resets,
    dx_0, dx_1, dx_2, dinitial_state_0, dinitial_state_1, dinitial_state_2, partial,
    x_stride_b_0, x_stride_b_1, x_stride_b_2, x_stride_t_0, x_stride_t_1, x_stride_t_2,
    dy_stride_b_0, dy_stride_b_1, dy_stride_b_2, dy_stride_t_0, dy_stride_t_1, dy_stride_t_2, D_0, D_1, D_2, B, T, N,
    W: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Programs as forward: B * tiles of tokens, then N initial states where there are any.

    partial: for one tensor after the other [B * tiles, W, D], or W + 1 with a bias: each tile's share of dweight and
    dbias."""
    tile, i, d = program(D_0, D_1, D_2, BD)
    D = the_one(i, D_0, D_1, D_2)
    x = the_one(i, x_0, x_1, x_2)
    x_stride_b = the_one(i, x_stride_b_0, x_stride_b_1, x_stride_b_2)
    x_stride_t = the_one(i, x_stride_t_0, x_stride_t_1, x_stride_t_2)
    dy = dy_0
    if dy_0 is not None:
        dy = the_one(i, dy_0, dy_1, dy_2)
    dy_stride_b = the_one(i, dy_stride_b_0, dy_stride_b_1, dy_stride_b_2)
    dy_stride_t = the_one(i, dy_stride_t_0, dy_stride_t_1, dy_stride_t_2)
    dfinal_state = dfinal_state_0
    if dfinal_state_0 is not None:
        dfinal_state = the_one(i, dfinal_state_0, dfinal_state_1, dfinal_state_2)
    weight = the_one(i, weight_0, weight_1, weight_2)
    bias = bias_0
    if bias_0 is not None:
        bias = the_one(i, bias_0, bias_1, bias_2)
    initial_state = initial_state_0
    if initial_state_0 is not None:
        initial_state = the_one(i, initial_state_0, initial_state_1, initial_state_2)
    tiles = B * tl.cdiv(T, ROWS - 2 * (W - 1))
    if tile < tiles:
        dx = the_one(i, dx_0, dx_1, dx_2)
        SUMS: tl.constexpr = W if bias_0 is None else W + 1
        partial += sums_before(i, D_0, D_1, SUMS * tiles)
        _backward_tokens(
            tile, d, dy, dfinal_state, x, weight, bias, initial_state, cu_seqlens, resets, dx, partial,
            x_stride_b, x_stride_t, dy_stride_b, dy_stride_t, T, D, N, W, SILU, ROWS, GROUP, BD,
        )  # fmt: skip
    elif initial_state_0 is not None:
        dinitial_state = the_one(i, dinitial_state_0, dinitial_state_1, dinitial_state_2)
        _backward_state(
            tile - tiles, d, dy, dfinal_state, x, weight, bias, initial_state, cu_seqlens, resets,
            dinitial_state, x_stride_b, x_stride_t, dy_stride_b, dy_stride_t, T, D, W, SILU, BD,
        )  # fmt: skip


@triton.jit
def sums_before(i, D_0, D_1, rows):
    """Elements of the partial sums of the tensors before number i; rows: of such sums, each as long as D."""
    if D_1 is None:
        return 0
    else:
        before = tl.where(i == 0, 0, tl.where(i == 1, D_0, D_0 + D_1))
        return before.to(tl.int64) * rows


@triton.jit(do_not_specialize=["P"])
def causal_conv1d_sum_kernel(
    partial, dweight_0, dweight_1, dweight_2, dbias_0, dbias_1, dbias_2, D_0, D_1, D_2, P,
    W: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """partial, of each tensor [P, W or W + 1, D], -> dweight [D, W] and dbias [D]. Programs (W or W + 1, block of
    channels), channels fastest."""
    j, i, d = program(D_0, D_1, D_2, BD)
    D = the_one(i, D_0, D_1, D_2)
    dweight = the_one(i, dweight_0, dweight_1, dweight_2)
    SUMS: tl.constexpr = W if dbias_0 is None else W + 1
    partial += sums_before(i, D_0, D_1, SUMS * P)
    sums = tl.zeros((BP, BD), tl.float32)
    for p0 in range(0, P, BP):
        p = p0 + tl.arange(0, BP)
        offsets = (p[:, None].to(tl.int64) * SUMS + j) * D + d[None, :]
        sums += tl.load(partial + offsets, mask=(p[:, None] < P) & (d[None, :] < D), other=0.0)
    total = tl.sum(sums, 0)
    if j < W:
        tl.store(dweight + d * W + j, cast(total, dweight.dtype.element_ty), mask=d < D)
    elif dbias_0 is not None:
        dbias = the_one(i, dbias_0, dbias_1, dbias_2)
        tl.store(dbias + d, cast(total, dbias.dtype.element_ty), mask=d < D)
