"""Validation on held-out text, or on a recall task under each of its conditions, with the share of right answers."""

from torchtitan.tools.logging import logger

from .accuracy import Accuracy
from .dataloader import build_task_dataloader, build_validation_dataloader, for_trainer
from .tasks import conditions

__all__ = ["TaskValidation"]


class _KeepsTheLoss:
    """Stands in for the metrics processor while the stock validator runs under one of several conditions."""

    ntokens_since_last_log = 0

    def log_validation(self, loss, step):
        self.loss = loss


class TaskValidation:
    """For a Validator whose ``validate`` runs over its ``validation_dataloader``. The stock ones take it from their own
    list of datasets; this brings ours, afresh at every validation so that all of them see the same text.

    A recall task is validated under each of its conditions. ``results`` has those of the last validation, a dictionary
    each, such as ``{"pairs": 16, "length": 256, "loss": 0.1, "accuracy": 0.98, "exact": 0.9}``; it is empty on ranks
    whose pipeline stage has no loss. ``accuracy``: share of answers that are right; ``exact``: share of sequences with
    every answer right; selective erase also has ``kept`` and ``forgotten``, the accuracy for such keys.
    """

    def prepare(self, parallel_dims, dp_world_size, dp_rank, tokenizer, job_config):
        self._of_validation = dp_world_size, dp_rank, tokenizer, job_config
        self._cp_mesh = parallel_dims.get_optional_mesh("cp")
        self._dp_mesh = parallel_dims.get_optional_mesh("batch")
        self._conditions = [
            (condition, build_task_dataloader(condition, *self._of_validation)) for condition in conditions(job_config)
        ]
        self.results = []

    def validate(self, model_parts, step):
        if self._conditions:
            self._validate_task(model_parts, step)
            return
        self.validation_dataloader = for_trainer(build_validation_dataloader)(
            *self._of_validation, infinite=self._of_validation[-1].validation.steps != -1
        )
        super().validate(model_parts, step)

    def _validate_task(self, model_parts, step):
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
