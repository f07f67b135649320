"""The conversions. Each reads one tensor at a time and writes a new path whole or not at all."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .atomic import check_free, new_path
from .checkpoint_info import CheckpointInfo, chosen_info, write_info
from .checkpoints import Checkpoint, open_checkpoint, open_hf, read_config
from .dcp_writer import write_dcp
from .errors import ConvertError, read_json, reading
from .fla import args_from_fla, config_for_fla, from_fla_mapping, to_fla_mapping
from .hf_folder import write_model_files
from .mapping import Part, Renamed, Source, check_fits, tensors_of, to_hf_name
from .megatron import WithoutExtraStates, args_of_megatron, check_one_rank, from_megatron_mapping
from .nvlabs import Unwrapped, check_layout, from_nvlabs_mapping, hparams_of
from .nvlabs import to_nvlabs as nvlabs_tensors
from .nvlabs_model import args_of
from .run_folders import checkpoint_folder
from .safetensors_files import SafetensorsFolder, write_safetensors
from .tokenizer import copy_tokenizer
from .torch_file import TorchFile, save_to

__all__ = [
    "SHARD_SIZE", "from_fla", "from_hf", "from_megatron", "from_nvlabs", "to_fla", "to_hf", "to_nvlabs", "to_torch",
]  # fmt: skip

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
    opened = open_checkpoint(checkpoint, config, flavor, with_tokenizer=False)
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
    theirs = SafetensorsFolder(folder)
    source = Renamed(theirs, from_fla_mapping(args, theirs.tensors))
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


def _open_nvlabs(path: Path) -> tuple[Unwrapped, dict[str, Any], int | None, list[str]]:
    """(checkpoint of the authors' layout, its hparams, its training step, types of objects in it that are not read).

    hparams are those of the file, or what config.json in a folder says in the same words.
    """
    if not path.exists():
        raise ConvertError(f"{path} is not there; it must be a file, or a folder of safetensors files")
    if path.is_dir() or path.suffix == ".safetensors":
        file, unread, step = SafetensorsFolder(path), [], None
        hparams = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    else:
        file = TorchFile(path)
        unread, step, hparams = file.unread, file.others.get("step_count"), file.others.get("hparams")
    hparams = hparams if isinstance(hparams, dict) else {}
    hparams = {name: value for name, value in hparams.items() if isinstance(value, (int, float, str, type(None)))}
    return Unwrapped(file), hparams, step if isinstance(step, int) and step >= 0 else None, unread


def from_nvlabs(
    path: PathLike, out: PathLike, dtype: torch.dtype | None = None,
    shard_size: int = SHARD_SIZE, config: PathLike | None = None, flavor: str | None = None,
    tokenizer: PathLike | None = None,
) -> None:  # fmt: skip
    """Checkpoint of the authors' release, or in its layout -> Hugging Face folder of this model.

    Args:
        path: a file of torch.save (with ``model`` beside optimizer, hparams and counts, or of tensors alone), a
            safetensors file, or a folder of them.
        config, flavor: what the model is, instead of what shapes, hparams and flavors tell (``nvlabs_model.args_of``).
        tokenizer: folder; no checkpoint has one.
        dtype, shard_size: as of ``to_hf``.

    Notes on stderr say what was not read, and which model it is where no flavor fits.
    """
    check_free(out)
    if tokenizer is not None and not Path(tokenizer).is_dir():
        raise ConvertError(f"--tokenizer is {tokenizer}; it must be a folder")
    info = chosen_info(config, flavor)
    theirs, hparams, step, unread = _open_nvlabs(Path(path))
    notes = [f"{path} has objects of types that are not read: {', '.join(unread)}"] if unread else []
    if info is None:
        args, fitting = args_of(theirs, hparams)
        info = CheckpointInfo(args)
        if fitting is None:
            sizes = f"{args.n_layers} layers, hidden_size {args.hidden_size}, mlp_size {args.mlp_size}"
            notes.append(f"{path} fits no flavor; its tensors make it {sizes}")
    check_layout(theirs, info.model_args)
    for note in notes:
        print(f"Note: {note}", file=sys.stderr)
    source = Renamed(theirs, from_nvlabs_mapping(info.model_args))
    tokenizer = None if tokenizer is None else Path(tokenizer)
    _write_hf(Checkpoint(source, info, tokenizer, step), out, dtype, shard_size)


def to_nvlabs(
    checkpoint: PathLike, out: PathLike, dtype: torch.dtype | None = None,
    config: PathLike | None = None, flavor: str | None = None,
) -> None:  # fmt: skip
    """Checkpoint -> one file of torch.save as the authors' trainer leaves it, without states of an optimizer.

    It is a dict of ``model``, ``hparams`` (see ``nvlabs.hparams_of``), ``iter_num`` and ``step_count``, both the
    training step, or 0 where it is not known. Holds the model in memory, as its readers do.
    """
    check_free(out)
    opened = open_checkpoint(checkpoint, config, flavor, with_tokenizer=False)
    source, step = nvlabs_tensors(opened.source, opened.info.model_args, dtype), opened.step or 0
    with _bar(source, f"reading {checkpoint}") as read:
        content = {
            "model": {name: read(name) for name in source.tensors}, "hparams": hparams_of(opened.info.model_args),
            "iter_num": step, "step_count": step,
        }  # fmt: skip
    with new_path(out, folder=False) as part, open(part, "wb") as stream:
        save_to(stream, content)


def from_megatron(
    path: PathLike, out: PathLike, dtype: torch.dtype | None = None,
    shard_size: int = SHARD_SIZE, config: PathLike | None = None, flavor: str | None = None,
    tokenizer: PathLike | None = None,
) -> None:  # fmt: skip
    """Megatron-Core's file (or a safetensors folder of its names) -> Hugging Face folder of this model.

    The file is that of a model on one rank, ``mp_rank_00/model_optim_rng.pt``. Config or flavor must say its shape;
    whatever ranks they say, decay and output gate have full rank.
    """
    check_free(out)
    info = chosen_info(config, flavor)
    if info is None:
        raise ConvertError(f"{path} does not say which model it is of; name it with --config or --flavor")
    args = args_of_megatron(info.model_args)
    check_one_rank(Path(path))
    theirs = WithoutExtraStates(SafetensorsFolder(path) if Path(path).is_dir() else TorchFile(path))
    source = Renamed(theirs, from_megatron_mapping(args))
    check_fits(source, args)
    tokenizer = None if tokenizer is None else Path(tokenizer)
    _write_hf(Checkpoint(source, CheckpointInfo(args), tokenizer, None), out, dtype, shard_size)
