"""The short convolution on a GPU: one launch forward, two backward. Its PyTorch twin is ``windowed``.

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
from torch import Tensor

from ...triton import launching
from ..arguments import ConvInputs
from .backward import causal_conv1d_backward_kernel, causal_conv1d_sum_kernel
from .forward import causal_conv1d_forward_kernel

__all__ = ["backward", "forward"]

# Rows of a walk. Not candidates to tune: there is a partial sum for every walk.
FORWARD_ROWS = 32
BACKWARD_ROWS = 64


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


def _contiguous(x):
    return None if x is None else x.contiguous()


def _with_strides(name, x):
    """x with neighbouring channels next to each other, and its other strides, which may be any, by name."""
    x = x if x is None or x.stride(2) == 1 else x.contiguous()
    stride_b, stride_t = (0, 0) if x is None else x.stride()[:2]
    return {name: x, f"{name}_stride_b": stride_b, f"{name}_stride_t": stride_t}


def _arguments(inputs):
    """The arguments that both kernels take, by name."""
    B, T, D = inputs.x.shape
    others = ("weight", "bias", "initial_state", "cu_seqlens", "resets")
    arguments = {name: _contiguous(getattr(inputs, name)) for name in others}
    if inputs.resets is not None:
        arguments["resets"] = arguments["resets"].view(torch.uint8)
    return _with_strides("x", inputs.x) | arguments | dict(B=B, T=T, D=D, N=inputs.num_sequences)


def forward(inputs: ConvInputs) -> tuple[Tensor, Tensor]:
    """y [B, T, D] and final_state [N, D, S], in x's dtype. No float64. cu_seqlens were checked."""
    x, W = inputs.x, inputs.weight.shape[1]
    B, T, D = x.shape
    y, final_state = x.new_empty((B, T, D)), x.new_empty(inputs.state_shape)
    programs = B * triton.cdiv(T, FORWARD_ROWS - W + 1) + inputs.num_sequences
    launching.launch(
        causal_conv1d_forward_kernel, lambda meta: (programs * triton.cdiv(D, meta["BD"]),),
        FORWARD_CONFIGS[x.element_size()], _arguments(inputs) | dict(y=y, final_state=final_state),
        dict(W=W, SILU=inputs.silu, ROWS=FORWARD_ROWS),
    )  # fmt: skip
    return y, final_state


def backward(
    dy: Tensor | None, dfinal_state: Tensor | None, inputs: ConvInputs
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """dx, dweight, dbias and dinitial_state in their inputs' shapes and dtypes, the last two None where there was
    none. dy [B, T, D] and dfinal_state [N, D, S], or None for zeros."""
    x, weight, bias, initial_state = inputs.x, inputs.weight, inputs.bias, inputs.initial_state
    (B, T, D), W = x.shape, weight.shape[1]
    tiles = B * triton.cdiv(T, BACKWARD_ROWS - 2 * (W - 1))
    programs = tiles if initial_state is None else tiles + inputs.num_sequences
    dx, dweight = x.new_empty((B, T, D)), weight.new_empty((D, W))
    dbias = None if bias is None else bias.new_empty(D)
    dinitial_state = None if initial_state is None else initial_state.new_empty(inputs.state_shape)
    partial = x.new_empty((tiles, W if bias is None else W + 1, D), dtype=torch.float32)
    launching.launch(
        causal_conv1d_backward_kernel, lambda meta: (programs * triton.cdiv(D, meta["BD"]),),
        BACKWARD_CONFIGS[x.element_size()],
        _arguments(inputs) | _with_strides("dy", dy)
        | dict(dfinal_state=_contiguous(dfinal_state), dx=dx, dinitial_state=dinitial_state, partial=partial),
        dict(W=W, SILU=inputs.silu, ROWS=BACKWARD_ROWS),
    )  # fmt: skip
    launching.launch(
        causal_conv1d_sum_kernel, lambda meta: (triton.cdiv(D, meta["BD"]) * partial.shape[1],),
        (dict(BP=64, BD=32, num_warps=4, num_stages=1),),
        dict(partial=partial, dweight=dweight, dbias=dbias, P=tiles, D=D), dict(W=W),
    )  # fmt: skip
    return dx, dweight, dbias, dinitial_state
