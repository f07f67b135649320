"""The flavors as TorchTitan takes them: with the job config's overrides, and FLOPs for its metrics."""

import dataclasses

from gdn2_titan.models import GDN2ModelArgs, flavors
from gdn2_titan.models.flops import flops_per_token, parameter_counts

from ..sections import section

__all__ = ["TitanModelArgs", "titan_flavors"]


@dataclasses.dataclass
class TitanModelArgs(GDN2ModelArgs):
    # Not a field: with this name TorchTitan asks the model for masks and hands them to every pipeline stage.
    attn_type = "varlen"

    def update_from_config(self, job_config, **kwargs):
        for name, value in section(job_config, "gdn2").changes().items():
            setattr(self, name, value)

    def get_nparams_and_flops(self, model, seq_len):
        total, embedding = parameter_counts(model)
        return total, flops_per_token(self, total, embedding, seq_len)


def titan_flavors():
    return {name: TitanModelArgs(**dataclasses.asdict(args)) for name, args in flavors.items()}
