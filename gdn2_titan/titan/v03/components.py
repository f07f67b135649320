"""The parts of a training as TorchTitan 0.3 builds and calls them: model, loss, optimizer, rate, data, metrics,
validation, and the functions of a ModelSpec."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import torch
import tyro
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torchtitan.components.checkpointer.utils import canonical_fqn
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.loss import BaseLoss, cross_entropy_loss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.components.validate import BaseValidator, Validator
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.compile import _maybe_enable_async_tp
from torchtitan.distributed.context_parallel.api import cp_shard
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.distributed.spmd_types import current_spmd_mesh
from torchtitan.protocols import BaseModel
from torchtitan.tools.logging import logger

from gdn2_titan.models import GDN2Model, GDN2ModelArgs
from gdn2_titan.models.flops import flops_per_token, parameter_counts

from ..checks.settings import check_vocabulary
from ..dataloader import ReshardingDataloader, build_dataloader, for_trainer
from ..errors import refusing
from ..float8 import NAMES, LinearConverter
from ..label_bytes import count
from ..metrics import GateMetrics
from ..optimizer import build_optimizers, hold_last_rate, trained
from ..parallelize import apply_plans
from ..pipeline import modules_of_stages
from ..settings import OptimizerFields, Settings
from ..training_log import TrainingLog
from ..validation import TaskValidation

__all__ = [
    "GDN2MetricsProcessor", "GDN2Validator", "GroupedOptimizers", "LRSchedulers", "TitanModel", "TrainingData",
    "WatchedLoss", "converters_of", "deal_out", "hook_converters", "parallelize", "pipeline",
]  # fmt: skip

# TorchTitan builds each part from its own section alone: what a part reads of others, the trainer fills in here before.
Filled = Annotated[Settings | None, tyro.conf.Suppress]


class TitanModel(GDN2Model, BaseModel):
    """The resets that a data loader gives with the tokens come as they are, to every pipeline stage."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseModel.Config):
        args: GDN2ModelArgs = field(default_factory=GDN2ModelArgs)
        _settings: Filled = None

        @property
        def layers(self) -> range:
            """As many as the model has: their number is all that TorchTitan's pipelines ask for."""
            return range(self.args.n_layers)

        def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
            self.args = self._settings.model_args()

        def get_nparams_and_flops(self, model: torch.nn.Module, seq_len: int) -> tuple[int, int]:
            total, embedding = parameter_counts(model)
            return total, flops_per_token(self.args, total, embedding, seq_len)

    def __init__(self, config: Config) -> None:
        super().__init__(config.args)
        self.config = config

    def verify_module_protocol(self) -> None:
        """The layers are plain modules of PyTorch."""


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """TorchTitan's cross entropy, summed. It takes logits that are sharded over the vocabulary as a DTensor or, with
    backend "spmd_types", whose mesh it then looks up, as the rank's shard."""
    if isinstance(logits, DTensor) and current_spmd_mesh() is not None:
        return cross_entropy_loss(logits.to_local(), labels, global_vocab_size=logits.shape[-1])
    return cross_entropy_loss(logits, labels)


class WatchedLoss(BaseLoss):
    """A loss that shows what it is given to ``watcher(logits, labels)``, while there is one: every layout computes its
    loss by this, on the ranks and in the microbatches that have logits."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        _settings: Filled = None

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        self.fn = _loss
        self.watcher: Callable[[torch.Tensor, torch.Tensor], None] | None = None
        # On shards of the vocabulary it communicates, which compiling it gains nothing for.
        if config._settings.parallelism.tensor_parallel_degree == 1:
            self._maybe_compile(compile_config)
        elif config._settings.compiles("loss"):
            logger.info("The loss is not compiled: it is computed on shards of the vocabulary")

    def __call__(self, pred: torch.Tensor, labels: torch.Tensor, *rest: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        if self.watcher is not None:
            self.watcher(pred, labels)
        count(labels)
        return super().__call__(pred, labels, *rest, **kwargs)


class GroupedOptimizers(OptimizersContainer):
    """One or two optimizers per model part. ``param_groups`` of the stock config is not read."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizerFields, OptimizersContainer.Config):
        name: Literal["Adam", "AdamW", "Muon"] = "AdamW"
        lr: float = 8e-4
        beta1: float = 0.9
        beta2: float = 0.95
        eps: float = 1e-8
        weight_decay: float = 0.1
        """Of what weight_decay_on says"""
        implementation: Literal["for-loop", "foreach", "fused"] = "fused"

    def __init__(self, config: Config, *, model_parts: list[torch.nn.Module]) -> None:
        self.model_parts, implementation = model_parts, self._build_impl_kwargs(config)
        of_parts = [build_optimizers(part, config, implementation, canonical_fqn) for part in model_parts]
        self.optimizers = [one for own in of_parts for one in own]
        self._post_init(trained(model_parts))


class LRSchedulers(LRSchedulersContainer):
    @dataclass(kw_only=True, slots=True)
    class Config(LRSchedulersContainer.Config):
        def build(self, *, optimizers: OptimizersContainer, training_steps: int) -> LRSchedulersContainer:
            built = LRSchedulersContainer.Config.build(self, optimizers=optimizers, training_steps=training_steps)
            hold_last_rate(built.schedulers, self.total_steps or training_steps)
            return built


