"""Whether [checkpoint] asks for checkpoints that are there, and for no more than TorchTitan does with them."""

import importlib.util
import os
import pickle
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemReader

from gdn2_titan.convert.dcp import DistributedCheckpoint
from gdn2_titan.convert.errors import ConvertError
from gdn2_titan.convert.mapping import CurrentNames, tensors_of, to_hf_name
from gdn2_titan.convert.safetensors_files import SafetensorsFolder

from ..errors import ConfigError
from ..settings import Settings
from ..tasks import TASKS
from ..torchtitan_version import IS_V02
from .combinations import number_of_processes

__all__ = ["check_checkpoint"]

# Without checkpoint.enable they would be silently left out, and the training would start from nothing.
NEED_ENABLE = {"initial_load_path": None, "initial_load_in_hf": False, "load_step": -1, "create_seed_checkpoint": False}


def check_checkpoint(settings: Settings) -> None:
    """Raise ConfigError unless the training can begin and end as [checkpoint] says."""
    checkpoint = settings.checkpoint
    if not checkpoint.enable:
        for name, default in NEED_ENABLE.items():
            if (value := getattr(checkpoint, name)) != default:
                raise ConfigError(f"checkpoint.{name} is {value!r}; then checkpoint.enable must be true")
        return
    _check_formats(checkpoint)
    for name in ("create_seed_checkpoint", "enable_first_step_checkpoint"):
        if checkpoint.load_only and getattr(checkpoint, name):
            raise ConfigError(f"checkpoint.{name} is true; with checkpoint.load_only, which saves nothing, it must be "
                              "false")  # fmt: skip
    if checkpoint.create_seed_checkpoint and (processes := number_of_processes()) > 1:
        raise ConfigError(f"checkpoint.create_seed_checkpoint is true; with {processes} processes it must be false")
    folder = os.path.join(settings.job.dump_folder, checkpoint.folder)
    if "://" not in folder:
        _check_begin(settings, folder)


def _check_formats(checkpoint: Any) -> None:
    """TorchTitan itself finds these out at the last step, with the training done and its weights not yet saved."""
    for name, other in (("last_save_in_hf", "last_save_model_only"), ("initial_load_in_hf", "initial_load_model_only")):
        if not getattr(checkpoint, name):
            continue
        if not getattr(checkpoint, other):
            raise ConfigError(f"checkpoint.{name} is true; then checkpoint.{other} must be true as well")
        if importlib.util.find_spec("safetensors") is None:
            raise ConfigError(f"checkpoint.{name} is true; it must be false where safetensors is not installed")
    if checkpoint.initial_load_in_hf_quantized:
        raise ConfigError("checkpoint.initial_load_in_hf_quantized is true; it must be false, this model has no such")
    if checkpoint.export_dtype != "float32" and not checkpoint.last_save_model_only:
        raise ConfigError(
            f"checkpoint.export_dtype is {checkpoint.export_dtype!r}; with checkpoint.last_save_model_only = false, "
            "which keeps the weights as they are trained, it must be 'float32'"
        )


def _check_begin(settings: Settings, folder: str) -> None:
    """The checkpoint that TorchTitan would load is there, if there is one to load."""
    checkpoint = settings.checkpoint
    own, exported = _steps(folder)
    step = checkpoint.load_step
    if step != -1 and step not in own:
        there = ", ".join(map(str, own)) or "there is none"
        raise ConfigError(f"checkpoint.load_step is {step}; it must be -1 (the latest) or the step of a checkpoint in "
                          f"{folder!r}: {there}")  # fmt: skip
    if step == -1 and exported and exported[-1] > max(own, default=-1):
        allowed = f"it must be one of {', '.join(map(str, own))}" if own else "job.dump_folder must be another folder"
        raise ConfigError(f"checkpoint.load_step is -1, the latest, which in {folder!r} is step {exported[-1]}, in "
                          f"Hugging Face's format and none to continue from; {allowed}")  # fmt: skip
    if own:
        step_folder = os.path.join(folder, f"step-{own[-1] if step == -1 else step}")
        _check_model(settings, "checkpoint.folder", step_folder, False)
        _check_states(settings, step_folder)
    if own or not (checkpoint.initial_load_path or checkpoint.initial_load_in_hf):
        return
    field, path = "checkpoint.initial_load_path", checkpoint.initial_load_path
    if not path:
        field, path = "model.hf_assets_path", settings.model.hf_assets_path
    if IS_V02 and os.path.exists(folder):
        raise ConfigError(f"{field} is {path!r}; TorchTitan reads it only where the folder of checkpoints is not there "
                          f"yet: {folder!r}, which has none, must be removed")  # fmt: skip
    _check_weights(field, path, checkpoint.initial_load_in_hf)
    _check_model(settings, field, path, checkpoint.initial_load_in_hf)
    if not checkpoint.initial_load_model_only and "://" not in path:
        _check_states(settings, path)


