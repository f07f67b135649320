"""A text as the tokens that a model reads, each with the piece of text that it stands for."""

from typing import NamedTuple

__all__ = ["Token", "tokens_of"]

_SIGNS = {" ": "·", "\n": "⏎", "\t": "⇥"}


class Token(NamedTuple):
    id: int
    text: str  # of all tokens together it is the text; empty for bos and for the rest of a character's bytes
    label: str  # what to show in its place, never empty


def _label(text):
    """The text with everything to be seen: signs for white space, and \\x00 for what no font has a glyph for."""
    return "".join(_SIGNS.get(c) or (c if c.isprintable() else repr(c)[1:-1]) for c in text)


def tokens_of(tokenizer, text, encoding, ids):
    """[Token] of the document's beginning ``ids``, the first of which may be bos.

    encoding: of text, with ``offset_mapping`` where the tokenizer can say it.
    """
    ids, tokens, end = list(ids), [], 0
    count = len(ids)
    if tokenizer.bos_token_id is not None:
        tokens.append(Token(ids[0], "", tokenizer.bos_token))
        count -= 1
    for place in range(count):
        token = encoding["input_ids"][place]
        if "offset_mapping" in encoding:
            start, stop = encoding["offset_mapping"][place]
            # From where the last one ended: some tokenizers leave the space before a word out of it.
            piece, end = text[end:stop], max(end, stop)
            label = _label(piece) or f"…{_label(text[start:stop])}"
        else:
            piece = tokenizer.decode([token])
            label = _label(piece) or "…"
        tokens.append(Token(token, piece, label))
    return tokens
