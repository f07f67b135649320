"""Where documents come from: the standard library's own source, local files, or a Hugging Face repository."""

import glob
import re
from pathlib import Path
from typing import Any

import datasets.config
from datasets import Dataset, IterableDataset, load_dataset

from gdn2_titan.titan.errors import ConfigError
from gdn2_titan.titan.stdlib import stdlib_documents
from gdn2_titan.titan.tasks import TASKS

_ALLOWED = (
    '"stdlib", "files" (with dataset_path), a Hugging Face repository such as "owner/name", or a recall task: '
    + ", ".join(f'"{name}"' for name in TASKS)
)
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

_FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_ALLOWED_FILES = "a .txt, .jsonl, .json or .parquet file, a folder with files of one of these kinds, or a glob of them"


def check_source(section: str, dataset: str, dataset_path: str | None) -> None:
    """Refuse a source of data that cannot be used, without loading anything.

    Args:
        section: ``"training"`` or ``"validation"``, to name the field in the message.
        dataset: ``"stdlib"``, ``"files"``, the name of a Hugging Face repository or of a recall task.
        dataset_path: file, folder or glob, for ``"files"`` and only for it.

    Raises:
        ConfigError: naming ``<section>.dataset`` or ``<section>.dataset_path``, its value and what is allowed.
    """
    if dataset == "files":
        _find_files(section, dataset_path)
    elif dataset not in ("stdlib", *TASKS) and not (isinstance(dataset, str) and _REPOSITORY.fullmatch(dataset)):
        raise ConfigError(f"{section}.dataset = {dataset!r} is not a known source; allowed: {_ALLOWED}.")
    elif dataset_path is not None:
        raise ConfigError(
            f"{section}.dataset_path = {dataset_path!r} would be ignored with {section}.dataset = {dataset!r}; "
            f'leave it out, or set {section}.dataset = "files" to read {_ALLOWED_FILES}.'
        )


def load_source(
    section: str,
    dataset: str,
    dataset_path: str | None,
    *,
    held_out: bool,
    text_column: str = "text",
    hf_subset: str | None = None,
    hf_split: str = "train",
) -> Dataset | IterableDataset:
    """Load the documents that a configuration names.

    Args:
        section, dataset, dataset_path: as for :func:`check_source`.
        held_out: for ``"stdlib"``, the validation split instead of the training split.
        text_column: the column with the text, in JSON lines, Parquet and Hugging Face repositories.
        hf_subset, hf_split: the subset (None for the default one) and split of a Hugging Face repository.

    Returns:
        A map-style ``Dataset`` whose only column is ``"text"`` for ``"stdlib"`` and ``"files"``; for a Hugging Face
        repository a streaming ``IterableDataset`` with the repository's own columns.

    Raises:
        ConfigError: as :func:`check_source`, or when the files have no such column of strings.
    """
    check_source(section, dataset, dataset_path)
    if dataset == "stdlib":
        return Dataset.from_dict({"text": list(stdlib_documents(held_out=held_out).values())})
    if dataset == "files":
        return _load_files(*_find_files(section, dataset_path), text_column)
    return load_dataset(dataset, hf_subset, split=hf_split, streaming=True)


def _find_files(section: str, dataset_path: str | None) -> tuple[str, list[str]]:
    """The builder's name for ``datasets.load_dataset`` and the sorted files that ``dataset_path`` stands for."""
    field = f"{section}.dataset_path = {dataset_path!r}"
    if not dataset_path:
        raise ConfigError(f'{field} must be set when {section}.dataset = "files"; allowed: {_ALLOWED_FILES}.')
    path = Path(dataset_path)
    if path.is_dir():
        # Other kinds of file, such as a README.md, do not make a folder of documents ambiguous.
        files = [file for file in path.iterdir() if file.suffix in _FORMATS]
    elif path.is_file():
        files = [path]
    else:
        files = [Path(file) for file in glob.glob(dataset_path, recursive=True)]
    # Not resolved: a link may point to a file whose name has no extension.
    files = sorted(file.absolute() for file in files if file.is_file())
    if not files:
        raise ConfigError(f"{field} matches no file; allowed: {_ALLOWED_FILES}.")
    formats = {_FORMATS.get(file.suffix) for file in files}
    if None in formats or len(formats) > 1:
        found = ", ".join(sorted({file.suffix or f"{file.name} (no extension)" for file in files}))
        raise ConfigError(f"{field} names files of these kinds: {found}; allowed: {_ALLOWED_FILES}.")
    return formats.pop(), [str(file) for file in files]


def _load_local(builder: str, **arguments: Any) -> Dataset:
    """``datasets.load_dataset`` for one of its own builders, which otherwise reports each use to a server: seconds lost
    where there is no network."""
    reporting, datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS, False
    try:
        return load_dataset(builder, split="train", **arguments)
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = reporting


def _load_files(builder: str, files: list[str], text_column: str) -> Dataset:
    # A path with glob characters in its own name must not be read as a pattern by load_dataset.
    files = [glob.escape(file) for file in files]
    if builder == "text":
        return _load_local("text", data_files=files, sample_by="document")
    data = _load_local(builder, data_files=files)
    if text_column not in data.column_names:
        raise ConfigError(
            f"data.text_column = {text_column!r} is not a column of {files[0]}; "
            f"allowed: {', '.join(data.column_names)}."
        )
    kind = getattr(data.features[text_column], "dtype", None)
    if kind not in ("string", "large_string"):
        raise ConfigError(
            f"data.text_column = {text_column!r} holds {kind or 'nested values'} in {files[0]}; "
            "allowed: a column of strings."
        )
    data = data.select_columns([text_column])
    return data if text_column == "text" else data.rename_column(text_column, "text")
