"""The parts of a training as TorchTitan 0.2.2 builds and calls them: model, loss, optimizer, learning rate, metrics,
validation, float8."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import LambdaLR
from torchtitan.components import lr_scheduler
from torchtitan.components.loss import build_cross_entropy_loss, cross_entropy_loss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.components.validate import Validator
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.context_parallel import prepare_context_parallel_input
from torchtitan.protocols import model_converter, train_spec
from torchtitan.tools.logging import logger

from gdn2_titan.models import GDN2Model, GDN2ModelArgs, flavors
from gdn2_titan.models.flops import flops_per_token, parameter_counts

from .. import optimizer
from ..float8 import NAMES, LinearConverter
from ..label_bytes import count
from ..metrics import GateMetrics
from ..optimizer import hold_last_rate, trained
from ..settings import Settings
from ..training_log import TrainingLog
from ..validation import TaskValidation

__all__ = [
    "GDN2MetricsProcessor", "GDN2Validator", "TitanModel", "TitanModelArgs", "WatchedLoss", "build_loss",
    "build_lr_schedulers", "build_optimizers", "register_converters", "titan_flavors",
]  # fmt: skip


class TitanModel(GDN2Model):
    """TorchTitan hands attention masks, and nothing else, to every pipeline stage, cut into microbatches like the
    tokens. The resets travel under that name: masks of softmax layers are made from them where they are needed."""

    def get_attention_masks(
        self, input_batch: torch.Tensor, tokenizer: Any, extra_inputs: dict[str, torch.Tensor] | None = None
    ) -> torch.Tensor | None:
        """bool [B, T], True where a document begins, or None; taken out of ``extra_inputs``."""
        return (extra_inputs or {}).pop("resets", None)

    def forward(
        self, tokens: torch.Tensor, attention_masks: torch.Tensor | None = None, positions: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """positions: comes under context parallelism, to every stage; the model knows them from its shards."""
        return super().forward(tokens, attention_masks)


@dataclasses.dataclass
class TitanModelArgs(GDN2ModelArgs):
    # Not a field: with this name TorchTitan asks the model for masks and hands them to every pipeline stage.
    attn_type = "varlen"

    def update_from_config(self, job_config: Any, **kwargs: Any) -> None:
        for name, value in Settings.of(job_config).gdn2.changes().items():
            setattr(self, name, value)

    def get_nparams_and_flops(self, model: torch.nn.Module, seq_len: int) -> tuple[int, int]:
        total, embedding = parameter_counts(model)
        return total, flops_per_token(self, total, embedding, seq_len)


def titan_flavors() -> dict[str, TitanModelArgs]:
    """The flavors as TorchTitan takes them: with the job config's overrides, and FLOPs for its metrics."""
    return {name: TitanModelArgs(**dataclasses.asdict(args)) for name, args in flavors.items()}


class WatchedLoss:
    """A loss that shows what it is given to ``watcher(logits, labels)``, while there is one: every layout computes its
    loss by this, on the ranks and in the microbatches that have logits."""

    def __init__(self, loss_fn: Callable[..., torch.Tensor]) -> None:
        self._loss_fn = loss_fn
        self.watcher: Callable[[torch.Tensor, torch.Tensor], None] | None = None

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.watcher is not None:
            self.watcher(logits, labels)
        count(labels)
        return self._loss_fn(logits, labels)


def build_loss(job_config: Any, parallel_dims: ParallelDims, **kwargs: Any) -> WatchedLoss:
    """TorchTitan's ``build_loss_fn``. A compiled loss of logits sharded over the vocabulary is silently zero."""
    if parallel_dims.tp_enabled and not job_config.parallelism.disable_loss_parallel:
        if Settings.of(job_config).compiles("loss"):
            logger.info("The loss is not compiled: it is computed on shards of the vocabulary")
        return WatchedLoss(cross_entropy_loss)
    return WatchedLoss(build_cross_entropy_loss(job_config, parallel_dims=parallel_dims))


class GroupedOptimizers(OptimizersContainer):
    """TorchTitan's container with the optimizers of ``optimizer.build_optimizers``, one or two for a model part."""

    def __init__(self, model_parts: list[torch.nn.Module], section: Any) -> None:
        implementation = {name: section.implementation == name for name in ("fused", "foreach")}
        self.model_parts = model_parts
        self.of_parts = [optimizer.build_optimizers(part, section, implementation) for part in model_parts]
        self.optimizers = [one for own in self.of_parts for one in own]
        self._post_init(trained(model_parts), {})

    def state_dict(self) -> dict[str, Any]:
        options, found = StateDictOptions(flatten_optimizer_state_dict=True), {}
        for part, own in zip(self.model_parts, self.of_parts, strict=True):
            found |= get_optimizer_state_dict(part, own, options=options)
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        for part, own in zip(self.model_parts, self.of_parts, strict=True):
            set_optimizer_state_dict(part, own, optim_state_dict=state_dict, options=options)


