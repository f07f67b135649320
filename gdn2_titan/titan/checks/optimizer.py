"""Whether the fields of [optimizer] go together, and with the other sections."""

import dataclasses

from ..errors import ConfigError
from ..settings import OptimizerFields, Settings

__all__ = ["check_optimizer"]


def check_optimizer(settings: Settings) -> None:
    """Raise ConfigError for a field of Muon's without Muon, and for what Muon cannot be combined with."""
    section = settings.optimizer
    own = {f.name: f.default for f in dataclasses.fields(OptimizerFields) if f.name.startswith("muon_")}
    if section.name != "Muon":
        for name, default in own.items():
            if (value := getattr(section, name, default)) != default:
                raise ConfigError(f"optimizer.{name} is {value!r}; then optimizer.name must be 'Muon'")
        return
    if getattr(section, "muon_adjust_lr_fn", None) == "original" and section.muon_lr is None:
        raise ConfigError("optimizer.muon_adjust_lr_fn is 'original'; then optimizer.muon_lr must be set: optimizer.lr "
                          "is for updates of AdamW's size")  # fmt: skip
    if settings.training.enable_cpu_offload:
        raise ConfigError("training.enable_cpu_offload is true; with optimizer.name = 'Muon' it must be false: the CPU "
                          "would multiply the matrices of every update")  # fmt: skip
