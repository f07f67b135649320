"""Whether [checkpoint] asks for checkpoints that are there, and for no more than TorchTitan does with them."""

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..settings import Settings
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
    if own or not (checkpoint.initial_load_path or checkpoint.initial_load_in_hf):
        return
    field, path = "checkpoint.initial_load_path", checkpoint.initial_load_path
    if not path:
        field, path = "model.hf_assets_path", settings.model.hf_assets_path
    if IS_V02 and os.path.exists(folder):
        raise ConfigError(f"{field} is {path!r}; TorchTitan reads it only where the folder of checkpoints is not there "
                          f"yet: {folder!r}, which has none, must be removed")  # fmt: skip
    _check_weights(field, path, checkpoint.initial_load_in_hf)


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
