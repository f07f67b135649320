"""What the commands that run a model share: the options that name it, and the way from them to its ids and weights.

Importing this and parsing the options takes neither torch nor transformers, which take seconds.
"""

import argparse
import json
from pathlib import Path

from .convert.errors import ConvertError, reading
from .convert.special_tokens import around, special_token

__all__ = ["add_model_options", "document_ids", "dtype_of", "encode", "number", "open_model"]


def number(kind, what, allowed):
    """For argparse's ``type``: reads a number of ``kind`` that ``allowed`` accepts; ``what`` says which these are."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not allowed(value):
            raise argparse.ArgumentTypeError(f"is {text!r}; it must be {what}")
        return value

    return parse


def add_model_options(parser):
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="TorchTitan checkpoint, run or Hugging Face folder")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="to compute in (default: the checkpoint's)")
    add("--device", help="to compute on (default: cuda where there is a GPU, else cpu)")
    add("--config", metavar="TOML", help="TorchTitan config of the model, where the checkpoint does not say it")
    add("--flavor", help="name of the model's shape, where the checkpoint does not say it")
    add("--tokenizer", metavar="FOLDER", help="instead of the one that the model was trained with")


def dtype_of(options):
    """The torch dtype of the option --dtype, or None."""
    import torch

    return None if options.dtype is None else getattr(torch, options.dtype)


def open_model(options):
    """(Checkpoint, tokenizer) of the parsed options, of which --device is filled in; no weights are read.

    Raises:
        ConvertError: the device, the checkpoint or the tokenizer is not there or not what it must be.
    """
    import torch
    from transformers import AutoTokenizer

    from .convert.checkpoints import open_checkpoint

    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=options.device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConvertError(f"--device is {options.device!r}; it must be a device that torch has here") from error
    checkpoint = open_checkpoint(options.model, options.config, options.flavor, options.tokenizer)
    if checkpoint.tokenizer is None:
        raise ConvertError(f"{options.model} does not say which tokenizer it was trained with; name it by --tokenizer")
    with reading(checkpoint.tokenizer):
        return checkpoint, AutoTokenizer.from_pretrained(checkpoint.tokenizer, local_files_only=True)


def encode(tokenizer, text, **options):
    """The tokenizer's encoding of a document as in training: with no special tokens in the text or around it."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, **options)


def _before(tokenizer):
    """The ids that begin each document in training."""
    folder = Path(tokenizer.name_or_path)
    if not (folder / "tokenizer.json").is_file():
        return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    # Of the files that TorchTitan reads, as it reads them: transformers also knows of symbols that are not in them.
    from tokenizers import Tokenizer

    config = {}
    if (folder / "tokenizer_config.json").is_file():
        with reading(folder / "tokenizer_config.json"):
            config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    with reading(folder / "tokenizer.json"):
        plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain.no_padding()
    names = {name: special_token(config, name) for name in ("bos_token", "eos_token")}
    ids = [None if token is None else tokenizer.convert_tokens_to_ids(token) for token in names.values()]
    return around(plain, *ids)[0]


def document_ids(tokenizer, ids, vocab_size):
    """The ids [1, T] of a document's beginning, as in training: after bos, where the tokenizer has one.

    Raises:
        ConvertError: an id is not of the model's vocabulary.
    """
    import torch

    ids = [*_before(tokenizer), *ids]
    if max(ids, default=0) >= vocab_size:
        raise ConvertError(f"the tokenizer gives id {max(ids)}; it must be below the model's vocab_size, {vocab_size}")
    return torch.tensor([ids], dtype=torch.long)
