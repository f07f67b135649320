"""The operator of sequences that are cut into segments which run side by side on one device.

Forward, all segments run at once as maps of the state they are entered with (``segments``), side by side as rows of the
batch. Folding the maps gives the entering states, and o = o_0 + P S. Backward is the mirror image: P^T dO and the
transitions give the gradient of the state that each segment leaves, and the ordinary backward does the rest.

Forward returns what backward needs beside the inputs: P, the entering states and the transitions.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..autograd import differentiable, once
from .flops import backward_flops, forward_flops
from .gates import compute_dtype
from .library import kernel_options, kernels, no_autocast
from .maps import apply, apply_transposed, read, read_transposed

__all__ = ["differentiable_segmented_gdn2"]


def _rows(x, segments):
    """x [B, T, ...] or None -> its segments as rows of the batch [B * segments, T / segments, ...]."""
    return None if x is None else x.unflatten(1, (segments, -1)).flatten(0, 1)


@torch.library.custom_op("gdn2_titan::segmented_gdn2", mutates_args=())
def segmented_gdn2_op(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor,
    A_log: Tensor | None, dt_bias: Tensor | None, initial_state: Tensor | None, resets: Tensor | None, segments: int,
    scale: float, l2norm: bool, gate: bool, sigmoid: bool, erase_scale: float, backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``chunk_gdn2`` of T tokens that ``segments`` divides: o and the final state. Then, for backward, P [B, T, H, K]
    in q's dtype, entering states [B, segments, HV, K, V] and transitions [B, segments, H, K, K]."""
    with no_autocast(q):
        o, P, M, D = kernels(q, v, backend).segment_forward(
            *(_rows(x, segments) for x in (q, k, v, g, b, w)), A_log, dt_bias, _rows(resets, segments), scale,
            kernel_options(l2norm, gate, sigmoid, erase_scale),
        )  # fmt: skip
        M, D = M.unflatten(0, (-1, segments)), D.unflatten(0, (-1, segments))
        state = torch.zeros_like(D[:, 0]) if initial_state is None else initial_state.to(D.dtype)
        entering = torch.empty_like(D, memory_format=torch.contiguous_format)
        for i in range(segments):
            entering[:, i] = state
            state = D[:, i] + apply(M[:, i], state)
        o = (o + read(P, entering.flatten(0, 1))).to(v.dtype).view(v.shape)
    return o.contiguous(), state.contiguous(), P.reshape(q.shape).contiguous(), entering, M.contiguous()


@segmented_gdn2_op.register_fake
def _(q, k, v, g, b, w, A_log, dt_bias, initial_state, resets, segments, *rest):
    (B, _, H, K), (HV, V), dtype = q.shape, v.shape[2:], compute_dtype(q)
    shapes = (B, HV, K, V), (B, segments, HV, K, V), (B, segments, H, K, K)
    final_state, entering, transitions = (q.new_empty(shape, dtype=dtype) for shape in shapes)
    return v.new_empty(v.shape), final_state, q.new_empty(q.shape), entering, transitions


@torch.library.custom_op("gdn2_titan::segmented_gdn2_backward", mutates_args=())
def segmented_gdn2_backward_op(
    do: Tensor | None, dfinal_state: Tensor | None, read_rows: Tensor, entering: Tensor, transitions: Tensor,
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor,
    A_log: Tensor | None, dt_bias: Tensor | None, initial_state: Tensor | None, resets: Tensor | None, segments: int,
    scale: float, l2norm: bool, gate: bool, sigmoid: bool, erase_scale: float, backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, g, b, w, A_log, dt_bias, initial_state; empty where the input is absent."""
    with no_autocast(q):
        leaving = torch.empty_like(entering)  # gradients of the states that segments leave
        dstate = torch.zeros_like(entering[:, 0]) if dfinal_state is None else dfinal_state.to(entering.dtype)
        do = _rows(do, segments)
        dD = torch.zeros_like(entering) if do is None else read_transposed(
            _rows(read_rows, segments), do, entering.dtype
        ).view(entering.shape)  # fmt: skip
        for i in reversed(range(segments)):
            leaving[:, i] = dstate
            dstate = dD[:, i] + apply_transposed(transitions[:, i], dstate)
        tensors = q, k, v, g, b, w
        *grads, dA_log, ddt_bias, _ = kernels(q, v, backend).chunk_backward(
            do, leaving.flatten(0, 1), *(_rows(x, segments) for x in tensors), A_log, dt_bias, entering.flatten(0, 1),
            None, _rows(resets, segments), scale, kernel_options(l2norm, gate, sigmoid, erase_scale),
        )  # fmt: skip
        grads = [grad.view(x.shape) for grad, x in zip(grads, tensors, strict=True)]
        dinitial_state = None if initial_state is None else dstate.to(initial_state.dtype)
    return tuple(q.new_empty(0) if x is None else x.contiguous() for x in (*grads, dA_log, ddt_bias, dinitial_state))


@segmented_gdn2_backward_op.register_fake
def _(do, dfinal_state, read_rows, entering, transitions, q, k, v, g, b, w, A_log, dt_bias, initial_state, *rest):
    inputs = q, k, v, g, b, w, A_log, dt_bias, initial_state
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


TENSORS = 10  # the leading arguments of the forward op


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*output[2:], *inputs[:TENSORS])
    ctx.numbers = inputs[TENSORS:]


def _backward(ctx, do, dfinal_state, *others):
    if do is None and dfinal_state is None:
        return (None,) * (TENSORS + len(ctx.numbers))
    saved = ctx.saved_tensors
    grads = segmented_gdn2_backward_once(do, dfinal_state, *saved, *ctx.numbers)
    present = [None if x is None else grad for x, grad in zip(saved[3:12], grads, strict=True)]
    return (*present, None, *(None for _ in ctx.numbers))


segmented_gdn2_op.register_autograd(_backward, setup_context=_setup_context)
differentiable_segmented_gdn2 = differentiable(segmented_gdn2_op, _setup_context, _backward)
segmented_gdn2_backward_once = once(segmented_gdn2_backward_op, "chunk_gdn2")


def _map_products(q_shape, v_shape, segments):
    """FLOPs of P S or P^T dO, and of M S or M^T dS."""
    (B, T, _, K), (HV, V) = q_shape, v_shape[2:]
    return 2 * B * HV * K * V * (T + segments * K)


@register_flop_formula(torch.ops.gdn2_titan.segmented_gdn2)
def _(q_shape, k_shape, v_shape, g, b, w, A_log, dt_bias, state, resets, segments, *args, out_shape=None, **kwargs):
    (B, T, H, K), (HV, V) = q_shape, v_shape[2:]
    return forward_flops(B * T, H, K, HV // H * V + K) + _map_products(q_shape, v_shape, segments)


@register_flop_formula(torch.ops.gdn2_titan.segmented_gdn2_backward)
def _(do, dfinal, P, entering, transitions, q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs):
    (B, T, H, K), (HV, V) = q_shape, v_shape[2:]
    return backward_flops(B * T, H, K, HV // H * V) + _map_products(q_shape, v_shape, entering[1])
