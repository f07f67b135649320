"""Which values TorchTitan's settings may have: all their fields, under the names of TOML files."""

import dataclasses
import functools
import math
import os
import typing
from collections.abc import Callable
from typing import Any

from gdn2_titan.convert.toml_table import ConfigError, describe, fits

__all__ = ["ANY", "ELSEWHERE", "FIELDS", "IGNORED", "RANGES", "Allowed", "check_range", "check_ranges", "each"]


@dataclasses.dataclass(frozen=True)
class Allowed:
    words: str
    """What comes after "it must be" """
    test: Callable[[Any], bool]
    """Whether a value of the field's type is allowed"""


def _one_of(*names: str) -> Allowed:
    return Allowed("one of " + ", ".join(map(repr, names)), lambda value: value in names)


def _names_of(*names: str) -> Allowed:
    words = f"a list of some of {', '.join(map(repr, names))}, each at most once"
    return Allowed(words, lambda value: set(value) <= set(names) and len(set(value)) == len(value))


def _or_none(allowed: Allowed) -> Allowed:
    return Allowed(f"left out, or {allowed.words}", lambda value: value is None or allowed.test(value))


def _at_least(least: int) -> Allowed:
    return Allowed(f"at least {least}", lambda value: value >= least)


def _is_schedule(name: str) -> bool:
    from torch.distributed.pipelining.schedules import get_schedule_class

    try:
        return bool(get_schedule_class(name))
    except ValueError:
        return False


COUNT, SIZE = _at_least(1), _at_least(0)
AMOUNT = Allowed("a finite number of at least 0", lambda value: 0 <= value < math.inf)
SHARE = Allowed("at least 0 and at most 1", lambda value: 0 <= value <= 1)
MOMENT = Allowed("at least 0 and less than 1", lambda value: 0 <= value < 1)
# torch.distributed counts milliseconds.
TIMEOUT = Allowed("at least 1 and at most 1000000000", lambda value: 1 <= value <= 10**9)
TEXT = Allowed("not empty", lambda value: value.strip() != "")


def each(section: str, values: dict[str, Any]) -> dict[str, Any]:
    """{field: value} of {"name name": value}."""
    return {f"{section}.{name}": value for names, value in values.items() for name in names.split()}


