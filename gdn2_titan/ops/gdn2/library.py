"""torch.library: the operators ``torch.ops.gdn2_titan.*``, their shapes, their gradients and their FLOPs.

One functional op forward and one backward, opaque to the compiler. Every public function of ``functional`` ends here.
The PyTorch kernels serve any device, the Triton kernels GPUs.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..autograd import differentiable, once
from ..dispatch import use_triton
from . import chunked, tokenless
from .flops import backward_flops, forward_flops
from .gates import activate, compute_dtype
from .reference import recur_packed

__all__ = [
    "chunk_gdn2_backward_once", "differentiable_chunk_gdn2", "differentiable_recurrent_gdn2", "kernel_options",
    "kernels", "no_autocast", "recurrent_gdn2_inplace_op",
]  # fmt: skip


def kernel_options(l2norm, gate, sigmoid, erase_scale):
    return {"l2norm": l2norm, "gate": gate, "sigmoid": sigmoid, "erase_scale": erase_scale}


def kernels(q, v, backend):
    """The module whose ``chunk_forward``, ``chunk_backward`` and ``segment_forward`` serve a call."""
    triton = use_triton("q", q, backend, (q.shape[-1], v.shape[-1]))
    if q.numel() == 0:
        return tokenless
    if not triton:
        return chunked
    from .triton import chunk  # not before it is needed: Triton is not everywhere

    return chunk


def _recurrent_torch(
    q, k, v, g, b, w, A_log, dt_bias, initial_state, cu_seqlens, resets, scale, options, final_state=None
):
    """o and the final state, which is written to ``final_state`` where that is given; it may be the initial state."""
    (B, _, _, K), (HV, V), dtype = q.shape, v.shape[2:], compute_dtype(q)
    q, k, g, b, w = activate(q, k, g, b, w, A_log, dt_bias, resets, **options)
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = q.new_zeros(N, HV, K, V) if initial_state is None else initial_state.to(dtype, copy=True)
    o, state = recur_packed(q, k, v.to(dtype), g, b, w, state, scale, cu_seqlens)
    return o.to(v.dtype), state if final_state is None else final_state.copy_(state)


def _recurrent_kernel(q, v, backend):
    if not use_triton("q", q, backend, (q.shape[-1], v.shape[-1])) or q.numel() == 0:
        return _recurrent_torch
    from .triton import recurrent

    return recurrent.recurrent_forward


def no_autocast(x):
    """Autocast reaches into an op's eager body but not into its compiled call: the two must not differ."""
    return torch.autocast(x.device.type, enabled=False)


