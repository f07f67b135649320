"""Documents as tokens on disk: written once, mapped into memory by every process that reads them.

A folder holds for each part, in the order of the documents, ``NNNNN.tokens`` (ids, uint16 or uint32) and ``NNNNN.ends``
(int64, where each document ends in it), and ``gdn2_tokens.json``, which is written last and makes the folder whole.
"""

import bisect
import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tokenizers
from filelock import FileLock, Timeout

from gdn2_titan.convert.atomic import write_text
from gdn2_titan.titan.errors import ConfigError
from gdn2_titan.titan.local_files import TOKENS, UNFINISHED, Columns, chunked_documents, reason, stamps_of
from gdn2_titan.titan.pieces import Piece
from gdn2_titan.titan.tokens import DocumentTokens

__all__ = ["TokenFiles", "plan_of", "write_tokens"]

_FORMAT = 1
_PART = 64 << 20  # bytes of files in a part, at least: what a killed process has to do again
_BATCH = 1 << 22  # characters that are encoded at a time


class TokenFiles:
    """``TokenFiles(folder)[i]`` is the ids of document i, uint16 or uint32 [tokens], mapped and not read.

    Raises:
        ConfigError: the folder is not finished, or damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        self._maps: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        try:
            said = json.loads((self._folder / TOKENS).read_text(encoding="utf-8"))
            self.plan, self._type, self._parts = said["plan"], np.dtype(said["dtype"]), said["parts"]
            self.digest = self.plan["tokenizer"]
            for part, (documents, tokens) in enumerate(self._parts):
                for name, size in (("ends", 8 * documents), ("tokens", self._type.itemsize * tokens)):
                    file = self._folder / f"{part:05}.{name}"
                    if (there := file.stat().st_size) != size:
                        raise ValueError(f"{file.name} has {there} bytes of {size}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self._folder} holds no tokens that can be read ({reason(error)}); remove it, and "
                              "tokenize anew.") from error  # fmt: skip
        # Number of documents before each part, and of all.
        self._firsts = [0, *itertools.accumulate(documents for documents, _ in self._parts)]

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return type(self), (self._folder,)  # the maps would be sent as copies

    def __len__(self) -> int:
        return self._firsts[-1]

    @property
    def tokens(self) -> int:
        """Tokens of all documents together."""
        return sum(tokens for _, tokens in self._parts)

    def __getitem__(self, index: int) -> np.ndarray:
        part = bisect.bisect_right(self._firsts, index) - 1
        if part not in self._maps:
            documents, tokens = self._parts[part]
            ids = self._map(part, "tokens", self._type) if tokens else np.empty(0, self._type)
            self._maps[part] = self._map(part, "ends", np.int64), ids
        ends, ids = self._maps[part]
        within = index - self._firsts[part]
        return ids[ends[within - 1] if within else 0 : ends[within]]

    def _map(self, part: int, name: str, dtype: Any) -> np.ndarray:
        return np.memmap(self._folder / f"{part:05}.{name}", dtype=dtype, mode="r").view(np.ndarray)


def plan_of(kind: str, files: list[str], column: str, encode: DocumentTokens) -> tuple[str, dict[str, Any]]:
    """(name, plan) of the tokens that these files have: another if a file or the tokenizer changes.

    Raises:
        ConfigError: a file is not there any more.
    """
    stamps = [[file, *stamp] for file, stamp in zip(files, stamps_of(files), strict=True)]
    plan = {"format": _FORMAT, "kind": kind, "column": None if kind == "text" else column, "files": stamps,
            "tokenizer": encode.digest, "tokenizers": tokenizers.__version__}  # fmt: skip
    return hashlib.sha256(json.dumps(plan).encode("utf-8")).hexdigest()[:32], plan


def write_tokens(
    folder: Path, plan: dict[str, Any], encode: DocumentTokens, *,
    began: Callable[[int], None], progress: Callable[[int], None], waits: Callable[[], None],
) -> TokenFiles:  # fmt: skip
    """Tokenize into a folder, unless it is there already.

    One process writes, others that ask for the same folder wait for it. A process that is killed leaves the parts that
    it had finished, from which the next one continues.

    Args:
        plan: see :func:`plan_of`.
        began, progress: are told the bytes of all files, and of those that are done.
        waits: is called before waiting for another process.

    Raises:
        ConfigError: a file cannot be read or changes meanwhile, or the folder holds something else.
        OSError: the folder cannot be written.
    """
    if not (folder / TOKENS).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / ".lock", waits):
            if not (folder / TOKENS).is_file():
                _continue(folder, plan)
                _write_parts(folder, plan, encode, began, progress)
    found = TokenFiles(folder)
    _check_same(folder, "tokens", found.plan, plan)
    return found


def _continue(folder: Path, plan: dict[str, Any]) -> None:
    if (folder / UNFINISHED).is_file():
        _check_same(folder, "unfinished tokens", json.loads((folder / UNFINISHED).read_text(encoding="utf-8")), plan)
    elif any(entry.name != ".lock" for entry in folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; tokens go to a new or an empty folder.")
    write_text(folder / UNFINISHED, json.dumps(plan))


@contextlib.contextmanager
def _locked(path: Path, waits: Callable[[], None]) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        waits()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _check_same(folder: Path, what: str, found: Any, plan: dict[str, Any]) -> None:
    if found != plan:
        raise ConfigError(f"{folder} holds {what} of other files, or of these before they changed, or of another "
                          "tokenizer; name a new folder, or remove it.")  # fmt: skip


def _write_parts(
    folder: Path, plan: dict[str, Any], encode: DocumentTokens, began: Callable[[int], None],
    progress: Callable[[int], None],
) -> None:  # fmt: skip
    files, columns, parts = plan["files"], Columns(), []
    most = max(encode.vocabulary.values(), default=0)
    dtype = np.dtype("<u2" if most < 1 << 16 else "<u4")
    began(sum(size for _, size, _ in files))
    done = 0
    for number, group in enumerate(_groups(files)):
        ends, ids = folder / f"{number:05}.ends", folder / f"{number:05}.tokens"
        if not ends.is_file():
            with _new(ids) as stream:
                found = np.array(_Part(stream, dtype, encode).write(plan, group, columns, done, progress), np.int64)
            with _new(ends) as stream:
                found.tofile(stream)
        parts.append([ends.stat().st_size // 8, ids.stat().st_size // dtype.itemsize])
        done += sum(size for _, size, _ in group)
        progress(done)
    if not any(tokens for _, tokens in parts):
        columns.check(plan["column"], files[0][0])
    if changed := [file for file, *stamp in files if [*stamps_of([file])[0]] != stamp]:
        raise ConfigError(f"{changed[0]} changed while it was read; begin anew.")
    said = {"dtype": dtype.str, "parts": parts, "plan": plan}
    write_text(folder / TOKENS, json.dumps(said))
    (folder / UNFINISHED).unlink()


def _groups(files: list[list[Any]]) -> Iterator[list[list[Any]]]:
    """Files that make a part together: one that is large, many that are small."""
    group, size = [], 0
    for file in files:
        group.append(file)
        size += file[1]
        if size >= _PART:
            yield group
            group, size = [], 0
    if group:
        yield group


@contextlib.contextmanager
def _new(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which has its name once it is whole. Under the lock, one that a killed process left is lost."""
    part = path.with_name(f".{path.name}.part")
    with open(part, "wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, path)


class _Part:
    """Writes the ids of the documents of some files to a stream."""

    def __init__(self, stream: BinaryIO, dtype: np.dtype, encode: DocumentTokens) -> None:
        self._stream, self._dtype, self._encoder = stream, dtype, encode.encoder
        self._before, self._after = (np.array(ids, dtype=np.int64) for ids in encode.around)
        # What is not written yet: text to encode, ids, or None for the end of a document.
        self._queue: list[Piece | np.ndarray | None] = []
        self._waiting = self._written = 0  # characters in the queue; tokens in the stream
        self._ends: list[int] = []

    def write(
        self, plan: dict[str, Any], files: list[list[Any]], columns: Columns, done: int, progress: Callable[[int], None]
    ) -> list[int]:
        """Where each document ends."""
        for file, size, _ in files:
            read = 0
            for chunks in chunked_documents(plan["kind"], file, plan["column"], columns):
                empty = True
                for piece in self._encoder.pieces(chunks or ()):
                    self._queue += [self._before, piece] if empty else [piece]
                    empty = False
                    read += len(piece.text)
                    self._waiting += len(piece.text)
                    if self._waiting >= _BATCH:
                        self._flush()
                        progress(done + min(read, size))  # characters, which are at most as many as bytes
                self._queue += [None] if empty else [self._after, None]
                if len(self._queue) >= 1 << 16:
                    self._flush()
            done += size
        self._flush()
        return self._ends

    def _flush(self) -> None:
        encoded = iter(self._encoder.encode([entry for entry in self._queue if isinstance(entry, Piece)]))
        for entry in self._queue:
            if entry is None:
                self._ends.append(self._written)
                continue
            ids = next(encoded) if isinstance(entry, Piece) else entry
            ids.astype(self._dtype).tofile(self._stream)
            self._written += len(ids)
        self._queue, self._waiting = [], 0
