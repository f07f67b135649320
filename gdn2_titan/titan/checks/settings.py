"""Refuses settings that cannot train, before anything is built: one sentence with field, value, what is allowed."""

import dataclasses
import operator
import os
from typing import Any

import torch
from torchtitan.components.tokenizer import BaseTokenizer

from gdn2_titan.models import flavors
from gdn2_titan.ops.elementwise import BATCH_INVARIANT
from gdn2_titan.parallel import check_tensor_parallel

from ..corpus import check_source
from ..cpu import accelerator
from ..errors import ConfigError
from ..float8 import check_float8
from ..parallelize import check_lengths
from ..pipeline import check_pipeline
from ..settings import GDN2, Settings
from ..tasks import check_task
from ..tokens import check_tokenizer_json
from ..torchtitan_version import IS_V02
from .checkpoint import check_checkpoint
from .combinations import check_combinations, check_name, number_of_processes
from .optimizer import check_optimizer
from .ranges import check_ranges

__all__ = ["check_settings", "check_vocabulary"]


def check_settings(config: Settings | Any) -> None:
    """Raise ConfigError for the first thing wrong with settings, or with a job config. Loads nothing."""
    settings = Settings.of(config)
    check_ranges(settings)
    _check_model(settings)
    _check_processes(settings)
    if settings.model.name == "gdn2":
        _check_shares(settings)
    check_float8(settings)
    check_optimizer(settings)
    _check_rest(settings)


def _check_model(settings: Settings) -> None:
    if IS_V02:
        check_name(settings)
    if settings.model.name != "gdn2":
        return
    flavor = settings.model.flavor
    if flavor not in flavors:
        raise ConfigError(f"model.flavor is {flavor!r}; it must be one of {', '.join(flavors)}")
    gdn2 = settings.gdn2
    try:
        settings.model_args().validate()
    except ValueError as error:
        # The sentence begins with the field; all fields that a flavor leaves open to change are ours.
        known = str(error).split(" ", 1)[0] in {f.name for f in dataclasses.fields(GDN2)}
        raise ConfigError(f"gdn2.{error}" if known else f"model.flavor {flavor!r}: {error}") from error
    if gdn2.statistics_freq < 0:
        raise ConfigError(f"gdn2.statistics_freq is {gdn2.statistics_freq}; it must be 0 (never) or more")


def _check_processes(settings: Settings) -> None:
    parallelism = settings.parallelism
    rest = world = number_of_processes()
    for name in ("pipeline_parallel", "context_parallel", "tensor_parallel", "data_parallel_replicate"):
        degree = getattr(parallelism, f"{name}_degree")
        if degree < 1 or rest % degree:
            left = f"{rest} of {world} processes that other degrees leave" if rest < world else f"{world} processes"
            raise ConfigError(f"parallelism.{name}_degree is {degree}; it must divide the {left}")
        rest //= degree
    replicate, shard = parallelism.data_parallel_replicate_degree, parallelism.data_parallel_shard_degree
    if shard not in (-1, rest):
        raise ConfigError(f"parallelism.data_parallel_shard_degree is {shard}; it must be -1, or {rest} so that all "
                          f"degrees multiply to the {world} processes")  # fmt: skip
    if replicate > 1 and rest * parallelism.context_parallel_degree == 1:
        raise ConfigError(
            f"parallelism.data_parallel_replicate_degree is {replicate}; with {world} processes it must be less, "
            "so that parameters are sharded too (TorchTitan's pure replication scales gradients wrongly)"
        )
    step = settings.training.local_batch_size * replicate * rest
    batch = settings.training.global_batch_size
    if batch != -1 and batch % step:
        raise ConfigError(
            f"training.global_batch_size is {batch}; it must be -1 or a multiple of training.local_batch_size times "
            f"the {replicate * rest} data-parallel processes = {step}"
        )


