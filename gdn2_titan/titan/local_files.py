"""Local files of text: which ones a path names, what is wrong with them, and the documents in them."""

import contextlib
import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from gdn2_titan.titan.errors import ConfigError

__all__ = ["ALLOWED_FILES", "TOKENS", "UNFINISHED", "Columns", "check_begins", "check_unicode", "chunked_documents",
           "documents_of", "find_files", "reason", "stamps_of"]  # fmt: skip

_FORMATS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
# Any of them but Parquet, which packs its own pages, may also be packed whole.
_PACKED = (".gz", ".zst")
# What makes a folder one of tokens, or of some that are not finished: see token_files.py.
TOKENS, UNFINISHED = "gdn2_tokens.json", "gdn2_tokens_unfinished.json"
ALLOWED_FILES = (
    "a .txt, .jsonl, .json or .parquet file, a folder with files of one of these kinds, or a glob of them; a .md file "
    "is text as well, and .gz or .zst may follow"
)
_CHUNK = 1 << 20  # characters of a long document held at a time
# A check that reads into files stays quick where there are very many: the others are read when training starts.
_MOST_BEGUN = 100


def find_files(section: str, dataset_path: str | None) -> tuple[str, list[str]]:
    """The kind ("text", "json" or "parquet") and the sorted files that ``<section>.dataset_path`` stands for.

    A folder stands for all usable files in it and in its subfolders, apart from hidden ones, from a packed file beside
    its unpacked self, and from .md files where there are others. One that ``python -m gdn2_titan.titan.tokenize`` wrote
    is of the kind "tokens".

    Raises:
        ConfigError: naming the field, its value and what is allowed, or a file that is not there or cannot be read.
    """
    field = f"{section}.dataset_path = {dataset_path!r}"
    if not dataset_path:
        raise ConfigError(f'{field} must be set when {section}.dataset = "files"; allowed: {ALLOWED_FILES}.')
    try:
        return _find(field, Path(dataset_path).expanduser())
    except OSError as error:
        raise ConfigError(f"{field} cannot be read ({reason(error)}); allowed: {ALLOWED_FILES}.") from error


def _find(field: str, path: Path) -> tuple[str, list[str]]:
    if (path / TOKENS).is_file():
        return "tokens", [str(path.absolute())]
    if (path / UNFINISHED).is_file():
        raise ConfigError(f"{field} holds unfinished tokens; give the command that makes them again, it continues.")
    if path.is_dir():
        # Other kinds of file, such as a README.md, do not make a folder of documents ambiguous.
        files = _files_below(field, path)
    elif path.is_file() or path.is_symlink():
        files = [path]
    else:
        whole = path.name == "**"  # the folders before it, whose documents lie at any depth
        named = [Path(name) for name in glob.glob(str(path.parent if whole else path), recursive=True)]
        if whole:
            named = [file for folder in named if folder.is_dir() for files in _walk(folder) for file in files]
        # Two stars follow links to folders, also to one that they are in.
        named.sort(key=lambda file: (len(file.parts), file))
        once = {(os.path.realpath(file.parent), file.name): file for file in reversed(named)}
        files = [file for file in once.values() if not file.is_dir()]
    # Not resolved: a link may point to a file whose name has no extension.
    files = sorted(file.absolute() for file in files)
    if not files:
        raise ConfigError(f"{field} matches no file; allowed: {ALLOWED_FILES}.")
    formats = {_format(file) for file in files}
    if None in formats or len(formats) > 1:
        found = ", ".join(sorted({_extension(file) or f"{file.name} (no extension)" for file in files}))
        raise ConfigError(f"{field} names files of these kinds: {found}; allowed: {ALLOWED_FILES}.")
    for file in files:
        if not file.exists():
            raise ConfigError(f"{field} names {file}, a link to a file that is not there.")
        if not file.is_file():
            raise ConfigError(f"{field} names {file}, which is not a file; allowed: {ALLOWED_FILES}.")
        if not os.access(file, os.R_OK):
            raise ConfigError(f"{field} names {file}, which this user may not read.")
    if not any(file.stat().st_size for file in files):
        empty = "an empty file" if len(files) == 1 else "only empty files"
        raise ConfigError(f"{field} names {empty}; it must name text to read.")
    return formats.pop(), [str(file) for file in files]


