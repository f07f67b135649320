"""State tracking: the parity of all bits so far, and the word problem of the group S5, the product of all permutations
so far."""

import dataclasses
import functools
import itertools
from typing import ClassVar

import numpy as np

from .task import Draw, Task, blank

__all__ = ["Parity", "Permutations"]

BEGIN = 2  # after the bits 0 and 1
ELEMENTS = list(itertools.permutations(range(5)))  # in the order of their symbols
THINGS = len(ELEMENTS) + np.arange(5)  # symbols
SWAPS = np.array([i for i, p in enumerate(ELEMENTS) if sum(p[x] != x for x in range(5)) == 2])


@functools.cache
def _products() -> list[list[int]]:
    """[i][j]: the symbol of "first i, then j"."""
    index = {p: i for i, p in enumerate(ELEMENTS)}
    return [[index[tuple(q[p[x]] for x in range(5))] for q in ELEMENTS] for p in ELEMENTS]


@dataclasses.dataclass
class Parity(Task):
    """A begin symbol, then bits; the answer at each bit is the parity of all bits up to it."""

    name: ClassVar[str] = "parity"

    def check(self, vocab_size: int) -> None:
        self.fits(3, vocab_size)

    def shortest(self) -> int:
        return 2

    def contents(self, length: int) -> int:
        return 2 ** (length - 1)

    def answers(self, length: int) -> int | None:
        return length - 1

    def remember(self, draw: Draw, length: int) -> np.ndarray:
        return draw.below(2, length - 1)

    def write(self, draw: Draw, content: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, labels = blank(length)
        tokens[0], tokens[1:], labels[1:] = BEGIN, content, np.cumsum(content) % 2
        return tokens, labels


@dataclasses.dataclass
class Permutations(Task):
    """Five things in order, a symbol each, then permutations; the answer at each is the product of all up to it.

    A memory that is edited one key at a time needs the things: it stores each under its place and exchanges places.

    ``generators``: "swaps", the 10 that exchange two things, or "all", the 120.
    """

    name: ClassVar[str] = "permutations"
    generators: str = "swaps"

    def check(self, vocab_size: int) -> None:
        if self.generators not in ("swaps", "all"):
            raise ValueError(f"generators is {self.generators!r}; it must be 'swaps' or 'all'")
        self.fits(len(ELEMENTS) + len(THINGS), vocab_size)

    def shortest(self) -> int:
        return len(THINGS) + 1

    def contents(self, length: int) -> int:
        return (len(SWAPS) if self.generators == "swaps" else len(ELEMENTS)) ** (length - len(THINGS))

    def answers(self, length: int) -> int | None:
        return length - len(THINGS)

    def remember(self, draw: Draw, length: int) -> np.ndarray:
        if self.generators == "swaps":
            return SWAPS[draw.below(len(SWAPS), length - len(THINGS))]
        return draw.below(len(ELEMENTS), length - len(THINGS))

    def write(self, draw: Draw, content: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, labels = blank(length)
        products = _products()
        tokens[: len(THINGS)], tokens[len(THINGS) :] = THINGS, content
        answers = itertools.accumulate(content.tolist(), lambda product, next: products[product][next])
        labels[len(THINGS) :] = list(answers)
        return tokens, labels
