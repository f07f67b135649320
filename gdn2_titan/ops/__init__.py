"""Gated DeltaNet-2 as an operator: import this and get torch, nothing else."""

import torch

from .custom_op import register_shardings
from .gdn2.api import chunk_gdn2, fused_recurrent_gdn2, recurrent_gdn2, recurrent_gdn2_
from .gdn2.reference import naive_recurrent_gdn2
from .gdn2.segments import segment_summary
from .short_conv.api import causal_conv1d, causal_conv1d_, causal_conv1d_qkv, causal_conv1d_qkv_

__all__ = [
    "causal_conv1d", "causal_conv1d_", "causal_conv1d_qkv", "causal_conv1d_qkv_", "chunk_gdn2", "fused_recurrent_gdn2",
    "naive_recurrent_gdn2", "recurrent_gdn2", "recurrent_gdn2_", "segment_summary",
]  # fmt: skip

if torch.distributed.is_available():
    __all__ += ["context_parallel_conv1d", "context_parallel_gdn2"]

register_shardings()


def __getattr__(name: str) -> object:
    """What shares sequences between devices, when it is asked for: it imports modules of torch.distributed."""
    if name in ("context_parallel_conv1d", "context_parallel_gdn2"):
        from . import context_parallel

        return getattr(context_parallel, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