def build_optimizers(
    model_parts: list[torch.nn.Module], optimizer_config: Any, parallel_dims: ParallelDims | None
) -> GroupedOptimizers:
    """TorchTitan's ``build_optimizers_fn``: the [optimizer] section, Adam, AdamW or Muon."""
    return GroupedOptimizers(model_parts, optimizer_config)


class LRSchedulers(lr_scheduler.LRSchedulersContainer):
    """The number of steps is all of the state: the rest follows from the config, and TorchTitan 0.3 saves no more."""

    def __init__(self, schedulers: list[LambdaLR]) -> None:
        self.schedulers = schedulers

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.schedulers[0].last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        steps = state_dict["last_epoch"]
        for one in self.schedulers:
            one.last_epoch, one._step_count = steps, steps + 1
            one._last_lr = [lr * factor(steps) for lr, factor in zip(one.base_lrs, one.lr_lambdas, strict=True)]


def build_lr_schedulers(optimizers: OptimizersContainer, lr_scheduler_config: Any, training_steps: int) -> LRSchedulers:
    """TorchTitan's ``build_lr_schedulers_fn``."""
    built = LRSchedulers(lr_scheduler.build_lr_schedulers(optimizers, lr_scheduler_config, training_steps).schedulers)
    hold_last_rate(built.schedulers, lr_scheduler_config.total_steps or training_steps)
    return built


class GDN2MetricsProcessor(GateMetrics, TrainingLog, MetricsProcessor):
    """TorchTitan's ``build_metrics_processor_fn``."""

    def __init__(self, job_config: Any, parallel_dims: ParallelDims, model_args: Any, tag: str | None = None) -> None:
        self.watch(Settings.of(job_config), model_args)
        super().__init__(job_config, parallel_dims, tag)

    def should_log(self, step: int) -> bool:
        # The one thing that the trainer asks in every step, after its forward.
        self.finish(step)
        if not (logs := super().should_log(step)):
            self.forget_labels()
        return logs

    def log(self, *args: Any, extra_metrics: dict[str, Any] | None = None) -> None:
        # TorchTitan has every context-parallel rank count whole sequences.
        if extra_metrics and "n_tokens_seen" in extra_metrics:
            extra_metrics = extra_metrics | {"n_tokens_seen": extra_metrics["n_tokens_seen"] // self.parallel_dims.cp}
        super().log(*args, extra_metrics=extra_metrics)


class _DealtOut:
    """ParallelDims as they are once sequences are dealt out: a rank with a part of a sequence is one with data of its
    own. The stock validator counts tokens after that, and would add up the ranks' means of their parts."""

    cp_enabled = False

    def __init__(self, parallel_dims: ParallelDims) -> None:
        self._dims = parallel_dims
        self.dp_enabled = parallel_dims.dp_cp_enabled

    def get_mesh(self, name: str) -> Any:
        return self._dims.get_mesh("loss" if name == "batch" else name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dims, name)


class GDN2Validator(TaskValidation, Validator):
    """TorchTitan's validation loop over this package's data; its ``build_validator_fn``."""

    def __init__(self, job_config: Any, dp_world_size: int, dp_rank: int, **parts: Any) -> None:
        self.job_config = job_config
        self.prepare(Settings.of(job_config), dp_world_size, dp_rank, **parts)
        self.parallel_dims = _DealtOut(self.parallel_dims)

    def post_dataloading_process(
        self, input_dict: dict[str, torch.Tensor], labels: torch.Tensor, model_parts: list[torch.nn.Module]
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any], dict[str, Any]]:
        # The stock one leaves the resets out where a model's masks are not asked for by type.
        inputs, extra = input_dict["input"], {"attention_masks": input_dict.get("resets")}
        if self._cp_mesh is not None:
            balancer = self.job_config.parallelism.context_parallel_load_balancer
            inputs, labels, extra = prepare_context_parallel_input(
                inputs, labels, extra, self._cp_mesh, inputs.device, balancer
            )
        return inputs, labels, {}, extra


_STOCK_CONVERTERS = {name: model_converter._registry_model_converter_cls[name] for name in NAMES}


def _build_converter(name: str, job_config: Any, parallel_dims: ParallelDims) -> Any:
    if issubclass(train_spec.get_train_spec(job_config.model.name).model_cls, GDN2Model):
        return LinearConverter(Settings.of(job_config), parallel_dims, name)
    return _STOCK_CONVERTERS[name](job_config, parallel_dims)


def register_converters() -> None:
    """Put our float8 converters in the places of TorchTitan's, for this model only. Again is harmless."""
    for name in NAMES:
        model_converter._registry_model_converter_cls[name] = functools.partial(_build_converter, name)
