"""Refuses a job config that cannot train, before anything is built: one sentence with field, value, what is allowed."""

import dataclasses
import os

import torch

from gdn2_titan.models import flavors
from gdn2_titan.parallel import check_tensor_parallel

from .checkpoint_check import check_checkpoint
from .combinations import check_combinations, check_name
from .context import check_lengths
from .corpus import check_source
from .cpu import accelerator
from .errors import ConfigError
from .float8 import check_float8
from .generation import HAS_TOML
from .model_args import model_args
from .pipeline import check_pipeline
from .processes import number_of_processes
from .sections import GDN2, compiles, section
from .setting_ranges import check_ranges
from .tasks import check_task
from .tokens import check_tokenizer_json

__all__ = ["check_vocabulary", "validate_config"]


def _check_model(job_config):
    if HAS_TOML:
        check_name(job_config)
    if job_config.model.name != "gdn2":
        return
    flavor = job_config.model.flavor
    if flavor not in flavors:
        raise ConfigError(f"model.flavor is {flavor!r}; it must be one of {', '.join(flavors)}")
    gdn2 = section(job_config, "gdn2")
    try:
        model_args(job_config).validate()
    except ValueError as error:
        # The sentence begins with the field; all fields that a flavor leaves open to change are ours.
        known = str(error).split(" ", 1)[0] in {f.name for f in dataclasses.fields(GDN2)}
        raise ConfigError(f"gdn2.{error}" if known else f"model.flavor {flavor!r}: {error}") from error
    if gdn2.statistics_freq < 0:
        raise ConfigError(f"gdn2.statistics_freq is {gdn2.statistics_freq}; it must be 0 (never) or more")


def _check_processes(job_config):
    parallelism = job_config.parallelism
    rest = world = number_of_processes()
    for name in (
        "pipeline_parallel_degree",
        "context_parallel_degree",
        "tensor_parallel_degree",
        "data_parallel_replicate_degree",
    ):
        degree = getattr(parallelism, name)
        if degree < 1 or rest % degree:
            of = (
                f"the {world} processes"
                if rest == world
                else f"the {rest} of {world} processes that other degrees leave"
            )
            raise ConfigError(f"parallelism.{name} is {degree}; it must divide {of}")
        rest //= degree
    replicate, shard = parallelism.data_parallel_replicate_degree, parallelism.data_parallel_shard_degree
    if shard not in (-1, rest):
        raise ConfigError(
            f"parallelism.data_parallel_shard_degree is {shard}; it must be -1, or {rest} so that all degrees multiply "
            f"to the {world} processes"
        )
    if replicate > 1 and rest * parallelism.context_parallel_degree == 1:
        raise ConfigError(
            f"parallelism.data_parallel_replicate_degree is {replicate}; with {world} processes it must be less, "
            "so that parameters are sharded too (TorchTitan's pure replication scales gradients wrongly)"
        )
    step = job_config.training.local_batch_size * replicate * rest
    batch = job_config.training.global_batch_size
    if batch != -1 and batch % step:
        raise ConfigError(
            f"training.global_batch_size is {batch}; it must be -1 or a multiple of training.local_batch_size times "
            f"the {replicate * rest} data-parallel processes = {step}"
        )


