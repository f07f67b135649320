"""Parallel plans for the models in plain PyTorch: usable from any training loop."""

from .activation_checkpoint import SAVED_OPS, apply_activation_checkpoint, apply_memory_budget
from .compile import apply_compile
from .context import apply_context_parallel, check_context_parallel
from .float8 import apply_float8, float8_share
from .fsdp import apply_fsdp, shard_decays, sum_gradients
from .muon import Muon, muon_matrices
from .tensor import apply_mixer_tensor_parallel, apply_tensor_parallel, check_tensor_parallel

__all__ = [
    "Muon", "SAVED_OPS", "apply_activation_checkpoint", "apply_compile", "apply_context_parallel", "apply_float8",
    "apply_fsdp", "apply_memory_budget", "apply_mixer_tensor_parallel", "apply_tensor_parallel",
    "check_context_parallel", "check_tensor_parallel", "float8_share", "muon_matrices", "shard_decays",
    "sum_gradients",
]  # fmt: skip
