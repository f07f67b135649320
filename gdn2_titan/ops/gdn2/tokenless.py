"""The operators where there is no token, because B or T is 0: states pass through, and no kernel has anything to do.

The functions, their arguments and their results are those of ``chunked``.
"""

import torch

from ..checks import check_cu_seqlens
from .gates import compute_dtype

__all__ = ["chunk_backward", "chunk_forward", "segment_forward"]


def _through(state, q, v, cu_seqlens, dtype):
    """A copy of state [N, HV, K, V] in dtype, zeros for None."""
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, q.shape[1])
    if state is not None:
        return state.to(dtype, copy=True, memory_format=torch.contiguous_format)
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return q.new_zeros((N, v.shape[2], q.shape[3], v.shape[3]), dtype=dtype)


def chunk_forward(q, k, v, g, b, w, A_log, dt_bias, initial_state, cu_seqlens, resets, scale, options):
    return v.new_empty(v.shape), _through(initial_state, q, v, cu_seqlens, compute_dtype(q))


def segment_forward(q, k, v, g, b, w, A_log, dt_bias, resets, scale, options):
    (B, _, H, K), dtype = q.shape, compute_dtype(q)
    transition = torch.eye(K, dtype=dtype, device=q.device).repeat(B, H, 1, 1)
    return v.new_empty(v.shape), q.new_empty(q.shape), transition, _through(None, q, v, None, dtype)


def chunk_backward(
    do, dfinal_state, q, k, v, g, b, w, A_log, dt_bias, initial_state, cu_seqlens, resets, scale, options
):
    tokens = [x.new_empty(x.shape) for x in (q, k, v, g, b, w)]
    parameters = [None if x is None else torch.zeros_like(x) for x in (A_log, dt_bias)]
    dinitial_state = None
    if initial_state is not None:
        dinitial_state = _through(dfinal_state, q, v, cu_seqlens, initial_state.dtype)
    return *tokens, *parameters, dinitial_state