def _check_shares(settings: Settings) -> None:
    """What the ranks of tensor, context and pipeline parallelism share must be theirs to share."""
    parallelism = settings.parallelism
    args = settings.model_args()
    degree = parallelism.tensor_parallel_degree
    if degree > 1:
        try:
            check_tensor_parallel(args, degree)
        except ValueError as error:
            raise ConfigError(f"parallelism.tensor_parallel_degree is {degree}; {error}") from error
    check_lengths(settings)
    if parallelism.context_parallel_degree > 1 and args.backend == "reference":
        allowed = "'auto', 'triton' or 'torch'"
        raise ConfigError(f"gdn2.backend is 'reference'; with context parallelism it must be {allowed}")
    if parallelism.context_parallel_degree > 1 and args.content_gate:
        raise ConfigError("gdn2.content_gate is true; with context parallelism it must be false")
    if args.backend == BATCH_INVARIANT:
        _check_batch_invariant(settings)
    checkpointing = settings.activation_checkpoint
    for asked, said in (
        (parallelism.enable_async_tensor_parallel, "parallelism.enable_async_tensor_parallel is true"),
        (checkpointing.mode == "memory_budget", "activation_checkpoint.mode is 'memory_budget'"),
    ):
        if asked and not settings.compiles("model"):
            raise ConfigError(f"{said}; then compile.enable must be true and compile.components must have 'model'")
    _check_accelerator(settings, "parallelism.enable_async_tensor_parallel")
    by_op = checkpointing.mode == "selective" and checkpointing.selective_ac_option == "op"
    whole = checkpointing.mode in ("full", "selective") and not by_op
    if degree > 1 and whole and settings.compiles("model") and torch.__version__.startswith("2.13."):
        raise ConfigError(
            f"activation_checkpoint.mode is {checkpointing.mode!r}; with tensor parallelism, compile.enable and "
            "torch 2.13 it must be 'none', or 'selective' with selective_ac_option = 'op'"
        )
    if parallelism.pipeline_parallel_degree > 1:
        check_pipeline(settings, args.n_layers)


def _check_batch_invariant(settings: Settings) -> None:
    for found, what in (
        (settings.parallelism.context_parallel_degree > 1, "context parallelism"),
        (settings.compiles("model"), "compile.enable"),
        (settings.model.converters, "model.converters"),
        (accelerator() is not None, "an accelerator"),
    ):
        if found:
            raise ConfigError(f"gdn2.backend is {BATCH_INVARIANT!r}; with {what} it must be another one")


def _check_accelerator(settings: Settings, field: str) -> None:
    if operator.attrgetter(field)(settings) and accelerator() is None:
        raise ConfigError(f"{field} is true; it must be false on a machine without an accelerator")


def _check_rest(settings: Settings) -> None:
    # A memory snapshot is one of CUDA's allocator.
    for field in ("profiling.enable_memory_snapshot", "training.enable_cpu_offload", "training.gc_debug"):
        _check_accelerator(settings, field)
    checkpoint = settings.checkpoint
    if accelerator() is None and checkpoint.enable and checkpoint.async_mode == "async_with_pinned_mem":
        raise ConfigError("checkpoint.async_mode is 'async_with_pinned_mem'; on a machine without an accelerator it "
                          "must be 'disabled' or 'async'")  # fmt: skip
    check_combinations(settings)
    check_checkpoint(settings)
    field, path = "model.hf_assets_path", settings.model.hf_assets_path
    if IS_V02 and settings.model.tokenizer_path:
        field, path = "model.tokenizer_path", settings.model.tokenizer_path
    if not any(os.path.isfile(os.path.join(path, name)) for name in ("tokenizer.json", "vocab.json", "vocab.txt")):
        raise ConfigError(f"{field} is {path!r}; it must be a folder that holds a Hugging Face tokenizer "
                          "(tokenizer.json), or be left out for the byte-level tokenizer of this package")  # fmt: skip
    check_tokenizer_json(path)
    data = settings.data
    if data.shuffle_seed < 0:
        raise ConfigError(f"data.shuffle_seed is {data.shuffle_seed}; it must be 0 or more")
    if data.cache_dir is not None and not data.cache_dir.strip():
        raise ConfigError(f"data.cache_dir is {data.cache_dir!r}; it must be left out, or name a folder")
    for name in ("training", "validation"):
        part = getattr(settings, name)
        if name == "training" or part.enable:
            check_source(name, part.dataset, part.dataset_path, data.text_column)
    if settings.model.name == "gdn2":
        check_task(settings, settings.model_args().vocab_size)


def check_vocabulary(settings: Settings, tokenizer: BaseTokenizer) -> None:
    """Raise ConfigError unless the model has room for all symbols of a tokenizer."""
    path, vocabulary, room = settings.model.hf_assets_path, tokenizer.get_vocab_size(), settings.model_args().vocab_size
    if vocabulary > room:
        raise ConfigError(f"model.hf_assets_path is {path!r}, a tokenizer of {vocabulary} symbols; the model has room "
                          f"for at most {room}, gdn2.vocab_size makes it more")  # fmt: skip