def _unpacked(file: Path) -> Path:
    return file.with_suffix("") if file.suffix.lower() in _PACKED else file


def _extension(file: Path) -> str:
    return _unpacked(file).suffix + (file.suffix if file.suffix.lower() in _PACKED else "")


def _format(file: Path) -> str | None:
    kind = _FORMATS.get(_unpacked(file).suffix.lower())
    return None if kind == "parquet" and _unpacked(file) != file else kind


def _walk(folder: Path) -> tuple[list[Path], list[Path]]:
    """The documents in a folder, and those in its subfolders."""
    directly, deeper, seen = [], [], set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        # A folder that links lead to again and again is read once, one of tokens never.
        real = os.path.realpath(place)
        if TOKENS in names or UNFINISHED in names:
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if real not in seen else []
        files = [Path(place, name) for name in names if not name.startswith(".") and _format(Path(name))]
        if real not in seen:
            (directly if Path(place) == folder else deeper).extend(files)
        seen.add(real)
    kept = set(_documents([*directly, *deeper]))
    return [file for file in directly if file in kept], [file for file in deeper if file in kept]


def _files_below(field: str, folder: Path) -> list[Path]:
    directly, deeper = _walk(folder)
    if directly and deeper:
        here, there = ({_extension(file).lower() for file in files} for files in (directly, deeper))
        above, below = min(here & there or here), min(here & there or there)
        everything = folder / "**" / ("*" + above) if here == there == {above} else folder / "**"
        raise ConfigError(
            f"{field} has {above} files and subfolders with {below} files; name those meant, by "
            f"{str(folder / ('*' + above))!r} or, with all subfolders, {str(everything)!r}."
        )
    return directly or deeper


def _documents(found: list[Path]) -> list[Path]:
    """Without packed copies of files that are there, and without notes beside documents."""
    files = set(found)
    notes = {file for file in files if _unpacked(file).suffix.lower() == ".md"}
    left_out = {file for file in files if _unpacked(file) != file and _unpacked(file) in files}
    left_out |= notes if notes != files else set()
    return [file for file in found if file not in left_out]


def _raise(error: OSError) -> NoReturn:
    raise error


