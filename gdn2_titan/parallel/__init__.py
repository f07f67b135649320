"""Parallel plans for the models in plain PyTorch: usable from any training loop."""

from .compile import apply_compile
from .fsdp import apply_fsdp, sum_gradients
from .tensor import apply_tensor_parallel, check_tensor_parallel

__all__ = ["apply_compile", "apply_fsdp", "apply_tensor_parallel", "check_tensor_parallel", "sum_gradients"]
