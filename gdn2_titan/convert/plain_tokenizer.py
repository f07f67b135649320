"""A tokenizer by its tokenizer.json, without transformers, whose imports take seconds."""

from pathlib import Path

from .tokenizer import special_ids

__all__ = ["PlainTokenizer"]


class PlainTokenizer:
    """As much of a transformers tokenizer as ``encode``, ``document_ids`` and a stream of text ask for."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self.name_or_path = str(folder)
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.eos_token_id = special_ids(folder)["eos_token_id"]

    def __call__(self, text: str, add_special_tokens: bool, split_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids}

    def convert_tokens_to_ids(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
