"""Finds out what a path holds: its tensors by the decoder's names, and what is known of how they were trained."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdn2_titan.models import flavors

from .companions import MODEL_TYPE
from .dcp import DistributedCheckpoint
from .errors import ConvertError, reading
from .layout import Part, Renamed, check_fits, tensors_of
from .names import INDEX, to_hf_name
from .record import Record, args_from_fields, find_record
from .run_folders import checkpoint_folder, step_of
from .safetensors_files import SafetensorsFolder
from .torchtitan_toml import record_of_toml

__all__ = ["Checkpoint", "chosen_record", "open_checkpoint", "open_hf", "read_config"]

_BYTE_TOKENIZER = Path(__file__).parents[1] / "titan" / "assets" / "byte_tokenizer"


@dataclass(frozen=True)
class Checkpoint:
    """source: has ``path``, ``tensors`` {name: meta tensor} and ``read(name)``; the tensors fit the record's model.

    tokenizer: a folder, or None; step: of training, or None.
    """

    source: Any
    record: Record
    tokenizer: Path | None
    step: int | None


def read_config(folder):
    """The dict of a folder's config.json."""
    path = Path(folder) / "config.json"
    with reading(path):
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ConvertError(f"{path} must hold a JSON object")
        return config


def chosen_record(config, flavor):
    """The Record that the options --config and --flavor name, or None.

    Raises:
        ConvertError: both are given, or what they name is not there.
    """
    if config is not None and flavor is not None:
        raise ConvertError("--config and --flavor are both given; it must be one of them")
    if config is not None:
        return record_of_toml(str(config))
    if flavor is not None and flavor not in flavors:
        raise ConvertError(f"--flavor is {flavor!r}; it must be one of {', '.join(flavors)}")
    return None if flavor is None else Record(flavors[flavor])


def open_hf(folder, config=None):
    """A Checkpoint of a Hugging Face folder of this model. config: its Record, where it has no config.json."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ConvertError(f"{folder} is not there; it must be a Hugging Face folder")
    if config is None:
        content = read_config(folder)
        if content.get("model_type") != MODEL_TYPE:
            raise ConvertError(
                f"{folder / 'config.json'} has model_type {content.get('model_type')!r}; it must be {MODEL_TYPE!r}"
            )
        config = Record(args_from_fields(content, folder / "config.json"))
    layout = {name: Part(to_hf_name(name)) for name in tensors_of(config.model_args)}
    source = Renamed(SafetensorsFolder(folder), layout)
    check_fits(source, config.model_args)
    return Checkpoint(source, config, folder, step_of(folder))


def _tokenizer(record):
    """The tokenizer that a model was trained with, or None where nothing says which."""
    path = ((record.job_config or {}).get("model") or {}).get("hf_assets_path")
    if path is None or Path(path).is_dir():
        return None if path is None else Path(path)
    if Path(path).name == _BYTE_TOKENIZER.name:  # this package's own, where it was installed at the time
        return _BYTE_TOKENIZER
    raise ConvertError(f"model.hf_assets_path was {path!r}, which is not there; name the tokenizer with --tokenizer")


def open_checkpoint(path, config=None, flavor=None, tokenizer=None):
    """A Checkpoint of a TorchTitan checkpoint (a step, or a run's folder or its folder of steps: the latest) or of a
    Hugging Face folder of this model.

    Args:
        config: TOML file, and flavor: name, of the model for checkpoints that do not say it.
        tokenizer: folder to take instead of the one that the model was trained with.

    Raises:
        ConvertError: there is no such checkpoint, it is damaged, or does not fit its model.
    """
    if tokenizer is not None and not Path(tokenizer).is_dir():
        raise ConvertError(f"--tokenizer is {tokenizer}; it must be a folder")
    chosen, path = chosen_record(config, flavor), checkpoint_folder(path)
    if not (path / ".metadata").is_file() and ((path / "config.json").is_file() or (path / INDEX).is_file()):
        # Without a config.json it is one that TorchTitan saved and nobody completed.
        opened = open_hf(path, chosen or (None if (path / "config.json").is_file() else find_record(path)))
        return Checkpoint(opened.source, opened.record, Path(tokenizer) if tokenizer else path, opened.step)
    source = DistributedCheckpoint(path)
    record = chosen or find_record(path)
    if record is None:
        raise ConvertError(
            f"{path} does not say which model it is of (no gdn2.json there or in {path.absolute().parent}); name it "
            "with --config or --flavor"
        )
    check_fits(source, record.model_args)
    return Checkpoint(source, record, Path(tokenizer) if tokenizer else _tokenizer(record), step_of(path))
