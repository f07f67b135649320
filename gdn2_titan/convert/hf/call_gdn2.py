"""A call that a cache has read, and how the cache goes back to any of its tokens: what prompt lookup and assisted
generation ask of it."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .cache_gdn2 import GDN2Cache
from .packing_gdn2 import PACKING
from .piece_gdn2 import Piece

__all__ = ["Call", "cut", "refuse_unrecorded"]


def refuse_unrecorded(words: dict[str, Any]) -> None:
    """Refuse words for documents that say nothing of the first tokens of a call alone."""
    for name in PACKING:
        if name != "resets" and words[name] is not None:
            raise ValueError(
                f"{name} is given with a cache that records its past; it must be left out, resets and position_ids "
                "tell of documents there"
            )


def cut(words: dict[str, Any], start: int, end: int) -> dict[str, Tensor | None]:
    """What the words say of tokens ``start`` to ``end`` of a call."""
    return {
        name: words[name][..., start:end] if name in ("resets", "position_ids") and words[name] is not None else None
        for name in words
    }


class Call:
    """Tokens [B, T] that follow those of a cache. Read again, the first of them take no projection: the mixers make
    their states of what they recorded."""

    def __init__(self, cache: GDN2Cache, mask: Any, words: dict[str, Any], text: Tensor | None, length: int) -> None:
        """mask, words: what the call was told; text: bool [B, T], None for all; length: T."""
        self.before = copy.copy(cache)  # where the cache stood
        self.before.calls, self.before.states = None, list(cache.states)
        self._told = mask, words, text
        self.length = length
        self.records = []  # by layer, of its mixer; empty where all of the call is padding
        self._layers = self._output = None

    def record(self) -> list[Tensor] | None:
        """What the next layer's mixer may record in; None for a call of one token, which is not read again."""
        self.records.append([])
        return self.records[-1] if self.length > 1 else None

    def end(self, layers: nn.ModuleList, output: Tensor) -> "Call":
        """Itself, once the whole model has given its output [B, T, D]."""
        self._layers, self._output = layers, output
        return self

    def first(self, length: int) -> GDN2Cache:
        """The cache after the first ``length`` tokens, fewer than T."""
        if length == 0:
            cache = copy.copy(self.before)
            cache.map(torch.clone)  # its states may be overwritten from here on
            return cache
        mask, words, text = self._told
        cache, states, output = copy.copy(self.before), list(self.before.states), self._output[:, :length]
        mask = None if mask is None else mask[:, : self.before.seen + length]
        piece = Piece(mask, cut(words, 0, length), self.before, *output.shape[:2], output.device)
        for index, record in enumerate([] if piece.is_empty else self.records):
            record = [self._first_of(x, text, length, piece) for x in record]
            options = dict(state=states[index], rows=piece.rows, only_state=True)
            states[index] = self._layers[index](record, piece.resets, **options)
        piece.remember(cache, states, output)
        return cache

    def share(self, states: list[Any]) -> bool:
        """Hold keys and values of full attention as the first ones of ``states``, those of a later cache, and not each
        call its own; False where padding has moved them."""
        if self._told[2] is not None:
            return False
        for index, (state, later) in enumerate(zip(self.before.states, states, strict=True)):
            if state is not None and self._layers[index].kind == "attention":
                first = [x[:, : state.keys.shape[1]] for x in later]
                self.before.states[index] = type(state)(*first)
        return True

    def _first_of(self, x, text, length, piece):
        """x of the call, [B, T, ...] or with padding [1, N, ...], as it would be in a call of the first tokens."""
        if text is None:
            return x[:, :length]
        x = x[:, (text.nonzero()[:, 1] < length).to(x.device)]
        return x[0].unflatten(0, (-1, length)) if piece.rows is None else x

    def __deepcopy__(self, memo: dict[int, Any]) -> "Call":
        return self  # nothing here is ever overwritten, and a copy must not copy the model
