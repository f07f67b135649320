"""A module of others as one module of TorchTitan sees it: with some of its names changed, for that module alone."""

import types
from typing import Any

__all__ = ["changed_in"]


def changed_in(user: types.ModuleType, name: str, **changes: Any) -> None:
    """Let ``user.name``, a module, have other ``changes``; everybody else sees it as it was."""
    stock = getattr(user, name)
    seen = types.ModuleType(stock.__name__)
    vars(seen).update(vars(stock) | changes)
    setattr(user, name, seen)
