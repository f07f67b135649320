"""What a command says: the error that it ends with, and nothing of what libraries remark on the way."""

import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["ConvertError", "exit_status", "quiet", "read_json", "reading"]


class ConvertError(ValueError):
    """A conversion cannot be done. The message is one sentence: what was found where, and what is wanted."""


@contextlib.contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns whatever a damaged file makes its reader raise into a ConvertError that names the file."""
    try:
        yield
    except (ConvertError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise ConvertError(f"{path} is not there") from error
    except Exception as error:  # a damaged file is arbitrary bytes: pickle, zip and JSON readers raise nearly anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConvertError(f"{path} cannot be read, it is damaged or of another kind: {reason}") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ConvertError: it is missing or damaged.
    """
    with reading(path):
        return json.loads(path.read_text(encoding="utf-8"))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and log lines of libraries, which are about their insides; errors are still seen.

    ``python -W`` and PYTHONWARNINGS keep the warnings.
    """
    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.WARNING))
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def exit_status(command: Callable[[Any], None], options: Any) -> int:
    """Runs ``command(options)``. Returns 0, or 1 after the sentence of its ConvertError on stderr."""
    try:
        with quiet():
            command(options)
    except ConvertError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0
