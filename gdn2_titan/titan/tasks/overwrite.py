"""Overwrite recall: the newest value of a key is the right one."""

import dataclasses
from typing import ClassVar

import numpy as np

from .pairs import PairsTask, ask, write_pairs
from .task import blank

__all__ = ["Overwrite"]


@dataclasses.dataclass
class Overwrite(PairsTask):
    """Each of ``pairs`` keys is written ``writes`` times, each time with a value that is not the one it replaces, in
    random order among the other keys; then each key is asked once."""

    name: ClassVar[str] = "overwrite"
    writes: int = 2

    def check(self, vocab_size):
        super().check(vocab_size)
        self.at_least(1, "writes")
        if self.writes > 1 and self.values < 2:
            raise ValueError(f"values is {self.values}; with writes = {self.writes} it must be at least 2")

    def shortest(self):
        return (2 * self.writes + 1) * max(self.pairs)

    def write(self, draw, content, length):
        tokens, labels = blank(length)
        pairs, first = len(content), 1 + self.keys
        # From the newest value back: each older one is some way round the circle of values, and never all the way.
        back = np.zeros((self.writes, pairs), np.int64)
        if self.writes > 1:
            steps = 1 + draw.below(self.values - 1, (self.writes - 1) * pairs)
            back[1:] = steps.reshape(self.writes - 1, pairs).cumsum(0)
        values = (first + (content[:, 1] - first - back) % self.values)[::-1]  # [writes, pairs], the oldest first
        whose = draw.order(self.writes * pairs) % pairs
        # The n-th time that a key comes it has its n-th value.
        by_key = np.argsort(whose, kind="stable")
        nth = np.empty_like(whose)
        nth[by_key] = np.tile(np.arange(self.writes), pairs)
        filler = length - (2 * self.writes + 1) * pairs
        written = np.stack((content[whose, 0], values[nth, whose]), 1)
        end = write_pairs(draw, tokens, written, draw.one(filler + 1), 0)
        ask(draw, tokens, labels, content, end)
        return tokens, labels
