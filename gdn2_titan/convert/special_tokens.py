"""The symbols around a document: which ones a tokenizer's files name, and which ones its post-processor puts there."""

from typing import Any

__all__ = ["around", "special_token"]

# Each text is at least one token of nearly every vocabulary.
_PROBES = ("a", "A", "0", ".", "\u4e00", " ")


def special_token(config: dict[str, Any] | None, name: str) -> str | None:
    """The symbol that tokenizer_config.json names as ``name`` ("bos_token", "eos_token"), or None."""
    token = (config or {}).get(name)
    return token.get("content") if isinstance(token, dict) else token


def around(tokenizer: Any, bos: int | None, eos: int | None) -> tuple[list[int], list[int]]:
    """The ids before and after the tokens of each document.

    They are those that the post-processor of a ``tokenizers.Tokenizer`` puts there, with bos in front unless it is
    among those before, and eos behind unless it is among those after.
    """
    before, after = _of_post_processor(tokenizer)
    if bos is not None and bos not in before:
        before = [bos, *before]
    if eos is not None and eos not in after:
        after = [*after, eos]
    return before, after


def _of_post_processor(tokenizer: Any) -> tuple[list[int], list[int]]:
    for probe in _PROBES:
        encoding = tokenizer.encode(probe)
        text = [index for index, special in enumerate(encoding.special_tokens_mask) if not special]
        if text:
            return encoding.ids[: text[0]], encoding.ids[text[-1] + 1 :]
    return [], []
