"""Text of tokens as they come, up to a string that ends it."""

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["TextStream"]


class TextStream:
    """``put`` writes what is sure of the text of the tokens so far, ``end`` the rest.

    Not sure is the beginning of a character whose other bytes are to come, and what may become one of ``stops``, at
    which the text ends.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], write: Callable[[str], Any]) -> None:
        self._tokenizer, self._stops, self._write = tokenizer, stops, write
        self._ids: list[int] = []
        # Tokens whose text is known; those from _before on are decoded with the next, whose space may depend on them.
        self._before = self._known = 0
        self._held = ""

    def put(self, token: int) -> bool:
        """Whether the text has ended."""
        self._ids.append(token)
        new = self._new()
        if not new or new.endswith("\ufffd"):
            return False
        self._before, self._known = self._known, len(self._ids)
        return self._take(new)

    def end(self) -> None:
        self._take(self._new())
        if self._held:
            self._write(self._held)
        self._held = ""

    def _new(self) -> str:
        old = self._decode(self._ids[self._before : self._known])
        return self._decode(self._ids[self._before :])[len(old) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True) if ids else ""

    def _take(self, new: str) -> bool:
        text = self._held + new
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        end = min(found) if found else len(text) - self._may_become_a_stop(text)
        if end:
            self._write(text[:end])
        self._held = "" if found else text[end:]
        return bool(found)

    def _may_become_a_stop(self, text: str) -> int:
        """Length of the longest end of the text that a stop begins with."""
        lengths = range(min(len(text), max(map(len, self._stops), default=0)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)
