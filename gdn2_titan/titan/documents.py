"""The order in which documents are read, and marks from which reading can start again.

A mark is a small dictionary of plain values that names one document; ``read(mark)`` starts with that document. Both
classes have ``shared``: whether every data-parallel rank and loader worker reads the same documents in the same order.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset

from gdn2_titan.titan.errors import ConfigError
from gdn2_titan.titan.local_files import check_unicode, reason

Mark = dict[str, Any]


class MapDocuments:
    """Documents of a map-style dataset, in an order shuffled anew for each epoch.

    Every rank reads all documents, in the same order.
    """

    shared = True

    def __init__(self, data: Dataset, column: str, seed: int) -> None:
        self._data, self._column, self._seed = data, column, seed

    def first(self) -> Mark:
        """Mark of the first document of the first epoch."""
        return {"epoch": 0, "index": 0, "documents": len(self._data)}

    def read(self, mark: Mark, infinite: bool) -> Iterator[tuple[Mark, str]]:
        """Yield (mark, text) from ``mark`` to the end of its epoch, or epoch after epoch without end.

        Raises:
            ConfigError: if the mark was made with a different number of documents.
        """
        if mark["documents"] != len(self._data):
            raise ConfigError(
                f"the checkpoint was written with {mark['documents']} documents and there are {len(self._data)} now; "
                "train on the same documents, or start the data anew with --checkpoint.exclude_from_loading dataloader."
            )
        epoch, index = mark["epoch"], mark["index"]
        while True:
            order = epoch_order(len(self._data), self._seed, epoch)
            empty = index == 0
            for index in range(index, len(order)):
                text = _text(self._data[int(order[index])], self._column)
                if text:
                    empty = False
                    yield {"epoch": epoch, "index": index, "documents": len(self._data)}, text
            if not infinite or empty:
                return
            epoch, index = epoch + 1, 0


class StreamDocuments:
    """Documents of a streaming dataset, in the stream's own order, the same in each pass.

    Each rank and each loader worker has documents of its own: reading everything and keeping a part, as for map-style
    datasets, would make each rank download the whole stream.
    """

    shared = False

    def __init__(self, data: IterableDataset, column: str) -> None:
        self._data, self._column = data, column

    def first(self) -> Mark:
        """Mark of the first document."""
        return {"stream": None}

    def read(self, mark: Mark, infinite: bool) -> Iterator[tuple[Mark, str]]:
        """Yield (mark, text) from ``mark`` to the end of the pass, or pass after pass without end."""
        state = mark["stream"]
        while True:
            # None starts a pass from the top. set_epoch would too, but it also permutes the shards, and its counter is
            # shared between the workers of a loader, whose passes end at different times.
            self._data.load_state_dict(copy.deepcopy(state))
            empty = state is None
            for sample in _samples(self._data):
                text = _text(sample, self._column)
                if text:
                    empty = False
                    yield {"stream": state}, text
                state = self._data.state_dict()
            # A worker beyond the number of shards has no documents: it must end, not look for them for ever.
            if not infinite or empty:
                return
            state = None


def _samples(data: IterableDataset) -> Iterator[Mapping[str, Any]]:
    """What the stream gives, until it ends or breaks off: a lost connection, a damaged file."""
    try:
        yield from data
    except Exception as error:  # of many libraries
        raise ConfigError(f"the stream of documents broke off: {type(error).__name__}, {reason(error)}.") from error


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of ``range(count)`` that depends on (count, seed, epoch) only.

    NumPy keeps the raw output of its bit generators the same from version to version, which it does not promise for
    ``Generator.permutation`` (nor torch for ``randperm``); a checkpoint outlives such versions.
    """
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(count)
    return np.argsort(keys, kind="stable")


def _text(sample: Mapping[str, Any], column: str) -> str | None:
    if column not in sample:
        raise ConfigError(f"data.text_column = {column!r} is not a column of the data; allowed: {', '.join(sample)}.")
    text = sample[column]
    if text is not None and not isinstance(text, str):
        raise ConfigError(f"data.text_column = {column!r} holds {type(text).__name__}; allowed: a column of strings.")
    if text is not None and not text.isascii():
        check_unicode(text, f"a document's {column!r}")
    return text
