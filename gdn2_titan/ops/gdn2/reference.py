"""The definition: Gated DeltaNet-2 token by token (arXiv 2605.22791, the recurrence of section 3).

Per head, with state S [K, V] and natural-log decay g <= 0,

    S_t = (I - k_t (b_t * k_t)^T) Diag(exp(g_t)) S_{t-1} + k_t (w_t * v_t)^T        o_t = scale * S_t^T q_t

Everything else in this package is measured against this file, in fp64.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import check_cu_seqlens
from .arguments import GDN2Inputs, GDN2Options, check_arguments
from .gates import activate

__all__ = ["naive_recurrent_gdn2", "over_sequences", "recurrent", "update"]


def _recur(q, k, v, g, b, w, state, scale):
    """The recurrence over one batch of sequences of equal length, every gate already applied.

    Args: q, k, g, b [B, T, H, K], b or None where nothing is erased; v, w [B, T, HV, V]; state [B, HV, K, V]. One dtype
    for all.
    Returns: o [B, T, HV, V], final state [B, HV, K, V].
    """
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    state = state.reshape(B, H, HV // H, K, V)  # value head j reads key head j // (HV // H)
    v = v.reshape(B, T, H, HV // H, V)
    w = w.reshape(B, T, H, HV // H, V)
    outputs = []
    for t in range(T):
        decayed = g[:, t].exp()[:, :, None, :, None] * state  # [B, H, HV/H, K, V]
        written = w[:, t] * v[:, t]
        if b is not None:
            written = written - torch.einsum("bhk,bhjkv->bhjv", b[:, t] * k[:, t], decayed)
        state = decayed + torch.einsum("bhk,bhjv->bhjkv", k[:, t], written)
        outputs.append(scale * torch.einsum("bhk,bhjkv->bhjv", q[:, t], state))
    if outputs:
        o = torch.stack(outputs, 1)
    else:  # no token, of which both results are functions all the same: their gradients are zeros, not None
        nothing = torch.einsum("bthk,bthjv->bthjkv", g.exp() * q * (k if b is None else b * k), w * v)
        o, state = nothing.sum(4), state + nothing.sum(1)
    return o.reshape(B, T, HV, V), state.reshape(B, HV, K, V)


def over_sequences(
    recur: Callable[..., tuple[Tensor, Tensor]], tensors: tuple[Tensor, ...], state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """recur(q, k, v, g, b, w, state=state) over B sequences, or over those that cu_seqlens [N + 1] packs in one row;
    state [N, HV, K, V]. Returns o and the final state."""
    if cu_seqlens is None:
        return recur(*tensors, state=state)
    check_cu_seqlens(cu_seqlens, tensors[0].shape[1])
    bounds = cu_seqlens.tolist()
    parts = [
        recur(*(None if x is None else x[:, i:j] for x in tensors), state=state[n : n + 1])
        for n, (i, j) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))
    ]
    return torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts], 0)


def recurrent(inputs: GDN2Inputs, options: GDN2Options) -> tuple[Tensor, Tensor]:
    """o [B, T, HV, V] in v's dtype, and the final state [N, HV, K, V] in the compute dtype."""
    tensors = activate(inputs, options)
    if inputs.initial_state is None:
        state = tensors[0].new_zeros(inputs.state_shape)
    else:
        state = inputs.initial_state.to(tensors[0].dtype, copy=True)
    o, final_state = over_sequences(functools.partial(_recur, scale=options.scale), tensors, state, inputs.cu_seqlens)
    return o.to(inputs.v.dtype), final_state


def update(
    inputs: GDN2Inputs, options: GDN2Options, state: Tensor, state_indices: Tensor | None,
    recurrent: Callable[..., tuple[Tensor, Tensor]] = recurrent,
) -> Tensor:  # fmt: skip
    """o [B, T, HV, V] in v's dtype; ``state`` [N, HV, K, V], or those blocks of a pool [blocks, HV, K, V] that
    state_indices [N] names, is the initial state and becomes the final one. A sequence at block -1 is left out: its o
    is zero."""
    if state_indices is None:
        o, final_state = recurrent(inputs._replace(initial_state=state), options)
        state.copy_(final_state)
        return o
    blocks = state_indices.long()
    used = blocks >= 0
    o, final_state = recurrent(inputs._replace(initial_state=state[blocks.clamp_min(0)]), options)
    state[blocks[used]] = final_state[used]
    if inputs.cu_seqlens is not None:
        used = used.repeat_interleave(inputs.cu_seqlens.diff().long())[None]
    return torch.where(used.view(*used.shape, *[1] * (4 - used.ndim)), o, 0.0)


def naive_recurrent_gdn2(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor | None, w: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False, A_log: Tensor | None = None, dt_bias: Tensor | None = None,
    use_sigmoid_in_kernel: bool = False, erase_scale: float = 1.0, cu_seqlens: Tensor | None = None,
    resets: Tensor | None = None, lower_bound: float | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Gated DeltaNet-2 one token at a time, differentiated by autograd: slow, readable, the definition.

    Arguments, shapes, returns and errors are those of :func:`gdn2_titan.ops.chunk_gdn2` (less ``backend`` and
    ``num_segments``).
    Computes in fp64 for fp64 inputs, in fp32 for all others.
    """
    inputs = GDN2Inputs(q, k, v, g, b, w, A_log, dt_bias, initial_state, cu_seqlens, resets)
    options = GDN2Options(
        scale, use_qk_l2norm_in_kernel, use_gate_in_kernel, use_sigmoid_in_kernel, erase_scale, lower_bound=lower_bound
    )
    o, final_state = recurrent(inputs, check_arguments(inputs, options))
    return o, final_state if output_final_state else None
