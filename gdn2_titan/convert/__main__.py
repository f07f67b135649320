"""The command line: ``python -m gdn2_titan.convert to-hf CHECKPOINT OUT``."""

import argparse
import re
import sys
from collections.abc import Sequence

from .errors import ConvertError, exit_status
from .run_folders import checkpoint_folder

# torch is not imported before the command line is known to be right: that takes seconds.
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)?", text, re.IGNORECASE)
    size = int(float(found.group(1)) * _UNITS[(found.group(2) or "").upper()]) if found else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 5GB, 500MB or a number of bytes")
    return size


# (command, whose function is of that name, what it does, the source's name, options)
_MODEL, _WEIGHTS = ("config", "flavor"), ("dtype", "shard_size")
_COMMANDS = (
    ("to-hf", "TorchTitan checkpoint to Hugging Face folder", "CHECKPOINT",
     (*_MODEL, *_WEIGHTS, "tokenizer", "with_code")),
    ("from-hf", "Hugging Face folder to checkpoint.initial_load_path", "FOLDER", ()),
    ("to-torch", "checkpoint to one .pt file of tensors", "CHECKPOINT", (*_MODEL, "dtype")),
    ("from-fla", "flash-linear-attention folder to Hugging Face folder", "FOLDER", _WEIGHTS),
    ("to-fla", "checkpoint to flash-linear-attention's names", "CHECKPOINT",
     (*_MODEL, *_WEIGHTS, "tokenizer")),
    ("from-nvlabs", "checkpoint in the layout of the authors' release to Hugging Face folder", "FILE",
     (*_MODEL, *_WEIGHTS, "tokenizer")),
    ("to-nvlabs", "checkpoint to a file in the layout of the authors' release", "CHECKPOINT", (*_MODEL, "dtype")),
    ("from-megatron", "Megatron-Core's file to Hugging Face folder", "FILE", (*_MODEL, *_WEIGHTS, "tokenizer")),
)  # fmt: skip
_OPTIONS = {
    "config": {"metavar": "TOML", "help": "TorchTitan config of the model, where the checkpoint does not say it"},
    "flavor": {"help": "name of the model's shape, where the checkpoint does not say it"},
    "dtype": {"choices": ("float32", "bfloat16", "float16"), "help": "of the tensors written (default: as they are)"},
    "shard_size": {"type": _bytes, "help": "of a safetensors file (default: 5GB)"},
    "tokenizer": {"metavar": "FOLDER", "help": "instead of the one that the model was trained with"},
    "with_code": {"action": "store_true", "help": "the model's code too, for trust_remote_code=True elsewhere"},
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m gdn2_titan.convert", description=__doc__)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, what, source, options in _COMMANDS:
        command = subparsers.add_parser(name, help=what, description=what)
        command.add_argument("source", metavar=source)
        command.add_argument("out", metavar="OUT", help="a new name")
        for option in options:
            command.add_argument(f"--{option.replace('_', '-')}", **_OPTIONS[option])
        command.set_defaults(command=name)
    return parser


def _run(parsed: argparse.Namespace) -> None:
    options = {name: value for name, value in vars(parsed).items() if value is not None}
    command, source, out = (options.pop(name) for name in ("command", "source", "out"))
    try:
        if command in ("to-hf", "from-hf", "to-torch", "to-fla", "to-nvlabs"):
            checkpoint_folder(source)
        import torch

        from . import commands

        if "dtype" in options:
            options["dtype"] = getattr(torch, options["dtype"])
        getattr(commands, command.replace("-", "_"))(source, out, **options)
    except OSError as error:
        raise ConvertError(f"{out} was not written: {error.strerror or error}") from error
    print(f"Wrote {out}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 after one sentence on stderr."""
    return exit_status(_run, _parser().parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
