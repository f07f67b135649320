"""Documents packed end to end into sequences of one length, and the order in which they are read.

A mark is a small dictionary of plain values that names one document, with which ``read(mark)`` of a reader starts. A
reader is ``shared`` where every data-parallel rank and loader worker reads the same documents in the same order.
"""

import copy
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.distributed.checkpoint.stateful import Stateful
from torch.utils.data import get_worker_info
from torchtitan.components.tokenizer import BaseTokenizer

from gdn2_titan.titan.errors import ConfigError
from gdn2_titan.titan.local_files import check_unicode, reason
from gdn2_titan.titan.tasks.task import Draw
from gdn2_titan.titan.token_files import TokenFiles
from gdn2_titan.titan.tokens import DocumentTokens

Mark = dict[str, Any]
Example = tuple[dict[str, torch.Tensor], torch.Tensor]


class PackedText(torch.utils.data.IterableDataset, Stateful):
    """Windows of ``seq_len`` tokens over the concatenation ``bos text eos bos text eos ...`` of all documents.

    Each item is ``({"input": int64 [seq_len], "resets": bool [seq_len]}, labels int64 [seq_len])``, where ``labels`` is
    ``input`` one token later. ``resets`` is True exactly at the first token of each document; at the start of a
    window only if a document begins there.

    The last label of a window is the first input of the next, so every token but the very first is a target once.

    **Order.** A map-style dataset gives ONE sequence of windows, whatever the number of ranks; of R ranks, rank r has
    windows r, r + R, r + 2R, ..., so the k-th batches of all ranks together are the k-th batch of a single process with
    an R-fold batch size. Of ``TokenFiles`` each rank reads its own windows alone; of texts, the price is that every
    rank (and loader worker) tokenizes all documents. Loader workers take whole batches in turn, so batches do not
    depend on their number either. A streaming dataset is split by documents instead, between ranks and by ``datasets``
    itself between workers.

    **Ends.** ``iter()`` starts from the first document, or from a state loaded since the last ``iter()``: a place in
    the documents, for a map-style dataset the same on all ranks, from which the following windows are read again
    exactly as they were. A pass that is not infinite leaves out the tokens that do not fill one window on every rank.

    Args:
        data: tokens, or a map-style or streaming dataset of texts; a streaming one must not be split by rank yet.
        tokenizer: see ``tokens.DocumentTokens``; not for what is tokens already.
        seq_len, batch_size: tokens per window; windows per batch of the loader that reads this.
        dp_rank, dp_world_size: data-parallel rank and number of ranks.
        infinite: start the next epoch when one ends; tokens left over go before it.
        with_resets: without it the dictionary has only ``"input"``.
        text_column: the column with the text.
        shuffle_seed: of the order of a map-style dataset's documents, different in each epoch.

    Raises:
        ConfigError: while iterating, if a single pass over a map-style dataset does not fill one batch on every rank,
            if the text column is missing or not text, or if the state was saved with other data.
    """

    def __init__(
        self, data: TokenFiles | Dataset | IterableDataset, tokenizer: BaseTokenizer, seq_len: int, *,
        batch_size: int = 1, dp_rank: int = 0, dp_world_size: int = 1, infinite: bool = False,
        with_resets: bool = True, text_column: str = "text", shuffle_seed: int = 0,
    ) -> None:  # fmt: skip
        self._seq_len, self._batch_size = seq_len, batch_size
        self._infinite, self._with_resets = infinite, with_resets
        self._documents: MapDocuments | StreamDocuments
        if isinstance(data, IterableDataset):
            split = split_dataset_by_node(data, dp_rank, dp_world_size)
            self._documents = StreamDocuments(split, text_column, DocumentTokens(tokenizer))
            self._rank, self._ranks = 0, 1
        else:
            if isinstance(data, Dataset):
                data = _Encoded(data, text_column, DocumentTokens(tokenizer))
            self._documents = MapDocuments(data, shuffle_seed)
            self._rank, self._ranks = dp_rank, dp_world_size
        self._state = self._initial_state()
        self._resuming = False

    def _initial_state(self) -> dict[str, Any]:
        # The next window begins with token number `offset` of the document at `mark`; `windows` came before it.
        return {"mark": self._documents.first(), "offset": 0, "windows": 0}

    @property
    def infinite(self) -> bool:
        """Whether the windows do not end where there are documents."""
        return self._infinite

    @property
    def same_state_on_all_ranks(self) -> bool:
        """Whether ``state_dict()`` is the same on every rank, after as many windows on each."""
        return self._documents.shared

    def state_dict(self) -> dict[str, Any]:
        """Where the window after the last one yielded begins."""
        return copy.deepcopy(self._state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Make the next ``iter()`` continue from ``state_dict``."""
        self._state = copy.deepcopy(state_dict)
        self._resuming = True

    def __iter__(self) -> Iterator[Example]:
        # Not a generator itself: the state must be that of this pass before its first window is asked for.
        if not self._resuming:
            self._state = self._initial_state()
        self._resuming = False
        return self._examples()

    def _examples(self) -> Iterator[Example]:
        info = get_worker_info() if self._documents.shared else None
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        round_tokens = self._ranks * self._seq_len  # one window for each rank
        windows, skip = self._state["windows"], self._state["offset"]

        # Positions count from the first token of this pass that belongs to a window; earlier ones are negative.
        done = end = 0  # what is before `done` has been the input of a window, what is before `end` has been read
        held: deque[tuple[int, np.ndarray]] = deque()  # first position and tokens of the documents from `done` on
        begins: deque[tuple[int, dict[str, Any]]] = deque()  # first position and mark of each of them

        for mark, tokens in self._documents.read(self._state["mark"], self._infinite):
            begins.append((end - skip, mark))
            held.append((end, tokens[skip:]))
            end += len(held[-1][1])
            skip = 0
            while end - done > round_tokens:  # one more than the inputs: the last label
                turn = windows // self._ranks // self._batch_size
                example = None
                if turn % workers == worker:
                    example = self._example(held, done + self._rank * self._seq_len, begins)
                done += round_tokens
                windows += self._ranks
                while held[0][0] + len(held[0][1]) <= done:
                    held.popleft()
                while len(begins) > 1 and begins[1][0] <= done:
                    begins.popleft()
                position, mark = begins[0]
                self._state = {"mark": mark, "offset": done - position, "windows": windows}
                if example is not None:
                    yield example

        if self._documents.shared and windows < self._ranks * self._batch_size:
            raise ConfigError(f"the documents have too few tokens for one batch of {self._batch_size} sequences of "
                              f"{self._seq_len} tokens on each of {self._ranks} data-parallel ranks; allowed: more "
                              "text, a smaller local_batch_size or a smaller seq_len.")  # fmt: skip

    def _example(
        self, held: deque[tuple[int, np.ndarray]], start: int, begins: deque[tuple[int, dict[str, Any]]]
    ) -> Example:
        """The window that begins at position ``start``."""
        window = torch.empty(self._seq_len + 1, dtype=torch.int64)
        for position, tokens in held:
            first, last = max(position, start), min(position + len(tokens), start + len(window))
            if first < last:
                part = tokens[first - position : last - position].astype(np.int64)
                window[first - start : last - start] = torch.from_numpy(part)
        inputs = {"input": window[:-1]}
        if self._with_resets:
            resets = torch.zeros(self._seq_len, dtype=torch.bool)
            resets[[position - start for position, _ in begins if 0 <= position - start < self._seq_len]] = True
            inputs["resets"] = resets
        return inputs, window[1:]


class _Encoded:
    """The documents of a map-style dataset as tokens, encoded each time that they are asked for."""

    def __init__(self, data: Dataset, column: str, encode: DocumentTokens) -> None:
        self._data, self._column, self._encode = data, column, encode

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> np.ndarray:
        text = _text(self._data[index], self._column)
        return self._encode(text) if text else np.empty(0, dtype=np.int64)


class MapDocuments:
    """Documents that are numbered, in an order shuffled anew for each epoch; ``data[i]`` is the tokens of one.

    Every rank reads all documents, in the same order.
    """

    shared = True

    def __init__(self, data: TokenFiles | _Encoded, seed: int) -> None:
        self._data, self._seed = data, seed

    def first(self) -> Mark:
        """Mark of the first document of the first epoch."""
        return {"epoch": 0, "index": 0, "documents": len(self._data)}

    def read(self, mark: Mark, infinite: bool) -> Iterator[tuple[Mark, np.ndarray]]:
        """Yield (mark, tokens) from ``mark`` to the end of its epoch, or epoch after epoch without end.

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
                tokens = self._data[int(order[index])]
                if len(tokens):
                    empty = False
                    yield {"epoch": epoch, "index": index, "documents": len(self._data)}, tokens
            if not infinite or empty:
                return
            epoch, index = epoch + 1, 0


class StreamDocuments:
    """Documents of a streaming dataset, in the stream's own order, the same in each pass.

    Each rank and each loader worker has documents of its own: reading everything and keeping a part, as for map-style
    datasets, would make each rank download the whole stream.
    """

    shared = False

    def __init__(self, data: IterableDataset, column: str, encode: DocumentTokens) -> None:
        self._data, self._column, self._encode = data, column, encode

    def first(self) -> Mark:
        """Mark of the first document."""
        return {"stream": None}

    def read(self, mark: Mark, infinite: bool) -> Iterator[tuple[Mark, np.ndarray]]:
        """Yield (mark, tokens) from ``mark`` to the end of the pass, or pass after pass without end."""
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
                    yield {"stream": state}, self._encode(text)
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
    """A permutation of ``range(count)`` that depends on (count, seed, epoch) only, on every machine: see ``Draw``."""
    return Draw(seed, epoch).order(count)


def _text(sample: Mapping[str, Any], column: str) -> str | None:
    if column not in sample:
        raise ConfigError(f"data.text_column = {column!r} is not a column of the data; allowed: {', '.join(sample)}.")
    text = sample[column]
    if text is not None and not isinstance(text, str):
        raise ConfigError(f"data.text_column = {column!r} holds {type(text).__name__}; allowed: a column of strings.")
    if text is not None and not text.isascii():
        check_unicode(text, f"a document's {column!r}")
    return text
