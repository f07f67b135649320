"""The recurrence token by token in an order of operations that the batch does not change: backend "batch_invariant".

Products and sums of two numbers are exact to rounding wherever they stand. So what is left to mind are sums over many:
here the reductions of each state by itself, over K alone, and no matrix product. The backward is the chunked one, of
which nothing is promised but the gradients.
"""

import functools

import torch
from torch import Tensor

from ..elementwise import sigmoid, softplus
from .arguments import GDN2Inputs, GDN2Options
from .gates import activate
from .reference import over_sequences

__all__ = ["recurrent"]


def _recur(q, k, v, g, b, w, state, scale):
    """As ``reference``'s, without autograd. ``state`` is overwritten."""
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    state = state.reshape(B, H, HV // H, K, V)
    z = (w * v).view(B, T, H, HV // H, 1, V)
    q, k, gamma = (x.view(B, T, H, 1, K, 1) for x in (q, k, g.exp()))
    e = None if b is None else b.view(k.shape) * k
    o = v.new_empty(B, T, H, HV // H, V)
    for t in range(T):
        state = state * gamma[:, t]
        read = 0 if e is None else (e[:, t] * state).sum(-2, keepdim=True)
        state += k[:, t] * (z[:, t] - read)
        torch.mul((q[:, t] * state).sum(-2), scale, out=o[:, t])
    return o.view(B, T, HV, V), state.reshape(B, HV, K, V)


def recurrent(inputs: GDN2Inputs, options: GDN2Options) -> tuple[Tensor, Tensor]:
    """o [B, T, HV, V] in v's dtype, and the final state [N, HV, K, V] in the compute dtype."""
    q, *others = activate(inputs, options, sigmoid, softplus)
    state = inputs.initial_state
    state = q.new_zeros(inputs.state_shape) if state is None else state.to(q.dtype, copy=True)
    o, final_state = over_sequences(
        functools.partial(_recur, scale=options.scale), (q, *others), state, inputs.cu_seqlens
    )
    return o.to(inputs.v.dtype), final_state
