"""Reads a TOML file against the config classes before TorchTitan does: unknown fields and wrong types, in one sentence.

TorchTitan itself does not check the types of TOML values, and reports unknown fields without the allowed ones.
"""

import codecs
import difflib
import tomllib
from dataclasses import fields, is_dataclass

from .errors import ConfigError
from .setting_ranges import check_range, describe, fits

__all__ = ["check_known", "check_table", "config_file", "read_toml"]

FLAGS = ("--job.config_file", "--job.config-file")


def config_file(argv):
    """The TOML file named on a command line, or None."""
    for i, argument in enumerate(argv):
        flag, _, value = argument.partition("=")
        if flag in FLAGS:
            return value if value else (argv[i + 1] if i + 1 < len(argv) else None)
    return None


def check_known(name, value, cls, prefix):
    """Raise ConfigError unless a config class has a field of that name; ``prefix`` is its section's, with a dot."""
    known = {f.name for f in fields(cls)}
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        allowed = ", ".join(sorted(known))
        path = f"{prefix}{name}"
        what = f"[{path}] is no section" if isinstance(value, dict) else f"{path} = {value!r}: no such field"
        raise ConfigError(f"{what}; {hint}allowed are: {allowed}")


def _check_table(table, cls, prefix):
    types = {f.name: f.type for f in fields(cls)}
    for name, value in table.items():
        path = f"{prefix}{name}"
        check_known(name, value, cls, prefix)
        if is_dataclass(types[name]):
            if not isinstance(value, dict):
                raise ConfigError(f"{path} is {value!r}; it must be a section [{path}]")
            _check_table(value, types[name], f"{path}.")
        elif not fits(value, types[name]):
            raise ConfigError(f"{path} is {value!r}; it must be {describe(types[name])}")
        else:
            check_range(path, value)


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
