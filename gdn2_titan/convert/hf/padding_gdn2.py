"""Padding: what transformers' attention masks tell, and the tokens of a batch without it."""

import torch

from gdn2_titan.models.rows import Rows

__all__ = ["rows_of", "text_of", "with_padding"]


def text_of(attention_mask, batch, length, cache, device):
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
    if not isinstance(attention_mask, torch.Tensor):
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


def rows_of(text, resets, places):
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


def with_padding(x, text, before=None):
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
