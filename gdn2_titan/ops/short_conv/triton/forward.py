"""The kernel of the forward pass: one launch, of one tensor or of three."""

import triton  # noqa: I001 - or each name of the long list below takes a line
import triton.language as tl

from ...triton.products import cast
from .walk import (
    channel_mask, enter, load_bounds, load_flags, load_group, load_parameters, load_row, load_state, pre_activation,
    program, sequence_of_walk, the_one, zeros,
)  # fmt: skip

__all__ = ["causal_conv1d_forward_kernel"]


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
    n, start, end = sequence_of_walk(b, first, T, N, cu_seqlens)
    b = b.to(tl.int64)
    x += b * x_stride_b
    y += b * T * D
    if resets is not None:
        resets += b * T
    weights, offset = load_parameters(weight, bias, d, D, W)
    window = zeros(S, BD)
    age = tl.full((), W, tl.int32)
    for r in range(0, tl.minimum(ROWS, T - first), GROUP):
        flags = load_flags(resets, first + r, T, GROUP)
        rows = load_group(x, x_stride_t, first + r, 0, T, d, D, GROUP)
        for i in tl.static_range(GROUP):
            t = first + r + i
            window, age, n, start, end = enter(
                t, flags[i], window, age, n, start, end, d, D, T, N, initial_state, cu_seqlens, S, BD
            )
            taps = window + (rows[i].to(tl.float32),)
            out = pre_activation(taps, weights, offset, W)
            if SILU:
                out *= tl.sigmoid(out)
            out = cast(out, y.dtype.element_ty)
            tl.store(y + t.to(tl.int64) * D + d, out, mask=channel_mask(d, D, (t0 <= t) & (t < T)))
            window = taps[1:]


@triton.jit
def _forward_state(
    n, d, x, initial_state, cu_seqlens, resets, final_state, x_stride_b, x_stride_t, T, D,
    S: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The window after the last token of sequence n: its initial state moved on by at most S tokens."""
    start, end = load_bounds(n, cu_seqlens, T)
    if cu_seqlens is None:
        x += n.to(tl.int64) * x_stride_b
        if resets is not None:
            resets += n.to(tl.int64) * T
    window = load_state(initial_state, n, d, D, S, BD)
    for i in tl.static_range(S):
        t = end - S + i
        if t >= start:
            if resets is not None:
                if tl.load(resets + t) != 0:
                    window = zeros(S, BD)
            row = load_row(x, x_stride_t, t, start, end, d, D).to(tl.float32)
            window = (window + (row,))[1:]
    for i in tl.static_range(S):
        entry = cast(window[i], final_state.dtype.element_ty)
        tl.store(final_state + (n.to(tl.int64) * D + d) * S + i, entry, mask=d < D)


@triton.jit(do_not_specialize=["B", "T", "N"])
def causal_conv1d_forward_kernel(
    x_0, x_1, x_2, weight_0, weight_1, weight_2, bias_0, bias_1, bias_2, initial_state_0, initial_state_1,
    initial_state_2, cu_seqlens, resets, y_0, y_1, y_2, final_state_0, final_state_1, final_state_2,
    x_stride_b_0, x_stride_b_1, x_stride_b_2, x_stride_t_0, x_stride_t_1, x_stride_t_2, D_0, D_1, D_2, B, T, N,
    W: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Programs (tile or sequence, block of channels), channels fastest: B * tiles of tokens, then N final states."""
    tile, i, d = program(D_0, D_1, D_2, BD)
    D = the_one(i, D_0, D_1, D_2)
    x = the_one(i, x_0, x_1, x_2)
    x_stride_b = the_one(i, x_stride_b_0, x_stride_b_1, x_stride_b_2)
    x_stride_t = the_one(i, x_stride_t_0, x_stride_t_1, x_stride_t_2)
    initial_state = initial_state_0
    if initial_state_0 is not None:
        initial_state = the_one(i, initial_state_0, initial_state_1, initial_state_2)
    tiles = B * tl.cdiv(T, ROWS - W + 1)
    if tile < tiles:
        weight = the_one(i, weight_0, weight_1, weight_2)
        bias = bias_0
        if bias_0 is not None:
            bias = the_one(i, bias_0, bias_1, bias_2)
        y = the_one(i, y_0, y_1, y_2)
        _forward_tokens(
            tile, d, x, weight, bias, initial_state, cu_seqlens, resets, y, x_stride_b, x_stride_t, T, D, N,
            W, SILU, ROWS, GROUP, BD,
        )  # fmt: skip
    else:
        final_state = the_one(i, final_state_0, final_state_1, final_state_2)
        _forward_state(
            tile - tiles, d, x, initial_state, cu_seqlens, resets, final_state,
            x_stride_b, x_stride_t, T, D, W - 1, BD,
        )  # fmt: skip
