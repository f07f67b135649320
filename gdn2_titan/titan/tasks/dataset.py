"""Sequences of a recall task, without end."""

import hashlib
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.stateful import Stateful
from torch.utils.data import get_worker_info

from gdn2_titan.titan.errors import ConfigError

from .task import Draw, Task

__all__ = ["HELD_OUT_ONE_IN", "TaskDataset", "is_held_out"]

HELD_OUT_ONE_IN = 8


def is_held_out(content: np.ndarray) -> bool:
    """Whether what is to be remembered belongs to the validation split: a hash of it says so, and nothing else."""
    digest = hashlib.blake2b(content.astype("<i8").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


class TaskDataset(torch.utils.data.IterableDataset, Stateful):
    """Yields ``({"input": int64 [length]}, labels int64 [length])``, each a sequence of its own: there are no resets.

    Sequence i of a split depends on the task, its settings, ``seed``, the split and i only. Of R ranks, rank r has
    sequences r, r + R, r + 2R, ...; loader workers take whole batches in turn. So the k-th batches of all ranks
    together are the k-th batch of a single process with an R-fold batch size, whatever the number of workers.

    No sequence of one split has the content of a sequence of the other: what is drawn and belongs to the other is
    thrown away, and drawn again.

    **State.** ``state_dict()`` says how many sequences came before, on all ranks together; it is the same on each.

    Args:
        task: a task that has passed its checks.
        length: tokens per sequence.
        seed: of all that is random.
        held_out: the validation split instead of the training split.
        batch_size: sequences per batch of the loader that reads this.
        dp_rank, dp_world_size: data-parallel rank and number of ranks.

    Raises:
        ConfigError: in ``load_state_dict``, if the state is not of this task.
    """

    same_state_on_all_ranks = True
    infinite = True

    def __init__(
        self, task: Task, length: int, seed: int, *, held_out: bool, batch_size: int = 1, dp_rank: int = 0,
        dp_world_size: int = 1,
    ) -> None:  # fmt: skip
        self._task, self._length, self._held_out = task, length, held_out
        self._seed = zlib.crc32(task.name.encode()), seed, int(held_out)
        self._batch_size, self._rank, self._ranks = batch_size, dp_rank, dp_world_size
        self._sequences, self._resuming = 0, False

    def sequence(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels, int64 [length], of the sequence with that number."""
        draw = Draw(*self._seed, index)
        while True:
            content = self._task.remember(draw, self._length)
            if is_held_out(content) == self._held_out:
                return self._task.write(draw, content, self._length)

    def state_dict(self) -> dict[str, Any]:
        """How many sequences have been yielded, on all ranks together."""
        return {"task": self._task.name, "sequences": self._sequences}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Make the next ``iter()`` continue from ``state_dict``."""
        if state_dict.get("task") != self._task.name:
            raise ConfigError(
                f"the checkpoint was not written with training.dataset = {self._task.name!r}; train on the same data, "
                "or start the data anew with --checkpoint.exclude_from_loading dataloader."
            )
        self._sequences = state_dict["sequences"]
        self._resuming = True

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        # Not a generator itself: the state must be that of this pass before its first sequence is asked for.
        if not self._resuming:
            self._sequences = 0
        self._resuming = False
        return self._examples()

    def _examples(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        while True:
            first = self._sequences
            self._sequences += self._ranks
            if first // self._ranks // self._batch_size % workers == worker:
                tokens, labels = self.sequence(first + self._rank)
                yield {"input": torch.from_numpy(tokens)}, torch.from_numpy(labels)
