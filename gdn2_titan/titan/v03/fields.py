"""Where TorchTitan 0.3 has the fields of TOML files, by which Settings are read out of its config and TOML files are
written into it; and the settings that TOML files have not."""

import contextlib
import copy
import functools
import operator
import re
import typing
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, make_dataclass
from typing import Any

from ..checks.ranges import COUNT, FIELDS, IGNORED, SIZE, Allowed, each
from ..errors import ConfigError

__all__ = ["ANY", "BACKENDS", "COUNTERPARTS", "ONLY", "OWN_RANGES", "WITHOUT", "check_own_fields", "in_words_of_03",
           "job_config_class", "owner"]  # fmt: skip


# Field or section of a TOML file: where Trainer.Config has it, if not under the same name.
MOVED = {
    "job.dump_folder": "dump_folder",
    "job.print_config": "debug.print_config",
    "job.save_config_file": "debug.save_config_file",
    "profiling": "profiler",
    "model.hf_assets_path": "hf_assets_path",
    "model.converters": "converters",
    "training.dataset": "dataloader.dataset",
    "training.dataset_path": "dataloader.dataset_path",
    "training.dataloader": "dataloader",
    "parallelism.enable_async_tensor_parallel": "compile.enable_async_tensor_parallel",
    "validation": "validator",
    **{f"validation.{name}": f"validator.dataloader.{name}"
       for name in ("dataset", "dataset_path", "local_batch_size", "seq_len")},
    "validation.dataloader": "validator.dataloader",
}  # fmt: skip
# What is not a field but a choice of class there, or is about the TOML file itself.
CHOSEN = ("model.name", "model.flavor", "activation_checkpoint", "job.config_file", "job.description",
          "job.custom_config_module")  # fmt: skip
# Whole sections of this package.
OURS = ("quantize.linear.float8", "quantize.linear.mx", "gdn2", "data", "task")

# TorchTitan 0.3 has these, and nothing reads them there either.
_STILL_THERE = ("parallelism.expert_parallel_degree", "debug.moe_force_load_balance", "comm.mode")
# Fields of TOML files that it has not, with their defaults, which say no more than leaving them out.
WITHOUT: dict[str, Any] = {
    "model.tokenizer_path": None,
    "model.print_after_conversion": False,
    "parallelism.disable_loss_parallel": False,
    "activation_checkpoint.early_stop": False,
    "experimental.custom_import": "",
    **{name: only for name, (only, _) in IGNORED.items() if name not in _STILL_THERE},
}


def _counterpart(field: str) -> str:
    section, _, name = field.rpartition(".")
    return MOVED.get(field) or f"{MOVED.get(section, section)}.{name}"


# Field of a TOML file: field of Trainer.Config.
COUNTERPARTS: dict[str, str] = {
    **{name: _counterpart(name) for name in FIELDS if name not in WITHOUT and not name.startswith((*CHOSEN, *OURS))},
    **{section: section for section in OURS},
}

# Field: the one value that it may have, and why.
ONLY = {
    "training.disable_cuda_graphs": (True, "captured steps are not supported"),
    "parallelism.enable_sequence_parallel": (True, "tensor-parallel ranks share the tokens between layers"),
    "parallelism.enable_fsdp_symm_mem": (False, "the model's own plan shards it"),
    "parallelism.context_parallel_ptrr_mask_key": (None, "only load balancer 'ptrr' reads it"),
    "optimizer.param_groups": ([], "which parameters decay is the model's own"),
    "optimizer.optimizer_factory_kwargs_by_name": ({}, "optimizer.name and the fields beside it say all"),
    "debug.spmd_typechecking": (False, "its layers say no types of spmd_types"),
    "debug.batch_invariant": (False, "TorchTitan does not train in that mode"),
}


def _or_none(number: Allowed) -> Allowed:
    return Allowed(number.words, lambda value: value is None or (type(value) is int and number.test(value)))


