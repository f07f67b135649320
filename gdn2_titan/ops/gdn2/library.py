"""torch.library: the operators ``torch.ops.gdn2_titan.*``, their shapes, their gradients and their FLOPs.

One functional op forward and one backward, opaque to the compiler. The PyTorch kernels serve any device, the Triton
kernels GPUs.
"""

from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..custom_op import define, differentiable, differentiable_once, no_autocast, overwriting
from ..dispatch import use_triton
from . import chunked, reference, tokenless
from .arguments import GDN2Inputs, GDN2Options
from .flops import backward_flops, forward_flops

__all__ = [
    "GATED", "GRADIENTS", "OPTIONS", "differentiable_chunk_gdn2", "differentiable_chunk_gdn2_backward",
    "differentiable_recurrent_gdn2", "inplace_recurrent_gdn2", "kernels", "or_empty",
]  # fmt: skip

GATED = "Tensor q, Tensor k, Tensor v, Tensor g, Tensor b, Tensor w, Tensor? A_log, Tensor? dt_bias"
OPTIONS = 'float scale, bool l2norm, bool gate, bool sigmoid, float erase_scale, str backend="auto"'
INPUTS = f"{GATED}, Tensor? initial_state, Tensor? cu_seqlens, Tensor? resets, {OPTIONS}"
GRADIENTS = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
TENSORS = len(GDN2Inputs._fields)
INPLACE_ARGUMENTS = TENSORS + len(GDN2Options._fields) + 1  # state_indices too


def _records(*args):
    """The arguments of an operator, whose positions are the fields of the two, the last one left out by default."""
    return GDN2Inputs(*args[:TENSORS]), GDN2Options(*args[TENSORS:])


def _use_triton(inputs, backend):
    return use_triton("q", inputs.q, backend, (inputs.q.shape[-1], inputs.v.shape[-1])) and inputs.q.numel() > 0


def kernels(inputs: GDN2Inputs, backend: str) -> ModuleType:
    """The module whose ``chunk_forward``, ``chunk_backward`` and ``segment_forward`` serve a call."""
    if _use_triton(inputs, backend):
        from .triton import chunk  # not before it is needed: Triton is not everywhere

        return chunk
    return chunked if inputs.q.numel() > 0 else tokenless


def or_empty(grads: GDN2Inputs) -> tuple[Tensor, ...]:
    """The gradients as a backward operator returns them: empty where the input is absent."""
    return tuple(grads.q.new_empty(0) if x is None else x.contiguous() for x in grads.differentiable)


def _chunk_forward(*args):
    inputs, options = _records(*args)
    with no_autocast(inputs.q):
        o, final_state = kernels(inputs, options.backend).chunk_forward(inputs, options)
    return o.contiguous(), final_state.contiguous()


def _recurrent_forward(*args):
    inputs, options = _records(*args)
    with no_autocast(inputs.q):
        if _use_triton(inputs, options.backend):
            from .triton import recurrent

            o, final_state = recurrent.recurrent_forward(inputs, options)
        else:
            o, final_state = reference.recurrent(inputs, options)
    return o.contiguous(), final_state.contiguous()


def _recurrent_inplace(*args):
    """o; ``state``, in the compute dtype, is the initial state and becomes the final one."""
    state_indices = args[INPLACE_ARGUMENTS - 1] if len(args) == INPLACE_ARGUMENTS else None
    inputs, options = _records(*args[: INPLACE_ARGUMENTS - 1])
    with no_autocast(inputs.q):
        if _use_triton(inputs, options.backend):
            from .triton import recurrent

            o, _ = recurrent.recurrent_forward(inputs, options, inputs.initial_state, state_indices)
        else:
            o = reference.update(inputs, options, inputs.initial_state, state_indices)
    return o.contiguous()


def _chunk_backward(do, dfinal_state, *args):
    inputs, options = _records(*args)
    with no_autocast(inputs.q):
        return or_empty(kernels(inputs, options.backend).chunk_backward(do, dfinal_state, inputs, options))


def _fake_forward(*args):
    inputs, _ = _records(*args)
    return inputs.v.new_empty(inputs.v.shape), inputs.q.new_empty(inputs.state_shape, dtype=inputs.compute_dtype)


def _fake_backward(do, dfinal_state, *args):
    inputs, _ = _records(*args)
    return or_empty(inputs.map(lambda x: x.new_empty(x.shape)))


_chunk_op = define("gdn2_titan::chunk_gdn2", f"({INPUTS}) -> (Tensor, Tensor)", _chunk_forward, _fake_forward)
_recurrent_op = define(
    "gdn2_titan::recurrent_gdn2", f"({INPUTS}) -> (Tensor, Tensor)", _recurrent_forward, _fake_forward
)
_inplace_op = define(
    "gdn2_titan::recurrent_gdn2_",
    f"({INPUTS}, Tensor? state_indices=None) -> Tensor".replace("Tensor? initial_state", "Tensor(a!) state"),
    _recurrent_inplace, lambda q, k, v, *rest: v.new_empty(v.shape),
)  # fmt: skip
_backward_op = define(
    "gdn2_titan::chunk_gdn2_backward", f"(Tensor? do, Tensor? dfinal_state, {INPUTS}) -> {GRADIENTS}",
    _chunk_backward, _fake_backward,
)  # fmt: skip


def _setup_context(ctx, args, output):
    ctx.set_materialize_grads(False)
    inputs, ctx.options = _records(*args)
    ctx.save_for_backward(*inputs)


def _backward(ctx, do, dfinal_state):
    if do is None and dfinal_state is None:
        return ()
    inputs = GDN2Inputs(*ctx.saved_tensors)
    # The recurrent op too: its gradient is the same function of the same inputs.
    grads = differentiable_chunk_gdn2_backward(do, dfinal_state, *inputs, *ctx.options)
    return tuple(None if x is None else grad for x, grad in zip(inputs.differentiable, grads, strict=True))


differentiable_chunk_gdn2 = differentiable(_chunk_op, _setup_context, _backward)
differentiable_recurrent_gdn2 = differentiable(_recurrent_op, _setup_context, _backward)
differentiable_chunk_gdn2_backward = differentiable_once(_backward_op, "chunk_gdn2 and recurrent_gdn2")
inplace_recurrent_gdn2 = overwriting(_inplace_op, "state")


def _sizes(q_shape, v_shape):
    B, T, H, K = q_shape
    return B * T, H, K, v_shape[2] // H * v_shape[3]


@register_flop_formula([op.overloadpacket for op in (_chunk_op, _recurrent_op, _inplace_op)])
def _(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs):
    return forward_flops(*_sizes(q_shape, v_shape))


@register_flop_formula(torch.ops.gdn2_titan.chunk_gdn2_backward)
def _(do_shape, dfinal_shape, q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs):
    return backward_flops(*_sizes(q_shape, v_shape))
