"""TorchTitan 0.3's validation loop over this package's data."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Annotated

import tyro
from torchtitan.components.validate import BaseValidator, Validator

from ..errors import refusing
from ..validator import TaskValidation
from .data import ValidationData, deal_out, in_microbatches

__all__ = ["GDN2Validator"]


class GDN2Validator(TaskValidation, Validator):
    @dataclass(kw_only=True, slots=True)
    class Config(Validator.Config):
        dataloader: ValidationData = field(default_factory=ValidationData)
        _job_config: Annotated[object | None, tyro.conf.Suppress] = None

        def __post_init__(self):
            """Our check refuses what the stock one does, in a sentence with the section's name."""

    @refusing
    def __init__(
        self,
        config,
        *,
        parallelism,
        dp_world_size,
        dp_rank,
        tokenizer,
        parallel_dims,
        loss_fn,
        validation_context,
        metrics_processor,
        pp_schedule=None,
        pp_has_first_stage=None,
        pp_has_last_stage=None,
        **_,
    ):
        BaseValidator.__init__(self, config)
        self.parallelism = parallelism
        self.parallel_dims = parallel_dims
        self.loss_fn = loss_fn
        self.validation_context = validation_context
        self.metrics_processor = metrics_processor
        self.pp_schedule = pp_schedule
        self.pp_has_first_stage = pp_has_first_stage
        self.pp_has_last_stage = pp_has_last_stage
        # What the stock loop would hand to the loader that it builds; ours is there already.
        self.dp_world_size, self.dp_rank, self.tokenizer = dp_world_size, dp_rank, tokenizer
        self.seq_len, self.local_batch_size = config.dataloader.seq_len, config.dataloader.local_batch_size
        self.dl_config = SimpleNamespace(build=lambda **_: self.validation_dataloader)
        self.prepare(
            parallel_dims, dp_world_size, dp_rank, tokenizer, in_microbatches(config._job_config, "validation")
        )

    def post_dataloading_process(self, input_dict, labels, model_parts):
        mesh = self.parallel_dims.get_optional_mesh("cp")
        return deal_out(input_dict, labels, mesh, self.parallelism.context_parallel_load_balancer)
