"""A needle in a haystack, in the manner of RULER (arXiv 2404.06654): a code is told somewhere in a long text and asked
for at its end."""

import dataclasses
import functools
from typing import ClassVar

import numpy as np
from torchtitan.components.tokenizer import BaseTokenizer

from gdn2_titan.needle_text import (
    CODE_DIGITS,
    FIRST,
    INTRODUCTION,
    KEYS,
    NEEDLE,
    NOISE,
    QUESTION,
    SECOND,
    UUID_DIGITS,
    key_of,
    spell,
)  # fmt: skip
from gdn2_titan.titan.stdlib import stdlib_documents
from gdn2_titan.titan.tokens import text_tokens

from .task import Draw, Task, blank

__all__ = ["VARIANTS", "Needle"]

VARIANTS = ("s1", "s2", "s3", "mk1")


@functools.cache
def _text(held_out: bool) -> str:
    return "\n".join(stdlib_documents(held_out=held_out).values())


@dataclasses.dataclass
class Needle(Task):
    """Text of the run's tokenizer; the answers are the tokens of the code that is asked for.

    ``variant``: "s1": a sentence said over and over, one code, a number; "s2": the standard library's source, one code,
    a number; "s3": the same with a UUID; "mk1": the source, ``needles`` codes (4 if unset) of different keys, numbers,
    one of them asked for. Training and validation read different files.
    """

    name: ClassVar[str] = "needle"
    variant: str = "s1"
    needles: int | None = None

    def check(self, vocab_size: int) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"variant is {self.variant!r}; it must be one of {', '.join(VARIANTS)}")
        if self.needles is not None:
            if self.variant != "mk1":
                raise ValueError(f"needles is {self.needles}; it must be left out unless variant is 'mk1'")
            if not 2 <= self.needles <= KEYS:
                raise ValueError(f"needles is {self.needles}; it must be at least 2 and at most {KEYS}")

    def prepare(self, tokenizer: BaseTokenizer, held_out: bool) -> None:
        self._tokenizer = tokenizer
        self._haystack = NOISE if self.variant == "s1" else _text(held_out)
        sample = self._haystack[:10_000]
        self._characters = len(sample) / len(self._encode(sample))  # per token

    def shortest(self) -> int:
        """1 before ``prepare``: it depends on the tokenizer."""
        if not hasattr(self, "_tokenizer"):
            return 1
        # Words may have different numbers of tokens: the longest of each.
        pieces = [FIRST, SECOND, "0123456789abcdef-"]
        word, other, digit = (max((len(self._encode(x)), x) for x in some)[1] for some in pieces)
        code = digit * (UUID_DIGITS + 4 if self.variant == "s3" else CODE_DIGITS)
        key = f"{word} {other}"
        needle, question = self._needle(key, code), self._question(key, code)
        return len(self._encode(INTRODUCTION)) + self._count * len(needle) + len(question) - 1

    @property
    def _count(self):
        return self.needles or (4 if self.variant == "mk1" else 1)

    def contents(self, length: int) -> int:
        return KEYS * (16**UUID_DIGITS if self.variant == "s3" else 9 * 10 ** (CODE_DIGITS - 1))

    def answers(self, length: int) -> int | None:
        return None  # the tokens of a code

    def remember(self, draw: Draw, length: int) -> np.ndarray:
        """The key that is asked for and the digits of its code."""
        return np.concatenate((draw.below(KEYS, 1), self._code(draw)))

    def write(self, draw: Draw, content: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        others = (content[0] + 1 + draw.order(KEYS - 1)[: self._count - 1]) % KEYS
        codes = [content[1:]] + [self._code(draw) for _ in others]
        told = [(key_of(key), spell(code)) for key, code in zip((content[0], *others), codes, strict=True)]
        needles = [self._needle(*told[i]) for i in draw.order(self._count)]
        introduction, question = self._encode(INTRODUCTION), self._question(*told[0])
        answer = self._encode(told[0][1])
        hay = self._hay(draw, length - len(introduction) - sum(map(len, needles)) - len(question) + 1)
        text, begin = list(introduction), 0
        for end, needle in zip(np.sort(draw.below(len(hay) + 1, len(needles))).tolist(), needles, strict=True):
            text += hay[begin:end] + needle
            begin = end
        text += hay[begin:] + question
        tokens, labels = blank(length)
        tokens[:] = text[:-1]
        labels[-len(answer) :] = answer
        return tokens, labels

    def _encode(self, text: str) -> list[int]:
        return text_tokens(self._tokenizer, text)

    def _code(self, draw):
        if self.variant == "s3":
            return draw.below(16, UUID_DIGITS)
        return np.concatenate((1 + draw.below(9, 1), draw.below(10, CODE_DIGITS - 1)))

    def _needle(self, key, code):
        # The code by itself, so that it has the same tokens here and in the answer.
        before, after = NEEDLE
        return self._encode(before.format(key=key)) + self._encode(code) + self._encode(after)

    def _question(self, key, code):
        return self._encode(QUESTION.format(key=key)) + self._encode(code)

    def _hay(self, draw, count):
        """Tokens of as much of the haystack, from a random place on and round its end."""
        start = draw.one(len(self._haystack))
        wanted = int(count * self._characters) + 16
        while True:
            text = self._haystack[start : start + wanted]
            while len(text) < wanted:
                text += self._haystack[: wanted - len(text)]
            tokens = self._encode(text)
            if len(tokens) >= count:
                return tokens[:count]
            wanted *= 2
