"""Tasks of keys and values: multi-query associative recall, overwriting, and selective forgetting."""

import dataclasses
import math
from typing import ClassVar

import numpy as np

from .task import Draw, Task, blank, place

__all__ = ["MQAR", "Overwrite", "SelectiveErase"]


@dataclasses.dataclass
class PairsTask(Task):
    """Pairs of a key and a value. Symbols: the filler, then ``keys`` keys, then ``values`` values."""

    sizes: ClassVar[str] = "pairs"
    pairs: list[int] = dataclasses.field(default_factory=lambda: [8])
    keys: int = 64
    values: int = 64

    extra_symbols: ClassVar[int] = 0

    def check(self, vocab_size: int) -> None:
        super().check(vocab_size)
        self.at_least(1, "keys", "values")
        if max(self.pairs) > self.keys:
            raise ValueError(f"pairs is {self.pairs}; they must be at most keys = {self.keys}")
        self.fits(1 + self.keys + self.values + self.extra_symbols, vocab_size, "keys", "values")

    def contents(self, length: int) -> int:
        return min(math.comb(self.keys, pairs) * self.values**pairs for pairs in self.pairs)

    def answers(self, length: int) -> int | None:
        return self.pairs[0] if len(self.pairs) == 1 else None

    @property
    def said(self) -> range:
        """The symbols that are said of what is asked for."""
        return range(1 + self.keys, 1 + self.keys + self.values)

    def remember(self, draw: Draw, length: int) -> np.ndarray:
        """[pairs, 2]: symbols of key and value, by key."""
        pairs = self.size(draw)
        keys = 1 + draw.some(self.keys, pairs)
        return np.stack((keys, 1 + self.keys + draw.below(self.values, pairs)), 1)


def write_pairs(draw: Draw, tokens: np.ndarray, pairs: np.ndarray, filler: int, start: int) -> int:
    """Write [n, 2] pairs into tokens from ``start`` on, in their order, among ``filler`` tokens. Returns the end."""
    at = start + place(draw, len(pairs), 2, filler)
    tokens[at], tokens[at + 1] = pairs[:, 0], pairs[:, 1]
    return start + 2 * len(pairs) + filler


def ask(draw: Draw, tokens: np.ndarray, labels: np.ndarray, asked: np.ndarray, start: int) -> None:
    """Ask each question once, in random order, anywhere from ``start`` to the end. asked [n, width + 1]: the symbols of
    a question, the answer to the last of them."""
    asked, width = asked[draw.order(len(asked))], asked.shape[1] - 1
    at = start + place(draw, len(asked), width, len(tokens) - start - width * len(asked))
    for i in range(width):
        tokens[at + i] = asked[:, i]
    labels[at + width - 1] = asked[:, -1]


@dataclasses.dataclass
class MQAR(PairsTask):
    """Pairs, a gap, then each key asked once: the answer to a key is its value, which the input does not show again.

    Half of the filler makes the gap, the other half lies between pairs and between questions. ``interference`` is the
    share of the gap that further pairs take, whose keys are others and are not asked.
    """

    name: ClassVar[str] = "mqar"
    interference: float = 0.0

    def check(self, vocab_size: int) -> None:
        super().check(vocab_size)
        if not 0 <= self.interference < 1:
            raise ValueError(f"interference is {self.interference}; it must be at least 0 and less than 1")
        if self.interference and max(self.pairs) == self.keys:
            raise ValueError(f"interference is {self.interference}; with pairs = {self.pairs} it must be 0, or keys = "
                             f"{self.keys} more, so that other keys are left")  # fmt: skip

    def shortest(self) -> int:
        return 3 * max(self.pairs)

    def write(self, draw: Draw, content: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
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


@dataclasses.dataclass
class Overwrite(PairsTask):
    """Each of ``pairs`` keys is written ``writes`` times, each time with a value that is not the one it replaces, in
    random order among the other keys; then each key is asked once."""

    name: ClassVar[str] = "overwrite"
    writes: int = 2

    def check(self, vocab_size: int) -> None:
        super().check(vocab_size)
        self.at_least(1, "writes")
        if self.writes > 1 and self.values < 2:
            raise ValueError(f"values is {self.values}; with writes = {self.writes} it must be at least 2")

    def shortest(self) -> int:
        return (2 * self.writes + 1) * max(self.pairs)

    def write(self, draw: Draw, content: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
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


@dataclasses.dataclass
class SelectiveErase(PairsTask):
    """Pairs; then a command to forget, and the key, for the share ``erased`` of the keys; then each key asked once.

    The answer is the value of a key that was kept, and the symbol ``none`` for one that was forgotten. Symbols: those
    of the pairs, the command, none.
    """

    name: ClassVar[str] = "selective_erase"
    erased: float = 0.5

    extra_symbols: ClassVar[int] = 2

    def check(self, vocab_size: int) -> None:
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

    def shortest(self) -> int:
        return max(3 * pairs + 2 * round(self.erased * pairs) for pairs in self.pairs)

    def write(self, draw: Draw, content: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
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
