"""The fields of TOML files and where TorchTitan 0.3 has them: one table, by which the Settings are read out of its
config and a TOML file is written into it; and the settings that TOML files have not."""

import contextlib
import dataclasses
import functools
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field, is_dataclass, make_dataclass
from typing import Any

from ..checks.ranges import COUNT, SIZE
from ..errors import ConfigError

__all__ = [
    "ANY",
    "COUNTERPARTS",
    "ONLY",
    "OR_NONE",
    "WITHOUT",
    "check_own_fields",
    "get",
    "in_words_of_03",
    "job_config_class",
    "put",
]


def _same(section: str, place: str, names: str) -> dict[str, str]:
    return {f"{section}.{name}": f"{place}.{name}" for name in names.split()}


# Field of a TOML file: field of Trainer.Config. Whole sections of this package are one entry each. What is not a field
# but a choice of class there (model.flavor, [activation_checkpoint]) is in job_config.py.
COUNTERPARTS: dict[str, str] = {
    "job.dump_folder": "dump_folder",
    "job.print_config": "debug.print_config",
    "job.save_config_file": "debug.save_config_file",
    **_same(
        "profiling",
        "profiler",
        "enable_profiling save_traces_folder profile_freq profiler_active profiler_warmup enable_memory_snapshot "
        "save_memory_snapshot_folder",
    ),
    **_same(
        "metrics",
        "metrics",
        "log_freq enable_tensorboard disable_color_printing save_tb_folder save_for_all_ranks enable_wandb",
    ),
    "model.hf_assets_path": "hf_assets_path",
    "model.converters": "converters",
    **_same("optimizer", "optimizer", "name lr beta1 beta2 eps weight_decay implementation"),
    **_same("lr_scheduler", "lr_scheduler", "warmup_steps total_steps decay_ratio decay_type min_lr_factor"),
    **_same("training", "dataloader", "dataset dataset_path"),
    **_same("training.dataloader", "dataloader", "num_workers persistent_workers pin_memory prefetch_factor"),
    **_same(
        "training",
        "training",
        "local_batch_size global_batch_size seq_len max_norm steps enable_cpu_offload dtype mixed_precision_param "
        "mixed_precision_reduce gc_freq gc_debug",
    ),
    **_same(
        "parallelism",
        "parallelism",
        "data_parallel_replicate_degree data_parallel_shard_degree fsdp_reshard_after_forward tensor_parallel_degree "
        "pipeline_parallel_degree module_fqns_per_model_part pipeline_parallel_first_stage_less_layers "
        "pipeline_parallel_last_stage_less_layers pipeline_parallel_layers_per_stage pipeline_parallel_schedule "
        "pipeline_parallel_schedule_csv pipeline_parallel_microbatch_size context_parallel_degree "
        "context_parallel_load_balancer expert_parallel_degree",
    ),
    "parallelism.enable_async_tensor_parallel": "compile.enable_async_tensor_parallel",
    **_same(
        "checkpoint",
        "checkpoint",
        "enable folder interval initial_load_path initial_load_model_only initial_load_in_hf "
        "initial_load_in_hf_quantized last_save_model_only last_save_in_hf export_dtype async_mode keep_latest_k "
        "load_step exclude_from_loading enable_first_step_checkpoint create_seed_checkpoint load_only",
    ),
    **_same("compile", "compile", "enable components backend"),
    "quantize.linear.float8": "quantize.linear.float8",
    "quantize.linear.mx": "quantize.linear.mx",
    **_same(
        "comm",
        "comm",
        "init_timeout_seconds train_timeout_seconds trace_buf_size save_traces_folder save_traces_file_prefix mode",
    ),
    **_same("validation", "validator", "enable freq steps"),
    **_same("validation", "validator.dataloader", "dataset dataset_path local_batch_size seq_len"),
    **_same(
        "validation.dataloader", "validator.dataloader", "num_workers persistent_workers pin_memory prefetch_factor"
    ),
    **_same("debug", "debug", "seed deterministic deterministic_warn_only moe_force_load_balance"),
    "gdn2": "gdn2",
    "data": "data",
    "task": "task",
}

# Fields of TOML files that TorchTitan 0.3 has not, with their defaults, which say no more than leaving them out.
WITHOUT: dict[str, Any] = {
    "model.tokenizer_path": None,
    "model.print_after_conversion": False,
    "optimizer.early_step_in_backward": False,
    "parallelism.disable_loss_parallel": False,
    "parallelism.pipeline_parallel_expert_parallel_overlap": True,
    "parallelism.context_parallel_rotate_method": "allgather",
    "parallelism.expert_tensor_parallel_degree": 1,
    "parallelism.expert_parallel_comm_backend": "standard",
    "checkpoint.enable_ft_dataloader_checkpoints": True,
    "activation_checkpoint.early_stop": False,
    "quantize.grouped_mm.float8.fqns": [],
    "quantize.grouped_mm.mx.recipe_name": "mxfp8",
    "quantize.grouped_mm.mx.fqns": [],
    "memory_estimation.enable": False,
    "memory_estimation.disable_fake_mode": False,
    "fault_tolerance.enable": False,
    "fault_tolerance.process_group": "gloo",
    "fault_tolerance.process_group_timeout_ms": 10000,
    "fault_tolerance.replica_id": 0,
    "fault_tolerance.group_size": 0,
    "fault_tolerance.min_replica_size": 1,
    "fault_tolerance.semi_sync_method": None,
    "experimental.custom_import": "",
    "experimental.custom_args_module": "",
}

