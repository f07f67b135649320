"""A model's tokenizer: its files and the symbols in them, and the ids that begin a document as in training.

Importing this takes neither torch nor transformers, which take seconds.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConvertError, read_json, reading

if TYPE_CHECKING:
    import torch

__all__ = ["around", "copy_tokenizer", "document_ids", "encode", "special_ids", "special_token"]

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
# Fields of a tokenizer_config.json that say where the tokenizer came from.
_ORIGIN = ("name_or_path", "special_tokens_map_file", "tokenizer_file", "vocab_file", "merges_file")
# Each text is at least one token of nearly every vocabulary.
_PROBES = ("a", "A", "0", ".", "\u4e00", " ")


def special_token(config: dict[str, Any] | None, name: str) -> str | None:
    """The symbol that tokenizer_config.json names as ``name`` ("bos_token", "eos_token"), or None."""
    token = (config or {}).get(name)
    return token.get("content") if isinstance(token, dict) else token


def special_ids(tokenizer: Path | None) -> dict[str, int | None]:
    """{"bos_token_id": ...} as the tokenizer's files have them; None where a token is not there."""
    found = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if tokenizer is None or not all((tokenizer / n).is_file() for n in ("tokenizer.json", "tokenizer_config.json")):
        return found
    content, config = read_json(tokenizer / "tokenizer.json"), read_json(tokenizer / "tokenizer_config.json")
    with reading(tokenizer / "tokenizer.json"):
        ids = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    return {name: ids.get(special_token(config, name.removesuffix("_id"))) for name in found}


def copy_tokenizer(tokenizer: Path | None, folder: Path) -> None:
    """Copies a tokenizer's files; None: there is none.

    Left out of tokenizer_config.json is what names files of the machine where it was written, and code, which is not
    copied and for which transformers would ask: all of the tokenizer is in tokenizer.json.
    """
    for name in TOKENIZER_FILES:
        if tokenizer is not None and (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    config = read_json(path)
    with reading(path):
        dropped = {*_ORIGIN, *(("auto_map",) if (folder / "tokenizer.json").is_file() else ())}
        kept = {name: value for name, value in config.items() if name not in dropped}
    if kept != config:
        path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def around(tokenizer: Any, bos: int | None, eos: int | None) -> tuple[list[int], list[int]]:
    """The ids before and after the tokens of each document.

    They are those that the post-processor of a ``tokenizers.Tokenizer`` puts there, with bos in front unless it is
    among those before, and eos behind unless it is among those after.
    """
    before, after = [], []
    for probe in _PROBES:
        encoding = tokenizer.encode(probe)
        text = [index for index, special in enumerate(encoding.special_tokens_mask) if not special]
        if text:
            before, after = encoding.ids[: text[0]], encoding.ids[text[-1] + 1 :]
            break
    if bos is not None and bos not in before:
        before = [bos, *before]
    if eos is not None and eos not in after:
        after = [*after, eos]
    return before, after


def encode(tokenizer: Any, text: str, **options: Any) -> Any:
    """The tokenizer's encoding of a document as in training: with no special tokens in the text or around it."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, **options)


def _before(tokenizer: Any) -> list[int]:
    """The ids that begin each document in training."""
    folder = Path(tokenizer.name_or_path)
    if not (folder / "tokenizer.json").is_file():
        return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    # Of the files that TorchTitan reads, as it reads them: transformers also knows of symbols that are not in them.
    from tokenizers import Tokenizer

    config_file = folder / "tokenizer_config.json"
    config = read_json(config_file) if config_file.is_file() else {}
    with reading(folder / "tokenizer.json"):
        plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain.no_padding()
    names = {name: special_token(config, name) for name in ("bos_token", "eos_token")}
    ids = [None if token is None else tokenizer.convert_tokens_to_ids(token) for token in names.values()]
    return around(plain, *ids)[0]


def document_ids(tokenizer: Any, ids: list[int], vocab_size: int) -> "torch.Tensor":
    """The ids [1, T] of a document's beginning, as in training: after bos, where the tokenizer has one.

    Raises:
        ConvertError: an id is not of the model's vocabulary.
    """
    import torch

    ids = [*_before(tokenizer), *ids]
    if max(ids, default=0) >= vocab_size:
        raise ConvertError(f"the tokenizer gives id {max(ids)}; it must be below the model's vocab_size, {vocab_size}")
    return torch.tensor([ids], dtype=torch.long)
