"""TorchTitan's metrics, plus what the gates of every GDN-2 layer do, plus where the logs went."""

import os

import torch
from torchtitan.components.metrics import MetricsProcessor, TensorBoardLogger
from torchtitan.tools.logging import logger

from gdn2_titan.models.layer import STATISTICS, GatedDeltaNet2

from .sections import section

__all__ = ["GDN2MetricsProcessor", "build_metrics_processor"]


class GDN2MetricsProcessor(MetricsProcessor):
    """Adds scalars gdn2/layers.<i>/<statistic>: of this rank's last microbatch of the step.

    A layer fills its statistics during forward while its flag is set, so no extra pass and no graph break is needed;
    the flag is raised one step ahead, for the first step of a run and every ``gdn2.statistics_freq`` steps.
    """

    def __init__(self, job_config, parallel_dims, tag=None):
        self.statistics_freq = section(job_config, "gdn2").statistics_freq
        self.mixers = {}
        super().__init__(job_config, parallel_dims, tag)

    @property
    def model_parts(self):
        return self._model_parts

    @model_parts.setter
    def model_parts(self, parts):
        # TorchTitan hands the model over here, before the first step: the moment to raise the first flag.
        self._model_parts = parts
        self.mixers = {
            f"layers.{layer}": module
            for part in parts or []
            for layer, block in part.layers.items()
            for module in block.modules()
            if isinstance(module, GatedDeltaNet2)
        }
        self._record(self.statistics_freq > 0)

    def _record(self, flag):
        self.recording = flag
        for mixer in self.mixers.values():
            mixer.record_statistics = flag

    def should_log(self, step):
        # Asked once a step, between the step's forward and the next one's.
        if self.recording and self.mixers:
            values = torch.stack([mixer.statistics for mixer in self.mixers.values()]).tolist()
            self.logger.log(
                {
                    f"gdn2/{layer}/{name}": value
                    for layer, row in zip(self.mixers, values, strict=True)
                    for name, value in zip(STATISTICS, row, strict=True)
                },
                step,
            )
        self._record(self.statistics_freq > 0 and (step + 1) % self.statistics_freq == 0)
        return super().should_log(step)

    def log(self, *args, **kwargs):
        super().log(*args, **kwargs)
        # The stock writer keeps two minutes of curves in memory: a killed run would resume with a hole in them.
        for backend in getattr(self.logger, "_loggers", []):
            if isinstance(backend, TensorBoardLogger):
                backend.writer.flush()

    def close(self):
        super().close()
        config = self.job_config
        if config.metrics.enable_tensorboard:
            logger.info(f"TensorBoard logs: {os.path.join(config.job.dump_folder, config.metrics.save_tb_folder)}")
        if config.checkpoint.enable:
            logger.info(f"Checkpoints: {os.path.join(config.job.dump_folder, config.checkpoint.folder)}")


def build_metrics_processor(job_config, parallel_dims, model_args=None, tag=None):
    return GDN2MetricsProcessor(job_config, parallel_dims, tag)
