"""Settles the device, registers the model, and checks the TOML file of this process, all on import."""

import sys

from torchtitan.config import ConfigManager
from torchtitan.config import JobConfig as StockJobConfig

from ..cpu import settle_device
from ..errors import ConfigError
from ..toml_check import check_toml, config_file
from ..validate_config import validate_config as validate
from .sections import JobConfig
from .train_spec import register

__all__ = ["JobConfig", "parse", "validate"]

settle_device()
register()

if (_path := config_file(sys.argv)) is not None:
    try:
        check_toml(_path, ConfigManager._merge_configs(StockJobConfig, JobConfig))
    except ConfigError as error:
        raise SystemExit(f"Config error: {error}") from error


def parse(arguments):
    """The job config of a command line: ``--job.config_file`` and changes to it."""
    return ConfigManager(JobConfig).parse_args(arguments)
