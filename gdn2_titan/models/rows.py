"""Sequences of unequal lengths: end to end for what works token by token, side by side for softmax attention."""

from typing import NamedTuple

import torch

__all__ = ["Rows"]


class Rows(NamedTuple):
    """B rows of at most L tokens, N in all, as one sequence [1, N, ...] without padding.

    A row is one document, or several of which the first goes on where the state of the row stands. Its documents are
    the sequences of ``cu_seqlens``; some have no tokens.
    """

    batch: int  # B
    length: int  # L
    longest: int  # tokens of the longest of the rows' last documents, those before this segment included
    lengths: torch.Tensor  # int64 [B]
    slots: torch.Tensor  # int64 [N], where each token lies in the flattened [B, L]
    cu_seqlens: torch.Tensor  # int64 [documents + 1]
    first: torch.Tensor | None  # int64 [B], each row's first document; None where every row is one
    last: torch.Tensor | None  # int64 [B], each row's last document

    def side_by_side(self, x: torch.Tensor) -> torch.Tensor:
        """[1, N, ...] -> [B, L, ...], zeros after the end of a row."""
        flat = x.new_zeros(self.batch * self.length, *x.shape[2:])
        return flat.index_copy(0, self.slots, x[0]).unflatten(0, (self.batch, self.length))

    def end_to_end(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, ...] -> [1, N, ...]"""
        return x.flatten(0, 1).index_select(0, self.slots)[None]

    def tail(self, x: torch.Tensor, count: int) -> torch.Tensor:
        """The last ``count`` of each row of x [B, S + L, ...], the first S before this segment -> [B, count, ...]"""
        before = x.shape[1] - self.length
        at = torch.arange(before - count, before, device=x.device) + self.lengths[:, None]
        return x[torch.arange(self.batch, device=x.device)[:, None], at.clamp_min(0)]

    def of_documents(self, state: torch.Tensor) -> torch.Tensor:
        """What the documents start from: [B, ...] -> [documents, ...], zeros for those that begin in this segment."""
        if self.first is None:
            return state
        return state.new_zeros(len(self.cu_seqlens) - 1, *state.shape[1:]).index_copy(0, self.first, state)

    def of_rows(self, state: torch.Tensor) -> torch.Tensor:
        """What is left of the last documents: [documents, ...] -> [B, ...]"""
        return state if self.last is None else state.index_select(0, self.last)
