"""The error that a conversion ends with."""

import contextlib

__all__ = ["ConvertError", "reading"]


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
