"""Multi-query associative recall."""

import dataclasses
from typing import ClassVar

import numpy as np

from .pairs import PairsTask, ask, write_pairs
from .task import blank

__all__ = ["MQAR"]


@dataclasses.dataclass
class MQAR(PairsTask):
    """Pairs, a gap, then each key asked once: the answer to a key is its value, which the input does not show again.

    Half of the filler makes the gap, the other half lies between pairs and between questions. ``interference`` is the
    share of the gap that further pairs take, whose keys are others and are not asked.
    """

    name: ClassVar[str] = "mqar"
    interference: float = 0.0

    def check(self, vocab_size):
        super().check(vocab_size)
        if not 0 <= self.interference < 1:
            raise ValueError(f"interference is {self.interference}; it must be at least 0 and less than 1")
        if self.interference and max(self.pairs) == self.keys:
            raise ValueError(
                f"interference is {self.interference}; with pairs = {self.pairs} it must be 0, or keys = {self.keys} "
                "more, so that other keys are left"
            )

    def shortest(self):
        return 3 * max(self.pairs)

    def write(self, draw, content, length):
        tokens, labels = blank(length)
        filler = length - 3 * len(content)
        gap = filler // 2
        before = draw.one(filler - gap + 1)
        end = write_pairs(draw, tokens, content[draw.order(len(content))], before, 0)
        others = int(self.interference * gap) // 2
        if others:
            free = np.ones(self.keys, bool)
            free[content[:, 0] - 1] = False
            free = 1 + np.flatnonzero(free)
            keys = free[draw.below(len(free), others)]
            pairs = np.stack((keys, 1 + self.keys + draw.below(self.values, others)), 1)
            write_pairs(draw, tokens, pairs, gap - 2 * others, end)
        ask(draw, tokens, labels, content, end + gap)
        return tokens, labels