RANGES: dict[str, Allowed] = {
    "job.save_config_file": Allowed("the name of a file", lambda value: value is None or os.path.basename(value) != ""),
    **each("profiling", {"profile_freq profiler_active": COUNT, "profiler_warmup": SIZE}),
    "metrics.log_freq": COUNT,
    "optimizer.name": _one_of("Adam", "AdamW", "Muon"),
    **each("optimizer", {"lr weight_decay": AMOUNT, "beta1 beta2": MOMENT}),
    # 0 divides 0 by 0 where a weight has had no gradient yet.
    "optimizer.eps": Allowed("a finite number of more than 0", lambda value: 0 < value < math.inf),
    "optimizer.implementation": _one_of("for-loop", "foreach", "fused"),
    "optimizer.weight_decay_on": _one_of("matrices", "all"),
    "optimizer.muon_lr": _or_none(AMOUNT),
    "optimizer.muon_momentum": MOMENT,
    "optimizer.muon_ns_steps": Allowed("at least 1 and less than 100", lambda value: 1 <= value < 100),
    "optimizer.muon_adjust_lr_fn": _one_of("match_rms_adamw", "original"),
    "lr_scheduler.warmup_steps": SIZE,
    "lr_scheduler.total_steps": _or_none(COUNT),
    "lr_scheduler.decay_ratio": _or_none(SHARE),
    "lr_scheduler.decay_type": _one_of("linear", "sqrt", "cosine"),
    "lr_scheduler.min_lr_factor": SHARE,
    **each("training", {"local_batch_size seq_len steps gc_freq": COUNT}),
    "training.global_batch_size": Allowed("-1 or at least 1", lambda value: value == -1 or value >= 1),
    "training.max_norm": Allowed("more than 0 (inf clips nothing)", lambda value: value > 0),
    **each("training", {"dtype mixed_precision_param": _one_of("bfloat16", "float32")}),
    "training.mixed_precision_reduce": _one_of("float32"),
    **each("training.dataloader", {"num_workers": SIZE, "prefetch_factor": _or_none(COUNT)}),
    "parallelism.fsdp_reshard_after_forward": _one_of("default", "always", "never"),
    **each("parallelism", {"pipeline_parallel_first_stage_less_layers pipeline_parallel_last_stage_less_layers": SIZE}),
    "parallelism.pipeline_parallel_layers_per_stage": _or_none(COUNT),
    "parallelism.pipeline_parallel_microbatch_size": COUNT,
    "parallelism.pipeline_parallel_schedule": Allowed(
        "one of torch's schedules, such as '1F1B' or 'Interleaved1F1B'", _is_schedule
    ),
    "checkpoint.folder": TEXT,
    "checkpoint.interval": COUNT,
    "checkpoint.export_dtype": _one_of("float16", "bfloat16", "float32"),
    "checkpoint.async_mode": _one_of("disabled", "async", "async_with_pinned_mem"),
    "checkpoint.keep_latest_k": Allowed("0 (keep all) or at least 2", lambda value: value == 0 or value >= 2),
    "checkpoint.load_step": Allowed("-1 (the latest) or at least 0", lambda value: value >= -1),
    "checkpoint.exclude_from_loading": _names_of("optimizer", "lr_scheduler", "dataloader", "train_state"),
    "activation_checkpoint.mode": _one_of("selective", "full", "memory_budget", "none"),
    "activation_checkpoint.selective_ac_option": Allowed(
        "'op' or a number of layers of at least 1, such as '2'",
        lambda value: value == "op" or (value.isdecimal() and int(value) >= 1),
    ),
    "activation_checkpoint.memory_budget": SHARE,
    "activation_checkpoint.determinism_check": _one_of("default", "none"),
    "compile.components": _names_of("model", "loss"),
    **each("quantize.linear", {"float8.smallest_side mx.smallest_side": SIZE}),
    **each("comm", {"init_timeout_seconds train_timeout_seconds": TIMEOUT, "trace_buf_size": SIZE}),
    **each("validation", {"local_batch_size seq_len freq": COUNT}),
    "validation.steps": Allowed("-1 (all of the data) or at least 1", lambda value: value == -1 or value >= 1),
    **each("validation.dataloader", {"num_workers": SIZE, "prefetch_factor": _or_none(COUNT)}),
    "debug.seed": _or_none(Allowed("at least 0 and less than 2**63", lambda value: 0 <= value < 2**63)),
}

_MOE = "this model has no experts"
_FT = "this training has no fault tolerance of TorchFT's"
_SCRIPT = "only another program of TorchTitan's reads it"

# Field: the one value that it may have, and why. Nothing that trains this model reads these.
IGNORED: dict[str, tuple[Any, str]] = {
    "parallelism.context_parallel_rotate_method": ("allgather", "this model's ranks hand on states, not keys"),
    "parallelism.pipeline_parallel_expert_parallel_overlap": (True, _MOE),
    **each("parallelism", {"expert_parallel_degree expert_tensor_parallel_degree": (1, _MOE)}),
    "parallelism.expert_parallel_comm_backend": ("standard", _MOE),
    "debug.moe_force_load_balance": (False, _MOE),
    **each("quantize.grouped_mm", {"float8.fqns mx.fqns": ([], _MOE), "mx.recipe_name": ("mxfp8", _MOE)}),
    "checkpoint.enable_ft_dataloader_checkpoints": (True, _FT),
    **each("fault_tolerance", {"enable": (False, _FT), "process_group": ("gloo", _FT), "min_replica_size": (1, _FT)}),
    **each("fault_tolerance", {"process_group_timeout_ms": (10000, _FT), "replica_id group_size": (0, _FT)}),
    "fault_tolerance.semi_sync_method": (None, _FT),
    **each("memory_estimation", {"enable disable_fake_mode": (False, _SCRIPT)}),
    "experimental.custom_args_module": ("", "job.custom_config_module names the module"),
    "optimizer.early_step_in_backward": (False, "gradients are clipped, and weight decay is per group"),
    "comm.mode": ("default", "the model's operators need the other ranks"),
}

