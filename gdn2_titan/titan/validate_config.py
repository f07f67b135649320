"""Refuses a job config that cannot train, before anything is built: one sentence with field, value, what is allowed."""

import dataclasses
import os

from gdn2_titan.models import flavors

from .corpus import check_source
from .cpu import accelerator
from .errors import ConfigError
from .float8 import check_float8
from .sections import GDN2, section

__all__ = ["validate_config"]


def _check_model(job_config):
    if job_config.model.name != "gdn2":
        return
    flavor = job_config.model.flavor
    if flavor not in flavors:
        raise ConfigError(f"model.flavor is {flavor!r}; it must be one of {', '.join(flavors)}")
    gdn2 = section(job_config, "gdn2")
    overrides = gdn2.overrides()
    try:
        dataclasses.replace(flavors[flavor], **overrides).validate()
    except ValueError as error:
        # The sentence begins with the field; all fields that a flavor leaves open to change are ours.
        known = str(error).split(" ", 1)[0] in {f.name for f in dataclasses.fields(GDN2)}
        raise ConfigError(f"gdn2.{error}" if known else f"model.flavor {flavor!r}: {error}") from error
    if gdn2.statistics_freq < 0:
        raise ConfigError(f"gdn2.statistics_freq is {gdn2.statistics_freq}; it must be 0 (never) or more")


def _check_numbers(job_config):
    training, validation = job_config.training, job_config.validation
    counts = {
        "training.local_batch_size": training.local_batch_size,
        "training.seq_len": training.seq_len,
        "training.steps": training.steps,
        "metrics.log_freq": job_config.metrics.log_freq,
    }
    if validation.enable:
        counts |= {
            "validation.local_batch_size": validation.local_batch_size,
            "validation.seq_len": validation.seq_len,
            "validation.freq": validation.freq,
        }
    if job_config.checkpoint.enable:
        counts["checkpoint.interval"] = job_config.checkpoint.interval
    for name, value in counts.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    if job_config.checkpoint.enable and job_config.checkpoint.keep_latest_k == 1:
        raise ConfigError("checkpoint.keep_latest_k is 1; it must be 0 (keep all) or at least 2")


def _check_parallelism(job_config):
    parallelism = job_config.parallelism
    for name in (
        "tensor_parallel_degree",
        "context_parallel_degree",
        "pipeline_parallel_degree",
        "expert_parallel_degree",
    ):
        if getattr(parallelism, name) != 1:
            value = getattr(parallelism, name)
            raise ConfigError(f"parallelism.{name} is {value}; it must be 1: this model shards over data only so far")
    world = int(os.environ.get("WORLD_SIZE", os.environ.get("NGPU", "1")))
    replicate, shard = parallelism.data_parallel_replicate_degree, parallelism.data_parallel_shard_degree
    if replicate < 1 or world % replicate:
        raise ConfigError(
            f"parallelism.data_parallel_replicate_degree is {replicate}; it must divide the {world} processes"
        )
    if shard != -1 and shard * replicate != world:
        raise ConfigError(
            f"parallelism.data_parallel_shard_degree is {shard}; it must be -1, or {world // replicate} so that "
            f"replicate and shard degrees multiply to the {world} processes"
        )
    if replicate > 1 and replicate == world:
        raise ConfigError(
            f"parallelism.data_parallel_replicate_degree is {replicate}; with {world} processes it must be less, "
            "so that parameters are sharded too (TorchTitan's pure replication scales gradients wrongly)"
        )
    step = job_config.training.local_batch_size * world
    batch = job_config.training.global_batch_size
    if batch >= 0 and (batch == 0 or batch % step):
        raise ConfigError(
            f"training.global_batch_size is {batch}; it must be -1 or a multiple of training.local_batch_size times "
            f"the {world} data-parallel processes = {step}"
        )


def _check_rest(job_config):
    if job_config.optimizer.early_step_in_backward:
        raise ConfigError(
            "optimizer.early_step_in_backward is true; it must be false: gradients are clipped, and weight decay is "
            "per group"
        )
    if accelerator() is None:
        for name in ("enable_profiling", "enable_memory_snapshot"):
            if getattr(job_config.profiling, name):
                raise ConfigError(f"profiling.{name} is true; it must be false on a machine without an accelerator")
        if job_config.checkpoint.enable and job_config.checkpoint.async_mode == "async_with_pinned_mem":
            raise ConfigError(
                "checkpoint.async_mode is 'async_with_pinned_mem'; on a machine without an accelerator it must be "
                "'disabled' or 'async'"
            )
    path = job_config.model.hf_assets_path
    if not any(os.path.isfile(os.path.join(path, name)) for name in ("tokenizer.json", "vocab.json", "vocab.txt")):
        raise ConfigError(
            f"model.hf_assets_path is {path!r}; it must be a folder that holds a Hugging Face tokenizer "
            "(tokenizer.json), or be left out for the byte-level tokenizer of this package"
        )
    seed = section(job_config, "data").shuffle_seed
    if seed < 0:
        raise ConfigError(f"data.shuffle_seed is {seed}; it must be 0 or more")
    check_source("training", job_config.training.dataset, job_config.training.dataset_path)
    if job_config.validation.enable:
        check_source("validation", job_config.validation.dataset, job_config.validation.dataset_path)


def validate_config(job_config):
    """Raise ConfigError for the first thing wrong with a parsed job config. Loads nothing."""
    _check_model(job_config)
    _check_numbers(job_config)
    _check_parallelism(job_config)
    check_float8(job_config)
    _check_rest(job_config)
