"""Documents as tokens, the same under every TorchTitan: bos and eos around the tokens of plain text."""

import functools
import hashlib
import json
from pathlib import Path

import numpy as np
from torchtitan.components.tokenizer import BaseTokenizer, HuggingFaceTokenizer

from gdn2_titan.convert.tokenizer import around, special_token
from gdn2_titan.titan.errors import ConfigError
from gdn2_titan.titan.local_files import reason
from gdn2_titan.titan.pieces import Encoder

__all__ = ["DocumentTokens", "check_tokenizer", "check_tokenizer_json", "of_plain_text", "text_tokens"]

_LONG = 1 << 20  # characters of a document that is encoded in pieces


def check_tokenizer_json(path: str) -> None:
    """Raise ConfigError unless the JSON files of ``model.hf_assets_path`` are JSON objects. Builds nothing."""
    for file in (Path(path, name) for name in ("tokenizer.json", "tokenizer_config.json")):
        try:
            found = json.loads(file.read_bytes()) if file.is_file() else {}
        except (ValueError, OSError, RecursionError) as error:
            why = reason(error)
            raise ConfigError(f"model.hf_assets_path is {path!r}, whose {file.name} is damaged: {why}") from error
        if not isinstance(found, dict):
            raise ConfigError(f"model.hf_assets_path is {path!r}, whose {file.name} holds no JSON object")


def check_tokenizer(path: str) -> None:
    """Raise ConfigError unless the files of ``model.hf_assets_path`` make a tokenizer."""
    try:
        HuggingFaceTokenizer(tokenizer_path=path)
    except Exception as error:  # damaged files are arbitrary bytes, and their readers raise nearly anything
        raise ConfigError(f"model.hf_assets_path is {path!r}, whose files make no tokenizer ({reason(error)}); it must "
                          "be a folder that holds a Hugging Face tokenizer (tokenizer.json)") from error  # fmt: skip


def of_plain_text(tokenizer: BaseTokenizer) -> BaseTokenizer:
    """What a document says is text: one that contains "<|eos|>" must not end there. It is read whole."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        tokenizer.tokenizer.encode_special_tokens = True
        tokenizer.tokenizer.no_truncation()
        tokenizer.tokenizer.no_padding()
    return tokenizer


def text_tokens(tokenizer: BaseTokenizer, text: str) -> list[int]:
    """The ids of a text, with nothing around them."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.tokenizer.encode(text, add_special_tokens=False).ids
    return tokenizer.encode(text, add_bos=False, add_eos=False)


class DocumentTokens:
    """``DocumentTokens(tokenizer)(text)`` is the ids of a document, int64 [tokens]: bos, the text, eos.

    bos and eos are those of tokenizer_config.json, which may be one symbol; one that is not there is left out.
    ``add_bos_token`` and ``add_eos_token`` there are about other uses. A tokenizer whose own post-processor puts
    symbols around a text keeps them, and what of bos before and eos after it they lack is added.

    ``around`` is the ids before and after each text. It is None of a tokenizer that is not Hugging Face's, which has no
    ``encoder``, ``vocabulary`` and ``digest`` either.
    """

    def __init__(self, tokenizer: BaseTokenizer) -> None:
        self._tokenizer = of_plain_text(tokenizer)
        self.around: tuple[list[int], list[int]] | None = None
        if isinstance(tokenizer, HuggingFaceTokenizer):
            self.around = around(tokenizer.tokenizer, tokenizer.bos_id, _eos(tokenizer))

    def __call__(self, text: str) -> np.ndarray:
        if self.around is None:
            return np.asarray(self._tokenizer.encode(text, add_bos=True, add_eos=True), dtype=np.int64)
        before, after = self.around
        if len(text) > _LONG:
            pieces = self.encoder.pieces(text[i : i + _LONG] for i in range(0, len(text), _LONG))
            ids = [self.encoder.encode([piece])[0] for piece in pieces]
        else:
            ids = [text_tokens(self._tokenizer, text)]
        return np.concatenate([before, *ids, after]).astype(np.int64)

    @functools.cached_property
    def encoder(self) -> Encoder:
        """Of the text alone, also of long ones."""
        return Encoder(self._tokenizer.tokenizer)

    @property
    def vocabulary(self) -> dict[str, int]:
        """The id of each symbol."""
        return self._tokenizer.tokenizer.get_vocab(with_added_tokens=True)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of all that decides what ids a document has, but the version of the tokenizers library."""
        said = json.dumps([self._tokenizer.tokenizer.to_str(), *self.around])
        return hashlib.sha256(said.encode("utf-8")).hexdigest()


def _eos(tokenizer: HuggingFaceTokenizer) -> int | None:
    """TorchTitan 0.2.2 leaves eos_id None where eos is the same symbol as bos."""
    config = getattr(tokenizer, "config", None)
    if tokenizer.eos_id is None and isinstance(config, dict) and tokenizer.bos_token is not None:
        return tokenizer.bos_id if special_token(config, "eos_token") == tokenizer.bos_token else None
    return tokenizer.eos_id
