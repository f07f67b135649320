"""The TOML file of a command line, checked before TorchTitan reads it."""

from collections.abc import Sequence
from typing import Any

from gdn2_titan.convert import toml_table
from gdn2_titan.convert.toml_table import check_known, read_toml

from .setting_ranges import check_range

__all__ = ["check_known", "check_table", "config_file", "read_toml"]

FLAGS = ("--job.config_file", "--job.config-file")


def config_file(argv: Sequence[str]) -> str | None:
    """The TOML file named on a command line, or None."""
    for i, argument in enumerate(argv):
        flag, _, value = argument.partition("=")
        if flag in FLAGS:
            return value if value else (argv[i + 1] if i + 1 < len(argv) else None)
    return None


def check_table(table: dict[str, Any], cls: type) -> None:
    """Raise ConfigError unless what a file says fits the (merged) config class."""
    toml_table.check_table(table, cls, check_range)
