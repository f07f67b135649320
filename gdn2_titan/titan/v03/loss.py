"""TorchTitan 0.3's cross-entropy, compiled where that is right."""

from dataclasses import dataclass
from typing import Annotated

import tyro
from torchtitan.components.loss import BaseLoss, cross_entropy_loss
from torchtitan.tools.logging import logger

__all__ = ["WatchedLoss"]


class WatchedLoss(BaseLoss):
    """A loss that shows what it is given to ``watcher(logits, labels)``, while there is one: every layout computes its
    loss by this, on the ranks and in the microbatches that have logits."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        _job_config: Annotated[object | None, tyro.conf.Suppress] = None

    def __init__(self, config, *, compile_config=None):
        self.fn, self.watcher = cross_entropy_loss, None
        # On shards of the vocabulary it communicates, which compiling it gains nothing for.
        if config._job_config.parallelism.tensor_parallel_degree == 1:
            self._maybe_compile(compile_config)
        elif compile_config is not None and compile_config.enable and "loss" in compile_config.components:
            logger.info("The loss is not compiled: it is computed on shards of the vocabulary")

    def __call__(self, pred, labels, global_valid_tokens=None, **kwargs):
        if self.watcher is not None:
            self.watcher(pred, labels)
        return super().__call__(pred, labels, global_valid_tokens, **kwargs)
