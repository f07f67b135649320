"""The word problem of the group S5: the product of all permutations so far."""

import dataclasses
import functools
import itertools
from typing import ClassVar

import numpy as np

from .task import Task, blank

__all__ = ["Permutations"]

ELEMENTS = list(itertools.permutations(range(5)))  # in the order of their symbols
THINGS = len(ELEMENTS) + np.arange(5)  # symbols
SWAPS = np.array([i for i, p in enumerate(ELEMENTS) if sum(p[x] != x for x in range(5)) == 2])


@functools.cache
def _products():
    """[i][j]: the symbol of "first i, then j"."""
    index = {p: i for i, p in enumerate(ELEMENTS)}
    return [[index[tuple(q[p[x]] for x in range(5))] for q in ELEMENTS] for p in ELEMENTS]


@dataclasses.dataclass
class Permutations(Task):
    """Five things in order, a symbol each, then permutations; the answer at each is the product of all up to it.

    A memory that is edited one key at a time needs the things: it stores each under its place and exchanges places.

    ``generators``: "swaps", the 10 that exchange two things, or "all", the 120.
    """

    name: ClassVar[str] = "permutations"
    generators: str = "swaps"

    def check(self, vocab_size):
        if self.generators not in ("swaps", "all"):
            raise ValueError(f"generators is {self.generators!r}; it must be 'swaps' or 'all'")
        self.fits(len(ELEMENTS) + len(THINGS), vocab_size)

    def shortest(self):
        return len(THINGS) + 1

    def contents(self, length):
        return (len(SWAPS) if self.generators == "swaps" else len(ELEMENTS)) ** (length - len(THINGS))

    def answers(self, length):
        return length - len(THINGS)

    def remember(self, draw, length):
        if self.generators == "swaps":
            return SWAPS[draw.below(len(SWAPS), length - len(THINGS))]
        return draw.below(len(ELEMENTS), length - len(THINGS))

    def write(self, draw, content, length):
        tokens, labels = blank(length)
        products = _products()
        tokens[: len(THINGS)], tokens[len(THINGS) :] = THINGS, content
        answers = itertools.accumulate(content.tolist(), lambda product, next: products[product][next])
        labels[len(THINGS) :] = list(answers)
        return tokens, labels
