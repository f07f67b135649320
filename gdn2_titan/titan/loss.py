"""TorchTitan's cross-entropy, compiled where that is right."""

from torchtitan.components.loss import build_cross_entropy_loss, cross_entropy_loss
from torchtitan.tools.logging import logger

from .sections import compiles

__all__ = ["build_loss"]


def build_loss(job_config, parallel_dims, **kwargs):
    """TorchTitan's ``build_loss_fn``. A compiled loss of logits sharded over the vocabulary is silently zero."""
    if parallel_dims.tp_enabled and not job_config.parallelism.disable_loss_parallel:
        if compiles(job_config, "loss"):
            logger.info("The loss is not compiled: it is computed on shards of the vocabulary")
        return cross_entropy_loss
    return build_cross_entropy_loss(job_config, parallel_dims=parallel_dims)
