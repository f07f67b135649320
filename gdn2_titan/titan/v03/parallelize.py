"""TorchTitan 0.3's activation checkpointing and settings for the plans."""

from torchtitan.distributed.compile import _maybe_enable_async_tp

from ..float8 import NAMES, LinearConverter
from ..parallelize import apply_plans

__all__ = ["hook_converters", "parallelize"]


def parallelize(model, *, parallel_dims, compile_config, ac_config, dump_folder, **_):
    """TorchTitan's ``parallelize_fn``, for the model or a pipeline stage of it."""
    job_config = model.config._job_config
    for converter in _converters(job_config, parallel_dims):
        converter.convert(model)
    return apply_plans(
        model,
        parallel_dims,
        job_config,
        loss_parallel=True,
        async_tensor_parallel=lambda mesh: _maybe_enable_async_tp(compile_config, mesh),
        checkpoint=lambda model: ac_config.build(dump_folder=dump_folder).apply(model),
        shards=True,  # over a single rank too: parameters in fp32 are computed with in bf16 by nothing else
    )


def hook_converters(optimizers, model_parts, parallel_dims):
    """TorchTitan's ``post_optimizer_build_fn``: what the converters of model.converters do after each step."""
    for converter in _converters(model_parts[0].config._job_config, parallel_dims):
        optimizers.register_step_post_hook(lambda *_, one=converter: one.post_optimizer_hook(model_parts))


def _converters(job_config, parallel_dims):
    return [LinearConverter(job_config, parallel_dims, name) for name in NAMES if name in job_config.model.converters]
