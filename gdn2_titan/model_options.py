"""What the commands that run a model share: the options that name it, and the way from them to its ids and weights."""

import argparse

import torch

from .convert.errors import ConvertError, reading

__all__ = ["DTYPES", "add_model_options", "document_ids", "encode", "number", "open_model"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    add("--model", required=True, metavar="FOLDER", help="TorchTitan checkpoint or Hugging Face folder")
    add("--dtype", choices=DTYPES, help="to compute in (default: the checkpoint's)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help=f"to compute on (default: {device})")
    add("--config", metavar="TOML", help="TorchTitan config of the model, where the checkpoint does not say it")
    add("--flavor", help="name of the model's shape, where the checkpoint does not say it")
    add("--tokenizer", metavar="FOLDER", help="instead of the one that the model was trained with")


def open_model(options):
    """(Checkpoint, tokenizer) of the parsed options; no weights are read.

    Raises:
        ConvertError: the device, the checkpoint or the tokenizer is not there or not what it must be.
    """
    # Not before they are wanted: the options are parsed without them.
    from transformers import AutoTokenizer

    from .convert.checkpoints import open_checkpoint

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


def document_ids(tokenizer, ids, vocab_size):
    """The ids [1, T] of a document's beginning, as in training: after bos, where the tokenizer has one.

    Raises:
        ConvertError: an id is not of the model's vocabulary.
    """
    if tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    if max(ids, default=0) >= vocab_size:
        raise ConvertError(f"the tokenizer gives id {max(ids)}; it must be below the model's vocab_size, {vocab_size}")
    return torch.tensor([ids], dtype=torch.long)
