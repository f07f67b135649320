"""The operators where there is no token, because B or T is 0: states pass through, and no kernel has anything to do.

The functions, their arguments and their results are those of ``chunked``.
"""

import torch
from torch import Tensor

from ..checks import check_cu_seqlens
from .arguments import GDN2Inputs, GDN2Options

__all__ = ["chunk_backward", "chunk_forward", "segment_forward"]


def _through(state, inputs, dtype):
    """A copy of state [N, HV, K, V] in dtype, zeros for None."""
    if inputs.cu_seqlens is not None:
        check_cu_seqlens(inputs.cu_seqlens, inputs.q.shape[1])
    if state is not None:
        return state.to(dtype, copy=True, memory_format=torch.contiguous_format)
    return inputs.q.new_zeros(inputs.state_shape, dtype=dtype)


def chunk_forward(inputs: GDN2Inputs, options: GDN2Options) -> tuple[Tensor, Tensor]:
    return inputs.v.new_empty(inputs.v.shape), _through(inputs.initial_state, inputs, inputs.compute_dtype)


def segment_forward(inputs: GDN2Inputs, options: GDN2Options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, v, dtype = inputs.q, inputs.v, inputs.compute_dtype
    B, _, H, K = q.shape
    transition = torch.eye(K, dtype=dtype, device=q.device).repeat(B, H, 1, 1)
    return v.new_empty(v.shape), q.new_empty(q.shape), transition, _through(None, inputs, dtype)


def chunk_backward(
    do: Tensor | None, dfinal_state: Tensor | None, inputs: GDN2Inputs, options: GDN2Options
) -> GDN2Inputs:
    dinitial_state = inputs.initial_state
    if dinitial_state is not None:
        dinitial_state = _through(dfinal_state, inputs, dinitial_state.dtype)
    return inputs.map(torch.zeros_like)._replace(initial_state=dinitial_state, cu_seqlens=None, resets=None)
