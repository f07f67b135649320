"""The tokens of local files, which are made once and kept: by whoever of the processes comes first."""

import os
import time
from pathlib import Path

import datasets
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.tools.logging import logger

from gdn2_titan.titan.errors import ConfigError
from gdn2_titan.titan.local_files import find_files, reason
from gdn2_titan.titan.settings import Data
from gdn2_titan.titan.token_files import TokenFiles, plan_of, write_tokens
from gdn2_titan.titan.tokens import DocumentTokens

__all__ = ["tokens_of_files"]

_LOG_EVERY = 15.0  # seconds


def tokens_of_files(section: str, dataset_path: str | None, data: Data, tokenizer: BaseTokenizer) -> TokenFiles:
    """The tokens of the files that ``<section>.dataset_path`` stands for, from ``data.cache_dir`` where they are there.

    Raises:
        ConfigError: a file cannot be read, the cache cannot be written, or a folder of tokens is another tokenizer's.
    """
    encode = DocumentTokens(tokenizer)
    kind, files = find_files(section, dataset_path)
    if kind == "tokens":
        found = TokenFiles(files[0])
        if found.digest != encode.digest:
            raise ConfigError(f"{section}.dataset_path = {dataset_path!r} holds tokens of another tokenizer than that "
                              "of model.hf_assets_path; tokenize anew with --tokenizer.")  # fmt: skip
        return found
    name, plan = plan_of(kind, files, data.text_column, encode)
    folder = Path(os.path.abspath(_cache_dir(data)), name)
    log = _Log(folder, len(files))
    try:
        return write_tokens(folder, plan, encode, began=log.began, progress=log.progress, waits=log.waits)
    except OSError as error:
        raise ConfigError(f"the tokens cannot be written to {folder} ({reason(error)}); data.cache_dir must name a "
                          "folder with room for them.") from error  # fmt: skip


def _cache_dir(data: Data) -> Path:
    if data.cache_dir is not None:
        return Path(data.cache_dir).expanduser()
    return Path(datasets.config.HF_DATASETS_CACHE, "gdn2_titan")


class _Log:
    def __init__(self, folder: Path, files: int) -> None:
        self._folder, self._files, self._last = folder, files, time.monotonic()

    def began(self, size: int) -> None:
        self._size = size
        logger.info(f"Tokenizing {self._files} files, {size / 1e6:.1f} MB, into {self._folder}")

    def progress(self, done: int) -> None:
        if time.monotonic() - self._last > _LOG_EVERY:
            self._last = time.monotonic()
            logger.info(f"Tokenized {done / 1e6:.0f} of {self._size / 1e6:.0f} MB")

    def waits(self) -> None:
        logger.info(f"Waiting for the process that tokenizes into {self._folder}")
