"""TorchTitan's validation loop over this package's data."""

from torchtitan.components.validate import Validator
from torchtitan.distributed.context_parallel import prepare_context_parallel_input
from torchtitan.tools.logging import logger

from .accuracy import Accuracy
from .dataloader import build_task_dataloader, build_validation_dataloader
from .tasks import conditions

__all__ = ["GDN2Validator", "build_validator"]


class _DealtOut:
    """ParallelDims as they are once sequences are dealt out: a rank with a part of a sequence is one with data of its
    own. The stock validator counts tokens after that, and would add up the ranks' means of their parts."""

    cp_enabled = False

    def __init__(self, parallel_dims):
        self._dims = parallel_dims
        self.dp_enabled = parallel_dims.dp_cp_enabled

    def get_mesh(self, name):
        return self._dims.get_mesh("loss" if name == "batch" else name)

    def __getattr__(self, name):
        return getattr(self._dims, name)


class _KeepsTheLoss:
    """Stands in for the metrics processor while the stock validator runs under one of several conditions."""

    ntokens_since_last_log = 0

    def log_validation(self, loss, step):
        self.loss = loss


class GDN2Validator(Validator):
    """The stock validator builds its own dataloader from its own list of datasets; this one brings ours, and starts it
    afresh at every validation so that all of them see the same text.

    A recall task is validated under each of its conditions. ``results`` has those of the last validation, a dictionary
    each, such as ``{"pairs": 16, "length": 256, "loss": 0.1, "accuracy": 0.98, "exact": 0.9}``; it is empty on ranks
    whose pipeline stage has no loss. ``accuracy``: share of answers that are right; ``exact``: share of sequences with
    every answer right; selective erase also has ``kept`` and ``forgotten``, the accuracy for such keys.
    """

    def __init__(
        self,
        job_config,
        dp_world_size,
        dp_rank,
        tokenizer,
        parallel_dims,
        loss_fn,
        validation_context,
        maybe_enable_amp,
        metrics_processor,
        pp_schedule=None,
        pp_has_first_stage=None,
        pp_has_last_stage=None,
    ):
        self.job_config = job_config
        self.tokenizer = tokenizer
        self.parallel_dims = _DealtOut(parallel_dims)
        self._cp_mesh = parallel_dims.get_optional_mesh("cp")
        self._dp_mesh = parallel_dims.get_optional_mesh("batch")
        self.loss_fn = loss_fn
        self.validation_context = validation_context
        self.maybe_enable_amp = maybe_enable_amp
        self.metrics_processor = metrics_processor
        self.pp_schedule = pp_schedule
        self.pp_has_first_stage = pp_has_first_stage
        self.pp_has_last_stage = pp_has_last_stage
        self._dataloader_arguments = dp_world_size, dp_rank, tokenizer, job_config
        self._conditions = [
            (condition, build_task_dataloader(condition, *self._dataloader_arguments))
            for condition in conditions(job_config)
        ]
        self.results = []

    def post_dataloading_process(self, input_dict, labels, model_parts):
        # The stock one leaves the resets out where a model's masks are not asked for by type.
        extra_inputs = {name: x for name, x in input_dict.items() if name != "input"}
        inputs = input_dict["input"]
        extra = {"attention_masks": model_parts[0].get_attention_masks(inputs, self.tokenizer, extra_inputs)}
        if self._cp_mesh is not None:
            balancer = self.job_config.parallelism.context_parallel_load_balancer
            inputs, labels, extra = prepare_context_parallel_input(
                inputs, labels, extra, self._cp_mesh, inputs.device, balancer
            )
        return inputs, labels, extra_inputs, extra

    def validate(self, model_parts, step):
        if self._conditions:
            self._validate_task(model_parts, step)
            return
        self.validation_dataloader = build_validation_dataloader(
            *self._dataloader_arguments, infinite=self.job_config.validation.steps != -1
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


def build_validator(**kwargs):
    return GDN2Validator(**kwargs)
