"""The loss on held-out text, or on a recall task under each of its conditions with the share of right answers."""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.tools.logging import logger

from .dataloader import build_task_dataloader, build_validation_dataloader, for_trainer
from .settings import Settings
from .tasks import conditions

__all__ = ["Accuracy", "TaskValidation"]


class Accuracy:
    """Watches a loss: how many answers (labels that are not IGNORE_INDEX) and how many of them wrong, per sequence.

    An answer is right if its logit is the greatest. cp_mesh, dp_mesh: the ranks that share sequences, and those that
    have other sequences, or None. apart: (symbol, its name, name of the others), to count those answers separately too.
    """

    def __init__(
        self, cp_mesh: DeviceMesh | None, dp_mesh: DeviceMesh | None, apart: tuple[int, str, str] | None = None
    ) -> None:
        self._cp_mesh, self._dp_mesh, self._apart, self._counts = cp_mesh, dp_mesh, apart, []

    @torch.no_grad()
    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """logits: [B, T, vocabulary], also as a DTensor sharded over the vocabulary; labels: int64 [B, T]."""
        answered = labels != IGNORE_INDEX
        wrong = torch.zeros_like(answered)
        wrong[answered] = _greatest(logits, answered) != labels[answered]
        apart = torch.zeros_like(answered) if self._apart is None else labels == self._apart[0]
        counted = answered, wrong, apart, apart & wrong
        self._counts.append(torch.stack([these.sum(1) for these in counted]))

    def shares(self) -> dict[str, float] | None:
        """{"accuracy": share of right answers, "exact": share of sequences all of whose answers are right}, and the
        accuracy of each kind of answer that is counted apart; None on a rank that had no logits. Every rank that had
        some must ask."""
        if not self._counts:
            return None
        counts = torch.cat(self._counts, 1)
        if self._cp_mesh is not None:  # a sequence is right if every rank's part of it is
            dist.all_reduce(counts, group=self._cp_mesh.get_group())
        right = counts[1] == 0
        sums = torch.cat((counts.sum(1), right.new_tensor([right.numel(), right.sum()], dtype=torch.int64)))
        if self._dp_mesh is not None:
            dist.all_reduce(sums, group=self._dp_mesh.get_group())
        answers, wrong, apart, wrong_apart, sequences, exact = sums.tolist()
        shares = {"accuracy": (answers - wrong) / answers, "exact": exact / sequences}
        if self._apart is not None:
            _, name, others = self._apart
            shares[name] = (apart - wrong_apart) / apart
            shares[others] = (answers - apart - wrong + wrong_apart) / (answers - apart)
        return shares


def _greatest(logits: torch.Tensor, answered: torch.Tensor) -> torch.Tensor:
    """The symbol with the greatest logit at each answer."""
    if not isinstance(logits, DTensor):
        return logits[answered].argmax(-1)
    # The few answers are gathered, not all of the logits.
    local = logits.to_local()[answered]
    shape = torch.Size((local.shape[0], logits.shape[-1]))
    placed = [Shard(1) if p.is_shard(2) or p.is_shard(-1) else p for p in logits.placements]
    answers = DTensor.from_local(local, logits.device_mesh, placed, run_check=False, shape=shape, stride=(shape[1], 1))
    return answers.full_tensor().argmax(-1)


class _KeepsTheLoss:
    """Stands in for the metrics processor while the stock validator runs under one of several conditions."""

    ntokens_since_last_log = 0

    def log_validation(self, loss: float, step: int) -> None:
        self.loss = loss


class TaskValidation:
    """For a Validator whose ``validate`` runs over its ``validation_dataloader``. The stock ones take it from their own
    list of datasets; this brings ours, afresh at every validation so that all of them see the same text.

    A recall task is validated under each of its conditions. ``results`` has those of the last validation, a dictionary
    each, such as ``{"pairs": 16, "length": 256, "loss": 0.1, "accuracy": 0.98, "exact": 0.9}``; it is empty on ranks
    whose pipeline stage has no loss. ``accuracy``: share of answers that are right; ``exact``: share of sequences with
    every answer right; selective erase also has ``kept`` and ``forgotten``, the accuracy for such keys.
    """

    def prepare(self, settings: Settings, dp_world_size: int, dp_rank: int, **parts: Any) -> None:
        """Take the parts that a trainer hands to its validator, under the names that both generations have for them;
        the loop of TorchTitan reads them."""
        without_pipeline = {"pp_schedule": None, "pp_has_first_stage": None, "pp_has_last_stage": None}
        for name, part in (without_pipeline | parts).items():
            setattr(self, name, part)
        self._of_validation = dp_world_size, dp_rank, self.tokenizer, settings
        self._cp_mesh = self.parallel_dims.get_optional_mesh("cp")
        self._dp_mesh = self.parallel_dims.get_optional_mesh("batch")
        self._conditions = [
            (condition, build_task_dataloader(condition, *self._of_validation)) for condition in conditions(settings)
        ]
        self.results = []

    def validate(self, model_parts: list[torch.nn.Module], step: int) -> None:
        if self._conditions:
            self._validate_task(model_parts, step)
            return
        self.validation_dataloader = for_trainer(build_validation_dataloader)(
            *self._of_validation, infinite=self._of_validation[-1].validation.steps != -1
        )
        super().validate(model_parts, step)

    def _validate_task(self, model_parts: list[torch.nn.Module], step: int) -> None:
        processor, kept = self.metrics_processor, _KeepsTheLoss()
        losses, results = [], []
        for condition, self.validation_dataloader in self._conditions:
            accuracy = Accuracy(self._cp_mesh, self._dp_mesh, condition.task.apart)
            self.metrics_processor, self.loss_fn.watcher = kept, accuracy
            try:
                super().validate(model_parts, step)
            finally:
                self.metrics_processor, self.loss_fn.watcher = processor, None
            losses.append(kept.loss)
            if (shares := accuracy.shares()) is not None:
                results.append((condition, shares | {"loss": kept.loss}))
        self.results = [condition.settings | shares for condition, shares in results]
        metrics = {}
        for condition, shares in results:
            said = ", ".join(f"{name} {value:.4f}" for name, value in shares.items())
            logger.info(f"validate step: {step:2}  {condition}: {said}")
            metrics |= {f"validation_metrics/{name}/{condition}": value for name, value in shares.items()}
        if results:
            metrics["validation_metrics/accuracy"] = sum(r["accuracy"] for r in self.results) / len(results)
        processor.ntokens_since_last_log += kept.ntokens_since_last_log
        processor.log_validation(loss=sum(losses) / len(losses), step=step, extra_metrics=metrics)
