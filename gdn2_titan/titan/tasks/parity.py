"""Parity: how many ones so far, odd or even."""

import dataclasses
from typing import ClassVar

import numpy as np

from .task import Task, blank

__all__ = ["Parity"]

BEGIN = 2  # after the bits 0 and 1


@dataclasses.dataclass
class Parity(Task):
    """A begin symbol, then bits; the answer at each bit is the parity of all bits up to it."""

    name: ClassVar[str] = "parity"

    def check(self, vocab_size):
        self.fits(3, vocab_size)

    def shortest(self):
        return 2

    def contents(self, length):
        return 2 ** (length - 1)

    def answers(self, length):
        return length - 1

    def remember(self, draw, length):
        return draw.below(2, length - 1)

    def write(self, draw, content, length):
        tokens, labels = blank(length)
        tokens[0], tokens[1:], labels[1:] = BEGIN, content, np.cumsum(content) % 2
        return tokens, labels
