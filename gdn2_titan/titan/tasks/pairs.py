"""Keys and values, which three of the tasks write and ask for."""

import dataclasses
import math
from typing import ClassVar

import numpy as np

from .task import Task, place

__all__ = ["PairsTask", "ask", "write_pairs"]


@dataclasses.dataclass
class PairsTask(Task):
    """Pairs of a key and a value. Symbols: the filler, then ``keys`` keys, then ``values`` values."""

    sizes: ClassVar[str] = "pairs"
    pairs: list[int] = dataclasses.field(default_factory=lambda: [8])
    keys: int = 64
    values: int = 64

    extra_symbols: ClassVar[int] = 0

    def check(self, vocab_size):
        super().check(vocab_size)
        self.at_least(1, "keys", "values")
        if max(self.pairs) > self.keys:
            raise ValueError(f"pairs is {self.pairs}; they must be at most keys = {self.keys}")
        self.fits(1 + self.keys + self.values + self.extra_symbols, vocab_size, "keys", "values")

    def contents(self, length):
        return min(math.comb(self.keys, pairs) * self.values**pairs for pairs in self.pairs)

    def answers(self, length):
        return self.pairs[0] if len(self.pairs) == 1 else None

    def remember(self, draw, length):
        """[pairs, 2]: symbols of key and value, by key."""
        pairs = self.size(draw)
        keys = 1 + draw.some(self.keys, pairs)
        return np.stack((keys, 1 + self.keys + draw.below(self.values, pairs)), 1)


def write_pairs(draw, tokens, pairs, filler, start):
    """Write [n, 2] pairs into tokens from ``start`` on, in their order, among ``filler`` tokens. Returns the end."""
    at = start + place(draw, len(pairs), 2, filler)
    tokens[at], tokens[at + 1] = pairs[:, 0], pairs[:, 1]
    return start + 2 * len(pairs) + filler


def ask(draw, tokens, labels, answers, start):
    """Ask for each key of [n, 2] keys and answers once, in random order, anywhere from ``start`` to the end."""
    answers = answers[draw.order(len(answers))]
    at = start + place(draw, len(answers), 1, len(tokens) - start - len(answers))
    tokens[at], labels[at] = answers[:, 0], answers[:, 1]
