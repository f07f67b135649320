"""Reads a TOML file against the config classes before TorchTitan does: unknown fields and wrong types, in one sentence.

TorchTitan itself does not check the types of TOML values, and reports unknown fields without the allowed ones.
"""

import codecs
import difflib
import tomllib
import types
import typing
from dataclasses import fields, is_dataclass

from .errors import ConfigError

__all__ = ["check_table", "check_toml", "config_file", "read_toml"]

FLAGS = ("--job.config_file", "--job.config-file")


def config_file(argv):
    """The TOML file named on a command line, or None."""
    for i, argument in enumerate(argv):
        flag, _, value = argument.partition("=")
        if flag in FLAGS:
            return value if value else (argv[i + 1] if i + 1 < len(argv) else None)
    return None


def _fits(value, annotation):
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(annotation))
    if origin is typing.Literal:
        return value in typing.get_args(annotation)
    if origin is list:
        (item,) = typing.get_args(annotation)
        return isinstance(value, list) and all(_fits(x, item) for x in value)
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, annotation)


def _describe(annotation):
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(part) for part in typing.get_args(annotation) if part is not type(None))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(annotation)))
    if origin is list:
        return f"a list of {_describe(typing.get_args(annotation)[0])}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}.get(
        annotation, getattr(annotation, "__name__", str(annotation))
    )


def _check_table(table, cls, prefix):
    known = {f.name: f.type for f in fields(cls)}
    for name, value in table.items():
        path = f"{prefix}{name}"
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            allowed = ", ".join(sorted(known))
            what = f"[{path}] is no section" if isinstance(value, dict) else f"{path} = {value!r}: no such field"
            raise ConfigError(f"{what}; {hint}allowed are: {allowed}")
        if is_dataclass(known[name]):
            if not isinstance(value, dict):
                raise ConfigError(f"{path} is {value!r}; it must be a section [{path}]")
            _check_table(value, known[name], f"{path}.")
        elif not _fits(value, known[name]):
            raise ConfigError(f"{path} is {value!r}; it must be {_describe(known[name])}")


def read_toml(path):
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


def check_table(table, cls):
    """Raise ConfigError unless what a file says fits the (merged) config class."""
    _check_table(table, cls, "")


def check_toml(path, cls):
    """Raise ConfigError unless the file is there, is TOML, and fits the (merged) config class."""
    check_table(read_toml(path), cls)
