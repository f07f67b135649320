"""Depthwise causal convolution of width 2 to 4 over packed documents: custom ops and the public function.

    pre_t = bias + sum_i weight[:, i] * x_{t - (W - 1) + i}        y_t = pre_t or silu(pre_t)

The past of a sequence's first tokens is its initial state or zero, that of a document's first tokens zero. Its kernels
are in ``windowed``, in PyTorch, and in ``triton``.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..checks import FLOAT_DTYPES, check_choice, check_cu_seqlens, check_flags, check_packing
from ..custom_op import define, differentiable, differentiable_once, no_autocast
from ..dispatch import BACKENDS, use_triton
from . import windowed

__all__ = ["causal_conv1d", "check_conv_inputs"]

WIDTHS = (2, 3, 4)
SILU = ("silu", "swish")


def _kernels(x, weight, bias, backend):
    """The module whose ``forward`` and ``backward`` serve a call."""
    tensors = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    if not all(use_triton(name, tensor, backend) for name, tensor in tensors.items()) or x.numel() == 0:
        return windowed
    from .triton import launches  # not before it is needed: Triton is not everywhere

    return launches


ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial_state, Tensor? cu_seqlens, Tensor? resets, "
    'str backend="auto"'
)


def _forward(x, weight, bias, silu, initial_state, cu_seqlens, resets, backend="auto"):
    """y [B, T, D] and final_state [N, D, S], which the op computes whether or not anybody asks for it."""
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, x.shape[1])
    with no_autocast(x):
        kernels = _kernels(x, weight, bias, backend)
        return kernels.forward(x, weight, bias, silu, initial_state, cu_seqlens, resets)


def _fake_forward(x, weight, bias, silu, initial_state, cu_seqlens, resets, backend="auto"):
    N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty((N, x.shape[2], weight.shape[1] - 1))


def _backward(dy, dfinal_state, x, weight, bias, silu, initial_state, cu_seqlens, resets, backend="auto"):
    """dx [B, T, D], dweight [D, W], dbias [D] and dinitial_state [N, D, S], the last two empty where there was none."""
    with no_autocast(x):
        kernels = _kernels(x, weight, bias, backend)
        grads = kernels.backward(dy, dfinal_state, x, weight, bias, silu, initial_state, cu_seqlens, resets)
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)


def _fake_backward(dy, dfinal_state, x, weight, bias, silu, initial_state, *rest):
    return tuple(x.new_empty(0) if y is None else y.new_empty(y.shape) for y in (x, weight, bias, initial_state))


_forward_op = define("gdn2_titan::causal_conv1d", f"({ARGUMENTS}) -> (Tensor, Tensor)", _forward, _fake_forward)
_backward_op = define(
    "gdn2_titan::causal_conv1d_backward",
    f"(Tensor? dy, Tensor? dfinal_state, {ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


def _setup_context(ctx, inputs, output):
    x, weight, bias, silu, initial_state, cu_seqlens, resets, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, initial_state, cu_seqlens, resets)
    ctx.silu, ctx.backend = silu, backend


def _gradients(ctx, dy, dfinal_state):
    if dy is None and dfinal_state is None:
        return ()
    x, weight, bias, initial_state, cu_seqlens, resets = ctx.saved_tensors
    dx, dweight, dbias, dinitial_state = _differentiable_backward(
        dy, dfinal_state, x, weight, bias, ctx.silu, initial_state, cu_seqlens, resets, ctx.backend
    )
    return (
        dx, dweight, None if bias is None else dbias, None, None if initial_state is None else dinitial_state
    )  # fmt: skip


_differentiable_forward = differentiable(_forward_op, _setup_context, _gradients)
_differentiable_backward = differentiable_once(_backward_op, "causal_conv1d")


@register_flop_formula(torch.ops.gdn2_titan.causal_conv1d)
def _forward_flops(x_shape, weight_shape, *args, **kwargs):
    B, T, D = x_shape
    return 2 * B * T * D * weight_shape[1]


@register_flop_formula(torch.ops.gdn2_titan.causal_conv1d_backward)
def _backward_flops(dy_shape, dfinal_state_shape, x_shape, weight_shape, *args, **kwargs):
    return 2 * _forward_flops(x_shape, weight_shape)


def check_conv_inputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, resets: Tensor | None,
) -> None:  # fmt: skip
    """Shapes, dtypes and devices only, so that it traces under torch.compile and costs no host synchronisation."""
    floats = {"x": x, "weight": weight, "bias": bias, "initial_state": initial_state}
    tensors = floats | {"cu_seqlens": cu_seqlens, "resets": resets}
    for name, tensor in tensors.items():
        if tensor is None and name not in ("x", "weight"):
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; it must be a torch.Tensor")
        if name in floats and tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name} has dtype {tensor.dtype}; it must be float16, bfloat16, float32 or float64")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}; it must be on x's device {x.device}")
    if activation not in (None, *SILU):
        raise ValueError(f"activation is {activation!r}; it must be None, 'silu' or 'swish'")
    if x.ndim != 3 or x.shape[2] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be [B, T, D], D at least 1")
    B, T, D = x.shape
    if weight.ndim != 2 or weight.shape[0] != D or weight.shape[1] not in WIDTHS:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be [D, W] with x's D = {D} and W 2, 3 or 4")
    if bias is not None and bias.shape != (D,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be [D] with x's D = {D}")
    N = check_packing("x", B, T, cu_seqlens, resets)
    if initial_state is not None:
        if initial_state.dtype != x.dtype:
            raise TypeError(f"initial_state has dtype {initial_state.dtype}; it must be x's dtype {x.dtype}")
        shape = (N, D, weight.shape[1] - 1)
        if initial_state.shape != shape:
            raise ValueError(f"initial_state has shape {tuple(initial_state.shape)}; it must be [N, D, W-1] = {shape}")


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
    check_choice("backend", backend, BACKENDS)
    check_flags(output_final_state=output_final_state)
    check_conv_inputs(x, weight, bias, activation, initial_state, cu_seqlens, resets)
    silu = activation in SILU
    y, final_state = _differentiable_forward(x, weight, bias, silu, initial_state, cu_seqlens, resets, backend)
    return y, final_state if output_final_state else None
