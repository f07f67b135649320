"""The tokens of one call: what is text and what is padding, where documents begin, and how the layers see them."""

from typing import Any

import torch
from torch import Tensor

from gdn2_titan.models.masks import continued_mask
from gdn2_titan.models.rows import Rows

from .cache_gdn2 import GDN2Cache
from .packing_gdn2 import places_of, resets_of

__all__ = ["Piece"]


def text_of(
    attention_mask: Any, batch: int, length: int, cache: GDN2Cache | None, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Which tokens are text: those of all calls so far, bool [B, seen + length], and those of this call, bool
    [B, length]; None where all of them are.

    attention_mask: [B, seen + length] of 0 and 1, of any dtype; None says that all tokens of this call are text. cache:
    a GDN2Cache or None; what it was told before stays.

    Raises:
        TypeError: the mask is no tensor.
        ValueError: the mask has another shape, other values, or says other things of tokens that were read.
    """
    seen, known = (0, None) if cache is None else (cache.seen, cache.text)
    if attention_mask is None:
        return known if known is None else torch.cat((known, known.new_ones(batch, length)), 1), None
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask is a {type(attention_mask).__name__}; it must be a torch.Tensor")
    if attention_mask.shape != (batch, seen + length):
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}; it must be [batch, {seen + length}], "
            f"a number for every token so far, and the batch is {batch}"
        )
    mask = attention_mask.to(device)
    text = mask != 0
    past, piece = text[:, :seen], text[:, seen:]
    agrees = past if known is None else past == known
    binary, agrees, full = torch.stack([(mask == text).all(), agrees.all(), piece.all()]).tolist()
    if not binary:
        wrong = mask[mask != text].flatten()[0].item()
        raise ValueError(f"attention_mask has the value {wrong}; it must be 1 for text and 0 for padding")
    if not agrees:
        wrong = past != (True if known is None else known)
        row, token = wrong.nonzero()[0].tolist()
        said, was = ("text", "padding") if past[row, token] else ("padding", "text")
        raise ValueError(
            f"attention_mask has token {token} of row {row} as {said}, and the cache has read it as {was}; "
            "it must repeat what earlier calls were told"
        )
    return None if full and known is None else text, None if full else piece


def rows_of(text: Tensor, resets: Tensor | None, places: Tensor) -> tuple[Rows, Tensor, Tensor]:
    """The Rows of the tokens that are ``text``, bool [B, T]; where they lie in the flattened [B, T], int64 [N]; and the
    place in its document of the token that comes next in each row, int64 [B].

    resets: bool [B, T] or None, counted by the text of each row: True where its i-th token begins a document. places:
    int64 [B, T] or [T], counted likewise: of each token in its document.
    """
    (batch, length), device = text.shape, text.device
    tokens = text.flatten().nonzero()[:, 0]
    lengths = text.sum(1)
    ends = lengths.cumsum(0)
    starts = ends - lengths
    row = tokens // length
    column = torch.arange(len(tokens), device=device) - starts[row]
    places = places.expand(batch, length)
    after = places.gather(1, (lengths - 1).clamp_min(0)[:, None])[:, 0] + (lengths > 0)
    length, longest = torch.stack((lengths.max(), after.max())).tolist()
    first = last = None
    if resets is not None:
        begins = resets[row, column]
        starts = torch.cat((starts, begins.nonzero()[:, 0])).sort().values
        count = torch.zeros_like(lengths).index_add(0, row, begins.long())
        last = torch.arange(batch, device=device) + count.cumsum(0)
        first = last - count
    cu_seqlens = torch.cat((starts, ends[-1:]))
    rows = Rows(batch, length, longest, lengths, row * length + column, cu_seqlens, first, last)
    return rows, tokens, after


def with_padding(x: Tensor, text: Tensor, before: Tensor | None = None) -> Tensor:
    """x [1, N, D] in the places of ``text``, bool [B, T] -> [B, T, D].

    At padding it repeats the token of text before it in the row, from which the next token follows; where this call has
    none before it, ``before`` [B, D], or zeros.
    """
    text = text.to(x.device)
    before = x.new_zeros(len(text), x.shape[2]) if before is None else before.to(x.device)
    count = text.long().cumsum(1)
    starts = count[:, -1].cumsum(0) - count[:, -1]
    source = len(text) + starts[:, None] + count - 1
    source = torch.where(count > 0, source, torch.arange(len(text), device=x.device)[:, None])
    return torch.cat((before, x[0]))[source]


class Piece:
    """Tokens [B, T] that follow those of a GDN2Cache, or none.

    Where there is padding the layers get the text alone, ``rows`` end to end; else ``rows`` is None and they get the
    tokens as they are, with ``resets``.
    """

    def __init__(
        self, attention_mask: Any, words: dict[str, Any], cache: GDN2Cache | None, batch: int, length: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        """words: {name: value} of what may tell of documents. Raises what ``text_of`` and ``resets_of`` do."""
        self.seen = 0 if cache is None else cache.seen
        self.places = self.seen if cache is None or cache.places is None else cache.places
        self.last = None if cache is None else cache.last
        self.length, self.device = length, device
        self.told, self.text = text_of(attention_mask, batch, length, cache, device)
        self._begins, self._over = resets_of(words, self.text, self.seen, self.places, batch, length, device)
        if cache is not None and cache.over is not None:
            self._begin_where_it_is_over(cache.over)
        self.resets, self.rows = self._begins, None
        if self.text is not None:
            at = places_of(self._begins, self.places, length, device)
            self.rows, self._tokens, self._after = rows_of(self.text, self._begins, at)
            self.resets, self.length = None, self.rows.length
            self._begins = None if self._begins is None else self._begins[:, : self.length]

    def _begin_where_it_is_over(self, over: Tensor) -> None:
        """over: bool [B], of the cache."""
        if self.text is not None:
            still = over & ~self.text.any(1)
            over = over & ~still
            if bool(still.any()):
                self._over = still if self._over is None else self._over | still
        begins = over.new_zeros(len(over), self.length) if self._begins is None else self._begins
        self._begins = torch.cat((begins[:, :1] | over[:, None], begins[:, 1:]), 1)

    @property
    def is_empty(self) -> bool:
        """Whether all of it is padding."""
        return self.rows is not None and self.length == 0

    def shortened(self, h: Tensor) -> Tensor:
        """[B, T, D] -> what the layers get."""
        return h if self.rows is None else h.flatten(0, 1)[self._tokens][None]

    def whole(self, h: Tensor, last: Tensor | None = None) -> Tensor:
        """What the layers give -> [B, T, D]. last: [B, D], what stands at padding before the text of this call."""
        return h if self.rows is None else with_padding(h, self.text, last)

    def positions(self) -> Tensor:
        """int64 [B or 1, tokens] of what the layers get, each counted in its document."""
        at = places_of(self._begins, self.places, self.length, self.device)
        return at if self.rows is None else self.rows.end_to_end(at.expand(self.rows.batch, self.length))

    def mask(self, window: int | None, kept: int) -> Tensor | None:
        """``continued_mask`` for a state of ``kept`` keys."""
        return continued_mask(self.length, kept, window, self.places, self._begins, self.device)

    def remember(self, cache: GDN2Cache, states: list[Any], output: Tensor) -> None:
        """Let the cache stand after these tokens. output: [B, T, D] of the whole model."""
        if self.rows is not None:
            cache.places = self._after
        elif self._begins is not None or cache.places is not None:
            cache.places = places_of(self._begins, self.places, self.length, self.device)[:, -1] + 1
        if self._over is not None:
            cache.places = cache.places.masked_fill(self._over, 0)
        cache.states, cache.text, cache.over = states, self.told, self._over
        cache.seen += output.shape[1]
        # A copy: a view would keep all outputs in memory.
        cache.last = output[:, -1].clone() if output.shape[1] > 1 else output[:, -1]
