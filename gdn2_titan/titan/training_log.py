"""The lines of a training's log and the scalars beside them: what TorchTitan measures, as far as the machine has it,
and with it how far the run is, how long it will take, perplexity and bits per byte."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from torchtitan.components import metrics as titan_metrics
from torchtitan.tools.logging import logger

from .cpu import accelerator
from .label_bytes import LabelBytes, bytes_of_symbols, counters
from .settings import Settings
from .tasks import task_of

__all__ = ["TrainingLog", "duration"]

MFU, TFLOPS = "mfu(%)", "tflops"


def duration(seconds: float) -> str:
    """Of a time to wait, in two units: "3m20s", "2h05m", "4d03h"."""
    seconds = round(seconds)
    for long, short, size, part in (("d", "h", 86400, 3600), ("h", "m", 3600, 60), ("m", "s", 60, 1)):
        if seconds >= size:
            return f"{seconds // size}{long}{seconds % size // part:02}{short}"
    return f"{seconds}s"


class _Kept:
    """In the place of TorchTitan's loggers: keeps scalars instead of writing them."""

    def __init__(self) -> None:
        self.scalars: dict[str, Any] = {}

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.scalars = metrics


class TrainingLog:
    """For a MetricsProcessor of either generation: writes its lines and scalars. ``begin`` comes before its own
    ``__init__``."""

    def begin(self, settings: Settings) -> None:
        self._steps, self._first = settings.training.steps, None
        table = None if task_of(settings) is not None else bytes_of_symbols(settings.model.hf_assets_path)
        counters.clear()
        if table is not None:
            counters.update(training=LabelBytes(table), validation=LabelBytes(table))

    @property
    def trained(self) -> bool:
        """Whether this process has done a step."""
        return self._first is not None

    def forget_labels(self) -> None:
        """In a step whose loss is not logged: a loss that is logged is that of its step alone."""
        if counters:
            counters["training"].forget()

    def count_step(self, step: int) -> None:
        """Once a step, after its forward."""
        if self._first is None:
            self._first = step, time.perf_counter()  # the first step, which compiles and allocates, is not counted

    def log(
        self, step: int, global_avg_loss: float, global_max_loss: float, grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        with self._kept() as kept:
            super().log(step, global_avg_loss, global_max_loss, grad_norm, extra_metrics=extra_metrics)
        scalars = kept.scalars | self._of_loss("training", "loss_metrics", global_avg_loss)
        left = self._left(step)
        if left is not None:
            scalars["time_metrics/left(s)"] = left
        if accelerator() is None:
            scalars.pop(MFU, None)
        self.logger.log(scalars, step)
        color = self.color
        end = f"  {color.red}left: {duration(left)}" if left is not None else ""
        logger.info(
            f"{color.red}step: {self._of_all(step)}  {color.green}loss: {global_avg_loss:8.5f}  "
            f"{self._said(scalars, 'loss_metrics')}"
            f"{color.orange}grad_norm: {grad_norm:7.4f}  {self._usage(scalars, '')}{end}{color.reset}"
        )

    def log_validation(self, loss: float, step: int, extra_metrics: dict[str, Any] | None = None) -> None:
        with self._kept() as kept:
            super().log_validation(loss, step, extra_metrics)
        scalars = kept.scalars | self._of_loss("validation", "validation_metrics", loss)
        self.logger.log(scalars, step)
        color = self.color
        logger.info(
            f"{color.yellow}validate step: {self._of_all(step)}  {color.green}loss: {loss:7.4f}  "
            f"{self._said(scalars, 'validation_metrics')}{self._usage(scalars, 'validation_metrics/')}{color.reset}"
        )

    @contextmanager
    def _kept(self) -> Iterator[_Kept]:
        """TorchTitan measures in here; its scalars are kept, and its line, which says less, is not said."""
        stock, self.logger = self.logger, _Kept()
        said, titan_metrics.logger = (
            titan_metrics.logger,
            SimpleNamespace(info=lambda line: None, warning=titan_metrics.logger.warning),
        )
        try:
            yield self.logger
        finally:
            self.logger, titan_metrics.logger = stock, said

    def _of_loss(self, part: str, prefix: str, loss: float) -> dict[str, float]:
        """Perplexity, and bits per byte where they are known, of a loss in nats per token."""
        ratio = counters[part].take(self.parallel_dims.get_optional_mesh("loss")) if counters else None
        if loss < 0:  # of a stage of a pipeline that has no loss
            return {}
        found = {f"{prefix}/perplexity": math.exp(min(loss, 700.0))}
        if ratio is not None:
            found[f"{prefix}/bits_per_byte"] = loss / math.log(2) * ratio
        return found

    def _left(self, step: int) -> float | None:
        """Seconds until the last step, validation and checkpoints on the way included as they have been so far."""
        if self._first is None or not self._first[0] < step < self._steps:
            return None
        first, then = self._first
        return (time.perf_counter() - then) / (step - first) * (self._steps - step)

    def _of_all(self, step: int) -> str:
        return f"{step:{len(str(self._steps))}}/{self._steps}"

    def _said(self, scalars: dict[str, Any], prefix: str) -> str:
        words = (("ppl", "perplexity", ",.2f"), ("bits/byte", "bits_per_byte", ".4f"))
        found = [(word, scalars.get(f"{prefix}/{name}"), form) for word, name, form in words]
        return "".join(f"{word}: {value:{form}}  " for word, value, form in found if value is not None)

    def _usage(self, scalars: dict[str, Any], prefix: str) -> str:
        color, memory = self.color, f"{prefix}memory/max_reserved"
        said = (
            f"{color.turquoise}memory: {scalars[f'{memory}(GiB)']:5.2f}GiB({scalars[f'{memory}(%)']:.2f}%)  "
            f"{color.blue}tps: {round(scalars[f'{prefix}throughput(tps)']):,}"
        )
        if accelerator() is None or TFLOPS not in scalars:
            return said
        mfu = f"{scalars[MFU]:.2f}%" if MFU in scalars else "N/A"
        return f"{said}  {color.cyan}tflops: {scalars[TFLOPS]:,.2f}  {color.magenta}mfu: {mfu}"