@torch.library.custom_op("gdn2_titan::chunk_gdn2", mutates_args=())
def chunk_gdn2_op(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor,
    A_log: Tensor | None, dt_bias: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, resets: Tensor | None,
    scale: float, l2norm: bool, gate: bool, sigmoid: bool, erase_scale: float, backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    with no_autocast(q):
        o, final_state = kernels(q, v, backend).chunk_forward(
            q, k, v, g, b, w, A_log, dt_bias, initial_state, cu_seqlens, resets, scale,
            kernel_options(l2norm, gate, sigmoid, erase_scale),
        )  # fmt: skip
    return o.contiguous(), final_state.contiguous()


@torch.library.custom_op("gdn2_titan::recurrent_gdn2", mutates_args=())
def recurrent_gdn2_op(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor,
    A_log: Tensor | None, dt_bias: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, resets: Tensor | None,
    scale: float, l2norm: bool, gate: bool, sigmoid: bool, erase_scale: float, backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    with no_autocast(q):
        o, final_state = _recurrent_kernel(q, v, backend)(
            q, k, v, g, b, w, A_log, dt_bias, initial_state, cu_seqlens, resets, scale,
            kernel_options(l2norm, gate, sigmoid, erase_scale),
        )  # fmt: skip
    return o.contiguous(), final_state.contiguous()


@torch.library.custom_op("gdn2_titan::recurrent_gdn2_", mutates_args={"state"})
def recurrent_gdn2_inplace_op(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor,
    A_log: Tensor | None, dt_bias: Tensor | None, state: Tensor,
    cu_seqlens: Tensor | None, resets: Tensor | None,
    scale: float, l2norm: bool, gate: bool, sigmoid: bool, erase_scale: float, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """o; ``state``, contiguous and in the compute dtype, is the initial state and becomes the final one."""
    with no_autocast(q):
        o, _ = _recurrent_kernel(q, v, backend)(
            q, k, v, g, b, w, A_log, dt_bias, state, cu_seqlens, resets, scale,
            kernel_options(l2norm, gate, sigmoid, erase_scale), final_state=state,
        )  # fmt: skip
    return o.contiguous()


@torch.library.custom_op("gdn2_titan::chunk_gdn2_backward", mutates_args=())
def chunk_gdn2_backward_op(
    do: Tensor | None, dfinal_state: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor,
    A_log: Tensor | None, dt_bias: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, resets: Tensor | None,
    scale: float, l2norm: bool, gate: bool, sigmoid: bool, erase_scale: float, backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, g, b, w, A_log, dt_bias, initial_state; empty where the input is absent."""
    with no_autocast(q):
        grads = kernels(q, v, backend).chunk_backward(
            do, dfinal_state, q, k, v, g, b, w, A_log, dt_bias, initial_state, cu_seqlens, resets, scale,
            kernel_options(l2norm, gate, sigmoid, erase_scale),
        )  # fmt: skip
    return tuple(q.new_empty(0) if x is None else x.contiguous() for x in grads)


def _fake_forward(q, k, v, g, b, w, A_log, dt_bias, initial_state, cu_seqlens, *rest):
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = q.new_empty((N, v.shape[2], q.shape[3], v.shape[3]), dtype=compute_dtype(q))
    return v.new_empty(v.shape), state


chunk_gdn2_op.register_fake(_fake_forward)
recurrent_gdn2_op.register_fake(_fake_forward)


@recurrent_gdn2_inplace_op.register_fake
def _(q, k, v, *rest):
    return v.new_empty(v.shape)


@chunk_gdn2_backward_op.register_fake
def _(do, dfinal_state, q, k, v, g, b, w, A_log, dt_bias, initial_state, *rest):
    return tuple(
        q.new_empty(0) if x is None else x.new_empty(x.shape)
        for x in (q, k, v, g, b, w, A_log, dt_bias, initial_state)
    )  # fmt: skip


TENSORS = 11  # the leading arguments of the forward ops; the rest are plain numbers


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:TENSORS])
    ctx.numbers = inputs[TENSORS:]


def _backward(ctx, do, dfinal_state):
    if do is None and dfinal_state is None:
        return (None,) * (TENSORS + len(ctx.numbers))
    inputs = ctx.saved_tensors
    # The recurrent op too: its gradient is the same function of the same inputs.
    grads = chunk_gdn2_backward_once(do, dfinal_state, *inputs, *ctx.numbers)
    present = [None if x is None else grad for x, grad in zip(inputs[:9], grads, strict=True)]
    return (*present, None, None, *(None for _ in ctx.numbers))


chunk_gdn2_op.register_autograd(_backward, setup_context=_setup_context)
recurrent_gdn2_op.register_autograd(_backward, setup_context=_setup_context)
differentiable_chunk_gdn2 = differentiable(chunk_gdn2_op, _setup_context, _backward)
differentiable_recurrent_gdn2 = differentiable(recurrent_gdn2_op, _setup_context, _backward)
chunk_gdn2_backward_once = once(chunk_gdn2_backward_op, "chunk_gdn2 and recurrent_gdn2")


def _sizes(q_shape, v_shape):
    B, T, H, K = q_shape
    return B * T, H, K, v_shape[2] // H * v_shape[3]


FORWARD_OPS = ("chunk_gdn2", "recurrent_gdn2", "recurrent_gdn2_")


@register_flop_formula([getattr(torch.ops.gdn2_titan, name) for name in FORWARD_OPS])
def _(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs):
    return forward_flops(*_sizes(q_shape, v_shape))


@register_flop_formula(torch.ops.gdn2_titan.chunk_gdn2_backward)
def _(do_shape, dfinal_shape, q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs):
    return backward_flops(*_sizes(q_shape, v_shape))
