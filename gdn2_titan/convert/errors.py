"""The error that a conversion ends with."""

import contextlib
import sys

__all__ = ["ConvertError", "exit_status", "reading"]


class ConvertError(ValueError):
    """A conversion cannot be done. The message is one sentence: what was found where, and what is wanted."""


@contextlib.contextmanager
def reading(path):
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


def exit_status(command, options):
    """Runs ``command(options)``. Returns 0, or 1 after the sentence of its ConvertError on stderr."""
    try:
        command(options)
    except ConvertError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0