def _check_shares(job_config):
    """What the ranks of tensor, context and pipeline parallelism share must be theirs to share."""
    parallelism = job_config.parallelism
    args = model_args(job_config)
    degree = parallelism.tensor_parallel_degree
    if degree > 1:
        try:
            check_tensor_parallel(args, degree)
        except ValueError as error:
            raise ConfigError(f"parallelism.tensor_parallel_degree is {degree}; {error}") from error
    check_lengths(job_config)
    if parallelism.context_parallel_degree > 1 and args.backend == "reference":
        allowed = "'auto', 'triton' or 'torch'"
        raise ConfigError(f"gdn2.backend is 'reference'; with context parallelism it must be {allowed}")
    if parallelism.enable_async_tensor_parallel:
        if not compiles(job_config, "model"):
            raise ConfigError(
                "parallelism.enable_async_tensor_parallel is true; then compile.enable must be true and "
                "compile.components must have 'model'"
            )
        if accelerator() is None:
            raise ConfigError(
                "parallelism.enable_async_tensor_parallel is true; it must be false on a machine without an accelerator"
            )
    checkpointing = job_config.activation_checkpoint
    whole = checkpointing.mode == "full" or (
        checkpointing.mode == "selective" and checkpointing.selective_ac_option != "op"
    )
    if checkpointing.mode == "memory_budget" and not compiles(job_config, "model"):
        raise ConfigError(
            "activation_checkpoint.mode is 'memory_budget'; then compile.enable must be true and compile.components "
            "must have 'model'"
        )
    if degree > 1 and whole and compiles(job_config, "model") and torch.__version__.startswith("2.13."):
        raise ConfigError(
            f"activation_checkpoint.mode is {checkpointing.mode!r}; with tensor parallelism, compile.enable and "
            "torch 2.13 it must be 'none', or 'selective' with selective_ac_option = 'op'"
        )
    if parallelism.pipeline_parallel_degree > 1:
        check_pipeline(job_config, args.n_layers)


def _check_rest(job_config):
    if accelerator() is None:
        for name in ("enable_profiling", "enable_memory_snapshot"):
            if getattr(job_config.profiling, name):
                raise ConfigError(f"profiling.{name} is true; it must be false on a machine without an accelerator")
        for name in ("enable_cpu_offload", "gc_debug"):
            if getattr(job_config.training, name):
                raise ConfigError(f"training.{name} is true; it must be false on a machine without an accelerator")
        if job_config.checkpoint.enable and job_config.checkpoint.async_mode == "async_with_pinned_mem":
            raise ConfigError(
                "checkpoint.async_mode is 'async_with_pinned_mem'; on a machine without an accelerator it must be "
                "'disabled' or 'async'"
            )
    check_combinations(job_config)
    check_checkpoint(job_config)
    field, path = "model.hf_assets_path", job_config.model.hf_assets_path
    if HAS_TOML and job_config.model.tokenizer_path:
        field, path = "model.tokenizer_path", job_config.model.tokenizer_path
    if not any(os.path.isfile(os.path.join(path, name)) for name in ("tokenizer.json", "vocab.json", "vocab.txt")):
        raise ConfigError(
            f"{field} is {path!r}; it must be a folder that holds a Hugging Face tokenizer "
            "(tokenizer.json), or be left out for the byte-level tokenizer of this package"
        )
    check_tokenizer_json(path)
    data = section(job_config, "data")
    if data.shuffle_seed < 0:
        raise ConfigError(f"data.shuffle_seed is {data.shuffle_seed}; it must be 0 or more")
    for name in ("training", "validation"):
        part = getattr(job_config, name)
        if name == "training" or part.enable:
            check_source(name, part.dataset, part.dataset_path, data.text_column)
    if job_config.model.name == "gdn2":
        check_task(job_config, model_args(job_config).vocab_size)


def validate_config(job_config):
    """Raise ConfigError for the first thing wrong with a parsed job config. Loads nothing."""
    check_ranges(job_config)
    _check_model(job_config)
    _check_processes(job_config)
    if job_config.model.name == "gdn2":
        _check_shares(job_config)
    check_float8(job_config)
    _check_rest(job_config)


def check_vocabulary(job_config, tokenizer):
    """Raise ConfigError unless the model has room for all symbols of a tokenizer."""
    path, flavor = job_config.model.hf_assets_path, job_config.model.flavor
    vocabulary, room = tokenizer.get_vocab_size(), flavors[flavor].vocab_size
    if vocabulary > room:
        raise ConfigError(
            f"model.hf_assets_path is {path!r}, a tokenizer of {vocabulary} symbols; flavor {flavor!r} has room for "
            f"at most {room}"
        )
