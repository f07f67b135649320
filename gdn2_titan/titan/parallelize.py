"""The plans of ``gdn2_titan.parallel`` with TorchTitan's settings."""

from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.tools.logging import logger

from gdn2_titan.parallel import (
    apply_compile,
    apply_context_parallel,
    apply_fsdp,
    apply_memory_budget,
    apply_tensor_parallel,
    sum_gradients,
)

from .context import layout_of
from .sections import compiles

__all__ = ["apply_plans"]


def apply_plans(model, parallel_dims, job_config, *, loss_parallel, async_tensor_parallel, checkpoint, shards):
    """Context and tensor parallelism, activation checkpointing, compilation, sharding, in this order, for the model or
    a pipeline stage of it.

    async_tensor_parallel, checkpoint: called with the mesh, and with the model, where their turn is. shards: whether
    parameters are sharded, perhaps over a single rank.
    """
    training, parallelism = job_config.training, job_config.parallelism
    if parallel_dims.cp_enabled:
        layout = layout_of(parallelism)
        apply_context_parallel(model, parallel_dims.get_mesh("cp"), layout)
        logger.info(f"Applied context parallelism to the model, with {layout} shards")
    if parallel_dims.tp_enabled:
        mesh = parallel_dims.get_mesh("tp")
        apply_tensor_parallel(model, mesh, loss_parallel=loss_parallel)
        async_tensor_parallel(mesh)
        logger.info("Applied tensor parallelism to the model")
    if job_config.activation_checkpoint.mode != "none":
        checkpoint(model)
    if job_config.activation_checkpoint.mode == "memory_budget":
        apply_memory_budget(job_config.activation_checkpoint.memory_budget)
    if compiles(job_config, "model"):
        apply_compile(model, job_config.compile.backend)
        logger.info("Compiling each block with torch.compile")
    if shards:
        reshard = parallelism.fsdp_reshard_after_forward
        names = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
        apply_fsdp(
            model,
            parallel_dims.get_mesh(names),
            param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
            reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
            # Under pipeline parallelism each microbatch would gather the parameters again.
            reshard_after_forward=reshard == "always" or (reshard == "default" and not parallel_dims.pp_enabled),
            reshard_last=reshard == "always",
            cpu_offload=training.enable_cpu_offload,
        )
        sum_gradients(model)  # TorchTitan divides the loss by the global number of tokens
        logger.info("Applied HSDP to the model" if parallel_dims.dp_replicate_enabled else "Applied FSDP to the model")
    return model
