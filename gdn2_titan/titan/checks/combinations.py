"""Settings that are right only beside others, or with what is on this machine."""

import importlib
import importlib.util
import os

import torch

from ..errors import ConfigError
from ..settings import Settings
from ..torchtitan_version import IS_V02

__all__ = ["check_combinations", "check_module", "check_name", "number_of_processes"]


def check_combinations(settings: Settings) -> None:
    """Raise ConfigError for a setting that would do nothing, or end the training later, because of another."""
    _check_folder(settings.job.dump_folder)
    _check_custom_modules(settings)
    profiling, metrics = settings.profiling, settings.metrics
    cycle = profiling.profiler_warmup + profiling.profiler_active
    if profiling.enable_profiling and profiling.profile_freq < cycle:
        raise ConfigError(f"profiling.profile_freq is {profiling.profile_freq}; it must be at least {cycle}, the sum "
                          "of profiling.profiler_warmup and profiling.profiler_active")  # fmt: skip
    if metrics.enable_wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError("metrics.enable_wandb is true; it must be false where wandb is not installed")
    for part in ("training", "validation"):
        loader = getattr(settings, part).dataloader
        for name, default in (("persistent_workers", False), ("prefetch_factor", None)):
            value = getattr(loader, name)
            if value != default and not loader.num_workers:
                raise ConfigError(
                    f"{part}.dataloader.{name} is {value!r}; then {part}.dataloader.num_workers must be at least 1"
                )
    if settings.debug.deterministic_warn_only and not settings.debug.deterministic:
        raise ConfigError("debug.deterministic_warn_only is true; then debug.deterministic must be true as well")
    compiling = settings.compile
    if compiling.enable and not compiling.components:
        raise ConfigError("compile.components is []; with compile.enable it must have 'model', 'loss' or both")
    if compiling.enable and compiling.backend not in (known := torch.compiler.list_backends(exclude_tags=())):
        raise ConfigError(f"compile.backend is {compiling.backend!r}; it must be one of {', '.join(known)}")


def _check_folder(path: str) -> None:
    """What a training writes goes there: the nearest folder that is there already must be one to write in."""
    there = os.path.abspath(path)
    while not os.path.lexists(there):
        there = os.path.dirname(there)
    if not os.path.isdir(there):
        raise ConfigError(f"job.dump_folder is {os.fspath(path)!r}; it must be a folder, and {there!r} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"job.dump_folder is {os.fspath(path)!r}; it must be a folder that can be written in")


def _check_custom_modules(settings: Settings) -> None:
    if IS_V02:
        check_module("experimental.custom_import", settings.experimental.custom_import)
    elif (module := settings.job.custom_config_module) not in ("", "gdn2_titan.titan.job_config"):
        raise ConfigError(f"job.custom_config_module is {module!r}; with TorchTitan 0.3, which reads no such module, "
                          "it must be left out, or be 'gdn2_titan.titan.job_config'")  # fmt: skip


def check_module(field: str, name: str) -> None:
    """Raise ConfigError if a field names a module that is not there."""
    try:
        missing = name and importlib.util.find_spec(name) is None
    except (ImportError, ValueError):  # a package on the way is missing, or the name is none
        missing = True
    if missing:
        raise ConfigError(f"{field} is {name!r}; it must be a module that can be imported")


def check_name(settings: Settings) -> None:
    """Raise ConfigError unless TorchTitan 0.2.2 knows the model and its flavor. One that experimental.custom_import
    registers is known when that is imported."""
    from torchtitan.experiments import _supported_experiments
    from torchtitan.models import _supported_models
    from torchtitan.protocols import train_spec

    name, flavor = settings.model.name, settings.model.flavor
    known = {*train_spec._extra_train_specs, *_supported_models, *_supported_experiments}
    if name not in known:
        if settings.experimental.custom_import:
            return
        others = ", ".join(sorted(known - {"gdn2"}))
        raise ConfigError(f"model.name is {name!r}; it must be 'gdn2', or one of TorchTitan's own models: {others}")
    flavors = train_spec.get_train_spec(name).model_args
    if flavor not in flavors:
        raise ConfigError(f"model.flavor is {flavor!r}; it must be one of {', '.join(flavors)}")


def number_of_processes() -> int:
    """What torchrun says in WORLD_SIZE, or will say by NGPU; 1 without either.

    Raises:
        ConfigError: if it is no whole number of at least 1.
    """
    name = next((name for name in ("WORLD_SIZE", "NGPU") if name in os.environ), None)
    said = os.environ[name] if name else "1"
    if not (said.isdecimal() and int(said)):
        raise ConfigError(f"{name} is {said!r}; it must be a whole number of at least 1")
    return int(said)
