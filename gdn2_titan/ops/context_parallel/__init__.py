"""Sequences that devices share. On top of ``gdn2`` and ``short_conv``, never below them."""

from .api import context_parallel_gdn2
from .tokens import context_parallel_conv1d

__all__ = ["context_parallel_conv1d", "context_parallel_gdn2"]