def _check_model(settings: Settings, field: str, path: str, in_hf: bool) -> None:
    """A checkpoint is of as many layers, and of such tensors, as [model] and [gdn2] say. TorchTitan would leave layers
    that the model has not where they are, and go on with the others."""
    if "://" in path or settings.model.name != "gdn2":
        return
    try:
        stored = CurrentNames(SafetensorsFolder(path) if in_hf else DistributedCheckpoint(path)).tensors
    except ConvertError:
        return  # TorchTitan reads it, or says why not
    args, name_of = settings.model_args(), to_hf_name if in_hf else str
    layers = {int(found[1]) for name in stored if (found := re.match(r"(?:model\.)?layers\.(\d+)\.", name))}
    if layers and max(layers) + 1 != args.n_layers:
        raise ConfigError(f"{field} is {path!r}, of a model of {max(layers) + 1} layers; model.flavor and [gdn2] make "
                          f"it {args.n_layers}")  # fmt: skip
    for name, tensor in tensors_of(args).items():
        name = name_of(name)
        if name in stored and stored[name].shape != tensor.shape:
            raise ConfigError(f"{field} is {path!r}, whose {name} has shape {[*stored[name].shape]}; model.flavor and "
                              f"[gdn2] make it {[*tensor.shape]}")  # fmt: skip


def _check_states(settings: Settings, path: str) -> None:
    """What a checkpoint has beside the weights is what the training would continue from."""
    try:
        names = FileSystemReader(path).read_metadata().state_dict_metadata
    except (EOFError, OSError, pickle.UnpicklingError):
        return  # TorchTitan says that it is damaged
    excluded = settings.checkpoint.exclude_from_loading
    if "optimizer" not in excluded:
        _check_optimizer(settings, path, names)
    if "dataloader" not in excluded:
        _check_place(settings, path, names)


def _check_place(settings: Settings, path: str, names: Collection[str]) -> None:
    """The place in the data is of as many ranks as there are, where each has its own: see ReshardingDataloader."""
    found = [name.removeprefix("dataloader.") for name in names if name.startswith("dataloader.")]
    written = sum(name.startswith("dp_rank_") for name in found)
    training, parallelism = settings.training, settings.parallelism
    workers = training.dataloader.num_workers
    ranks = number_of_processes()
    for kind in ("tensor", "pipeline", "context"):
        ranks //= getattr(parallelism, f"{kind}_parallel_degree")
    wanted = 0 if training.dataset in ("stdlib", "files", *TASKS) and workers == 0 else ranks
    if found and written != wanted:
        was, now = (f"places in the data of {n} data-parallel ranks" if n else "one place in the data for all ranks"
                    for n in (written, wanted))  # fmt: skip
        raise ConfigError(
            f"training.dataset is {training.dataset!r}, with training.dataloader.num_workers = {workers} on {ranks} "
            f"data-parallel ranks, which continues from {now}; the checkpoint {path!r} has {was}, so "
            "checkpoint.exclude_from_loading must have 'dataloader', which begins the data anew"
        )


def _check_optimizer(settings: Settings, path: str, names: Collection[str]) -> None:
    """The state in a checkpoint is of the optimizer that is asked for: with a momentum of Muon's, or without."""
    has_state = any(name.endswith(".exp_avg") for name in names)
    name, of_muon = settings.optimizer.name, any(name.endswith(".momentum_buffer") for name in names)
    if has_state and of_muon != (name == "Muon"):
        raise ConfigError(f"optimizer.name is {name!r}; the checkpoint {path!r} has another's state, so "
                          "checkpoint.exclude_from_loading must have 'optimizer'")  # fmt: skip


def _steps(folder: str | Path) -> tuple[list[int], list[int]]:
    """Steps of the checkpoints in a folder, sorted: (those of TorchTitan's format, those of Hugging Face's)."""
    own, exported = [], []
    for path in Path(folder).glob("step-*"):
        if not (found := re.fullmatch(r"step-(\d+)", path.name)):
            continue
        if (path / ".metadata").is_file():
            own.append(int(found[1]))
        elif (path / "model.safetensors.index.json").is_file():
            exported.append(int(found[1]))
    return sorted(own), sorted(exported)


def _check_weights(field: str, path: str, in_hf: bool) -> None:
    if "://" in path:
        return
    folder = Path(path)
    wanted = "a folder of safetensors files" if in_hf else "the folder of one checkpoint, such as .../step-100"
    if any(folder.glob("*.safetensors")) if in_hf else (folder / ".metadata").is_file():
        return
    if not folder.is_dir():
        found = "it is no folder"
    elif steps := [f"step-{step}" for step in _steps(folder)[0]]:
        found = f"it has {', '.join(steps)}"
    elif any(folder.glob("*.safetensors")):
        found = "it has safetensors, which need checkpoint.initial_load_in_hf = true"
    else:
        found = "it has no checkpoint"
    raise ConfigError(f"{field} is {path!r}; it must be {wanted}: {found}")
