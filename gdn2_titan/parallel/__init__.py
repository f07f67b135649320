"""Parallel plans for the models in plain PyTorch: usable from any training loop."""

from .compile import apply_compile
from .fsdp import apply_fsdp, sum_gradients

__all__ = ["apply_compile", "apply_fsdp", "sum_gradients"]
