"""The word problem of the group S5: the product of all permutations so far."""

import dataclasses
import functools
import itertools
from typing import ClassVar

import numpy as np

from .task import Task, blank

__all__ = ["Permutations"]

ELEMENTS = list(itertools.permutations(range(5)))  # in the order of their symbols
BEGIN = len(ELEMENTS)
SWAPS = np.array([i for i, p in enumerate(ELEMENTS) if sum(p[x] != x for x in range(5)) == 2])


@functools.cache
def _products():
    """[i][j]: the symbol of "first i, then j"."""
    index = {p: i for i, p in enumerate(ELEMENTS)}
    return [[index[tuple(q[p[x]] for x in range(5))] for q in ELEMENTS] for p in ELEMENTS]


@dataclasses.dataclass
class Permutations(Task):
    """A begin symbol, then permutations of five things; the answer at each is the product of all up to it.

    ``generators``: "swaps", the 10 that exchange two things, or "all", the 120.
    """

    name: ClassVar[str] = "permutations"
    generators: str = "swaps"

    def check(self, vocab_size):
        if self.generators not in ("swaps", "all"):
            raise ValueError(f"generators is {self.generators!r}; it must be 'swaps' or 'all'")
        self.fits(BEGIN + 1, vocab_size)

    def shortest(self):
        return 2

    def contents(self, length):
        return (len(SWAPS) if self.generators == "swaps" else len(ELEMENTS)) ** (length - 1)

    def answers(self, length):
        return length - 1

    def remember(self, draw, length):
        if self.generators == "swaps":
            return SWAPS[draw.below(len(SWAPS), length - 1)]
        return draw.below(len(ELEMENTS), length - 1)

    def write(self, draw, content, length):
        tokens, labels = blank(length)
        products = _products()
        tokens[0], tokens[1:] = BEGIN, content
        labels[1:] = list(itertools.accumulate(content.tolist(), lambda product, next: products[product][next]))
        return tokens, labels
