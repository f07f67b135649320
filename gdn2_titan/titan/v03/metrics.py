"""TorchTitan 0.3's metrics with ours."""

from dataclasses import dataclass
from typing import Annotated

import tyro
from torchtitan.components.metrics import MetricsProcessor

from ..metrics import GateMetrics
from ..model_args import model_args

__all__ = ["GDN2MetricsProcessor"]


class GDN2MetricsProcessor(GateMetrics, MetricsProcessor):
    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        _job_config: Annotated[object | None, tyro.conf.Suppress] = None

    def __init__(self, config, *, parallel_dims, **kwargs):
        self.watch(config._job_config, model_args(config._job_config))
        super().__init__(config, parallel_dims=parallel_dims, **kwargs)

    def log(self, step, global_avg_loss, global_max_loss, grad_norm, extra_metrics=None):
        # TorchTitan divides the loss of a context-parallel rank by the tokens of whole sequences; it has a share.
        super().log(step, global_avg_loss, global_max_loss * self.parallel_dims.cp, grad_norm, extra_metrics)
        self.flush()
