"""The error that a wrong setting raises."""

import functools

__all__ = ["ConfigError", "refusing"]


class ConfigError(ValueError):
    """A setting cannot be used. The message is one sentence: which field, which value, what is allowed."""


def refusing(function):
    """The function, whose ConfigError ends the process with its sentence instead of a traceback."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except ConfigError as error:
            raise SystemExit(f"Config error: {error}") from error

    return wrapper
