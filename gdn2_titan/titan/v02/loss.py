"""TorchTitan's cross-entropy, compiled where that is right."""

from torchtitan.components.loss import build_cross_entropy_loss, cross_entropy_loss
from torchtitan.tools.logging import logger

from ..sections import compiles

__all__ = ["WatchedLoss", "build_loss"]


class WatchedLoss:
    """A loss that shows what it is given to ``watcher(logits, labels)``, while there is one: every layout computes its
    loss by this, on the ranks and in the microbatches that have logits."""

    def __init__(self, loss_fn):
        self._loss_fn = loss_fn
        self.watcher = None

    def __call__(self, logits, labels):
        if self.watcher is not None:
            self.watcher(logits, labels)
        return self._loss_fn(logits, labels)


def build_loss(job_config, parallel_dims, **kwargs):
    """TorchTitan's ``build_loss_fn``. A compiled loss of logits sharded over the vocabulary is silently zero."""
    if parallel_dims.tp_enabled and not job_config.parallelism.disable_loss_parallel:
        if compiles(job_config, "loss"):
            logger.info("The loss is not compiled: it is computed on shards of the vocabulary")
        return WatchedLoss(cross_entropy_loss)
    return WatchedLoss(build_cross_entropy_loss(job_config, parallel_dims=parallel_dims))
