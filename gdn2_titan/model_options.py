"""What the commands that run a model share: the options that name it, and the way from them to it.

Importing this and parsing the options takes neither torch nor transformers, which take seconds.
"""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .convert.errors import ConvertError, reading

if TYPE_CHECKING:
    import torch

    from .convert.checkpoints import Checkpoint

__all__ = ["add_model_options", "dtype_of", "number", "open_model", "open_without_tokenizer"]


def number(kind: type, what: str, allowed: Callable[[Any], bool]) -> Callable[[str], Any]:
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


def add_model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="TorchTitan checkpoint, run or Hugging Face folder")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="to compute in (default: the checkpoint's)")
    add("--device", help="to compute on (default: cuda where there is a GPU, else cpu)")
    add("--config", metavar="TOML", help="TorchTitan config of the model, where the checkpoint does not say it")
    add("--flavor", help="name of the model's shape, where the checkpoint does not say it")
    add("--tokenizer", metavar="FOLDER", help="instead of the one that the model was trained with")


def dtype_of(options: argparse.Namespace) -> "torch.dtype | None":
    """The torch dtype of the option --dtype, or None."""
    import torch

    return None if options.dtype is None else getattr(torch, options.dtype)


def open_without_tokenizer(options: argparse.Namespace) -> "Checkpoint":
    """Checkpoint of the parsed options, of which --device is filled in; no weights are read, and it names a tokenizer.

    Raises:
        ConvertError: the device or the checkpoint is not there or not what it must be, or nothing says which tokenizer.
    """
    import torch

    from .convert.checkpoints import open_checkpoint

    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=options.device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConvertError(f"--device is {options.device!r}; it must be a device that torch has here") from error
    checkpoint = open_checkpoint(options.model, options.config, options.flavor, options.tokenizer)
    if checkpoint.tokenizer is None:
        raise ConvertError(f"{options.model} does not say which tokenizer it was trained with; name it by --tokenizer")
    return checkpoint


def open_model(options: argparse.Namespace) -> "tuple[Checkpoint, Any]":
    """(Checkpoint, transformers tokenizer) as of ``open_without_tokenizer``.

    Raises:
        ConvertError: as there, or the tokenizer is damaged.
    """
    from transformers import AutoTokenizer

    checkpoint = open_without_tokenizer(options)
    with reading(checkpoint.tokenizer):
        return checkpoint, AutoTokenizer.from_pretrained(checkpoint.tokenizer, local_files_only=True)
