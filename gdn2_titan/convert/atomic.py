"""Atomic writes: the final name never holds half of something. Write beside it, fsync, rename."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from .errors import ConvertError

__all__ = ["check_free", "new_path", "write_text"]


def check_free(out: str | os.PathLike[str]) -> None:
    """Raise ConvertError unless something new can be put there: nothing, or an empty folder, is there now."""
    out = Path(out)
    if out.is_dir() and not out.is_symlink():
        if any(out.iterdir()):
            raise ConvertError(f"{out} is a folder that is not empty; it must be a new name, or an empty folder")
    elif out.exists() or out.is_symlink():
        raise ConvertError(f"{out} exists; it must be a new name, or an empty folder")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def new_path(out: str | os.PathLike[str], folder: bool = True) -> Iterator[Path]:
    """Gives a path to write a folder (made empty) or a file at; it becomes ``out`` when the block ends well.

    If the block raises, nothing is left. A process that is killed leaves a hidden path that ends with ".part".

    Raises:
        ConvertError: see :func:`check_free`.
    """
    out = Path(os.path.abspath(out))
    check_free(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Not of tempfile: what it makes only its owner may read, and the name becomes the final one.
    part = out.parent / f".{out.name}.{os.getpid()}.part"
    try:
        if folder:
            part.mkdir()
        yield part
        for path in [*part.rglob("*"), part]:
            _sync(path)
        check_free(out)
        if not folder and out.is_dir():
            out.rmdir()
        os.rename(part, out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True) if folder else part.unlink(missing_ok=True)
        raise
    _sync(out.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes one small file whole, or not at all."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        _sync(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
