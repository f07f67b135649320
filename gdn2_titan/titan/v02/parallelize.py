"""TorchTitan 0.2.2's activation checkpointing and settings for the plans."""

from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.distributed.tensor_parallel import maybe_enable_async_tp

from gdn2_titan.parallel import SAVED_OPS

from ..parallelize import apply_plans
from ..sections import compiles

__all__ = ["parallelize"]


def parallelize(model, parallel_dims, job_config):
    """TorchTitan's ``parallelize_fn``, for the model or a pipeline stage of it."""

    def checkpoint(model):
        apply_ac(
            model,
            job_config.activation_checkpoint,
            model_compile_enabled=compiles(job_config, "model"),
            op_sac_save_list=SAVED_OPS,
            base_folder=job_config.job.dump_folder,
        )

    return apply_plans(
        model,
        parallel_dims,
        job_config,
        loss_parallel=not job_config.parallelism.disable_loss_parallel,
        async_tensor_parallel=lambda mesh: maybe_enable_async_tp(job_config, mesh),
        checkpoint=checkpoint,
        shards=parallel_dims.fsdp_enabled,  # also under context parallelism alone: its ranks hold shards of parameters
    )
