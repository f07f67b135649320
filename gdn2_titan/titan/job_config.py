"""The module to name in ``job.custom_config_module``: importing it makes plain TorchTitan 0.2.2 train this model.

It settles the device where there is no accelerator, registers the model, and refuses a TOML file that does not fit.
Under 0.3.x, where nothing imports it by itself, it has the same names, for what reads or trains a TOML file on either.
"""

from .generation import HAS_TOML

if HAS_TOML:
    from .v02.job_config import JobConfig, build, parse, validate
else:
    from .v03.job_config import JobConfig, build, parse, validate

__all__ = ["JobConfig", "build", "parse", "validate"]
