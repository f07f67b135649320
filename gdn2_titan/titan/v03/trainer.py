"""TorchTitan 0.3's trainer with this package's parts in its config, and the Settings that such a config says."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.config.configs import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.trainer import Trainer

from .. import pipeline
from ..byte_tokenizer import BYTE_TOKENIZER_DIR
from ..checkpoint import keeps_decays_and_knows_old_names
from ..checks.settings import check_settings
from ..errors import ConfigError, refusing
from ..settings import GDN2, Data, Float8Linear, MXLinear, Settings, Task
from ..tokens import check_tokenizer
from . import components
from .activation_checkpoint import Policy, fields_of_policy
from .fields import COUNTERPARTS, check_own_fields, in_words_of_03, job_config_class, owner

__all__ = ["GDN2Trainer", "JobConfig", "check", "fill", "settings_of", "settle_timeouts"]


@dataclass(kw_only=True, slots=True)
class QuantizedLinear:
    float8: Float8Linear = field(default_factory=Float8Linear)
    mx: MXLinear = field(default_factory=MXLinear)


@dataclass(kw_only=True, slots=True)
class Quantize:
    linear: QuantizedLinear = field(default_factory=QuantizedLinear)


@dataclass(kw_only=True, slots=True)
class Training(TrainingConfig):
    disable_cuda_graphs: bool = True
    """This model trains without them"""


@dataclass(kw_only=True, slots=True)
class Parallelism(ParallelismConfig):
    def __post_init__(self):
        """As of GDN2Trainer.Config."""


@dataclass(kw_only=True, slots=True)
class Compile(CompileConfig):
    def __post_init__(self):
        """As of GDN2Trainer.Config."""


@keeps_decays_and_knows_old_names
class Checkpoints(CheckpointManager):
    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        last_save_model_only: bool = False
        """Stock TorchTitan says true; with false a finished run can be continued for more steps"""

        def __post_init__(self):
            """As of GDN2Trainer.Config; a relative initial_load_path is right."""


class GDN2Trainer(Trainer):
    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        hf_assets_path: str = str(BYTE_TOKENIZER_DIR)
        converters: list[str] = field(default_factory=list)
        """"quantize.linear.float8" or "quantize.linear.mx" """
        quantize: Quantize = field(default_factory=Quantize)
        gdn2: GDN2 = field(default_factory=GDN2)
        data: Data = field(default_factory=Data)
        task: Task = field(default_factory=Task)
        metrics: components.GDN2MetricsProcessor.Config = field(default_factory=components.GDN2MetricsProcessor.Config)
        dataloader: components.TrainingData = field(default_factory=components.TrainingData)
        optimizer: components.GroupedOptimizers.Config = field(default_factory=components.GroupedOptimizers.Config)
        lr_scheduler: components.LRSchedulers.Config = field(default_factory=components.LRSchedulers.Config)
        training: Training = field(default_factory=Training)
        parallelism: Parallelism = field(default_factory=Parallelism)
        checkpoint: Checkpoints.Config = field(default_factory=Checkpoints.Config)
        compile: Compile = field(default_factory=Compile)
        activation_checkpoint: Policy = None
        validator: components.GDN2Validator.Config = field(default_factory=components.GDN2Validator.Config)
        loss: components.WatchedLoss.Config = field(default_factory=components.WatchedLoss.Config)

        def __post_init__(self):
            """Our check refuses what the stock one does and more, in a sentence with the section's name."""

    @refusing
    def __init__(self, config: Config) -> None:
        check(config)
        settings = settings_of(config)
        with in_words_of_03():
            check_settings(settings)
            check_tokenizer(config.hf_assets_path)
        fill(config, settings)
        settle_timeouts()
        super().__init__(config)

    def post_dataloading_process(
        self, input_dict: dict[str, torch.Tensor], labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        mesh = self.parallel_dims.get_optional_mesh("cp")
        balancer = self.config.parallelism.context_parallel_load_balancer
        inputs, labels, extra = components.deal_out(input_dict, labels, mesh, balancer)
        self.ntokens_seen += labels.numel()
        return inputs, labels, extra

    def train_step(self, data_iterator: Iterator[Any]) -> None:
        super().train_step(data_iterator)
        self.metrics_processor.finish(self.step)


JobConfig = job_config_class(GDN2Trainer.Config())


def settings_of(config: GDN2Trainer.Config) -> Settings:
    """What a config says, under the names of TOML files."""
    said = JobConfig()
    said.model.flavor = config.model_spec.flavor
    for name, value in fields_of_policy(config.activation_checkpoint).items():
        setattr(said.activation_checkpoint, name, value)
    for place, counterpart in COUNTERPARTS.items():
        setattr(*owner(said, place), getattr(*owner(config, counterpart)))
    return Settings.of(said)


def fill(config: GDN2Trainer.Config, settings: Settings) -> None:
    """Give the settings to the parts of a config that are built from it."""
    for part in (config.model_spec.model, config.metrics, config.dataloader, config.validator, config.loss):
        part._settings = settings


def check(config: GDN2Trainer.Config) -> None:
    """Raise ConfigError for what cannot train, before anything is built."""
    check_own_fields(config)
    degree = config.parallelism.pipeline_parallel_degree
    if degree > 1 and not pipeline.RUNS:
        raise ConfigError(f"parallelism.pipeline_parallel_degree is {degree}; with TorchTitan 0.3 and torch "
                          f"{torch.__version__} it must be 1, torch 2.14 has the pipelines that it needs")  # fmt: skip


def settle_timeouts() -> None:
    """Replace the function by which TorchTitan shortens timeouts after the first step: stock, it needs torch 2.14.
    Once per process, before training; again is harmless."""
    dist_utils.set_pg_timeouts = _set_timeouts


def _set_timeouts(timeout: timedelta, parallel_dims: ParallelDims) -> None:
    dist.barrier(device_ids=None if dist_utils.device_type == "cpu" else [dist_utils.device_module.current_device()])
    dist_utils.device_module.synchronize()
    groups = [mesh.get_group() for mesh in parallel_dims.get_all_one_dimensional_meshes().values()] + [None]
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    for group in groups:
        set_timeout(timeout, group)