@dataclass(kw_only=True, slots=True)
class TrainingData(ParallelAwareDataloader.Config):
    dataset: str = "stdlib"
    """"stdlib", "files", a Hugging Face repository or a recall task"""
    dataset_path: str | None = None
    """File, folder or glob, with "files" """
    _settings: Filled = None

    @refusing
    def build(self, *, dp_world_size: int, dp_rank: int, tokenizer: BaseTokenizer, **_: Any) -> ReshardingDataloader:
        check_vocabulary(self._settings, tokenizer)
        settings = in_microbatches(self._settings, "training")
        return for_trainer(build_dataloader)(dp_world_size, dp_rank, tokenizer, settings)


@dataclass(kw_only=True, slots=True)
class ValidationData(ParallelAwareDataloader.Config):
    dataset: str = "stdlib"
    dataset_path: str | None = None
    local_batch_size: int = 8
    """Sequences that a data-parallel rank validates with at a time"""
    seq_len: int = 2048
    """Tokens of a sequence"""


def in_microbatches(settings: Settings, part: str) -> Settings:
    """The settings for a loader of what the trainer asks for at a time: in a pipeline, a microbatch."""
    parallelism = settings.parallelism
    if parallelism.pipeline_parallel_degree == 1:
        return settings
    microbatch = replace(getattr(settings, part), local_batch_size=parallelism.pipeline_parallel_microbatch_size)
    return replace(settings, **{part: microbatch})


def deal_out(
    input_dict: dict[str, torch.Tensor], labels: torch.Tensor, cp_mesh: DeviceMesh | None, balancer: str | None
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """(tokens, labels, {"resets": ...}) as the model takes them: under context parallelism, this rank's share of each
    sequence. The stock trainer asks for positions to deal out, which this model knows from its shards."""
    tensors = {name: input_dict[name] for name in ("input", "resets") if name in input_dict} | {"labels": labels}
    if cp_mesh is not None:
        shares, _ = cp_shard(
            cp_mesh, tuple(tensors.values()), None, None if balancer == "none" else balancer, input_seq_dim=1
        )
        tensors = dict(zip(tensors, shares, strict=True))
    return tensors.pop("input"), tensors.pop("labels"), tensors


class GDN2MetricsProcessor(GateMetrics, TrainingLog, MetricsProcessor):
    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        _settings: Filled = None

    def __init__(self, config: Config, *, parallel_dims: ParallelDims, **kwargs: Any) -> None:
        self.watch(config._settings, config._settings.model_args())
        super().__init__(config, parallel_dims=parallel_dims, **kwargs)

    def should_log(self, step: int) -> bool:
        # Asked before each step's forward.
        self.forget_labels()
        return super().should_log(step)


class GDN2Validator(TaskValidation, Validator):
    """TorchTitan's validation loop over this package's data."""

    @dataclass(kw_only=True, slots=True)
    class Config(Validator.Config):
        dataloader: ValidationData = field(default_factory=ValidationData)
        _settings: Filled = None

        def __post_init__(self):
            """Our check refuses what the stock one does, in a sentence with the section's name."""

    @refusing
    def __init__(self, config: Config, *, dp_world_size: int, dp_rank: int, **parts: Any) -> None:
        BaseValidator.__init__(self, config)
        self.prepare(in_microbatches(config._settings, "validation"), dp_world_size, dp_rank, **parts)
        # What the stock loop would hand to the loader that it builds; ours is there already.
        self.dp_world_size, self.dp_rank = dp_world_size, dp_rank
        self.seq_len, self.local_batch_size = config.dataloader.seq_len, config.dataloader.local_batch_size
        self.dl_config = SimpleNamespace(build=lambda **_: self.validation_dataloader)

    def post_dataloading_process(
        self, input_dict: dict[str, torch.Tensor], labels: torch.Tensor, model_parts: list[torch.nn.Module]
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        balancer = self.parallelism.context_parallel_load_balancer
        return deal_out(input_dict, labels, self._cp_mesh, balancer)


def parallelize(
    model: torch.nn.Module, *, parallel_dims: ParallelDims, compile_config: Any, ac_config: Any, dump_folder: str,
    **_: Any,
) -> torch.nn.Module:  # fmt: skip
    """TorchTitan's ``parallelize_fn``, for the model or a pipeline stage of it."""
    settings = model.config._settings
    for converter in converters_of(settings, parallel_dims):
        converter.convert(model)
    return apply_plans(
        model,
        parallel_dims,
        settings,
        loss_parallel=True,
        async_tensor_parallel=lambda mesh: _maybe_enable_async_tp(compile_config, mesh),
        checkpoint=lambda model: ac_config.build(dump_folder=dump_folder).apply(model),
        shards=True,  # over a single rank too: parameters in fp32 are computed with in bf16 by nothing else
    )


def hook_converters(
    optimizers: OptimizersContainer, model_parts: list[torch.nn.Module], parallel_dims: ParallelDims
) -> None:
    """TorchTitan's ``post_optimizer_build_fn``: what the converters of model.converters do after each step."""
    for converter in converters_of(model_parts[0].config._settings, parallel_dims):
        optimizers.register_step_post_hook(lambda *_, one=converter: one.post_optimizer_hook(model_parts))


def converters_of(settings: Settings, parallel_dims: ParallelDims) -> list[LinearConverter]:
    """The converters that model.converters names."""
    return [LinearConverter(settings, parallel_dims, name) for name in NAMES if name in settings.model.converters]


def pipeline(model: torch.nn.Module, *, parallelism: Any, model_config: Any, **rest: Any) -> tuple[Any, ...]:
    """TorchTitan's ``pipelining_fn``, which also knows the head by the name that 0.2.2 has for it."""
    stages = modules_of_stages(parallelism, model_config.args.n_layers)
    named = replace(parallelism, module_fqns_per_model_part=stages)
    return pipeline_llm(model, parallelism=named, model_config=model_config, **rest)