def reason(error: Exception) -> str:
    """What an exception says, as part of a sentence."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(said.split())[:200].rstrip(".") or type(error).__name__


def stamps_of(files: list[str]) -> tuple[tuple[int, int], ...]:
    """Size and time of change of each file: what tells a file from its earlier self.

    Raises:
        ConfigError: a file is not there any more.
    """
    stamps = []
    for file in files:
        with _reading(file):
            stat = os.stat(file)
        stamps.append((stat.st_size, stat.st_mtime_ns))
    return tuple(stamps)


def check_begins(kind: str, files: list[str], column: str) -> None:
    """Read the beginnings of files: raise ConfigError for what :func:`documents_of` would find there."""
    for file in files[:_MOST_BEGUN]:
        if kind == "text":
            with _reading(file), _open_text(file) as stream:
                stream.read(1 << 16)
        elif kind == "json":
            next(_rows(file), None)
        else:
            _open_parquet(file, column)
    if kind == "json":
        next(documents_of(kind, files[:1], column), None)


def documents_of(kind: str, files: tuple[str, ...], column: str) -> Iterator[str | None]:
    """The documents of files in their order: a text file is one, as is each line of JSON lines, each row of Parquet.

    Args:
        kind: "text", "json" or "parquet".
        column: with the text, of JSON and Parquet. A document that does not have it, or null there, is None.

    Raises:
        ConfigError: naming the file, and the line of JSON lines, that cannot be read or holds no text.
    """
    columns = Columns()
    for file in files:
        for chunks in chunked_documents(kind, file, column, columns):
            yield None if chunks is None else "".join(chunks)
    columns.check(column, files[0])


class Columns:
    """What the rows of JSON files hold: whether any has the column with the text, and the names until one has."""

    def __init__(self) -> None:
        self.there, self.names = False, {}

    def check(self, column: str, file: str) -> None:
        """Raise ConfigError, which names ``file``, if there were rows and none had the column."""
        if not self.there and self.names:
            names = ", ".join(self.names)
            raise ConfigError(f"data.text_column = {column!r} is not a column of {file}; allowed: {names}.")


def chunked_documents(kind: str, file: str, column: str, columns: Columns) -> Iterator[Iterator[str] | None]:
    """The documents of one file as :func:`documents_of` has them, each as chunks of text that follow each other. A
    document must be read to its end before the next is asked for. columns: is told what the rows of JSON hold."""
    if kind == "text":
        yield _text_chunks(file)
        return
    for text in _json_texts(file, column, columns) if kind == "json" else _parquet_texts(file, column):
        yield None if text is None else (text[i : i + _CHUNK] for i in range(0, len(text), _CHUNK))


@contextlib.contextmanager
def _reading(place: str) -> Iterator[None]:
    """Turns what a damaged or absent file makes its reader raise into a ConfigError that names it."""
    try:
        yield
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ConfigError(f"{place} is not UTF-8 (byte 0x{byte:02x}); it must be text in UTF-8.") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{place} is not JSON: {error.msg} at character {error.pos + 1}.") from error
    except (OSError, EOFError, zlib.error, pa.ArrowException, RecursionError) as error:
        raise ConfigError(f"{place} cannot be read: {reason(error)}.") from error


def _open(file: str) -> BinaryIO:
    packing = Path(file).suffix.lower()
    if packing == ".gz":
        return gzip.open(file)
    return open(file, "rb") if packing != ".zst" else io.BufferedReader(pa.CompressedInputStream(file, "zstd"))


def _open_text(file: str) -> io.TextIOWrapper:
    # The mark that some editors begin a file with is not part of its text.
    return io.TextIOWrapper(_open(file), encoding="utf-8-sig")


def _text_chunks(file: str) -> Iterator[str]:
    with _reading(file), _open_text(file) as stream:
        while chunk := stream.read(_CHUNK):
            yield chunk


def _rows(file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of JSON lines, or of a file with one list of objects, or one object."""
    with _reading(file), _open(file) as stream:
        first = True
        for number, line in enumerate(stream, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                with _reading(f"{file}, line {number},"):
                    row = json.loads(line.decode("utf-8"))
            except ConfigError:
                # A list, or an object written over several lines.
                if not first or line.strip()[:1] not in (b"[", b"{"):
                    raise
                row = None
                with contextlib.suppress(ValueError):
                    row = json.loads((line + stream.read()).decode("utf-8"))
                if not isinstance(row, (list, dict)):
                    raise
            is_list = first and isinstance(row, list)
            for index, entry in enumerate(row if is_list else [row], 1):
                place = f"{file}, entry {index}" if is_list else f"{file}, line {number}"
                yield place, _object(place, entry)
            first = False


def _object(place: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ConfigError(f'{place}, holds {_kind(row)}; it must be an object such as {{"text": "..."}}.')
    return row


def _kind(value: Any) -> str:
    try:
        return str(pa.scalar(value).type)
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        return type(value).__name__


def _json_texts(file: str, column: str, columns: Columns) -> Iterator[str | None]:
    for place, row in _rows(file):
        text = row.get(column)
        if text is not None and not isinstance(text, str):
            raise _no_text(column, _kind(text), place)
        columns.there = columns.there or column in row
        if not columns.there:
            columns.names.update(dict.fromkeys(row))
        if text is not None and not text.isascii():
            check_unicode(text, place)
        yield text


def check_unicode(text: str, place: str) -> None:
    """Raise ConfigError for a half of a character, which JSON can say (``"\\ud800"``) and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"{place}, has the lone surrogate \\u{ord(text[error.start]):04x}, half of a character; it "
                          "must be text in Unicode.") from error  # fmt: skip


def _no_text(column: str, kind: str, place: str) -> ConfigError:
    return ConfigError(f"data.text_column = {column!r} holds {kind} in {place}; allowed: a column of strings.")


def _open_parquet(file: str, column: str) -> pq.ParquetFile:
    with _reading(file):
        parquet = pq.ParquetFile(file)
    schema = parquet.schema_arrow
    if column not in schema.names:
        raise ConfigError(
            f"data.text_column = {column!r} is not a column of {file}; allowed: {', '.join(schema.names)}."
        )
    kind = schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        nested = pa.types.is_nested(kind)
        raise _no_text(column, "nested values" if nested else str(kind), file)
    return parquet


def _parquet_texts(file: str, column: str) -> Iterator[str | None]:
    with _open_parquet(file, column) as parquet, _reading(file):
        for batch in parquet.iter_batches(1024, columns=[column]):
            yield from batch.column(0).to_pylist()
