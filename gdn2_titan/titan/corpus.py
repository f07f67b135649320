"""Where documents come from: the standard library's own source, local files, or a Hugging Face repository."""

import re
from collections.abc import Iterator

import datasets
from datasets import Dataset, Features, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from gdn2_titan.titan.errors import ConfigError
from gdn2_titan.titan.local_files import ALLOWED_FILES, check_begins, documents_of, find_files, reason, stamps_of
from gdn2_titan.titan.stdlib import stdlib_documents
from gdn2_titan.titan.tasks import TASKS
from gdn2_titan.titan.token_files import TokenFiles

_ALLOWED = (
    '"stdlib", "files" (with dataset_path), a Hugging Face repository such as "owner/name", or a recall task: '
    + ", ".join(f'"{name}"' for name in TASKS)
)
# Versions of datasets whose streams do not continue where the second of two resumed runs ended.
_RESTARTS = ("5.0.0",)
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def check_source(section: str, dataset: str, dataset_path: str | None, text_column: str | None = None) -> None:
    """Refuse a source of data that cannot be used, without loading it: of files, only beginnings are read.

    section: "training" or "validation". dataset: "stdlib", "files", the name of a Hugging Face repository or of a
    recall task. dataset_path: file, folder or glob, for "files" and only for it. text_column: the column with the
    text, in JSON lines and Parquet; None does not look into the files.

    Raises:
        ConfigError: naming the field, its value and what is allowed, or the file that cannot be read.
    """
    if dataset == "files":
        kind, files = find_files(section, dataset_path)
        if kind == "tokens":
            TokenFiles(files[0])
        elif text_column is not None:
            check_begins(kind, files, text_column)
    elif dataset not in ("stdlib", *TASKS) and not (isinstance(dataset, str) and _REPOSITORY.fullmatch(dataset)):
        raise ConfigError(f"{section}.dataset = {dataset!r} is not a known source; allowed: {_ALLOWED}.")
    elif dataset_path is not None:
        raise ConfigError(
            f"{section}.dataset_path = {dataset_path!r} would be ignored with {section}.dataset = {dataset!r}; "
            f'leave it out, or set {section}.dataset = "files" to read {ALLOWED_FILES}.'
        )
    elif dataset not in ("stdlib", *TASKS) and datasets.__version__ in _RESTARTS:
        raise ConfigError(
            f"{section}.dataset = {dataset!r} is a stream, which datasets {datasets.__version__} begins anew when it "
            "is resumed for the second time; install another version of datasets."
        )


def load_source(
    section: str, dataset: str, dataset_path: str | None, *, held_out: bool, text_column: str = "text",
    hf_subset: str | None = None, hf_split: str = "train",
) -> Dataset | IterableDataset:  # fmt: skip
    """Load the documents that a configuration names.

    held_out: for "stdlib", the validation split instead of the training split. hf_subset, hf_split: of a Hugging Face
    repository; None is its default subset. The rest is as for :func:`check_source`.

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
        kind, files = find_files(section, dataset_path)
        if kind == "tokens":
            raise ConfigError(f"{section}.dataset_path = {dataset_path!r} holds tokens and no text any more.")
        return _load_files(kind, files, text_column)
    try:
        return load_dataset(dataset, hf_subset, split=hf_split, streaming=True)
    except Exception as error:  # no network, no such repository, subset or split: of many libraries
        raise ConfigError(f"{section}.dataset = {dataset!r} with subset {hf_subset!r} and split {hf_split!r} cannot be "
                          f"opened: {reason(error)}.") from error  # fmt: skip


def _rows_of(kind: str, files: tuple[str, ...], stamps: tuple[tuple[int, int], ...], column: str) -> Iterator[dict]:
    """For ``Dataset.from_generator``, to which ``stamps`` tells changed files from those that it has read before."""
    for text in documents_of(kind, files, column):
        yield {"text": text}


def _load_files(kind: str, files: list[str], text_column: str) -> Dataset:
    try:
        return Dataset.from_generator(
            _rows_of,
            features=Features({"text": Value("large_string")}),
            gen_kwargs={"kind": kind, "files": tuple(files), "stamps": stamps_of(files), "column": text_column},
            writer_batch_size=100,  # documents held in memory at a time
        )
    except (DatasetGenerationError, OSError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, (ConfigError, OSError)):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        if isinstance(cause, ConfigError):
            raise cause from error
        raise ConfigError(
            f"the documents cannot be written to {datasets.config.HF_DATASETS_CACHE} ({cause.strerror or cause}); the "
            "environment variable HF_DATASETS_CACHE must name a folder with room for them."
        ) from error
