"""Prompts that tell codes somewhere in a long text and ask for one at the end: RULER's S-NIAH-1, 2, 3 and MK-NIAH-1
(arXiv 2404.06654) in our own words, and in a text of the user's."""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from gdn2_titan.convert.errors import ConvertError
from gdn2_titan.needle_text import (
    CODE_DIGITS,
    INTRODUCTION,
    KEYS,
    NEEDLE,
    NOISE,
    QUESTION,
    UUID_DIGITS,
    key_of,
    spell,
)  # fmt: skip

__all__ = ["NEEDLE_TASKS", "NEW_TOKENS", "NeedleTask", "Prompt", "contains", "needle_prompts"]

NEW_TOKENS = 128  # that an answer may take, as in RULER
# A prompt is so close to its length at least; more than that is rarely to be had, text comes in tokens of any size.
SLACK = 8
# How far behind the place that is wanted a needle may come, to lie between two sentences, or else two words.
SENTENCE_END, WORD_END = (re.compile(r"[.!?][\"')\]]*\s+|\n"), 400), (re.compile(r"\s+"), 100)


@dataclass(frozen=True)
class NeedleTask:
    noise: bool  # one sentence over and over, instead of the user's text
    uuid: bool  # codes are UUIDs, instead of numbers
    keys: int  # codes that are told, each of a key of its own


NEEDLE_TASKS = {
    "s-niah-1": NeedleTask(noise=True, uuid=False, keys=1),
    "s-niah-2": NeedleTask(noise=False, uuid=False, keys=1),
    "s-niah-3": NeedleTask(noise=False, uuid=True, keys=1),
    "mk-niah-1": NeedleTask(noise=False, uuid=False, keys=4),
}


@dataclass(frozen=True)
class Prompt:
    text: str
    ids: list[int]  # of the text, with nothing around them
    code: str  # the answer
    depths: list[float]  # where the needles are wanted, the one asked for first; shares of the haystack, 0 to 1


def needle_prompts(
    task: str, length: int, count: int, seed: int, haystack: str, tokens: Callable[[str], list[int]], around: int = 0
) -> Iterator[Prompt]:
    """The first ``count`` prompts of a task, the same for every model with the same tokenizer.

    Keys, codes and depths of prompt i depend on task, ``seed`` and i alone: neither tokenizer nor length changes them.

    Args:
        task: one of NEEDLE_TASKS.
        length: tokens of bos, the prompt and NEW_TOKENS of the answer; a prompt has that many or a few less.
        haystack: text to hide needles in, from a random place on and round its end. Not used by "s-niah-1".
        tokens: the ids of a text, with nothing around them.
        around: how many tokens stand before a document's text.

    Raises:
        ConvertError: the length leaves no room for a haystack.
    """
    kind = NEEDLE_TASKS[task]
    hay = NOISE if kind.noise else haystack
    drafts = [_Draft(kind, random.Random(f"{task} {seed} {number}"), hay) for number in range(count)]
    others = around + NEW_TOKENS
    least = max(len(tokens(draft.text(0))) for draft in drafts) + others
    if length <= least:
        raise ConvertError(
            f"--lengths has {length}; with {task} and this tokenizer it must be more than {least}, which is what "
            f"question, codes and {NEW_TOKENS} tokens of an answer take without any haystack"
        )
    return (draft.prompt(length - others, tokens) for draft in drafts)


def contains(prompt: Prompt, answer: str) -> bool:
    """RULER's score of one prompt: the code is in the answer, letter by letter."""
    return prompt.code in answer


class _Draft:
    """What is random about a prompt, before it is known how much text fits."""

    def __init__(self, kind: NeedleTask, draw: random.Random, hay: str) -> None:
        # Of all that ``random`` has, Python promises only of ``random()`` that it stays the same.
        def below(limit):
            return int(draw.random() * limit)

        keys: list[int] = []
        while len(keys) < kind.keys:
            if (key := below(KEYS)) not in keys:
                keys.append(key)
        sizes = [16] * UUID_DIGITS if kind.uuid else [9] + [10] * (CODE_DIGITS - 1)
        first = 0 if kind.uuid else 1  # a number does not begin with 0
        codes = []
        for _ in keys:
            digits = [below(size) for size in sizes]
            codes.append(spell([digits[0] + first, *digits[1:]]))
        self.code, self.question = codes[0], QUESTION.format(key=key_of(keys[0]))
        before, after = NEEDLE
        self.needles = [before.format(key=key_of(key)) + code + after for key, code in zip(keys, codes, strict=True)]
        self.depths = [draw.random() for _ in keys]
        self.start = 0 if kind.noise else below(len(hay))
        self.hay = hay

    def text(self, characters: int) -> str:
        """The prompt with that many characters of haystack."""
        rounds = -(-(self.start + characters) // len(self.hay))
        hay = (self.hay * rounds)[self.start : self.start + characters]
        places = [_border(hay, int(depth * characters)) for depth in self.depths]
        pieces, begin = [INTRODUCTION], 0
        for place, needle in sorted(zip(places, self.needles, strict=True)):
            pieces += [hay[begin:place], needle]
            begin = place
        return "".join([*pieces, hay[begin:], self.question])

    def prompt(self, most: int, tokens: Callable[[str], list[int]]) -> Prompt:
        """With as much haystack as makes ``most`` tokens, or up to SLACK less."""
        fits, ids, too_many = 0, tokens(self.text(0)), None
        least = len(ids)
        guess = 4 * (most - least)  # characters; the first measurement tells how many there are to a token
        for _ in range(20):
            text = self.text(guess)
            found = tokens(text)
            per_token = guess / max(len(found) - least, 1)
            if len(found) <= most:
                fits, ids = guess, found
                if most - len(found) <= SLACK:
                    break
            else:
                too_many = guess
            guess += int((most - SLACK // 2 - len(found)) * per_token)
            if too_many is not None and not fits < guess < too_many:
                guess = (fits + too_many) // 2
            if guess in (fits, too_many):
                break
        text = self.text(fits)
        return Prompt(text, _open_ended(text, self.code, ids, tokens), self.code, self.depths)


def _border(text: str, place: int) -> int:
    """The end of a sentence that is near behind ``place``, or of a word, or else the place itself."""
    for pattern, reach in (SENTENCE_END, WORD_END):
        if found := pattern.search(text, place, min(place + reach, len(text))):
            return found.end()
    return place


def _open_ended(text: str, code: str, ids: Sequence[int], tokens: Callable[[str], list[int]]) -> list[int]:
    """The ids of a text that ends with a space, without those that the code would change: in many vocabularies a space
    and what follows it are one token, and a model has rarely seen a token of the space alone before a digit."""
    complete = tokens(text + code)
    same = next((i for i, (a, b) in enumerate(zip(ids, complete, strict=False)) if a != b), len(ids))
    return list(ids[:same])
