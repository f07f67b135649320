"""The module to name in ``job.custom_config_module``: importing it makes plain TorchTitan train this model.

It settles the device where there is no accelerator, registers the model, and refuses a TOML file that does not fit.
"""

import sys

from torchtitan.config import ConfigManager
from torchtitan.config import JobConfig as StockJobConfig

from .cpu import settle_device
from .errors import ConfigError
from .sections import JobConfig
from .toml_check import check_toml, config_file
from .train_spec import register

__all__ = ["JobConfig"]

settle_device()
register()

if (_path := config_file(sys.argv)) is not None:
    try:
        check_toml(_path, ConfigManager._merge_configs(StockJobConfig, JobConfig))
    except ConfigError as error:
        raise SystemExit(f"Config error: {error}") from error
