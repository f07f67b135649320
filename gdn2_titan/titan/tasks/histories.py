"""Tasks of keys with a history: which of the values that were said of a key is right, its last mention does not tell.

On all of them the rule "the value that was said last" is wrong for every key, by construction.
"""

import dataclasses

import numpy as np

from .pairs import PairsTask, ask, write_pairs
from .task import Draw, blank

__all__ = ["Alias", "Locked", "Rejected", "Stale", "Version"]

Event = tuple[int, int]  # two symbols, said one after the other


class HistoryTask(PairsTask):
    """Events, two symbols each, those of a key in order and those of the keys in random order among each other; then a
    question for each key."""

    most_events: int  # of one key
    question_symbols = 1

    def tell(self, draw: Draw, content: np.ndarray) -> tuple[list[list[Event]], list[tuple[int, ...]]]:
        """Of each [key, right value] of content [pairs, 2]: its events, and the symbols that ask for the value."""
        raise NotImplementedError

    def shortest(self) -> int:
        return max(self.pairs) * (2 * self.most_events + self.question_symbols)

    def write(self, draw: Draw, content: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, labels = blank(length)
        histories, questions = self.tell(draw, content)
        whose = np.repeat(np.arange(len(content)), [len(events) for events in histories])
        following = [iter(events) for events in histories]
        told = np.array([next(following[i]) for i in whose[draw.order(len(whose))]])
        asked = np.concatenate((np.array(questions), content[:, 1:]), 1)
        filler = length - told.size - len(content) * self.question_symbols
        end = write_pairs(draw, tokens, told, draw.one(filler + 1), 0)
        ask(draw, tokens, labels, asked, end)
        return tokens, labels


@dataclasses.dataclass
class WrittenTask(HistoryTask):
    """Each key is written ``writes`` times, every time with another value."""

    writes: int = 3

    def check(self, vocab_size: int) -> None:
        super().check(vocab_size)
        self.at_least(2, "writes")
        if self.values < self.writes:
            raise ValueError(f"values is {self.values}; with writes = {self.writes} it must be at least {self.writes}")

    @property
    def most_events(self):
        return 2 * self.writes - 1

    def tell(self, draw: Draw, content: np.ndarray) -> tuple[list[list[Event]], list[tuple[int, ...]]]:
        told = [self.history(draw, key, self._values(draw, value), value) for key, value in content.tolist()]
        events, questions = zip(*told, strict=True)
        return list(events), list(questions)

    def _values(self, draw, right):
        """The other values of a key, which are wrong."""
        first = 1 + self.keys
        others = first + (right - first + 1 + draw.order(self.values - 1)[: self.writes - 1]) % self.values
        return others.tolist()

    def history(self, draw: Draw, key: int, wrong: list[int], right: int) -> tuple[list[Event], tuple[int, ...]]:
        """Events and question of a key with these values, ``writes`` in all."""
        raise NotImplementedError

    def written(self, key: int, wrong: list[int], right: int, place: int) -> list[Event]:
        """The writes of a key, the right value being number ``place``, from 0."""
        return [(key, value) for value in (*wrong[:place], right, *wrong[place:])]


@dataclasses.dataclass
class Stale(WrittenTask):
    """Each key is written ``writes`` times, and then one or two of its older values are said again, which are old news:
    the newest value is right. A value that a key had before never becomes its value again."""

    name = "stale"

    @property
    def most_events(self):
        return self.writes + 2

    def history(self, draw: Draw, key: int, wrong: list[int], right: int) -> tuple[list[Event], tuple[int, ...]]:
        again = [wrong[draw.one(len(wrong))] for _ in range(1 + draw.one(2))]
        return self.written(key, wrong, right, len(wrong)) + [(key, value) for value in again], (key,)


@dataclasses.dataclass
class Rejected(WrittenTask):
    """Each key is written ``writes`` times, and then one or more of the newest of these writes, but not all, are taken
    back, each by a command and the key: the newest value that stands is right. Symbols: those of pairs, the command."""

    name = "rejected"
    extra_symbols = 1

    def history(self, draw: Draw, key: int, wrong: list[int], right: int) -> tuple[list[Event], tuple[int, ...]]:
        place = draw.one(len(wrong))
        back = [(self.keys + self.values + 1, key)] * (len(wrong) - place)
        return self.written(key, wrong, right, place) + back, (key,)


@dataclasses.dataclass
class Locked(WrittenTask):
    """Each key is written ``writes`` times, and some time before the last of them locked, by a command and the key: the
    value that it then has is right, and later writes are void. Symbols: those of pairs, the command."""

    name = "locked"
    extra_symbols = 1

    @property
    def most_events(self):
        return self.writes + 1

    def history(self, draw: Draw, key: int, wrong: list[int], right: int) -> tuple[list[Event], tuple[int, ...]]:
        place = draw.one(len(wrong))
        events = self.written(key, wrong, right, place)
        events.insert(place + 1, (self.keys + self.values + 1, key))
        return events, (key,)


@dataclasses.dataclass
class Version(WrittenTask):
    """Each key is written ``writes`` times; the question is a number and the key, and the answer the value that it was
    given that many times in, which is never the last. Symbols: those of pairs, the numbers from 1 on."""

    name = "version"
    question_symbols = 2

    @property
    def extra_symbols(self):
        return self.writes - 1

    @property
    def most_events(self):
        return self.writes

    def history(self, draw: Draw, key: int, wrong: list[int], right: int) -> tuple[list[Event], tuple[int, ...]]:
        place = draw.one(len(wrong))
        return self.written(key, wrong, right, place), (self.keys + self.values + 1 + place, key)


@dataclasses.dataclass
class Alias(HistoryTask):
    """Each key has a value and another name, which is said as a pair of name and key, before or after; the question is
    the name. Symbols: those of pairs, then ``keys`` names."""

    name = "alias"
    most_events = 2

    @property
    def extra_symbols(self):
        return self.keys

    @property
    def said(self):
        return range(1, 1 + self.keys)

    def tell(self, draw: Draw, content: np.ndarray) -> tuple[list[list[Event]], list[tuple[int, ...]]]:
        names = (1 + self.keys + self.values + draw.order(self.keys)[: len(content)]).tolist()
        told = [[(name, key), (key, value)] for name, (key, value) in zip(names, content.tolist(), strict=True)]
        return [events[:: 1 - 2 * draw.one(2)] for events in told], [(name,) for name in names]
