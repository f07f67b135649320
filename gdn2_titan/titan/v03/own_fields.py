"""The settings that TOML files have not, of TorchTitan 0.3's config, and sentences in the names that it has."""

import contextlib
import re
from typing import Any

from ..errors import ConfigError
from ..setting_ranges import COUNT, SIZE
from .counterparts import COUNTERPARTS

__all__ = ["ANY", "ONLY", "OR_NONE", "check_own_fields", "in_words_of_03"]

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
def in_words_of_03():
    """Sentences on the fields of TOML files raised in here name the fields of TorchTitan 0.3's config."""
    try:
        yield
    except ConfigError as error:
        names = COUNTERPARTS | {"model.flavor": "model_spec.flavor"}
        in_names = re.sub(r"(?<![\w.'/])[a-z]\w*(?:\.\w+)+", lambda found: names.get(found[0], found[0]), str(error))
        raise ConfigError(in_names) from error
