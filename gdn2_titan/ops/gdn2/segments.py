"""A segment of a sequence as a map: what it does whose entering state is not known yet.

The recurrence is linear in the state, so that over any number of tokens

    S_out = M S_in + D        o = o_0 + P S_in

with M [K, K], the product of all (I - k_t (b_t * k_t)^T) Diag(exp(g_t)), with D [K, V] the state and o_0 the outputs
that come of S_in = 0, and with a row P_t = scale * q_t^T M_t of each token, where M_t is the product up to it. M and P
know nothing of the values: one per key head. A reset makes M and all later rows of P exact zeros.

They are K more columns of the value axis, with nothing written into them and S_in = I: the ordinary kernels, once.
Where nothing is erased M is diagonal, and both are decays.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..custom_op import define, differentiable, no_autocast
from .arguments import GDN2Inputs, GDN2Options, check_arguments
from .flops import segment_flops
from .library import GATED, OPTIONS, differentiable_chunk_gdn2_backward, kernels

__all__ = ["segment_gdn2", "segment_summary"]


def _records(*args):
    q, k, v, g, b, w, A_log, dt_bias, resets, *options = args
    return GDN2Inputs(q, k, v, g, b, w, A_log, dt_bias, resets=resets), GDN2Options(*options)


def _segment_forward(*args):
    """o_0 [B, T, HV, V] and P [B, T, H, K] in q's dtype, M [B, H, K, K] and D [B, HV, K, V] in the compute dtype."""
    inputs, options = _records(*args)
    with no_autocast(inputs.q):
        return tuple(x.contiguous() for x in kernels(inputs, options.backend).segment_forward(inputs, options))


def _fake_segment_forward(*args):
    inputs, _ = _records(*args)
    q, v, (B, _, H, K) = inputs.q, inputs.v, inputs.q.shape
    M, D = (q.new_empty(shape, dtype=inputs.compute_dtype) for shape in ((B, H, K, K), inputs.state_shape))
    return v.new_empty(v.shape), q.new_empty(q.shape), M, D


# Looks like the operators of ``library``: torch.library reads each schema by itself.
_segment_op = define(
    "gdn2_titan::segment_gdn2", f"({GATED}, Tensor? resets, {OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _segment_forward, _fake_segment_forward,
)  # fmt: skip


def _setup_context(ctx, args, output):
    ctx.set_materialize_grads(False)
    inputs, ctx.options = _records(*args)
    ctx.save_for_backward(*inputs)


def _backward(ctx, do, dread, dtransition, dcontribution):
    """The columns of the value axis have nothing to do with each other: those of the values, and those of the map."""
    inputs = GDN2Inputs(*ctx.saved_tensors)
    of_values = of_map = (None,) * 9
    if do is not None or dcontribution is not None:
        of_values = differentiable_chunk_gdn2_backward(do, dcontribution, *inputs, *ctx.options)
    if dread is not None or dtransition is not None:
        q = inputs.q
        identity = torch.eye(q.shape[-1], dtype=inputs.compute_dtype, device=q.device)
        identity = identity.expand(q.shape[0], q.shape[2], -1, -1).contiguous()
        nothing = torch.zeros_like(q)
        map_inputs = inputs._replace(v=nothing, w=nothing, initial_state=identity)
        of_map = GDN2Inputs(*differentiable_chunk_gdn2_backward(dread, dtransition, *map_inputs, *ctx.options))
        of_map = of_map._replace(v=None, w=None).differentiable
    grads = []
    for x, a, b in zip(inputs.differentiable, of_values, of_map, strict=True):
        given = [grad for grad in (a, b) if grad is not None]
        grads.append(sum(given[1:], given[0]) if given and x is not None else None)
    return tuple(grads)


_differentiable_segment_gdn2 = differentiable(_segment_op, _setup_context, _backward)


def segment_gdn2(inputs: GDN2Inputs, options: GDN2Options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o_0 [B, T, HV, V], P [B, T, H, K], M [B, H, K, K] and D [B, HV, K, V] of segments that are all of one length."""
    return _differentiable_segment_gdn2(*inputs.tokens, inputs.A_log, inputs.dt_bias, inputs.resets, *options)


@register_flop_formula(torch.ops.gdn2_titan.segment_gdn2)
def _(q_shape, k_shape, v_shape, g, b, *args, out_shape=None, **kwargs):
    B, T, H, K = q_shape
    return segment_flops(B * T, H, K, v_shape[2] // H * v_shape[3], b is not None)


def segment_summary(
    k: Tensor, v: Tensor, g: Tensor, b: Tensor | None, w: Tensor, use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False, A_log: Tensor | None = None, dt_bias: Tensor | None = None,
    use_sigmoid_in_kernel: bool = False, erase_scale: float = 1.0, resets: Tensor | None = None, backend: str = "auto",
    lower_bound: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A segment of a sequence as an affine map of the state (arXiv 2605.22791's recurrence is linear in it).

    Args:
        k, v, g, b, w, A_log, dt_bias, erase_scale, resets, use_gate_in_kernel, use_sigmoid_in_kernel, lower_bound: of
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
    inputs = GDN2Inputs(k, k, v, g, b, w, A_log, dt_bias, resets=resets)
    options = GDN2Options(
        1.0, use_qk_l2norm_in_kernel, use_gate_in_kernel, use_sigmoid_in_kernel, erase_scale, backend, lower_bound
    )
    _, _, M, D = segment_gdn2(inputs, check_arguments(inputs, options))
    return M, D