_TYPES = "only spmd_backend 'spmd_types' reads it"

# Field: the one value that it may have, and why.
ONLY = {
    "training.disable_cuda_graphs": (True, "captured steps are not supported"),
    "parallelism.spmd_backend": ("partial_dtensor", "the model is sharded by DTensors"),
    "parallelism.enable_sequence_parallel": (True, "tensor-parallel ranks share the tokens between layers"),
    "parallelism.enable_fsdp_symm_mem": (False, "the model's own plan shards it"),
    "parallelism.context_parallel_ptrr_mask_key": (None, "only load balancer 'ptrr' reads it"),
    "optimizer.param_groups": ([], "which parameters decay is the model's own"),
    "optimizer.optimizer_factory_kwargs_by_name": ({}, "optimizer.name and the fields beside it say all"),
    "debug.spmd_typechecking": (False, _TYPES),
    "debug.batch_invariant": (False, "TorchTitan does not train in that mode"),
}

# Numbers that may be None.
OR_NONE = {
    "profiler.profiler_repeat": SIZE,
    "profiler.profiler_skip_first": SIZE,
    "profiler.profiler_skip_first_wait": SIZE,
    "profiler.memory_snapshot_freq": COUNT,
    "profiler.memory_snapshot_max_entries": COUNT,
}

# Fields of which any value of their type is right, and why.
ANY = {
    "model_spec": "the config function's, with its flavor checked",
    "activation_checkpoint": "a policy, with what it says checked as [activation_checkpoint]",
    "profiler.trace_post_processor": "a function of the user's",
    "override.imports": "modules of the user's",
    "debug.detect_anomaly": "a switch that works by itself",
    "debug.enable_structured_logging": "a switch that works by itself",
}


def check_own_fields(config: Any) -> None:
    """Raise ConfigError for a setting without counterpart in TOML files that cannot be honoured."""
    for name, (only, why) in ONLY.items():
        section, field = name.split(".")
        if (value := getattr(getattr(config, section), field)) != only:
            raise ConfigError(f"{name} is {value!r}; with this model it must be {only!r}: {why}")
    for name, allowed in OR_NONE.items():
        section, field = name.split(".")
        value = getattr(getattr(config, section), field)
        if value is not None and not (type(value) is int and allowed.test(value)):
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


def get(config: Any, place: str) -> Any:
    """A config's field of that dotted name."""
    return functools.reduce(getattr, place.split("."), config)


def put(config: Any, place: str, value: Any) -> None:
    """Set a config's field of that dotted name."""
    *parents, name = place.split(".")
    setattr(get(config, ".".join(parents)) if parents else config, name, value)


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


def _type(config: Any, place: str) -> Any:
    *parents, name = place.split(".")
    return typing.get_type_hints(type(get(config, ".".join(parents)) if parents else config))[name]


def _section(name: str, tree: dict[str, Any], base: tuple[type, ...] = ()) -> type:
    """A dataclass of the branches and leaves (type, default) of a tree of dictionaries."""
    made = []
    for key, value in tree.items():
        if isinstance(value, dict):
            value = _section(key, value, {"job": (Job,), "model": (Model,)}.get(key, ()))
            made.append((key, value, field(default_factory=value)))
        elif is_dataclass(value[1]) or isinstance(value[1], list):
            made.append((key, value[0], field(default_factory=functools.partial(_copy, value[1]))))
        else:
            made.append((key, *value))
    return make_dataclass(name, [m if len(m) == 2 else (m[0], m[1], _as_field(m[2])) for m in made], bases=base)


def _as_field(default: Any) -> Any:
    return default if isinstance(default, dataclasses.Field) else field(default=default)


def _copy(value: Any) -> Any:
    return dataclasses.replace(value) if is_dataclass(value) else list(value)


def job_config_class(defaults: Any) -> type:
    """The class of job configs: the sections and fields of TOML files, with the defaults of a Trainer.Config."""
    tree: dict[str, Any] = {}
    for place, counterpart in COUNTERPARTS.items():
        *sections, name = place.split(".")
        branch = functools.reduce(lambda tree, section: tree.setdefault(section, {}), sections, tree)
        branch[name] = (_type(defaults, counterpart), get(defaults, counterpart))
    tree["activation_checkpoint"] = (ActivationCheckpoint, ActivationCheckpoint())
    return _section("JobConfig", tree, (_ToDict,))


class _ToDict:
    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
