"""Where the text of each row begins, from transformers' attention masks."""

import torch

__all__ = ["text_begins"]


def text_begins(attention_mask, length, cache):
    """int64 [B], the position in each row of its first token that is no padding, or None where no row has padding.

    attention_mask: [B, tokens seen + length] of 0 and 1, or None for what the cache knows. length: tokens of this call.
    cache: a GDN2Cache or None; it remembers the answer. Padding after the text is let pass without a cache: no token
    of the text looks at it.

    Raises:
        ValueError: the mask has another shape, or padding where the model could not be right.
    """
    if cache is not None and (attention_mask is None or cache.settled):
        return cache.begins
    if attention_mask is None:
        return None
    total = length + (cache.seen if cache is not None else 0)
    if attention_mask.ndim != 2 or attention_mask.shape[1] != total:
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}; it must be [batch, {total}], "
            "a number for every token so far"
        )
    text = attention_mask != 0
    begins = (~text).long().cumprod(1).sum(1)
    ends = total - (~text).flip(1).long().cumprod(1).sum(1)
    position = torch.arange(total, device=text.device)
    if not torch.equal(text, (position >= begins[:, None]) & (position < ends[:, None])):
        raise ValueError("attention_mask has padding between the tokens of a row; it must be all on the left")
    empty = begins == total
    if cache is not None and bool(((ends < total) & ~empty).any()):
        raise ValueError("attention_mask has padding after the tokens of a row; with a cache it must be on the left")
    begins = begins if bool(begins.any()) else None
    if cache is not None:
        cache.begins, cache.settled = begins, not bool(empty.any())
    return begins
