"""The plans of ``gdn2_titan.parallel`` with TorchTitan's settings."""

from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.distributed.tensor_parallel import maybe_enable_async_tp
from torchtitan.tools.logging import logger

from gdn2_titan.parallel import (
    SAVED_OPS,
    apply_compile,
    apply_context_parallel,
    apply_fsdp,
    apply_memory_budget,
    apply_tensor_parallel,
    sum_gradients,
)

from .context import layout_of
from .sections import compiles

__all__ = ["parallelize"]


def parallelize(model, parallel_dims, job_config):
    """TorchTitan's ``parallelize_fn``, for the model or a pipeline stage of it: context and tensor parallelism,
    activation checkpointing, compilation, sharding, in this order."""
    training, parallelism = job_config.training, job_config.parallelism
    compiled = compiles(job_config, "model")
    if parallel_dims.cp_enabled:
        layout = layout_of(parallelism)
        apply_context_parallel(model, parallel_dims.get_mesh("cp"), layout)
        logger.info(f"Applied context parallelism to the model, with {layout} shards")
    if parallel_dims.tp_enabled:
        mesh = parallel_dims.get_mesh("tp")
        apply_tensor_parallel(model, mesh, loss_parallel=not parallelism.disable_loss_parallel)
        maybe_enable_async_tp(job_config, mesh)
        logger.info("Applied tensor parallelism to the model")
    if job_config.activation_checkpoint.mode != "none":
        apply_ac(
            model,
            job_config.activation_checkpoint,
            model_compile_enabled=compiled,
            op_sac_save_list=SAVED_OPS,
            base_folder=job_config.job.dump_folder,
        )
    if job_config.activation_checkpoint.mode == "memory_budget":
        apply_memory_budget(job_config.activation_checkpoint.memory_budget)
    if compiled:
        apply_compile(model, job_config.compile.backend)
        logger.info("Compiling each block with torch.compile")
    if parallel_dims.fsdp_enabled:  # also under context parallelism alone: its ranks hold shards of the parameters
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
