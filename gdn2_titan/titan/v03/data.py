"""The data loaders in TorchTitan 0.3's config, and batches as the trainer hands them to the model."""

from dataclasses import dataclass, replace
from typing import Annotated

import tyro
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.distributed.context_parallel.api import cp_shard

from ..dataloader import build_dataloader, for_trainer
from ..errors import refusing
from ..validate_config import check_vocabulary

__all__ = ["TrainingData", "ValidationData", "deal_out", "in_microbatches"]


@dataclass(kw_only=True, slots=True)
class TrainingData(ParallelAwareDataloader.Config):
    dataset: str = "stdlib"
    """"stdlib", "files", a Hugging Face repository or a recall task"""
    dataset_path: str | None = None
    """File, folder or glob, with "files" """
    _job_config: Annotated[object | None, tyro.conf.Suppress] = None

    @refusing
    def build(self, *, dp_world_size, dp_rank, tokenizer, **_):
        job_config = self._job_config
        check_vocabulary(job_config, tokenizer)
        return for_trainer(build_dataloader)(dp_world_size, dp_rank, tokenizer, in_microbatches(job_config, "training"))


@dataclass(kw_only=True, slots=True)
class ValidationData(ParallelAwareDataloader.Config):
    dataset: str = "stdlib"
    dataset_path: str | None = None
    local_batch_size: int = 8
    """Sequences that a data-parallel rank validates with at a time"""
    seq_len: int = 2048
    """Tokens of a sequence"""


def in_microbatches(job_config, part):
    """The job config for a loader of what the trainer asks for at a time: in a pipeline, a microbatch."""
    parallelism, settings = job_config.parallelism, getattr(job_config, part)
    if parallelism.pipeline_parallel_degree == 1:
        return job_config
    settings = replace(settings, local_batch_size=parallelism.pipeline_parallel_microbatch_size)
    return replace(job_config, **{part: settings})


def deal_out(input_dict, labels, cp_mesh, balancer):
    """(tokens, labels, {"resets": ...}) as the model takes them: under context parallelism, this rank's share of each
    sequence. The stock trainer asks for positions to deal out, which this model knows from its shards."""
    tensors = {"input": input_dict["input"], "labels": labels}
    if "resets" in input_dict:
        tensors["resets"] = input_dict["resets"]
    if cp_mesh is not None:
        shares, _ = cp_shard(cp_mesh, tuple(tensors.values()), None, None if balancer == "none" else balancer)
        tensors = dict(zip(tensors, shares, strict=True))
    return tensors.pop("input"), tensors.pop("labels"), tensors
