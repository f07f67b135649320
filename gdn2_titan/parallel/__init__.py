"""Parallel plans for the models in plain PyTorch: usable from any training loop."""

from .activation_checkpoint import SAVED_OPS, apply_activation_checkpoint, apply_memory_budget
from .compile import apply_compile
from .fsdp import apply_fsdp, sum_gradients

__all__ = [
    "SAVED_OPS", "apply_activation_checkpoint", "apply_compile", "apply_fsdp", "apply_memory_budget", "sum_gradients",
]  # fmt: skip
