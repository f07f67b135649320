"""A segment of a sequence as a map: what it does whose entering state is not known yet.

The recurrence is linear in the state, so that over any number of tokens

    S_out = M S_in + D        o = o_0 + P S_in

with M [K, K], the product of all (I - k_t (b_t * k_t)^T) Diag(exp(g_t)), with D [K, V] the state and o_0 the outputs
that come of S_in = 0, and with a row P_t = scale * q_t^T M_t of each token, where M_t is the product up to it. M and P
know nothing of the values: one per key head. A reset makes M and all later rows of P exact zeros.

They are K more columns of the value axis, with nothing written into them and S_in = I: the ordinary kernels, once.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..autograd import differentiable
from ..checks import check_choice, check_flags, check_inputs
from ..dispatch import BACKENDS
from .flops import forward_flops
from .gates import compute_dtype
from .library import chunk_gdn2_backward_once, kernel_options, kernels, no_autocast

__all__ = ["segment_gdn2_op", "segment_summary"]


@torch.library.custom_op("gdn2_titan::segment_gdn2", mutates_args=())
def segment_gdn2_op(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor,
    A_log: Tensor | None, dt_bias: Tensor | None, resets: Tensor | None,
    scale: float, l2norm: bool, gate: bool, sigmoid: bool, erase_scale: float, backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """o_0 [B, T, HV, V] and P [B, T, H, K] in q's dtype, M [B, H, K, K] and D [B, HV, K, V] in the compute dtype."""
    with no_autocast(q):
        results = kernels(q, v, backend).segment_forward(
            q, k, v, g, b, w, A_log, dt_bias, resets, scale, kernel_options(l2norm, gate, sigmoid, erase_scale)
        )
    return tuple(x.contiguous() for x in results)


@segment_gdn2_op.register_fake
def _(q, k, v, *rest):
    (B, _, H, K), (HV, V), dtype = q.shape, v.shape[2:], compute_dtype(q)
    M, D = (q.new_empty(shape, dtype=dtype) for shape in ((B, H, K, K), (B, HV, K, V)))
    return v.new_empty(v.shape), q.new_empty(q.shape), M, D


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:9])
    ctx.numbers = inputs[9:]


def _backward(ctx, do, dread, dtransition, dcontribution):
    """The columns of the value axis have nothing to do with each other: those of the values, and those of the map."""
    q, k, v, g, b, w, A_log, dt_bias, resets = ctx.saved_tensors
    of_values = of_map = (None,) * 9
    if do is not None or dcontribution is not None:
        of_values = chunk_gdn2_backward_once(
            do, dcontribution, q, k, v, g, b, w, A_log, dt_bias, None, None, resets, *ctx.numbers
        )
    if dread is not None or dtransition is not None:
        identity = torch.eye(q.shape[-1], dtype=compute_dtype(q), device=q.device)
        identity = identity.expand(q.shape[0], q.shape[2], -1, -1).contiguous()
        nothing = torch.zeros_like(q)
        of_map = chunk_gdn2_backward_once(
            dread, dtransition, q, k, nothing, g, b, nothing, A_log, dt_bias, identity, None, resets, *ctx.numbers
        )
        of_map = [None if i in (2, 5) else x for i, x in enumerate(of_map)]
    grads = []
    for x, a, b_ in zip((q, k, v, g, b, w, A_log, dt_bias), of_values[:8], of_map[:8], strict=True):
        given = [grad for grad in (a, b_) if grad is not None]
        grads.append(sum(given[1:], given[0]) if given and x is not None else None)
    return (*grads, None, *(None for _ in ctx.numbers))


segment_gdn2_op.register_autograd(_backward, setup_context=_setup_context)
_differentiable_segment_gdn2 = differentiable(segment_gdn2_op, _setup_context, _backward)


@register_flop_formula(torch.ops.gdn2_titan.segment_gdn2)
def _(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs):
    B, T, H, K = q_shape
    return forward_flops(B * T, H, K, v_shape[2] // H * v_shape[3] + K)


def segment_summary(
    k, v, g, b, w,
    use_qk_l2norm_in_kernel=False,
    use_gate_in_kernel=False,
    A_log=None,
    dt_bias=None,
    use_sigmoid_in_kernel=False,
    erase_scale=1.0,
    resets=None,
    backend="auto",
):  # fmt: skip
    """A segment of a sequence as an affine map of the state (arXiv 2605.22791's recurrence is linear in it).

    Args:
        k, v, g, b, w, A_log, dt_bias, erase_scale, resets, use_gate_in_kernel, use_sigmoid_in_kernel: of
            :func:`chunk_gdn2`.
        use_qk_l2norm_in_kernel: use k / sqrt(sum(k^2) + 1e-6).
        backend: "auto", "triton" or "torch".

    Returns:
        M [B, H, K, K] and D [B, HV, K, V], float64 for float64 inputs and float32 otherwise, both differentiable, once:
        the state that leaves the segment is M S + D for a state S [B, HV, K, V] that enters it, where value head j
        takes M of key head j // (HV // H). Two segments in a row are M = M2 M1, D = M2 D1 + D2. A reset makes M zero.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is allowed.
    """
    check_choice("backend", backend, BACKENDS)
    check_flags(
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, use_gate_in_kernel=use_gate_in_kernel,
        use_sigmoid_in_kernel=use_sigmoid_in_kernel,
    )  # fmt: skip
    scale = check_inputs(
        k, k, v, g, b, w, 1.0, None, use_gate_in_kernel, A_log, dt_bias,
        use_sigmoid_in_kernel, erase_scale, None, resets,
    )  # fmt: skip
    _, _, M, D = _differentiable_segment_gdn2(
        k, k, v, g, b, w, A_log, dt_bias, resets, scale,
        use_qk_l2norm_in_kernel, use_gate_in_kernel, use_sigmoid_in_kernel, float(erase_scale), backend,
    )  # fmt: skip
    return M, D
