"""Packing: where documents begin in rows that hold several, from any of the words that callers have for it."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["PACKING", "places_of", "resets_of"]

BOUNDS = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k")
LONGEST = ("max_length_q", "max_length_k")
# All that says where documents begin, but position_ids, which need not.
PACKING = ("resets", *BOUNDS, *LONGEST, "seq_idx")


def resets_of(
    words: dict[str, Any], text: Tensor | None, seen: int, places: int | Tensor, batch: int, length: int,
    device: torch.device,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """bool [B, T], True where a document begins, counted by the text of each row: at i for its i-th token of text.
    None where all goes on. And bool [B], True in rows where another document begins at padding after all text; None
    where that is nowhere so.

    words: {name: value} of PACKING and position_ids, None for what was not said. text: bool [B, T], None for all.
    seen: tokens so far, padding included. places: of the first token of text in its row's document, an int or int64
    [B].

    Raises:
        TypeError: a word is no tensor, or has a wrong dtype.
        ValueError: a word has a wrong shape or values, or two of them say different things.
    """
    words = {name: value for name, value in words.items() if value is not None}
    if not words:
        return None, None
    piece = _Piece(text, seen, places, batch, length, device)
    if set(words) == {"resets"}:
        return piece.from_resets(words["resets"]), piece.over
    found = {}
    for name, value in words.items():
        if name in BOUNDS:
            found[name] = piece.from_bounds(name, value)
        elif name not in LONGEST:
            found[name] = getattr(piece, f"from_{name}")(value)
    (name, resets), *others = found.items() or [(None, None)]
    for other, again in others:
        if not torch.equal(again, resets):
            raise ValueError(f"{other} and {name} tell different documents; they must agree, or one be left out")
    for longest in LONGEST:
        if longest in words:
            _check_longest(longest, words[longest], found)
    return resets if bool(resets.any()) else None, piece.over


def places_of(resets: Tensor | None, places: int | Tensor, length: int, device: torch.device) -> Tensor:
    """int64 [B or 1, T]: of each token in its document. places: of the first, an int or int64 [B]."""
    at = torch.arange(length, device=device)[None]
    going_on = at + (places if isinstance(places, int) else places[:, None])
    if resets is None:
        return going_on
    begin = torch.where(resets, at, -1).cummax(1).values
    return torch.where(begin < 0, going_on, at - begin)


def _whole_numbers(name, value, device):
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a torch.Tensor")
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} has dtype {value.dtype}; it must be int32 or int64")
    return value.to(device).long()


def _check_longest(name, value, found):
    bounds = [bound for bound in BOUNDS if bound in found]
    if not bounds:
        raise ValueError(f"{name} is {value!r} without cu_seq_lens_q; it must be left out, or both be given")
    (resets,) = found[bounds[0]]
    begins = torch.cat((resets.nonzero()[:, 0], torch.tensor([len(resets)], device=resets.device)))
    longest = int(begins.diff(prepend=begins.new_zeros(1)).max())
    if int(value) < longest:
        raise ValueError(f"{name} is {int(value)}; it must be at least {longest}, the tokens of the longest document")


class _Piece:
    """The tokens of a call. Its methods read one word each and return what ``resets_of`` does, never None."""

    def __init__(self, text, seen, places, batch, length, device):
        self.seen, self.places, self.device = seen, places, device
        self.shape = batch, length
        self.order = self.text = self.over = None
        if text is not None:
            self.order = (~text).long().argsort(dim=1, stable=True)
            self.text = text.gather(1, self.order)

    def from_resets(self, value):
        if not isinstance(value, Tensor):
            raise TypeError(f"resets is a {type(value).__name__}; it must be a torch.Tensor")
        if value.dtype != torch.bool:
            raise TypeError(f"resets has dtype {value.dtype}; it must be bool")
        self._check_shape("resets", value)
        documents = value.to(self.device).long().cumsum(1)
        none = torch.zeros_like(documents[:, :1])
        if self.text is not None:
            counted, lengths = torch.cat((none, self._counted(documents)), 1), self.text.sum(1, keepdim=True)
            over = (counted.gather(1, lengths) != documents[:, -1:])[:, 0]
            self.over = over if bool(over.any()) else None
        return self._begins(documents, none)

    def from_bounds(self, name, value):
        self._check_first(name)
        bounds, (batch, length) = _whole_numbers(name, value, self.device), self.shape
        if bounds.ndim != 1 or len(bounds) < 2:
            raise ValueError(f"{name} has shape {list(bounds.shape)}; it must be [documents + 1], at least [2]")
        if batch != 1:
            raise ValueError(f"{name} is given for a batch of {batch}; it must be 1, documents packed end to end")
        first, *_, last = bounds.tolist()
        if first != 0 or last != length or bool((bounds.diff() < 0).any()):
            raise ValueError(
                f"{name} runs from {first} to {last}; it must run from 0 to the {length} tokens without falling"
            )
        begins = torch.zeros(length + 1, dtype=torch.long, device=self.device)
        return self._begins(begins.index_fill(0, bounds, 1)[:-1].cumsum(0)[None])

    def from_seq_idx(self, value):
        self._check_first("seq_idx")
        value = _whole_numbers("seq_idx", value, self.device)
        self._check_shape("seq_idx", value)
        counted = self._counted(value)
        falls = counted.diff(dim=1) < 0
        if bool((falls if self.text is None else falls & self.text[:, 1:]).any()):
            raise ValueError("seq_idx falls within a row; it must number the documents in their order")
        return self._begins(value)

    def from_position_ids(self, value):
        value, (batch, length) = _whole_numbers("position_ids", value, self.device), self.shape
        if value.ndim > 2 or value.shape[-1] != length or (value.ndim == 2 and len(value) not in (1, batch)):
            raise ValueError(f"position_ids has shape {list(value.shape)}; it must be {[batch, length]}")
        value = self._counted(value.expand(batch, length))
        expected = torch.cat((self._places()[:, None], value[:, :-1] + 1), 1)
        right = (value == expected) | (value == 0)
        # Or the places in the padded rows, which turn all keys and queries of a row by the same angle more.
        padded = value == self._counted(torch.arange(self.seen, self.seen + length, device=self.device)[None])
        if self.text is not None:
            right, padded = right | ~self.text, padded | ~self.text
        right, padded = torch.stack((right.all(), padded.all())).tolist()
        if padded:
            return torch.zeros(self.shape, dtype=torch.bool, device=self.device)
        if not right:
            wrong = (value != expected) & (value != 0)
            row, at = (wrong if self.text is None else wrong & self.text).nonzero()[0].tolist()
            raise ValueError(
                f"position_ids has {int(value[row, at])} in row {row}; it must be {int(expected[row, at])}, "
                "which goes on with what came before, or 0 where a document begins"
            )
        return self._of_text((value == 0) & (expected != 0))

    def _check_first(self, name):
        if self.seen:
            raise ValueError(
                f"{name} is given after {self.seen} tokens that the cache has seen; there it must be left out, "
                "resets and position_ids tell of documents"
            )

    def _check_shape(self, name, value):
        if value.shape != self.shape:
            raise ValueError(f"{name} has shape {list(value.shape)}; it must be {list(self.shape)}")

    def _places(self):
        """int64 [B]"""
        if isinstance(self.places, Tensor):
            return self.places
        return torch.full(self.shape[:1], self.places, device=self.device)

    def _counted(self, x):
        """x [B or 1, T] with the text of each row first."""
        return x if self.order is None else x.expand(self.shape).gather(1, self.order)

    def _begins(self, documents, before=None):
        """documents: int64 [B, T], another number for another document; before: int64 [B, 1], that of the text before
        this call, None where there is none."""
        documents = self._counted(documents)
        before = documents[:, :1] if before is None else before
        return self._of_text(documents != torch.cat((before, documents[:, :-1]), 1))

    def _of_text(self, resets):
        """Without what stands behind the text, and where there is nothing to forget."""
        resets = resets if self.text is None else resets & self.text
        return torch.cat((resets[:, :1] & (self._places() > 0)[:, None], resets[:, 1:]), 1)
