"""Gated DeltaNet-2 as an operator: import this and get torch, nothing else."""

import torch

from .causal_conv1d import causal_conv1d
from .functional import chunk_gdn2, fused_recurrent_gdn2, recurrent_gdn2, recurrent_gdn2_
from .reference import naive_recurrent_gdn2
from .segments import segment_summary

__all__ = [
    "causal_conv1d", "chunk_gdn2", "fused_recurrent_gdn2", "naive_recurrent_gdn2", "recurrent_gdn2", "recurrent_gdn2_",
    "segment_summary",
]  # fmt: skip

if torch.distributed.is_available():
    # Not lazily: the first call of any custom op imports torch._dynamo, and that imports DTensor.
    from . import sharding  # noqa: F401
    from .context_parallel import context_parallel_gdn2
    from .halo import context_parallel_conv1d

    __all__ += ["context_parallel_conv1d", "context_parallel_gdn2"]
