"""Parallel plans for the models in plain PyTorch: usable from any training loop."""

from .compile import apply_compile
from .float8 import apply_float8, float8_share
from .fsdp import apply_fsdp, sum_gradients

__all__ = ["apply_compile", "apply_float8", "apply_fsdp", "float8_share", "sum_gradients"]
