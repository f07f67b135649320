"""Copying: a string of symbols, said again."""

import dataclasses
from typing import ClassVar

import numpy as np

from .task import Draw, Task, blank

__all__ = ["Copying"]


@dataclasses.dataclass
class Copying(Task):
    """A string of ``symbols`` random symbols out of ``alphabet``, a separator, the string again.

    The answer at the separator is the first symbol, at the first symbol of the copy the second one, and so on: the
    last symbol is only an answer. Filler lies before the string and between it and the separator. Symbols: the filler,
    the alphabet, the separator.
    """

    name: ClassVar[str] = "copying"
    sizes: ClassVar[str] = "symbols"
    symbols: list[int] = dataclasses.field(default_factory=lambda: [16])
    alphabet: int = 64

    def check(self, vocab_size: int) -> None:
        super().check(vocab_size)
        self.at_least(1, "alphabet")
        self.fits(self.alphabet + 2, vocab_size, "alphabet")

    def shortest(self) -> int:
        return 2 * max(self.symbols)

    def contents(self, length: int) -> int:
        return self.alphabet ** min(self.symbols)

    def answers(self, length: int) -> int | None:
        return self.symbols[0] if len(self.symbols) == 1 else None

    def remember(self, draw: Draw, length: int) -> np.ndarray:
        return 1 + draw.below(self.alphabet, self.size(draw))

    def write(self, draw: Draw, content: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, labels = blank(length)
        count = len(content)
        start = draw.one(length - 2 * count + 1)
        tokens[start : start + count] = content
        tokens[-count] = self.alphabet + 1
        tokens[length - count + 1 :] = content[:-1]
        labels[-count:] = content
        return tokens, labels
