"""A long text's tokens, encoded in pieces in bounded memory: the same as those of the whole text.

Where a text is cut, two things must be shown. The tokenizer parts the text there: its pre-tokenizer cuts, or no merge
of its vocabulary joins what is on both sides. And it does not look further: the tokens before the place are the same
with what follows it and without, with much text before them and with little. A text with no such place stays whole.
"""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer
from torchtitan.tools.logging import logger

from gdn2_titan.titan.errors import ConfigError

__all__ = ["Encoder", "Piece"]

_PIECE = 1 << 16  # characters of a piece, at least
_CONTEXT = 256  # characters on either side of a place that its proof looks at
_MUCH = 1 << 24  # characters without a place that are worth a word
_TRIES = 8  # places of each kind that are tried in as many characters as a piece has
# Kinds of places: after a line's end, between words. A single blank, as tokenizers part longer ones in many ways.
_PLACES = {"line": re.compile(r"(?<=\S\n)(?=[^\W_])"), "word": re.compile(r"(?<=[^\W_])(?= [^\W_])")}
_LINE_ENDS, _BLANKS = ("\n", "Ċ", "<0x0A>"), (" ", "Ġ", "▁")


class Piece(NamedTuple):
    """Text to encode, and the text just before it, which the tokenizer must see too."""

    before: str
    text: str


class Encoder:
    """Ids of texts, without special symbols around them, of a ``tokenizers.Tokenizer`` that takes special symbols in a
    text as text. Short texts are pieces; ``pieces`` cuts a long one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        said = json.loads(tokenizer.to_str())
        self._ids_of_bytes = _ids_of_bytes(tokenizer, said)
        self._parted = _parted_by_merges(tokenizer, said["model"])

    def pieces(self, chunks: Iterable[str]) -> Iterator[Piece]:
        """Pieces of the text that the chunks together are; none of an empty one."""
        before, held, searched = "", "", _PIECE
        for chunk in chunks:
            held += chunk
            while len(held) >= searched + _PIECE + _CONTEXT:
                place = self._place(held, searched)
                if place is None:
                    searched += _PIECE
                    if searched % _MUCH == 0:
                        logger.warning(f"A document has {searched:,} characters where this tokenizer cannot be shown "
                                       "to part the text; they are encoded at once, which takes memory")  # fmt: skip
                    continue
                yield Piece(before, held[:place])
                before, held, searched = held[place - _CONTEXT : place], held[place:], _PIECE
        if held:
            yield Piece(before, held)

    def encode(self, pieces: list[Piece]) -> list[np.ndarray]:
        """The ids, [tokens of the piece] each, of any texts' pieces, with all cores."""
        if self._ids_of_bytes is not None:
            return [self._ids_of_bytes[np.frombuffer(text.encode(), np.uint8)] for _, text in pieces]
        later = [piece for piece in pieces if piece.before]
        befores = iter(self._encode([before for before, _ in later]))
        found = []
        for (before, _), ids in zip(pieces, self._encode([before + text for before, text in pieces]), strict=True):
            if before:
                known = next(befores)
                if not np.array_equal(ids[: len(known)], known):
                    raise ConfigError(f"the tokenizer encodes {before[-40:]!r} in another way where other text follows "
                                      "it further on; it must encode a place by what is near")  # fmt: skip
                ids = ids[len(known) :]
            found.append(ids)
        return found

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(one.ids, dtype=np.int64) for one in encoded]

    def _place(self, text: str, start: int) -> int | None:
        """Where the text can be cut, from ``start`` on, in as many characters as a piece has."""
        if self._ids_of_bytes is not None:
            return start
        for kind, pattern in _PLACES.items():
            for match, _ in zip(pattern.finditer(text, start, start + _PIECE), range(_TRIES)):
                if self._parts(kind, text, match.start()):
                    return match.start()
        return None

    def _parts(self, kind: str, text: str, place: int) -> bool:
        near, far, after = text[place - _CONTEXT : place], text[place - 4 * _CONTEXT : place], text[place:][:_CONTEXT]
        if kind not in self._parted and not self._pre_tokenizer_cuts(near, after):
            return False
        without, longer, followed = self._encode([near, far, near + after])
        last = len(without) // 2
        return (
            last > 0 and np.array_equal(followed[: len(without)], without)
            and np.array_equal(longer[-last:], without[-last:])
        )  # fmt: skip

    def _pre_tokenizer_cuts(self, before: str, after: str) -> bool:
        without, followed = (_words(self._tokenizer, text) for text in (before, before + after))
        return len(followed) > len(without) and followed[: len(without)] == without


def _words(tokenizer: Tokenizer, text: str) -> list[str]:
    """What the model is given to encode, each by itself."""
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    if tokenizer.pre_tokenizer is None:
        return [text]
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def _ids_of_bytes(tokenizer: Tokenizer, said: dict[str, Any]) -> np.ndarray | None:
    """The id of each byte [256], of a tokenizer to which a byte is a token, whatever is beside it."""
    model, words = said["model"], said["pre_tokenizer"] or {}
    bytewise = (
        model["type"] == "BPE" and not model["merges"] and not model.get("dropout") and said["normalizer"] is None
        and words.get("type") == "ByteLevel" and not words["use_regex"] and not words["add_prefix_space"]
        and all(token["special"] for token in said["added_tokens"])
    )  # fmt: skip
    if not bytewise:
        return None
    # Latin-1's printable characters stand for themselves, the other bytes for the characters from 256 on.
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    symbols = [chr(byte if byte in printable else next(spare)) for byte in range(256)]
    if any(symbol not in model["vocab"] for symbol in symbols):
        return None
    ids = np.array([model["vocab"][symbol] for symbol in symbols], dtype=np.int64)
    # Among them is every byte that UTF-8 has.
    probe = "".join(map(chr, (*range(0x800), *range(0x800, 0xD800, 0x40), *range(0x10000, 0x110000, 0x1000))))
    same = np.array_equal(tokenizer.encode(probe, add_special_tokens=False).ids, ids[list(probe.encode())])
    return ids if same else None


def _parted_by_merges(tokenizer: Tokenizer, model: dict[str, Any]) -> set[str]:
    """The kinds of places that no merge of a BPE vocabulary crosses, so that both sides are encoded by themselves."""
    if model["type"] != "BPE":
        return set()
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    blank = (*_LINE_ENDS, *_BLANKS, "\t", "\r", "ĉ", "č")
    # The symbols that stand for the blanks of a text are looked for under the names that are usual.
    line, word = ("".join(_words(tokenizer, text)) for text in ("a\na", "a a"))
    parted = set()
    if re.fullmatch("[ Ġ▁]?a[\nĊ]a", line) and not any(
        left.endswith(_LINE_ENDS) and not right.startswith(blank) for left, right in merges
    ):
        parted.add("line")
    if re.fullmatch("[ Ġ▁]?a[ Ġ▁]a", word) and not any(
        right.startswith(_BLANKS) and not left.endswith(blank) for left, right in merges
    ):
        parted.add("word")
    return parted
