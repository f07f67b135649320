"""Settles the device, registers the model, and checks the TOML file of this process, all on import."""

import sys

from torchtitan.config import ConfigManager
from torchtitan.config import JobConfig as StockJobConfig

from ..cpu import settle_device
from ..errors import refusing
from ..toml_check import check_toml, config_file
from ..validate_config import validate_config as validate
from .sections import JobConfig
from .train_spec import register

__all__ = ["JobConfig", "build", "parse", "validate"]

settle_device()
register()


def _check_file(arguments):
    if (path := config_file(arguments)) is not None:
        check_toml(path, ConfigManager._merge_configs(StockJobConfig, JobConfig))


refusing(_check_file)(sys.argv)


def parse(arguments):
    """The job config of a command line: ``--job.config_file`` and changes to it.

    Raises:
        ConfigError: if the file does not fit.
    """
    _check_file(arguments)
    return ConfigManager(JobConfig).parse_args(arguments)


def build(job_config):
    """The trainer of a parsed job config, in an initialised environment of torchrun."""
    from torchtitan.train import Trainer

    return Trainer(job_config)
