"""A command line and the TOML file that it names, checked against the config classes before TorchTitan reads them."""

import functools
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torchtitan.config import manager

from gdn2_titan.convert import toml_table
from gdn2_titan.convert.toml_table import ConfigError, check_known, describe

from ..over import changed_in
from .ranges import check_range

__all__ = ["as_tyro_reads", "check_arguments", "check_table", "config_file", "options_of", "torchtitan_reads_all_words"]


def config_file(argv: Sequence[str]) -> str | None:
    """The TOML file named on a command line, or None."""
    return next((values[0] for name, values in options_of(argv) if name == "job.config_file" and values), None)


def check_table(table: dict[str, Any], cls: type) -> None:
    """Raise ConfigError unless what a file says fits the (merged) config class."""
    toml_table.check_table(table, cls, check_range)


# In the place of a value: it is none of the field's type, or only TorchTitan knows how to read the type.
WRONG, UNREADABLE = object(), object()


def check_arguments(arguments: Sequence[str], cls: type) -> None:
    """Raise ConfigError unless the ``--section.field value`` of a command line fit a (merged) config class.

    What is none, such as ``--help``, is left to TorchTitan.
    """
    for name, values in options_of(as_tyro_reads(arguments, cls)):
        *sections, last = name.split(".")
        if sections:
            _check(cls, sections, last, values)


def options_of(arguments: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """(name, values) of each option. Options may be written with hyphens for underscores, and with ``=``."""
    name, values = None, []
    for argument in arguments:
        if not argument.startswith("--"):
            values.append(argument)
            continue
        if name is not None:
            yield name, values
        name, joined, value = argument.removeprefix("--").partition("=")
        name, values = name.replace("-", "_"), [value] if joined else []
    if name is not None:
        yield name, values


def as_tyro_reads(arguments: Sequence[str], cls: type) -> list[str]:
    """A command line in the words that tyro, by which TorchTitan reads it, knows for the fields of a config class.

    ``--x.enable true`` and ``--x.enable=false`` become ``--x.enable`` and ``--x.no-enable``. The items of a list may be
    parted by spaces, commas or both; of strings they are parted by commas then, and otherwise words of their own.
    All else stays as it is.
    """
    options: list[list[str]] = [[]]  # what comes before the first option is in the first
    for argument in arguments:
        if argument.startswith("--"):
            options.append([])
        options[-1].append(argument)
    return [word for words in options for word in _as_tyro_reads(words, cls)]


def torchtitan_reads_all_words() -> None:
    """Let TorchTitan, from its own entry point too, read a command line ``as_tyro_reads``. Again is harmless."""
    stock = manager.tyro.cli
    if hasattr(stock, "__wrapped__"):
        return

    @functools.wraps(stock)
    def cli(cls: type, *, args: Sequence[str], **rest: Any) -> Any:
        return stock(cls, args=as_tyro_reads(args, cls), **rest)

    changed_in(manager, "tyro", cli=cli)


def _as_tyro_reads(words: list[str], cls: type) -> list[str]:
    option, joined, value = words[0].partition("=") if words else ("", "", "")
    annotation = _annotation(cls, option.removeprefix("--").replace("-", "_").split("."))
    values = ([value] if joined else []) + words[1:]
    if annotation is bool and len(values) == 1 and values[0].lower() in ("true", "false"):
        section, _, field = option.rpartition(".")
        return [option if values[0].lower() == "true" else f"{section}.no-{field}"]
    item = _item(annotation)
    if item is None or not values:
        return words
    items = [part.strip() for one in values for part in one.split(",")]
    if len(items) > 1:  # "a, b" and "a,"; a lone empty one is said
        items = [part for part in items if part]
    return [option, ",".join(items)] if item is str else [option, *items]


def _annotation(cls: type, names: list[str]) -> Any:
    """The type of the field of these names, or None."""
    for name in names:
        cls = typing.get_type_hints(cls).get(name) if is_dataclass(cls) else None
    return cls


def _item(annotation: Any) -> Any:
    """str, int or float if a field's type is a list of it, or of it or None; else None."""
    parts = {annotation} if typing.get_origin(annotation) is list else set(typing.get_args(annotation)) - {type(None)}
    lists = [typing.get_args(part) for part in parts if typing.get_origin(part) is list]
    return lists[0][0] if len(parts) == len(lists) == 1 and lists[0][0] in (str, int, float) else None


def _check(cls: type, sections: list[str], last: str, values: list[str]) -> None:
    prefix = ""
    for one in sections:
        check_known(one, {}, cls, prefix)
        cls, prefix = {f.name: f.type for f in fields(cls)}[one], f"{prefix}{one}."
        if not is_dataclass(cls):
            return
    annotations = {f.name: f.type for f in fields(cls)}
    switched = last.removeprefix("no_")
    if annotations.get(switched) is bool and last not in annotations:
        last, value = switched, False
    elif annotations.get(last) is bool:
        value = True
    else:
        check_known(last, values[0] if values else "", cls, prefix)
        value = _read(values, annotations[last]) if values else UNREADABLE
        if value is WRONG:
            raise ConfigError(f"{prefix}{last} is {' '.join(values)!r}; it must be {describe(annotations[last])}")
    if annotations[last] is bool and values:
        said = f"{' '.join(values)!r}; it must be true or false, or is said by --{prefix}{last} or --{prefix}no-{last}"
        raise ConfigError(f"{prefix}{last} is {said} alone")
    if value is not UNREADABLE:
        check_range(f"{prefix}{last}", value)


def _read(values: list[str], annotation: Any) -> Any:
    """The value of a field's type that an option's words say, WRONG, or UNREADABLE."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        found = [_read(values, part) for part in typing.get_args(annotation)]
        return next((value for value in found if value is not WRONG), WRONG)
    if origin is typing.Literal:
        return values[0] if values[0] in typing.get_args(annotation) else WRONG
    if origin is list:
        (item,) = typing.get_args(annotation)
        found = values[0].split(",") if item is str else [_read([value], item) for value in values]
        return next((value for value in found if value in (WRONG, UNREADABLE)), found)
    if annotation is type(None):
        return None if values == ["None"] else WRONG
    if annotation in (int, float):
        try:
            return annotation(values[0])
        except ValueError:
            return WRONG
    return values[0] if annotation is str else UNREADABLE
