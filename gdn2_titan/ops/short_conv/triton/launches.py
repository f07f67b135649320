"""The short convolution on a GPU: one launch forward, two backward, one for a step of decoding; of one tensor or of
three (q, k and v) alike. Its PyTorch twin is ``windowed``.

A program takes BD channels of a tile of consecutive tokens and walks over them in time. It carries the window, the
S = W - 1 inputs before the current token, so that every row is read once and nothing is shared between threads. A
reset, or the start of a packed sequence, replaces the window there and then: what it hides is never multiplied.

A walk has ROWS rows, of which a tile owns those that it writes: forward all but the S rows before them, which fill the
window; backward also all but the S rows after them, whose gradients reach back into the tile. Sums over tokens, for
the weight and the bias, go by tile into a buffer of their own that the second launch adds up, always in one order.

The states at the two ends of each sequence, S rows, belong to programs of their own in the same launch. Where a state
is overwritten, in a step of decoding, one program has all tokens of a sequence and its state.

Three tensors lie side by side in the grid: a program finds by its number which of them its channels belong to. Nothing
is copied together, and a tensor's numbers are those of a call of its own.

Shapes: x, y and their gradients [B, T, D]; states [N, D, S]; weight [D, W]; a row or one entry of a window [BD] fp32.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from ...triton import launching
from ..arguments import ConvInputs
from .backward import causal_conv1d_backward_kernel, causal_conv1d_sum_kernel
from .forward import causal_conv1d_forward_kernel
from .update import causal_conv1d_update_kernel

__all__ = ["backward", "forward", "update"]

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
# The one candidate: measuring several would take several steps of a state that is updated in place. No more threads
# than channels, so that no two hold the same number (AMD's warps have 64 threads).
UPDATE_CONFIG = dict(BD=256, num_warps=4, num_stages=1)
MOST_PARTS = 3


def _contiguous(x):
    return None if x is None else x.contiguous()


def _numbered(name, values):
    """The kernels' arguments name_0, name_1 and name_2, None for those that are not there."""
    return {f"{name}_{i}": values[i] if i < len(values) else None for i in range(MOST_PARTS)}


def _with_strides(name, xs):
    """Tensors [B, T, D] with neighbouring channels next to each other, and their other strides, which may be any."""
    xs = [x if x is None or x.stride(2) == 1 else x.contiguous() for x in xs]
    strides = [(0, 0) if x is None else x.stride()[:2] for x in xs]
    strides_b, strides_t = zip(*strides, strict=True)
    return _numbered(name, xs) | _numbered(f"{name}_stride_b", strides_b) | _numbered(f"{name}_stride_t", strides_t)


def _arguments(parts):
    """The arguments that all kernels take, by name."""
    first = parts[0]
    resets = _contiguous(first.resets)
    arguments = _with_strides("x", [part.x for part in parts])
    for name in ("weight", "bias"):
        arguments |= _numbered(name, [_contiguous(getattr(part, name)) for part in parts])
    arguments |= _numbered("D", [part.x.shape[2] for part in parts])
    arguments |= dict(cu_seqlens=_contiguous(first.cu_seqlens), T=first.x.shape[1])
    return arguments | dict(resets=None if resets is None else resets.view(torch.uint8))


def _initial_states(parts):
    first = parts[0]
    states = _numbered("initial_state", [_contiguous(part.initial_state) for part in parts])
    return states | dict(B=first.x.shape[0], N=first.num_sequences)


def _grid(parts, rows):
    """So many rows of programs, each a block of channels of one of the tensors."""
    return lambda meta: (rows * sum(triton.cdiv(part.x.shape[2], meta["BD"]) for part in parts),)


def forward(parts: Sequence[ConvInputs]) -> list[tuple[Tensor, Tensor]]:
    """For each of one or three tensors y [B, T, D] and final_state [N, D, S], in x's dtype. No float64. cu_seqlens were
    checked. The parts agree in all but x, weight, bias and initial_state; of these in dtypes, B, T and W, and in what
    is there."""
    x, W = parts[0].x, parts[0].weight.shape[1]
    B, T, _ = x.shape
    results = [(part.x.new_empty(part.x.shape), part.x.new_empty(part.state_shape)) for part in parts]
    ys, final_states = zip(*results, strict=True)
    rows = B * triton.cdiv(T, FORWARD_ROWS - W + 1) + parts[0].num_sequences
    launching.launch(
        causal_conv1d_forward_kernel, _grid(parts, rows), FORWARD_CONFIGS[x.element_size()],
        _arguments(parts) | _initial_states(parts) | _numbered("y", ys) | _numbered("final_state", final_states),
        dict(W=W, SILU=parts[0].silu, ROWS=FORWARD_ROWS),
    )  # fmt: skip
    return results


def backward(
    dys: Sequence[Tensor | None], dfinal_states: Sequence[Tensor | None], parts: Sequence[ConvInputs]
) -> list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]:
    """For each of one or three tensors dx, dweight, dbias and dinitial_state in their inputs' shapes and dtypes, the
    last two None where there was none. dys [B, T, D], all of them or None, for zeros; dfinal_states [N, D, S]
    likewise."""
    x, W = parts[0].x, parts[0].weight.shape[1]
    B, T, _ = x.shape
    tiles = B * triton.cdiv(T, BACKWARD_ROWS - 2 * (W - 1))
    rows = tiles if parts[0].initial_state is None else tiles + parts[0].num_sequences
    dxs, dweights, dbiases, dinitial_states = (
        [None if given is None else given.new_empty(given.shape) for given in (getattr(part, name) for part in parts)]
        for name in ("x", "weight", "bias", "initial_state")
    )
    sums = W if parts[0].bias is None else W + 1
    partial = x.new_empty(tiles * sums * sum(part.x.shape[2] for part in parts), dtype=torch.float32)
    launching.launch(
        causal_conv1d_backward_kernel, _grid(parts, rows), BACKWARD_CONFIGS[x.element_size()],
        _arguments(parts) | _initial_states(parts) | _with_strides("dy", dys)
        | _numbered("dfinal_state", [_contiguous(dstate) for dstate in dfinal_states])
        | _numbered("dx", dxs) | _numbered("dinitial_state", dinitial_states) | dict(partial=partial),
        dict(W=W, SILU=parts[0].silu, ROWS=BACKWARD_ROWS),
    )  # fmt: skip
    launching.launch(
        causal_conv1d_sum_kernel, _grid(parts, sums), (dict(BP=64, BD=32, num_warps=4, num_stages=1),),
        dict(partial=partial, P=tiles) | _numbered("dweight", dweights) | _numbered("dbias", dbiases)
        | _numbered("D", [part.x.shape[2] for part in parts]), dict(W=W),
    )  # fmt: skip
    return list(zip(dxs, dweights, dbiases, dinitial_states, strict=True))


def update(parts: Sequence[ConvInputs], state_indices: Tensor | None) -> list[Tensor]:
    """For each of one or three tensors y [B, T, D]. The initial states, or those of their blocks that state_indices [N]
    names, become the final ones. A sequence at block -1 is left out: its y is zero."""
    ys = [part.x.new_empty(part.x.shape) for part in parts]
    states = [part.initial_state for part in parts]
    launching.launch(
        causal_conv1d_update_kernel, _grid(parts, parts[0].num_sequences), (UPDATE_CONFIG,),
        _arguments(parts) | _numbered("state", states) | _numbered("block_stride", [x.stride(0) for x in states])
        | _numbered("y", ys) | dict(state_indices=_contiguous(state_indices)),
        dict(W=parts[0].weight.shape[1], SILU=parts[0].silu),
    )  # fmt: skip
    return ys
