"""TorchTitan 0.3's trainer with this package's parts in its config."""

from dataclasses import dataclass, field

import torch
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.checkpointer.base import MODEL
from torchtitan.config.configs import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.trainer import Trainer

from gdn2_titan.models import flavors

from .. import pipeline
from ..byte_tokenizer import BYTE_TOKENIZER_DIR
from ..errors import ConfigError, refusing
from ..export import exact_decays
from ..old_names import reading_old_names
from ..sections import GDN2, Data, Float8Linear, MXLinear, Task
from ..tokens import check_tokenizer
from ..validate_config import validate_config
from .activation_checkpoint import Policy
from .data import TrainingData, deal_out
from .loss import WatchedLoss
from .lr_scheduler import LRSchedulers
from .metrics import GDN2MetricsProcessor
from .optimizer import GroupedOptimizers
from .own_fields import check_own_fields, in_words_of_03
from .timeouts import settle_timeouts
from .validator import GDN2Validator

__all__ = ["GDN2Trainer", "check", "hand_on"]


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
    spmd_backend: str = "partial_dtensor"
    """The one that this model's plans are written in"""

    def __post_init__(self):
        """As of GDN2Trainer.Config."""


@dataclass(kw_only=True, slots=True)
class Compile(CompileConfig):
    def __post_init__(self):
        """As of GDN2Trainer.Config."""


class Checkpoints(CheckpointManager):
    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        last_save_model_only: bool = False
        """Stock TorchTitan says true; with false a finished run can be continued for more steps"""

        def __post_init__(self):
            """As of GDN2Trainer.Config; a relative initial_load_path is right."""

    def dcp_save(self, state_dict, *args, **kwargs):
        # Whatever checkpoint.export_dtype made of A_log and dt_bias.
        return super().dcp_save(exact_decays(state_dict, self.states[MODEL]), *args, **kwargs)

    dcp_load = reading_old_names(CheckpointManager.dcp_load)


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
        metrics: GDN2MetricsProcessor.Config = field(default_factory=GDN2MetricsProcessor.Config)
        dataloader: TrainingData = field(default_factory=TrainingData)
        optimizer: GroupedOptimizers.Config = field(default_factory=GroupedOptimizers.Config)
        lr_scheduler: LRSchedulers.Config = field(default_factory=LRSchedulers.Config)
        training: Training = field(default_factory=Training)
        parallelism: Parallelism = field(default_factory=Parallelism)
        checkpoint: Checkpoints.Config = field(default_factory=Checkpoints.Config)
        compile: Compile = field(default_factory=Compile)
        activation_checkpoint: Policy = None
        validator: GDN2Validator.Config = field(default_factory=GDN2Validator.Config)
        loss: WatchedLoss.Config = field(default_factory=WatchedLoss.Config)

        def __post_init__(self):
            """Our check refuses what the stock one does and more, in a sentence with the section's name."""

    @refusing
    def __init__(self, config):
        from .job_config import job_config_of

        check(config)
        job_config = job_config_of(config)
        with in_words_of_03():
            validate_config(job_config)
            check_tokenizer(config.hf_assets_path)
        hand_on(config, job_config)
        settle_timeouts()
        super().__init__(config)

    def post_dataloading_process(self, input_dict, labels):
        mesh = self.parallel_dims.get_optional_mesh("cp")
        balancer = self.config.parallelism.context_parallel_load_balancer
        inputs, labels, extra = deal_out(input_dict, labels, mesh, balancer)
        self.ntokens_seen += labels.numel()
        return inputs, labels, extra

    def train_step(self, data_iterator):
        super().train_step(data_iterator)
        self.metrics_processor.finish(self.step)


def hand_on(config, job_config):
    """Give the job config to the parts of a trainer's config that are built from it."""
    for part in (config.model_spec.model, config.metrics, config.dataloader, config.validator, config.loss):
        part._job_config = job_config


def check(config):
    """Raise ConfigError for what cannot train, before anything is built."""
    check_own_fields(config)
    if config.model_spec.flavor not in flavors:
        raise ConfigError(f"model_spec.flavor is {config.model_spec.flavor!r}; it must be one of {', '.join(flavors)}")
    degree = config.parallelism.pipeline_parallel_degree
    if degree > 1 and not pipeline.RUNS:
        raise ConfigError(
            f"parallelism.pipeline_parallel_degree is {degree}; with TorchTitan 0.3 and torch {torch.__version__} it "
            "must be 1, torch 2.14 has the pipelines that it needs"
        )
