"""The decoder as TorchTitan 0.3 builds and calls it."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro
from torchtitan.protocols import BaseModel

from gdn2_titan.models import GDN2Model, GDN2ModelArgs
from gdn2_titan.models.flops import flops_per_token, parameter_counts

from ..model_args import model_args

__all__ = ["TitanModel"]


class TitanModel(GDN2Model, BaseModel):
    """The resets that a data loader gives with the tokens come as they are, to every pipeline stage."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseModel.Config):
        args: GDN2ModelArgs = field(default_factory=GDN2ModelArgs)
        _job_config: Annotated[object | None, tyro.conf.Suppress] = None

        @property
        def layers(self):
            """As many as the model has: their number is all that TorchTitan's pipelines ask for."""
            return range(self.args.n_layers)

        def update_from_config(self, *, config, **kwargs):
            self.args = model_args(self._job_config)

        def get_nparams_and_flops(self, model, seq_len):
            total, embedding = parameter_counts(model)
            return total, flops_per_token(self.args, total, embedding, seq_len)

    def __init__(self, config):
        super().__init__(config.args)
        self.config = config

    def verify_module_protocol(self):
        """The layers are plain modules of PyTorch."""
