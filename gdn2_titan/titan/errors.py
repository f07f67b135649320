"""The error that a wrong setting raises."""

import functools
from collections.abc import Callable
from typing import Any

from gdn2_titan.convert.toml_table import ConfigError

__all__ = ["ConfigError", "refusing"]


def refusing(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose ConfigError ends the process with its sentence instead of a traceback."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except ConfigError as error:
            raise SystemExit(f"Config error: {error}") from error

    return wrapper
