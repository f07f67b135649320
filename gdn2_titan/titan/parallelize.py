"""The plans of ``gdn2_titan.parallel`` with TorchTitan's settings."""

import torch
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.tools.logging import logger

from gdn2_titan.parallel import apply_compile, apply_fsdp, sum_gradients

__all__ = ["parallelize"]

# Selective activation checkpointing by op keeps these: matrix products and the mixers, which cost the most to redo.
SAVED_OPS = {
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch._higher_order_ops.flex_attention,
    torch.ops.gdn2_titan.chunk_gdn2.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops.aten.max.default,  # of float8's scales
}


def parallelize(model, parallel_dims, job_config):
    """TorchTitan's ``parallelize_fn``: activation checkpointing, compilation, sharding, in this order."""
    training, parallelism = job_config.training, job_config.parallelism
    compiled = job_config.compile.enable and "model" in job_config.compile.components
    if job_config.activation_checkpoint.mode != "none":
        apply_ac(
            model,
            job_config.activation_checkpoint,
            model_compile_enabled=compiled,
            op_sac_save_list=SAVED_OPS,
            base_folder=job_config.job.dump_folder,
        )
    if compiled:
        apply_compile(model, job_config.compile.backend)
        logger.info("Compiling each block with torch.compile")
    if parallel_dims.fsdp_enabled:
        names = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
        apply_fsdp(
            model,
            parallel_dims.get_mesh(names),
            param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
            reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
            reshard_after_forward=parallelism.fsdp_reshard_after_forward != "never",
            reshard_last=parallelism.fsdp_reshard_after_forward == "always",
            cpu_offload=training.enable_cpu_offload,
        )
        sum_gradients(model)  # TorchTitan divides the loss by the global number of tokens
        logger.info("Applied HSDP to the model" if parallel_dims.dp_replicate_enabled else "Applied FSDP to the model")
    return model
