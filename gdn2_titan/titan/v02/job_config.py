"""Settles the device, registers the model, and checks the TOML file of this process, all on import."""

import sys

from torchtitan.config import ConfigManager
from torchtitan.config import JobConfig as StockJobConfig

from ..arguments_check import check_arguments, options_of
from ..combinations import check_module
from ..cpu import settle_device
from ..errors import refusing
from ..toml_check import check_table, config_file, read_toml
from ..validate_config import validate_config as validate
from .parsing import UncheckedConfigManager
from .sections import JobConfig
from .train_spec import register

__all__ = ["JobConfig", "build", "parse", "validate"]

settle_device()
register()


def _check_said(arguments):
    """Of what a command line and its file say, all that can be refused before TorchTitan makes a config of it."""
    merged = ConfigManager._merge_configs(StockJobConfig, JobConfig)
    table = {} if (path := config_file(arguments)) is None else read_toml(path)
    check_table(table, merged)
    check_arguments(arguments, merged)
    in_file = table.get("job", {}).get("custom_config_module", "")
    in_arguments = dict(options_of(arguments)).get("job.custom_config_module")
    check_module("job.custom_config_module", in_arguments[0] if in_arguments else in_file)


# Otherwise this is no process of TorchTitan's.
if any(name.startswith("job.") for name, _ in options_of(sys.argv[1:])):
    refusing(_check_said)(sys.argv[1:])


def parse(arguments):
    """The job config of a command line: ``--job.config_file`` and changes to it.

    Raises:
        ConfigError: if the file or a change does not fit.
    """
    _check_said(arguments)
    return UncheckedConfigManager(JobConfig).parse_args(arguments)


def build(job_config):
    """The trainer of a parsed job config, in an initialised environment of torchrun."""
    from torchtitan.train import Trainer

    return Trainer(job_config)
