"""TorchTitan 0.2.2: a fork's own job config on top of this package's. ``job_config.toml`` names this module."""

from dataclasses import dataclass, field

from gdn2_titan.titan import register, settle_device
from gdn2_titan.titan.v02.sections import JobConfig as GDN2JobConfig


@dataclass
class Fork:
    team: str = ""


@dataclass
class JobConfig(GDN2JobConfig):
    fork: Fork = field(default_factory=Fork)


settle_device()  # the CPU where there is no accelerator; on GPUs leave it out
register()
