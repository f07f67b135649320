"""The conversions. Each reads one tensor at a time and writes a new path whole or not at all."""

import json
import math
from pathlib import Path

from tqdm import tqdm

from .aside import check_free, new_path
from .checkpoints import Checkpoint, chosen_record, open_checkpoint, open_hf, read_config
from .companions import copy_tokenizer, write_companions
from .dcp import write_dcp
from .errors import ConvertError, reading
from .fla import args_from_fla, config_for_fla, from_fla_layout, to_fla_layout
from .layout import Part, Renamed, check_fits, tensors_of
from .names import to_hf_name
from .nvlabs import from_nvlabs_layout
from .record import Record, write_record
from .run_folders import checkpoint_folder
from .safetensors_files import SafetensorsFolder, write_safetensors
from .torch_file import TorchFile, save_to

__all__ = ["SHARD_SIZE", "from_fla", "from_hf", "from_nvlabs", "to_fla", "to_hf", "to_torch"]

SHARD_SIZE = 5 * 10**9


def _dtype(tensors):
    return str(tensors["lm_head.weight"].dtype).removeprefix("torch.")


class _Bar:
    """A source whose reads move a progress bar, shown on terminals only."""

    def __init__(self, source, what):
        self.tensors, self._source = source.tensors, source
        total = sum(math.prod(t.shape) * t.dtype.itemsize for t in source.tensors.values())
        self._bar = tqdm(desc=what, total=total, unit="B", unit_scale=True, disable=None, leave=False)

    def read(self, name):
        tensor = self._source.read(name)
        self._bar.update(tensor.nbytes)
        return tensor

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()


def _save_code(folder):
    try:
        from .hf import save_code  # not before it is wanted: all else is done without transformers
    except ImportError as error:
        raise ConvertError(f"--with-code needs transformers, which cannot be imported: {error}") from error
    save_code(folder)


def _write_hf(checkpoint: Checkpoint, out, dtype, shard_size, with_code=False):
    layout = {to_hf_name(name): Part(name) for name in tensors_of(checkpoint.record.model_args)}
    renamed = Renamed(checkpoint.source, layout, dtype)
    with new_path(out) as folder, _Bar(renamed, f"writing {out}") as source:
        written = _dtype(source.tensors)
        write_companions(folder, checkpoint.record, checkpoint.tokenizer, written, checkpoint.step, with_code)
        if with_code:
            _save_code(folder)
        write_safetensors(folder, source.tensors, source.read, shard_size)


def to_hf(
    checkpoint, out, dtype=None, shard_size=SHARD_SIZE, config=None, flavor=None, tokenizer=None, with_code=False
):
    """TorchTitan checkpoint -> Hugging Face folder.

    Args:
        checkpoint, config, flavor, tokenizer: as for ``open_checkpoint``.
        out: a new name.
        dtype: torch dtype of the tensors, except A_log and dt_bias; None keeps theirs.
        shard_size: bytes of tensors in a file.
        with_code: put the model's code beside it, for ``trust_remote_code=True``.

    Raises:
        ConvertError: one sentence about what is wrong with checkpoint or out.
        OSError: a write failed.
    """
    check_free(out)
    _write_hf(open_checkpoint(checkpoint, config, flavor, tokenizer), out, dtype, shard_size, with_code)


def from_hf(folder, out):
    """Hugging Face folder -> checkpoint that TorchTitan's ``checkpoint.initial_load_path`` reads, bit for bit."""
    check_free(out)
    folder = checkpoint_folder(folder)
    if (folder / ".metadata").is_file():
        raise ConvertError(f"{folder} is a TorchTitan checkpoint; checkpoint.initial_load_path reads it as it is")
    checkpoint = open_hf(folder)
    with new_path(out) as part, _Bar(checkpoint.source, f"writing {out}") as source:
        write_dcp(part, source.tensors, map(source.read, source.tensors))
        write_record(part, checkpoint.record)


def to_torch(checkpoint, out, dtype=None, config=None, flavor=None):
    """Checkpoint -> one file of torch.save with {name: tensor}. Holds the model in memory, as its readers do."""
    check_free(out)
    opened = open_checkpoint(checkpoint, config, flavor)
    renamed = Renamed(opened.source, {name: Part(name) for name in opened.source.tensors}, dtype)
    with _Bar(renamed, f"reading {checkpoint}") as source:
        tensors = {name: source.read(name) for name in source.tensors}
    with new_path(out, folder=False) as part, open(part, "wb") as stream:
        save_to(stream, tensors)


def from_fla(folder, out, dtype=None, shard_size=SHARD_SIZE):
    """flash-linear-attention folder (config.json and safetensors) -> Hugging Face folder of this model."""
    check_free(out)
    path = Path(folder) / "config.json"
    with reading(path):
        args = args_from_fla(read_config(folder), path)
    source = Renamed(SafetensorsFolder(folder), from_fla_layout(args))
    check_fits(source, args)
    _write_hf(Checkpoint(source, Record(args), Path(folder), None), out, dtype, shard_size)


def to_fla(checkpoint, out, dtype=None, shard_size=SHARD_SIZE, config=None, flavor=None, tokenizer=None):
    """Checkpoint -> folder with flash-linear-attention's names and config fields."""
    check_free(out)
    opened = open_checkpoint(checkpoint, config, flavor, tokenizer)
    fields = config_for_fla(opened.record.model_args)
    renamed = Renamed(opened.source, to_fla_layout(opened.record.model_args), dtype)
    with new_path(out) as part, _Bar(renamed, f"writing {out}") as source:
        fields["dtype"] = _dtype(source.tensors)
        (part / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        copy_tokenizer(opened.tokenizer, part)
        write_safetensors(part, source.tensors, source.read, shard_size)


def from_nvlabs(path, out, dtype=None, shard_size=SHARD_SIZE, config=None, flavor=None, tokenizer=None, qkv_order=None):
    """Checkpoint file (or safetensors folder) of the authors' trainer -> Hugging Face folder of this model.

    Such a checkpoint does not say its shape: config or flavor must. qkv_order: see ``from_nvlabs_layout``.
    """
    check_free(out)
    record = chosen_record(config, flavor)
    if record is None:
        raise ConvertError(f"{path} does not say which model it is of; name it with --config or --flavor")
    theirs = SafetensorsFolder(path) if Path(path).is_dir() else TorchFile(path)
    source = Renamed(theirs, from_nvlabs_layout(record.model_args, theirs, qkv_order))
    check_fits(source, record.model_args)
    tokenizer = None if tokenizer is None else Path(tokenizer)
    _write_hf(Checkpoint(source, Record(record.model_args), tokenizer, None), out, dtype, shard_size)
