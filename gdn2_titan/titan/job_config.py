"""The module to name in ``job.custom_config_module``: importing it makes plain TorchTitan 0.2.2 train this model.

It settles the device where there is no accelerator, registers the model, and refuses a TOML file that does not fit.
Under 0.3.x, where nothing imports it by itself, it has the same names, for what reads or trains a TOML file on either.
"""

import sys

from .cpu import settle_device
from .torchtitan_version import IS_V02

__all__ = ["JobConfig", "build", "parse", "validate"]

settle_device()

if IS_V02:
    from .checks.command_line import options_of
    from .checks.settings import check_settings as validate
    from .errors import refusing
    from .v02.config import build, check_said, parse
    from .v02.sections import JobConfig
    from .v02.train_spec import register

    register()
    # Otherwise this is no process of TorchTitan's.
    if any(name.startswith("job.") for name, _ in options_of(sys.argv[1:])):
        refusing(check_said)(sys.argv[1:])
else:
    from .v03.config import JobConfig, build, parse, validate
