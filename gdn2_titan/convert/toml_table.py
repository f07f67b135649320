"""TOML files against config classes: unknown fields and values of the wrong type, in one sentence.

TorchTitan itself does not check the types of TOML values, and reports unknown fields without the allowed ones.
"""

import codecs
import difflib
import os
import tomllib
import types
import typing
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

__all__ = ["ConfigError", "check_known", "check_table", "describe", "fits", "read_toml"]

CheckValue = Callable[[str, Any], None]


class ConfigError(ValueError):
    """A setting cannot be used. The message is one sentence: which field, which value, what is allowed."""


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value is of a field's type; a whole number is also a number, and truth values are neither."""
    origin = typing.get_origin(annotation)
    if annotation is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in typing.get_args(annotation))
    if origin is typing.Literal:
        return value in typing.get_args(annotation)
    if origin is list:
        (item,) = typing.get_args(annotation)
        return isinstance(value, (list, tuple)) and all(fits(x, item) for x in value)
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation is str:
        return isinstance(value, (str, os.PathLike))
    return isinstance(value, annotation)


def describe(annotation: Any) -> str:
    """A field's type in words, as what a value must be."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        parts = [describe(part) for part in typing.get_args(annotation) if part is not type(None)]
        return " or ".join(dict.fromkeys(parts))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(annotation)))
    if origin is list:
        return f"a list of {describe(typing.get_args(annotation)[0])}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}.get(
        annotation, getattr(annotation, "__name__", str(annotation))
    )


def check_known(name: str, value: Any, cls: type, prefix: str) -> None:
    """Raise ConfigError unless a config class has a field of that name; ``prefix`` is its section's, with a dot."""
    known = {f.name for f in fields(cls)}
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        allowed = ", ".join(sorted(known))
        path = f"{prefix}{name}"
        what = f"[{path}] is no section" if isinstance(value, dict) else f"{path} = {value!r}: no such field"
        raise ConfigError(f"{what}; {hint}allowed are: {allowed}")


def check_table(table: dict[str, Any], cls: type, check_value: CheckValue | None = None, prefix: str = "") -> None:
    """Raise ConfigError unless what a file says are fields of a config class, and of their types.

    check_value: called with each field's name, such as "training.steps", and value, once its type is right. prefix: of
    the names, with a dot, where the table is a section.
    """
    types = {f.name: f.type for f in fields(cls)}
    for name, value in table.items():
        path = f"{prefix}{name}"
        check_known(name, value, cls, prefix)
        if is_dataclass(types[name]):
            if not isinstance(value, dict):
                raise ConfigError(f"{path} is {value!r}; it must be a section [{path}]")
            check_table(value, types[name], check_value, f"{path}.")
        elif not fits(value, types[name]):
            raise ConfigError(f"{path} is {value!r}; it must be {describe(types[name])}")
        elif check_value is not None:
            check_value(path, value)


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The file's content; ConfigError unless it is there and is TOML."""
    field = f"job.config_file is {path!r}"
    try:
        with open(path, "rb") as file:
            content = file.read()
        if content.startswith(codecs.BOM_UTF8):
            raise ConfigError(f"{field}, which begins with a byte order mark; it must be UTF-8 without one")
        return tomllib.loads(content.decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"{field}; it must be a readable TOML file ({error.strerror})") from error
    except UnicodeDecodeError as error:
        line, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
        raise ConfigError(f"{field}; it must be UTF-8, which it is not at line {line} (byte 0x{byte:02x})") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{field}; it must be valid TOML ({error})") from error
