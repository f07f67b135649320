"""Parallel plans for the models in plain PyTorch: usable from any training loop."""

from .activation_checkpoint import SAVED_OPS, apply_activation_checkpoint, apply_memory_budget
from .compile import apply_compile
from .fsdp import apply_fsdp, sum_gradients
from .tensor import apply_tensor_parallel, check_tensor_parallel

__all__ = [
    "SAVED_OPS", "apply_activation_checkpoint", "apply_compile", "apply_fsdp", "apply_memory_budget",
    "apply_tensor_parallel", "check_tensor_parallel", "sum_gradients",
]  # fmt: skip
