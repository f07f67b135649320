"""The plans of ``gdn2_titan.parallel`` with TorchTitan's settings, and which lengths they can share out."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger

from gdn2_titan import parallel

from .errors import ConfigError
from .settings import Settings
from .tasks import validation_lengths

__all__ = ["apply_plans", "check_lengths", "layout_of", "mesh_of_shards"]

# None is TorchTitan's word for no balancer, which TOML cannot say.
LAYOUTS = {"headtail": "head_tail", "none": "contiguous", None: "contiguous"}


def layout_of(parallelism: Any) -> str:
    """The layout of ``gdn2_titan.parallel`` in which TorchTitan deals out sequences.

    Raises:
        ConfigError: if [parallelism] asks for a balancer whose shards are no segments of the sequence.
    """
    balancer = parallelism.context_parallel_load_balancer
    if balancer not in LAYOUTS:
        raise ConfigError(f"parallelism.context_parallel_load_balancer is {balancer!r}; it must be 'headtail' or "
                          "'none', which give a rank unbroken segments of the sequence")  # fmt: skip
    return LAYOUTS[balancer]


def check_lengths(settings: Settings) -> None:
    """Raise ConfigError unless the ranks of context and tensor parallelism can share every sequence equally."""
    parallelism = settings.parallelism
    context, tensor = parallelism.context_parallel_degree, parallelism.tensor_parallel_degree
    per_rank = 2 if layout_of(parallelism) == "head_tail" else 1
    reasons, divisor = [], tensor
    if context > 1:
        divisor = context * math.lcm(per_rank, tensor)
        reasons.append(f"parallelism.context_parallel_degree = {context}")
        if per_rank == 2:
            reasons.append("parallelism.context_parallel_load_balancer = 'headtail' (two segments a rank)")
    if tensor > 1:
        reasons.append(f"parallelism.tensor_parallel_degree = {tensor}")
    for name, length in (("training.seq_len", settings.training.seq_len), *validation_lengths(settings)):
        if length % divisor:
            raise ConfigError(f"{name} is {length}; with {' and '.join(reasons)} it must be a multiple of {divisor}")


def mesh_of_shards(parallel_dims: ParallelDims) -> DeviceMesh:
    """The ranks that share parameters, 1-D, or replicate x shard: among them those that share sequences."""
    replicate = ["dp_replicate"] if parallel_dims.dp_replicate_enabled else []
    try:
        return parallel_dims.get_mesh([*replicate, "fsdp"])
    except ValueError:  # with TorchTitan's backend "spmd_types" there is no such axis, but one for each
        if not parallel_dims.cp_enabled:
            return parallel_dims.get_mesh([*replicate, "dp_shard"])
    shards = parallel_dims.get_mesh(["dp_shard", "cp"])._flatten("dp_shard_cp")
    return DeviceMesh._concatenate([parallel_dims.get_mesh("dp_replicate"), shards]) if replicate else shards


def apply_plans(
    model: torch.nn.Module, parallel_dims: ParallelDims, settings: Settings, *, loss_parallel: bool,
    async_tensor_parallel: Callable[[DeviceMesh], None], checkpoint: Callable[[torch.nn.Module], None], shards: bool,
) -> torch.nn.Module:  # fmt: skip
    """Context and tensor parallelism, activation checkpointing, compilation, sharding, in this order, for the model or
    a pipeline stage of it.

    async_tensor_parallel, checkpoint: called with the mesh, and with the model, where their turn is. shards: whether
    parameters are sharded, perhaps over a single rank.
    """
    training, parallelism = settings.training, settings.parallelism
    if parallel_dims.cp_enabled:
        layout = layout_of(parallelism)
        parallel.apply_context_parallel(model, parallel_dims.get_mesh("cp"), layout)
        logger.info(f"Applied context parallelism to the model, with {layout} shards")
    if parallel_dims.tp_enabled:
        mesh = parallel_dims.get_mesh("tp")
        parallel.apply_tensor_parallel(model, mesh, loss_parallel=loss_parallel)
        async_tensor_parallel(mesh)
        logger.info("Applied tensor parallelism to the model")
    if settings.activation_checkpoint.mode != "none":
        checkpoint(model)
    if settings.activation_checkpoint.mode == "memory_budget":
        parallel.apply_memory_budget(settings.activation_checkpoint.memory_budget)
    if settings.compiles("model"):
        parallel.apply_compile(model, settings.compile.backend)
        logger.info("Compiling each block with torch.compile")
    if shards:
        reshard = parallelism.fsdp_reshard_after_forward
        parallel.apply_fsdp(
            model,
            mesh_of_shards(parallel_dims),
            param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
            reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
            # Under pipeline parallelism each microbatch would gather the parameters again.
            reshard_after_forward=reshard == "always" or (reshard == "default" and not parallel_dims.pp_enabled),
            reshard_last=reshard == "always",
            cpu_offload=training.enable_cpu_offload,
        )
        parallel.sum_gradients(model)  # TorchTitan divides the loss by the global number of tokens
        logger.info("Applied HSDP to the model" if parallel_dims.dp_replicate_enabled else "Applied FSDP to the model")
    return model
