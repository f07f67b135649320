"""Gated DeltaNet-2 as an operator: import this and get torch, nothing else."""

import torch

from .gdn2.api import chunk_gdn2, fused_recurrent_gdn2, recurrent_gdn2, recurrent_gdn2_
from .gdn2.reference import naive_recurrent_gdn2
from .gdn2.segments import segment_summary
from .short_conv.api import causal_conv1d

__all__ = [
    "causal_conv1d", "chunk_gdn2", "fused_recurrent_gdn2", "naive_recurrent_gdn2", "recurrent_gdn2", "recurrent_gdn2_",
    "segment_summary",
]  # fmt: skip

if torch.distributed.is_available():
    # Not lazily: the first call of any custom op imports torch._dynamo, and that imports DTensor.
    from . import sharding  # noqa: F401
    from .context_parallel.api import context_parallel_gdn2
    from .context_parallel.halo import context_parallel_conv1d

    __all__ += ["context_parallel_conv1d", "context_parallel_gdn2"]
