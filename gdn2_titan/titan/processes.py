"""How many processes train."""

import os

from .errors import ConfigError

__all__ = ["number_of_processes"]


def number_of_processes() -> int:
    """What torchrun says in WORLD_SIZE, or will say by NGPU; 1 without either.

    Raises:
        ConfigError: if it is no whole number of at least 1.
    """
    name = next((name for name in ("WORLD_SIZE", "NGPU") if name in os.environ), None)
    said = os.environ[name] if name else "1"
    if not (said.isdecimal() and int(said)):
        raise ConfigError(f"{name} is {said!r}; it must be a whole number of at least 1")
    return int(said)
