"""Pipeline parallelism by TorchTitan 0.3's splitter, which scales the gradients itself."""

import dataclasses

from torchtitan.distributed.pipeline_parallel import pipeline_llm

from ..pipeline import modules_of_stages

__all__ = ["pipeline"]


def pipeline(model, *, parallelism, model_config, **rest):
    """TorchTitan's ``pipelining_fn``, which also knows the head by the name that 0.2.2 has for it."""
    stages = modules_of_stages(parallelism, model_config.args.n_layers)
    named = dataclasses.replace(parallelism, module_fqns_per_model_part=stages)
    return pipeline_llm(model, parallelism=named, model_config=model_config, **rest)