BACKENDS = ("spmd_types", "partial_dtensor")
# Field: which values of it are right.
OWN_RANGES = {
    "parallelism.spmd_backend": Allowed(" or ".join(map(repr, BACKENDS)), lambda value: value in BACKENDS),
    **each("profiler", {"profiler_repeat profiler_skip_first profiler_skip_first_wait": _or_none(SIZE)}),
    **each("profiler", {"memory_snapshot_freq memory_snapshot_max_entries": _or_none(COUNT)}),
}

# Fields of which any value of their type is right, and why.
ANY = {
    "model_spec": "the config function's, with its flavor checked as model.flavor",
    "activation_checkpoint": "a policy, with what it says checked as [activation_checkpoint]",
    "profiler.trace_post_processor": "a function of the user's",
    "override.imports": "modules of the user's",
    "debug.detect_anomaly": "a switch that works by itself",
    "debug.enable_structured_logging": "a switch that works by itself",
}


def check_own_fields(config: Any) -> None:
    """Raise ConfigError for a setting without counterpart in TOML files that cannot be honoured."""
    for name, (only, why) in ONLY.items():
        if (value := getattr(*owner(config, name))) != only:
            raise ConfigError(f"{name} is {value!r}; with this model it must be {only!r}: {why}")
    for name, allowed in OWN_RANGES.items():
        if not allowed.test(value := getattr(*owner(config, name))):
            raise ConfigError(f"{name} is {value!r}; it must be {allowed.words}")


@contextlib.contextmanager
def in_words_of_03() -> Iterator[None]:
    """Sentences on the fields of TOML files raised in here name the fields of TorchTitan 0.3's config."""
    try:
        yield
    except ConfigError as error:
        names = COUNTERPARTS | {"model.flavor": "model_spec.flavor"}
        in_names = re.sub(r"(?<![\w.'/])[a-z]\w*(?:\.\w+)+", lambda found: names.get(found[0], found[0]), str(error))
        raise ConfigError(in_names) from error


def owner(config: Any, place: str) -> tuple[Any, str]:
    """The section of a config, and the name there, of the field of that dotted name."""
    section, _, name = place.rpartition(".")
    return operator.attrgetter(section)(config) if section else config, name


@dataclass
class Job:
    config_file: str | None = None
    description: str = "default job"
    custom_config_module: str = ""


@dataclass
class Model:
    name: str = "gdn2"
    flavor: str = "debug"


@dataclass
class ActivationCheckpoint:
    mode: typing.Literal["selective", "full", "memory_budget", "none"] = "selective"
    selective_ac_option: str = "2"
    per_op_sac_force_recompute_mm_shapes_by_fqns: list[str] = field(default_factory=lambda: ["moe.router.gate"])
    memory_budget: float = 0.5
    visualize_memory_budget_pareto: bool = False
    preserve_rng_state: bool = True
    determinism_check: str = "default"
    debug: bool = False


def job_config_class(defaults: Any) -> type:
    """The class of job configs: the sections and fields of TOML files, with the defaults of a Trainer.Config."""
    tree: dict[str, Any] = {"job": {}, "model": {}}
    for place, counterpart in COUNTERPARTS.items():
        *sections, name = place.split(".")
        branch = functools.reduce(lambda tree, section: tree.setdefault(section, {}), sections, tree)
        section, there = owner(defaults, counterpart)
        branch[name] = typing.get_type_hints(type(section))[there], getattr(section, there)
    tree["activation_checkpoint"] = ActivationCheckpoint, ActivationCheckpoint()
    return _dataclass("JobConfig", tree)


def _dataclass(name: str, tree: dict[str, Any]) -> type:
    """Of the branches and leaves (type, default) of a tree of dictionaries."""
    made = []
    for key, value in tree.items():
        if isinstance(value, dict):
            made.append((key, section := _dataclass(key, value), field(default_factory=section)))
        else:
            made.append((key, value[0], field(default_factory=functools.partial(copy.deepcopy, value[1]))))
    return make_dataclass(name, made, bases=BASES.get(name, ()))


class _ToDict:
    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


BASES = {"job": (Job,), "model": (Model,), "JobConfig": (_ToDict,)}
