"""The kernel of a step of decoding: one launch, of one tensor or of three, that overwrites the states."""

import triton
import triton.language as tl

from ...triton.products import cast
from .walk import (
    channel_mask,
    load_bounds,
    load_parameters,
    load_row,
    load_state,
    pre_activation,
    program,
    the_one,
    zeros,
)

__all__ = ["causal_conv1d_update_kernel"]


@triton.jit(do_not_specialize=["T"])
def causal_conv1d_update_kernel(
    x_0, x_1, x_2, weight_0, weight_1, weight_2, bias_0, bias_1, bias_2, state_0, state_1, state_2,
    cu_seqlens, resets, state_indices, y_0, y_1, y_2, x_stride_b_0, x_stride_b_1, x_stride_b_2,
    x_stride_t_0, x_stride_t_1, x_stride_t_2, block_stride_0, block_stride_1, block_stride_2, D_0, D_1, D_2, T,
    W: tl.constexpr, SILU: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Programs (sequence, block of channels), channels fastest: all tokens of the sequence, and its state, which no
    other program reads.

    state [N, D, S], or with state_indices [N] a pool of blocks [D, S]; entries lie block_stride apart."""
    S: tl.constexpr = W - 1
    n, i, d = program(D_0, D_1, D_2, BD)
    D = the_one(i, D_0, D_1, D_2)
    x = the_one(i, x_0, x_1, x_2)
    x_stride_t = the_one(i, x_stride_t_0, x_stride_t_1, x_stride_t_2)
    y = the_one(i, y_0, y_1, y_2)
    start, end = load_bounds(n, cu_seqlens, T)
    if cu_seqlens is None:
        row = n.to(tl.int64)
        x += row * the_one(i, x_stride_b_0, x_stride_b_1, x_stride_b_2)
        y += row * T * D
        if resets is not None:
            resets += row * T
    block = n.to(tl.int64)
    if state_indices is not None:
        block = tl.load(state_indices + n).to(tl.int64)
        if block < 0:
            for i_t in range(0, end - start):
                t = start + i_t
                tl.store(y + t.to(tl.int64) * D + d, tl.zeros((BD,), y.dtype.element_ty), mask=d < D)
            return
    state = the_one(i, state_0, state_1, state_2)
    state += block * the_one(i, block_stride_0, block_stride_1, block_stride_2)
    bias = bias_0
    if bias_0 is not None:
        bias = the_one(i, bias_0, bias_1, bias_2)
    weights, offset = load_parameters(the_one(i, weight_0, weight_1, weight_2), bias, d, D, W)
    window = load_state(state, tl.full((), 0, tl.int32), d, D, S, BD)
    for i_t in range(0, end - start):
        t = start + i_t
        if resets is not None:
            if tl.load(resets + t) != 0:
                window = zeros(S, BD)
        taps = window + (load_row(x, x_stride_t, t, start, end, d, D).to(tl.float32),)
        out = pre_activation(taps, weights, offset, W)
        if SILU:
            out *= tl.sigmoid(out)
        out = cast(out, y.dtype.element_ty)
        tl.store(y + t.to(tl.int64) * D + d, out, mask=channel_mask(d, D, t < end))
        window = taps[1:]
    for j in tl.static_range(S):
        tl.store(state + d * S + j, cast(window[j], state.dtype.element_ty), mask=d < D)