# Fields that are checked with others, by checks.settings and what it calls.
ELSEWHERE: set[str] = {
    f"{section}.{name}"
    for section, names in {
        "job": "config_file dump_folder custom_config_module",
        "experimental": "custom_import",
        "model": "name flavor hf_assets_path tokenizer_path converters",
        "profiling": "enable_profiling enable_memory_snapshot",
        "metrics": "enable_wandb",
        "optimizer": "muon_nesterov",
        "training": "dataset dataset_path enable_cpu_offload gc_debug dataloader.persistent_workers",
        "validation": "enable dataset dataset_path dataloader.persistent_workers",
        "parallelism": "data_parallel_replicate_degree data_parallel_shard_degree tensor_parallel_degree "
        "pipeline_parallel_degree context_parallel_degree enable_async_tensor_parallel context_parallel_load_balancer "
        "module_fqns_per_model_part pipeline_parallel_schedule_csv",
        "checkpoint": "initial_load_path initial_load_in_hf initial_load_in_hf_quantized last_save_in_hf "
        "create_seed_checkpoint load_only enable_first_step_checkpoint",
        "compile": "enable backend",
        "debug": "deterministic_warn_only",
        "quantize.linear.float8": "recipe_name filter_fqns emulate enable_fsdp_float8_all_gather "
        "precompute_float8_dynamic_scale_for_fsdp",
        "quantize.linear.mx": "recipe_name filter_fqns emulate mxfp8_dim1_cast_kernel_choice",
    }.items()
    for name in names.split()
}

# Fields of which any value of their type is right, and why.
ANY: dict[str, tuple[str, ...]] = {
    "a text that the log shows": ("job.description",),
    "a folder in job.dump_folder, made where it is missing, or the beginning of names there": (
        *("profiling.save_traces_folder", "profiling.save_memory_snapshot_folder", "metrics.save_tb_folder"),
        *("comm.save_traces_folder", "comm.save_traces_file_prefix"),
    ),
    "a switch that works by itself": (
        *("job.print_config", "metrics.enable_tensorboard", "metrics.disable_color_printing"),
        *("metrics.save_for_all_ranks", "model.print_after_conversion"),
        *("training.dataloader.pin_memory", "validation.dataloader.pin_memory", "parallelism.disable_loss_parallel"),
        *("checkpoint.enable", "checkpoint.initial_load_model_only", "checkpoint.last_save_model_only"),
        *("activation_checkpoint.early_stop", "activation_checkpoint.visualize_memory_budget_pareto"),
        *("activation_checkpoint.preserve_rng_state", "activation_checkpoint.debug", "debug.deterministic"),
    ),
    "parts of names; where no layer has them, none is meant": (
        "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns",
    ),
}


FIELDS = sorted({*RANGES, *IGNORED, *ELSEWHERE, *(name for names in ANY.values() for name in names)})


def check_range(field: str, value: Any) -> None:
    """Raise ConfigError if a value of the field's type is not allowed whatever the other settings are."""
    if field in IGNORED and value != IGNORED[field][0]:
        only, why = IGNORED[field]
        raise ConfigError(f"{field} is {value!r}; it must be {only!r}, or left out: {why}")
    allowed = RANGES.get(field)
    if allowed is not None and not allowed.test(value):
        raise ConfigError(f"{field} is {value!r}; it must be {allowed.words}")


def check_ranges(settings: Any) -> None:
    """Raise ConfigError if a setting of TorchTitan's, or of this package, has a wrong type, or is never allowed."""
    for name in FIELDS:
        *sections, last = name.split(".")
        try:
            section = functools.reduce(getattr, sections, settings)
        except AttributeError:  # of the other generation
            continue
        if dataclasses.is_dataclass(section) and hasattr(section, last):
            value, annotation = getattr(section, last), typing.get_type_hints(type(section)).get(last, Any)
            if not fits(value, annotation):
                raise ConfigError(f"{name} is {value!r}; it must be {describe(annotation)}")
            check_range(name, value)
