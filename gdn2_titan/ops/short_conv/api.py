"""Depthwise causal convolution of width 2 to 4 over packed documents: custom ops and the public function.

    pre_t = bias + sum_i weight[:, i] * x_{t - (W - 1) + i}        y_t = pre_t or silu(pre_t)

The past of a sequence's first tokens is its initial state or zero, that of a document's first tokens zero. Its kernels
are in ``windowed``, in PyTorch, and in ``triton``.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..checks import check_cu_seqlens, check_flags
from ..custom_op import define, differentiable, differentiable_once, no_autocast
from ..dispatch import use_triton
from . import windowed
from .arguments import ConvInputs, checked_inputs

__all__ = ["causal_conv1d"]

ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial_state, Tensor? cu_seqlens, Tensor? resets, "
    'str backend="auto"'
)


def _kernels(inputs):
    """The module whose ``forward`` and ``backward`` serve a call."""
    parameters = {"x": inputs.x, "weight": inputs.weight, "bias": inputs.bias}
    served = all(use_triton(name, x, inputs.backend) for name, x in parameters.items() if x is not None)
    if not served or inputs.x.numel() == 0:
        return windowed
    from .triton import launches  # not before it is needed: Triton is not everywhere

    return launches


def _forward(*args):
    """y [B, T, D] and final_state [N, D, S], which the op computes whether or not anybody asks for it."""
    inputs = ConvInputs(*args)
    if inputs.cu_seqlens is not None:
        check_cu_seqlens(inputs.cu_seqlens, inputs.x.shape[1])
    with no_autocast(inputs.x):
        return _kernels(inputs).forward(inputs)


def _fake_forward(*args):
    inputs = ConvInputs(*args)
    return inputs.x.new_empty(inputs.x.shape), inputs.x.new_empty(inputs.state_shape)


def _backward(dy, dfinal_state, *args):
    """dx [B, T, D], dweight [D, W], dbias [D] and dinitial_state [N, D, S], the last two empty where there was none."""
    inputs = ConvInputs(*args)
    with no_autocast(inputs.x):
        grads = _kernels(inputs).backward(dy, dfinal_state, inputs)
    return tuple(inputs.x.new_empty(0) if grad is None else grad for grad in grads)


def _fake_backward(dy, dfinal_state, x, weight, bias, silu, initial_state, *rest):
    return tuple(x.new_empty(0) if y is None else y.new_empty(y.shape) for y in (x, weight, bias, initial_state))


_forward_op = define("gdn2_titan::causal_conv1d", f"({ARGUMENTS}) -> (Tensor, Tensor)", _forward, _fake_forward)
_backward_op = define(
    "gdn2_titan::causal_conv1d_backward",
    f"(Tensor? dy, Tensor? dfinal_state, {ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)", _backward, _fake_backward,
)  # fmt: skip


def _setup_context(ctx, args, output):
    x, weight, bias, ctx.silu, *others, ctx.backend = args
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, *others)


def _gradients(ctx, dy, dfinal_state):
    if dy is None and dfinal_state is None:
        return ()
    x, weight, bias, *others = ctx.saved_tensors
    inputs = ConvInputs(x, weight, bias, ctx.silu, *others, ctx.backend)
    dx, dweight, dbias, dinitial_state = _differentiable_backward(dy, dfinal_state, *inputs)
    dbias, dinitial_state = None if bias is None else dbias, None if inputs.initial_state is None else dinitial_state
    return dx, dweight, dbias, None, dinitial_state


_differentiable_forward = differentiable(_forward_op, _setup_context, _gradients)
_differentiable_backward = differentiable_once(_backward_op, "causal_conv1d")


@register_flop_formula(torch.ops.gdn2_titan.causal_conv1d)
def _forward_flops(x_shape, weight_shape, *args, **kwargs):
    B, T, D = x_shape
    return 2 * B * T * D * weight_shape[1]


@register_flop_formula(torch.ops.gdn2_titan.causal_conv1d_backward)
def _backward_flops(dy_shape, dfinal_state_shape, x_shape, weight_shape, *args, **kwargs):
    return 2 * _forward_flops(x_shape, weight_shape)


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, cu_seqlens: Tensor | None = None,
    resets: Tensor | None = None, backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Depthwise causal convolution over time, y_t = act(bias + sum_i weight[:, i] * x_{t - (W - 1) + i}).

    Args:
        x: [B, T, D], float16, bfloat16, float32 or float64, B and T any, 0 too.
        weight: [D, W] with W 2, 3 or 4; column W - 1 multiplies the current token. Any of x's dtypes, not
            necessarily the same one.
        bias: [D] or None, any of x's dtypes.
        activation: None, "silu" or "swish" (the same).
        initial_state: [N, D, W - 1] in x's dtype, the last W - 1 inputs before each sequence, oldest first; None for
            zeros. N is B, or the number of packed sequences.
        output_final_state: whether to return the state at the end of each sequence.
        cu_seqlens: [N + 1] int32 or int64, bounds of sequences packed end to end along T, from 0 to T; B must be 1.
            Each starts from zeros or its own initial state. A sequence may be empty: its state passes through. The op
            reads the values on the host to check them; `resets` needs no such synchronisation.
        resets: [B, T] bool, True where a token begins a new document: no tap reaches a token before it, nor the
            initial state, and the final state holds zeros for tokens of earlier documents than the last token's.
        backend: "auto" (Triton on a GPU that it serves, otherwise PyTorch; on a GPU that is said in the log once: no
            Triton, older than sm_80, x, weight or bias in float64), "triton" or "torch".

    Returns:
        y [B, T, D] in x's dtype, and final_state [N, D, W - 1] in x's dtype or None. Computed in float32, or float64
        if any of x, weight and bias is. Both are differentiable, once, in x, weight, bias and initial_state; each
        gradient has the dtype of its input.

    Raises:
        TypeError: an argument is no tensor or has a wrong dtype.
        ValueError: a wrong shape, device, activation or backend, a dtype or GPU that backend="triton" cannot serve, or
            cu_seqlens that do not run from 0 to T without falling.
    """
    check_flags(output_final_state=output_final_state)
    inputs = checked_inputs(x, weight, bias, activation, initial_state, cu_seqlens, resets, backend)
    y, final_state = _differentiable_forward(*inputs)
    return y, final_state if output_final_state else None
