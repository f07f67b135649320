"""What the recall tasks have in common: settings and their checks, random numbers, and how sequences are laid out."""

import dataclasses
from typing import ClassVar

import numpy as np
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.tokenizer import BaseTokenizer

__all__ = ["FILLER", "Draw", "Task", "blank", "place"]

FILLER = 0  # the symbol without meaning, of the tasks that have one


class Draw:
    """A stream of random numbers that depends on ``seed``, whole numbers of at least 0, only.

    Made from the raw output of a bit generator: NumPy keeps that the same from version to version, which it does not
    promise for the methods of ``Generator``; a checkpoint outlives such versions.
    """

    def __init__(self, *seed: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(seed))

    def below(self, limit: int | np.ndarray, count: int) -> np.ndarray:
        """int64 [count], each uniform in 0 .. limit - 1; limit: up to 2**31, a number or an array [count]."""
        return ((self._bits.random_raw(count) >> np.uint64(32)).astype(np.int64) * limit) >> 32

    def one(self, limit: int) -> int:
        """A number uniform in 0 .. limit - 1."""
        return ((self._bits.random_raw() >> 32) * limit) >> 32

    def order(self, count: int) -> np.ndarray:
        """int64 [count]: a permutation of 0 .. count - 1."""
        return np.argsort(self._bits.random_raw(count), kind="stable")

    def some(self, limit: int, count: int) -> np.ndarray:
        """int64 [count]: different numbers below limit, in rising order."""
        return np.sort(self.order(limit)[:count])


@dataclasses.dataclass
class Task:
    """A task whose fields are those that the section [task] of a job config may set for it.

    A sequence is made in two steps: ``remember`` draws what is to be remembered, which alone decides whether the
    sequence may be trained on or is held out; ``write`` makes the tokens.
    """

    name: ClassVar[str]
    sizes: ClassVar[str | None] = None
    """The field that says how much is to be remembered, a list of which each sequence has one; None: its length does"""

    apart: ClassVar[tuple[int, str, str] | None] = None
    """A symbol, a name for answers that are this symbol, and a name for all others, where both accuracies are of use"""

    def check(self, vocab_size: int) -> None:
        """Raise ValueError, one sentence with field, value and what is allowed, unless sequences can be made of the
        ``vocab_size`` symbols of a model."""
        if self.sizes is not None:
            values = getattr(self, self.sizes)
            if not values or min(values) < 1 or len(set(values)) < len(values):
                raise ValueError(f"{self.sizes} is {values}; it must be a list of different numbers of at least 1")

    def at_least(self, least: int, *fields: str) -> None:
        """The check of fields that are whole numbers."""
        for field in fields:
            if getattr(self, field) < least:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least {least}")

    def fits(self, symbols: int, vocab_size: int, *fields: str) -> None:
        """The check that a model knows all symbols; fields: those that ask for so many."""
        if symbols > vocab_size:
            what = " and ".join(f"{field} is {getattr(self, field)}" for field in fields) or f"dataset is {self.name!r}"
            raise ValueError(f"{what}; that makes {symbols} symbols, which must be at most vocab_size = {vocab_size}")

    def prepare(self, tokenizer: BaseTokenizer, held_out: bool) -> None:
        """Called before sequences of one of the splits are made, for tasks that are made of text."""

    def each_size(self) -> list["Task"]:
        """This task with one size, for each of its sizes."""
        if self.sizes is None:
            return [self]
        return [dataclasses.replace(self, **{self.sizes: [size]}) for size in getattr(self, self.sizes)]

    def size(self, draw: Draw) -> int:
        """The size of the sequence that is being drawn."""
        values = getattr(self, self.sizes)
        return values[draw.one(len(values))]

    def shortest(self) -> int:
        """The least length that a sequence of the largest size needs."""
        raise NotImplementedError

    def contents(self, length: int) -> int:
        """How many different things to remember there are, of the smallest size."""
        raise NotImplementedError

    def answers(self, length: int) -> int | None:
        """How many tokens of a sequence are answers, or None where that differs from sequence to sequence."""
        raise NotImplementedError

    def remember(self, draw: Draw, length: int) -> np.ndarray:
        """int64 array: what is to be remembered, in one order of the many that say the same."""
        raise NotImplementedError

    def write(self, draw: Draw, content: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 [length] tokens and labels, the labels IGNORE_INDEX but at answers."""
        raise NotImplementedError


def blank(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that are all filler, and labels without an answer."""
    return np.full(length, FILLER, np.int64), np.full(length, IGNORE_INDEX, np.int64)


def place(draw: Draw, units: int, width: int, filler: int) -> np.ndarray:
    """int64 [units]: where units of ``width`` tokens begin, among as many tokens of filler as said, at random."""
    return draw.some(units + filler, units) + np.arange(units) * (width - 1)
