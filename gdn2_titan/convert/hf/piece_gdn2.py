"""The tokens of one call: what is text, where documents begin, and how the layers see them."""

import torch

from gdn2_titan.models.masks import continued_mask

from .packing_gdn2 import places_of, resets_of
from .padding_gdn2 import rows_of, text_of, with_padding

__all__ = ["Piece"]


class Piece:
    """Tokens [B, T] that follow those of a GDN2Cache, or none.

    Where there is padding the layers get the text alone, ``rows`` end to end; else ``rows`` is None and they get the
    tokens as they are, with ``resets``.
    """

    def __init__(self, attention_mask, words, cache, batch, length, device):
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

    def _begin_where_it_is_over(self, over):
        """over: bool [B], of the cache."""
        if self.text is not None:
            still = over & ~self.text.any(1)
            over = over & ~still
            if bool(still.any()):
                self._over = still if self._over is None else self._over | still
        begins = over.new_zeros(len(over), self.length) if self._begins is None else self._begins
        self._begins = torch.cat((begins[:, :1] | over[:, None], begins[:, 1:]), 1)

    @property
    def is_empty(self):
        """Whether all of it is padding."""
        return self.rows is not None and self.length == 0

    def shortened(self, h):
        """[B, T, D] -> what the layers get."""
        return h if self.rows is None else h.flatten(0, 1)[self._tokens][None]

    def whole(self, h, last=None):
        """What the layers give -> [B, T, D]. last: [B, D], what stands at padding before the text of this call."""
        return h if self.rows is None else with_padding(h, self.text, last)

    def positions(self):
        """int64 [B or 1, tokens] of what the layers get, each counted in its document."""
        at = places_of(self._begins, self.places, self.length, self.device)
        return at if self.rows is None else self.rows.end_to_end(at.expand(self.rows.batch, self.length))

    def mask(self, window, kept):
        """``continued_mask`` for a state of ``kept`` keys."""
        return continued_mask(self.length, kept, window, self.places, self._begins, self.device)

    def remember(self, cache, states, output):
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
