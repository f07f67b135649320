"""How TorchTitan 0.2.2 comes to its job config: what a command line and its file say is checked before it parses them,
and the whole as soon as it has, before it builds anything."""

import functools
from collections.abc import Sequence
from typing import Any

from torchtitan.config import ConfigManager
from torchtitan.config import JobConfig as StockJobConfig
from torchtitan.protocols import train_spec

from gdn2_titan.convert.toml_table import read_toml
from gdn2_titan.models import GDN2Model

from ..checks.combinations import check_module
from ..checks.command_line import check_arguments, check_table, config_file, options_of
from ..checks.settings import check_settings
from ..errors import refusing
from .sections import JobConfig

__all__ = ["build", "check_parsed_configs", "check_said", "parse"]

STOCK = ConfigManager._validate_config


class UncheckedConfigManager(ConfigManager):
    """Parses for someone who checks for himself."""

    _validate_config = STOCK


def _is_ours(job_config: Any) -> bool:
    """Whether this package's model is asked for, or one that nobody knows or will register."""
    try:
        return issubclass(train_spec.get_train_spec(job_config.model.name).model_cls, GDN2Model)
    except ValueError:
        return not job_config.experimental.custom_import


def check_parsed_configs() -> None:
    """Let a launch end with our sentence where its config cannot train. Once per process; again is harmless."""

    @functools.wraps(STOCK)
    def check(manager: ConfigManager) -> None:
        if _is_ours(manager.config):
            refusing(check_settings)(manager.config)
        STOCK(manager)

    ConfigManager._validate_config = check


def check_said(arguments: Sequence[str]) -> None:
    """Of what a command line and its file say, all that can be refused before TorchTitan makes a config of it."""
    merged = ConfigManager._merge_configs(StockJobConfig, JobConfig)
    table = {} if (path := config_file(arguments)) is None else read_toml(path)
    check_table(table, merged)
    check_arguments(arguments, merged)
    in_file = table.get("job", {}).get("custom_config_module", "")
    in_arguments = dict(options_of(arguments)).get("job.custom_config_module")
    check_module("job.custom_config_module", in_arguments[0] if in_arguments else in_file)


def parse(arguments: Sequence[str]) -> JobConfig:
    """The job config of a command line: ``--job.config_file`` and changes to it.

    Raises:
        ConfigError: if the file or a change does not fit.
    """
    check_said(arguments)
    return UncheckedConfigManager(JobConfig).parse_args(arguments)


def build(job_config: Any) -> Any:
    """The trainer of a parsed job config, in an initialised environment of torchrun."""
    from torchtitan.train import Trainer

    return Trainer(job_config)
