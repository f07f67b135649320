"""The tokens of a text, as pictures and page of the gates show them."""

from typing import Any, NamedTuple

__all__ = ["Token", "tokens_of"]

_SIGNS = {" ": "·", "\n": "⏎", "\t": "⇥"}


class Token(NamedTuple):
    id: int
    text: str  # of all tokens together it is the text; empty for bos and for the rest of a character's bytes
    label: str  # what to show in its place, never empty


def _label(text: str) -> str:
    """The text with everything to be seen: signs for white space, and \\x00 for what no font has a glyph for."""
    return "".join(_SIGNS.get(c) or (c if c.isprintable() else repr(c)[1:-1]) for c in text)


def tokens_of(tokenizer: Any, text: str, encoding: Any, ids: list[int]) -> list[Token]:
    """[Token] of the document's beginning ``ids``, the first of which may be bos.

    encoding: of text, with ``offset_mapping`` where the tokenizer can say it.
    """
    tokens, end = [], 0
    if tokenizer.bos_token_id is not None:
        tokens.append(Token(ids[0], "", tokenizer.bos_token))
    for place, token in enumerate(encoding["input_ids"][: len(ids) - len(tokens)]):
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
