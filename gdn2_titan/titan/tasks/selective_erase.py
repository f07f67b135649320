"""Selective erase: forget some keys, keep the others."""

import dataclasses
from typing import ClassVar

from .pairs import PairsTask, ask, write_pairs
from .task import blank

__all__ = ["SelectiveErase"]


@dataclasses.dataclass
class SelectiveErase(PairsTask):
    """Pairs; then a command to forget, and the key, for the share ``erased`` of the keys; then each key asked once.

    The answer is the value of a key that was kept, and the symbol ``none`` for one that was forgotten. Symbols: those
    of the pairs, the command, none.
    """

    name: ClassVar[str] = "selective_erase"
    erased: float = 0.5

    extra_symbols: ClassVar[int] = 2

    def check(self, vocab_size):
        super().check(vocab_size)
        if not 0 < self.erased < 1:
            raise ValueError(f"erased is {self.erased}; it must be greater than 0 and less than 1")
        for pairs in self.pairs:
            if not 0 < round(self.erased * pairs) < pairs:
                raise ValueError(
                    f"erased is {self.erased}; of pairs = {pairs} it must be at least one pair and not all of them"
                )

    @property
    def none(self):
        return 2 + self.keys + self.values

    @property
    def apart(self):
        return self.none, "forgotten", "kept"

    def shortest(self):
        return max(3 * pairs + 2 * round(self.erased * pairs) for pairs in self.pairs)

    def write(self, draw, content, length):
        tokens, labels = blank(length)
        forgotten = draw.order(len(content))[: round(self.erased * len(content))]
        commands = content[forgotten][:, ::-1].copy()
        commands[:, 0] = self.none - 1
        answers = content.copy()
        answers[forgotten, 1] = self.none
        filler = length - 3 * len(content) - 2 * len(commands)
        between, before = sorted(draw.below(filler + 1, 2))
        end = write_pairs(draw, tokens, content[draw.order(len(content))], between, 0)
        end = write_pairs(draw, tokens, commands, before - between, end)
        ask(draw, tokens, labels, answers, end)
        return tokens, labels
