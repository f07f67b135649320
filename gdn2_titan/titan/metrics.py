"""What this package adds to TorchTitan's metrics: what the gates of every GDN-2 layer do, what to do next, and what a
checkpoint was trained with."""

import sys
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.components.metrics import TensorBoardLogger
from torchtitan.tools.logging import logger

from gdn2_titan.models import GDN2ModelArgs
from gdn2_titan.models.layer import STATISTICS, GatedDeltaNet2

from .checkpoint import write_checkpoint_files
from .settings import Settings
from .what_next import nothing_to_train, what_next

__all__ = ["GateMetrics"]


class GateMetrics:
    """For a MetricsProcessor with TrainingLog: adds scalars gdn2/layers.<i>/<statistic>: of the last microbatch, and
    the heads and tokens, of one rank. ``watch`` comes before the processor's own ``__init__``.

    A layer fills its statistics during forward while its flag is set, so no extra pass and no graph break is needed;
    the flag is raised one step ahead, for the first step of a run and every ``gdn2.statistics_freq`` steps.
    """

    def watch(self, settings: Settings, model_args: GDN2ModelArgs) -> None:
        self._settings, self.model_args = settings, model_args
        self.statistics_freq = settings.gdn2.statistics_freq
        self.begin(settings)
        self.mixers = {}

    @property
    def model_parts(self) -> list[torch.nn.Module] | None:
        return self._model_parts

    @model_parts.setter
    def model_parts(self, parts: list[torch.nn.Module] | None) -> None:
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

    def _record(self, flag: bool) -> None:
        self.recording = flag
        for mixer in self.mixers.values():
            mixer.record_statistics = flag

    def finish(self, step: int) -> None:
        """Once a step, between its forward and the next one's, and before its checkpoint."""
        self.count_step(step)
        write_checkpoint_files(self._settings, self.model_args, step)
        if self.recording and (statistics := self._statistics()):
            self.logger.log(statistics, step)
        self._record(self.statistics_freq > 0 and (step + 1) % self.statistics_freq == 0)

    def _statistics(self) -> dict[str, float]:
        """Of the layers of all pipeline stages: one rank of the last stage writes them."""
        rows = torch.stack([m.statistics for m in self.mixers.values()]).tolist() if self.mixers else []
        found = {
            f"gdn2/{layer}/{name}": value
            for layer, row in zip(self.mixers, rows, strict=True)
            for name, value in zip(STATISTICS, row, strict=True)
        }
        if not self.parallel_dims.pp_enabled:
            return found
        group = self.parallel_dims.get_mesh("pp").get_group()
        stages = [None] * dist.get_world_size(group)
        dist.all_gather_object(stages, found, group)
        return {name: value for stage in stages for name, value in stage.items()}

    def log(self, step: int, global_avg_loss: float, global_max_loss: float, *rest: Any, **named: Any) -> None:
        # TorchTitan divides the loss of a context-parallel rank by the tokens of whole sequences; it has a share.
        super().log(step, global_avg_loss, global_max_loss * self.parallel_dims.cp, *rest, **named)
        self.flush()

    def flush(self) -> None:
        # The stock writer keeps two minutes of curves in memory: a killed run would resume with a hole in them.
        for backend in getattr(self.logger, "_loggers", []):
            if isinstance(backend, TensorBoardLogger):
                backend.writer.flush()

    def close(self) -> None:
        super().close()
        if sys.exc_info()[0] is not None:  # TorchTitan closes a run that failed, too
            return
        if not self.trained and (sentence := nothing_to_train(self._settings)):
            logger.info(sentence)
        if lines := what_next(self._settings):
            logger.info(lines)
