"""The conversions. Each reads one tensor at a time and writes a new path whole or not at all."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from .atomic import check_free, new_path
from .checkpoint_info import CheckpointInfo, chosen_info, write_info
from .checkpoints import Checkpoint, open_checkpoint, open_hf, read_config
from .dcp import write_dcp
from .errors import ConvertError, reading
from .fla import args_from_fla, config_for_fla, from_fla_mapping, to_fla_mapping
from .hf_folder import write_model_files
from .mapping import Part, Renamed, Source, check_fits, tensors_of, to_hf_name
from .nvlabs import from_nvlabs_mapping
from .run_folders import checkpoint_folder
from .safetensors_files import SafetensorsFolder, write_safetensors
from .tokenizer import copy_tokenizer
from .torch_file import TorchFile, save_to

__all__ = ["SHARD_SIZE", "from_fla", "from_hf", "from_nvlabs", "to_fla", "to_hf", "to_torch"]

SHARD_SIZE = 5 * 10**9
PathLike = str | os.PathLike[str]


def _dtype(tensors: dict[str, torch.Tensor]) -> str:
    return str(tensors["lm_head.weight"].dtype).removeprefix("torch.")


@contextlib.contextmanager
def _bar(source: Source, what: str) -> Iterator[Callable[[str], torch.Tensor]]:
    """The source's ``read``, which moves a progress bar, shown on terminals only."""
    total = sum(tensor.nbytes for tensor in source.tensors.values())
    with tqdm(desc=what, total=total, unit="B", unit_scale=True, disable=None, leave=False) as bar:

        def read(name):
            tensor = source.read(name)
            bar.update(tensor.nbytes)
            return tensor

        yield read


def _write_hf(
    checkpoint: Checkpoint, out: PathLike, dtype: torch.dtype | None, shard_size: int, with_code: bool = False
) -> None:
    mapping = {to_hf_name(name): Part(name) for name in tensors_of(checkpoint.info.model_args)}
    source = Renamed(checkpoint.source, mapping, dtype)
    with new_path(out) as folder, _bar(source, f"writing {out}") as read:
        written = _dtype(source.tensors)
        write_model_files(folder, checkpoint.info, checkpoint.tokenizer, written, checkpoint.step, with_code)
        if with_code:
            try:
                from .hf import save_code  # not before it is wanted: all else is done without transformers
            except ImportError as error:
                raise ConvertError(f"--with-code needs transformers, which cannot be imported: {error}") from error
            save_code(folder)
        write_safetensors(folder, source.tensors, read, shard_size)


def to_hf(
    checkpoint: PathLike, out: PathLike, dtype: torch.dtype | None = None,
    shard_size: int = SHARD_SIZE, config: PathLike | None = None, flavor: str | None = None,
    tokenizer: PathLike | None = None, with_code: bool = False,
) -> None:  # fmt: skip
    """TorchTitan checkpoint -> Hugging Face folder ``out``, a new name.

    Args:
        checkpoint, config, flavor, tokenizer: as for ``open_checkpoint``.
        dtype: torch dtype of the tensors, except A_log and dt_bias; None keeps theirs.
        shard_size: bytes of tensors in a file.
        with_code: put the model's code beside it, for ``trust_remote_code=True``.

    Raises:
        ConvertError: one sentence about what is wrong with checkpoint or out.
        OSError: a write failed.
    """
    check_free(out)
    _write_hf(open_checkpoint(checkpoint, config, flavor, tokenizer), out, dtype, shard_size, with_code)


def from_hf(folder: PathLike, out: PathLike) -> None:
    """Hugging Face folder -> checkpoint that TorchTitan's ``checkpoint.initial_load_path`` reads, bit for bit."""
    check_free(out)
    folder = checkpoint_folder(folder)
    if (folder / ".metadata").is_file():
        raise ConvertError(f"{folder} is a TorchTitan checkpoint; checkpoint.initial_load_path reads it as it is")
    checkpoint = open_hf(folder)
    with new_path(out) as part, _bar(checkpoint.source, f"writing {out}") as read:
        write_dcp(part, checkpoint.source.tensors, read)
        write_info(part, checkpoint.info)


def to_torch(
    checkpoint: PathLike, out: PathLike, dtype: torch.dtype | None = None,
    config: PathLike | None = None, flavor: str | None = None,
) -> None:  # fmt: skip
    """Checkpoint -> one file of torch.save with {name: tensor}. Holds the model in memory, as its readers do."""
    check_free(out)
    opened = open_checkpoint(checkpoint, config, flavor)
    source = Renamed(opened.source, {name: Part(name) for name in opened.source.tensors}, dtype)
    with _bar(source, f"reading {checkpoint}") as read:
        tensors = {name: read(name) for name in source.tensors}
    with new_path(out, folder=False) as part, open(part, "wb") as stream:
        save_to(stream, tensors)


def from_fla(folder: PathLike, out: PathLike, dtype: torch.dtype | None = None, shard_size: int = SHARD_SIZE) -> None:
    """flash-linear-attention folder (config.json and safetensors) -> Hugging Face folder of this model."""
    check_free(out)
    path = Path(folder) / "config.json"
    with reading(path):
        args = args_from_fla(read_config(folder), path)
    source = Renamed(SafetensorsFolder(folder), from_fla_mapping(args))
    check_fits(source, args)
    _write_hf(Checkpoint(source, CheckpointInfo(args), Path(folder), None), out, dtype, shard_size)


def to_fla(
    checkpoint: PathLike, out: PathLike, dtype: torch.dtype | None = None,
    shard_size: int = SHARD_SIZE, config: PathLike | None = None, flavor: str | None = None,
    tokenizer: PathLike | None = None,
) -> None:  # fmt: skip
    """Checkpoint -> folder with flash-linear-attention's names and config fields."""
    check_free(out)
    opened = open_checkpoint(checkpoint, config, flavor, tokenizer)
    fields = config_for_fla(opened.info.model_args)
    source = Renamed(opened.source, to_fla_mapping(opened.info.model_args), dtype)
    with new_path(out) as part, _bar(source, f"writing {out}") as read:
        fields["dtype"] = _dtype(source.tensors)
        (part / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        copy_tokenizer(opened.tokenizer, part)
        write_safetensors(part, source.tensors, read, shard_size)


def from_nvlabs(
    path: PathLike, out: PathLike, dtype: torch.dtype | None = None,
    shard_size: int = SHARD_SIZE, config: PathLike | None = None, flavor: str | None = None,
    tokenizer: PathLike | None = None, qkv_order: str | None = None,
) -> None:  # fmt: skip
    """Checkpoint file (or safetensors folder) of the authors' trainer -> Hugging Face folder of this model.

    Such a checkpoint does not say its shape: config or flavor must. qkv_order: see ``from_nvlabs_mapping``.
    """
    check_free(out)
    info = chosen_info(config, flavor)
    if info is None:
        raise ConvertError(f"{path} does not say which model it is of; name it with --config or --flavor")
    theirs = SafetensorsFolder(path) if Path(path).is_dir() else TorchFile(path)
    source = Renamed(theirs, from_nvlabs_mapping(info.model_args, theirs, qkv_order))
    check_fits(source, info.model_args)
    tokenizer = None if tokenizer is None else Path(tokenizer)
    _write_hf(Checkpoint(source, CheckpointInfo(info.model_args), tokenizer, None), out, dtype, shard_size)
