"""Finds out what a path holds: its tensors by the decoder's names, and what is known of how they were trained."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint_info import BYTE_TOKENIZER, CheckpointInfo, args_from_fields, chosen_info, find_info
from .dcp import DistributedCheckpoint
from .errors import ConvertError, read_json
from .hf_folder import MODEL_TYPE
from .mapping import CurrentNames, Part, Renamed, Source, check_fits, tensors_of, to_hf_name
from .run_folders import INDEX, checkpoint_folder, step_of
from .safetensors_files import SafetensorsFolder

__all__ = ["Checkpoint", "open_checkpoint", "open_hf", "read_config"]


@dataclass(frozen=True)
class Checkpoint:
    """Tensors that fit the model of ``info``."""

    source: Source
    info: CheckpointInfo
    tokenizer: Path | None  # a folder
    step: int | None  # of training


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The dict of a folder's config.json."""
    path = Path(folder) / "config.json"
    config = read_json(path)
    if not isinstance(config, dict):
        raise ConvertError(f"{path} must hold a JSON object")
    return config


def open_hf(folder: str | os.PathLike[str], info: CheckpointInfo | None = None) -> Checkpoint:
    """A Checkpoint of a Hugging Face folder of this model. info: of it, where it has no config.json."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ConvertError(f"{folder} is not there; it must be a Hugging Face folder")
    if info is None:
        content = read_config(folder)
        if content.get("model_type") != MODEL_TYPE:
            raise ConvertError(
                f"{folder / 'config.json'} has model_type {content.get('model_type')!r}; it must be {MODEL_TYPE!r}"
            )
        info = CheckpointInfo(args_from_fields(content, folder / "config.json"))
    mapping = {name: Part(to_hf_name(name)) for name in tensors_of(info.model_args)}
    source = Renamed(CurrentNames(SafetensorsFolder(folder)), mapping)
    check_fits(source, info.model_args)
    return Checkpoint(source, info, folder, step_of(folder))


def _tokenizer(info: CheckpointInfo) -> Path | None:
    """The tokenizer that a model was trained with, or None where nothing says which."""
    path = ((info.job_config or {}).get("model") or {}).get("hf_assets_path")
    if path is None or Path(path).is_dir():
        return None if path is None else Path(path)
    if Path(path).name == BYTE_TOKENIZER.name:  # this package's own, where it was installed at the time
        return BYTE_TOKENIZER
    raise ConvertError(f"model.hf_assets_path was {path!r}, which is not there; name the tokenizer with --tokenizer")


def open_checkpoint(
    path: str | os.PathLike[str], config: str | os.PathLike[str] | None = None, flavor: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None, with_tokenizer: bool = True,
) -> Checkpoint:  # fmt: skip
    """A Checkpoint of a TorchTitan checkpoint (a step, or a run's folder or its folder of steps: the latest) or of a
    Hugging Face folder of this model.

    Args:
        config: TOML file, and flavor: name, of the model for checkpoints that do not say it.
        tokenizer: folder to take instead of the one that the model was trained with.
        with_tokenizer: whether it is asked for; if not, it is None.

    Raises:
        ConvertError: there is no such checkpoint, it is damaged, or does not fit its model.
    """
    if tokenizer is not None and not Path(tokenizer).is_dir():
        raise ConvertError(f"--tokenizer is {tokenizer}; it must be a folder")
    chosen, path = chosen_info(config, flavor), checkpoint_folder(path)
    if not (path / ".metadata").is_file() and ((path / "config.json").is_file() or (path / INDEX).is_file()):
        # Without a config.json it is one that TorchTitan saved and nobody completed.
        opened = open_hf(path, chosen or (None if (path / "config.json").is_file() else find_info(path)))
        return Checkpoint(opened.source, opened.info, Path(tokenizer) if tokenizer else path, opened.step)
    source = CurrentNames(DistributedCheckpoint(path))
    info = chosen or find_info(path)
    if info is None:
        raise ConvertError(
            f"{path} does not say which model it is of (no gdn2.json there or in {path.absolute().parent}); name it "
            "with --config or --flavor"
        )
    check_fits(source, info.model_args)
    found = Path(tokenizer) if tokenizer else _tokenizer(info) if with_tokenizer else None
    return Checkpoint(source, info, found, step_of(path))
