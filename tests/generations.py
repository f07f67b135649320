"""What the tests ask of TorchTitan, in the words of the generation that is installed."""

import contextlib
import copy

import pytest
import torch
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.distributed import ParallelDims

from gdn2_titan.titan.byte_tokenizer import BYTE_TOKENIZER_DIR
from gdn2_titan.titan.settings import Settings
from gdn2_titan.titan.torchtitan_version import IS_V02

if IS_V02:
    from torchtitan.config.job_config import Parallelism as StockParallelism
    from torchtitan.distributed.context_parallel import prepare_context_parallel_input
    from torchtitan.protocols.model_converter import build_model_converters
    from torchtitan.protocols.train_spec import get_train_spec

    from gdn2_titan.titan.v02 import components as generation_loss
    from gdn2_titan.titan.v02.train_spec import parallelize
else:
    from torchtitan.config.configs import ParallelismConfig as StockParallelism

    from gdn2_titan.titan.v03 import components as generation_parallelize
    from gdn2_titan.titan.v03.components import deal_out
    from gdn2_titan.titan.v03.config import trainer_config
    from gdn2_titan.titan.v03.trainer import fill

__all__ = [
    "IS_V02",
    "StockParallelism",
    "byte_tokenizer",
    "convert",
    "dealt_out",
    "dimensions",
    "loader_of",
    "loss_of",
    "model_config",
    "only_functions",
    "only_toml",
    "optimizers_of",
    "parallelized",
    "schedule_of",
    "validator_of",
]

only_toml = pytest.mark.skipif(not IS_V02, reason="about TorchTitan 0.2.2's job config and registration")
only_functions = pytest.mark.skipif(IS_V02, reason="about TorchTitan 0.3's config functions")


def byte_tokenizer(path=BYTE_TOKENIZER_DIR):
    return HuggingFaceTokenizer(tokenizer_path=str(path))


def dimensions(world):
    """ParallelDims of FSDP alone. Makes no mesh."""
    rest = {"etp": 1} if IS_V02 else {}
    return ParallelDims(dp_replicate=1, dp_shard=world, cp=1, tp=1, pp=1, ep=1, world_size=world, **rest)


def _parts(job_config):
    """TorchTitan 0.3's config, with the job config handed on as its trainer does."""
    config = trainer_config(job_config)
    fill(config, Settings.of(job_config))
    return config


def model_config(job_config):
    """(model args, the object that TorchTitan asks for parameters and FLOPs) of a job config."""
    if IS_V02:
        args = copy.deepcopy(get_train_spec("gdn2").model_args[job_config.model.flavor])
        args.update_from_config(job_config)
        return args, args
    config = _parts(job_config).model_spec.model
    config.update_from_config(config=None)
    return config.args, config


def optimizers_of(model, job_config):
    """TorchTitan's container of a model's optimizers."""
    if IS_V02:
        return get_train_spec("gdn2").build_optimizers_fn([model], job_config.optimizer, None)
    return trainer_config(job_config).optimizer.build(model_parts=[model])


def schedule_of(optimizers, job_config):
    """TorchTitan's container of the schedules of a container of optimizers."""
    if IS_V02:
        build = get_train_spec("gdn2").build_lr_schedulers_fn
        return build(optimizers, job_config.lr_scheduler, job_config.training.steps)
    settings = trainer_config(job_config).lr_scheduler
    return settings.build(optimizers=optimizers, training_steps=job_config.training.steps)


def loader_of(job_config):
    """The loader of training batches in one process, with the tokenizer that the job config names."""
    if IS_V02:
        spec = get_train_spec("gdn2")
        tokenizer = spec.build_tokenizer_fn(job_config)
        return spec.build_dataloader_fn(dp_world_size=1, dp_rank=0, tokenizer=tokenizer, job_config=job_config)
    tokenizer = byte_tokenizer(job_config.model.hf_assets_path)
    return _parts(job_config).dataloader.build(dp_world_size=1, dp_rank=0, tokenizer=tokenizer)


def loss_of(job_config, dims):
    """The loss: called with (logits, labels) it gives a number, or a tuple that begins with it."""
    if IS_V02:
        return generation_loss.build_loss(job_config, dims)
    config = _parts(job_config)
    return config.loss.build(compile_config=config.compile)


def validator_of(job_config, dims, metrics_processor):
    """The validator of one process."""
    common = {
        "dp_world_size": 1, "dp_rank": 0, "tokenizer": byte_tokenizer(), "parallel_dims": dims,
        "loss_fn": loss_of(job_config, dims), "validation_context": contextlib.nullcontext,
        "metrics_processor": metrics_processor,
    }  # fmt: skip
    if IS_V02:
        autocast = {"maybe_enable_amp": contextlib.nullcontext()}
        return get_train_spec("gdn2").build_validator_fn(job_config=job_config, **common, **autocast)
    config = _parts(job_config)
    return config.validator.build(parallelism=config.parallelism, **common)


def parallelized(model, dims, job_config):
    """The model with everything applied to it that the job config asks for."""
    if IS_V02:
        return parallelize(model, dims, job_config)
    config = _parts(job_config)
    model.config = config.model_spec.model
    return generation_parallelize.parallelize(
        model, parallel_dims=dims, compile_config=config.compile, ac_config=config.activation_checkpoint, dump_folder=""
    )


def convert(model, job_config, dims):
    """Let TorchTitan convert the linear layers of a model as model.converters says."""
    if IS_V02:
        build_model_converters(job_config, dims).convert(model)
        return
    for converter in generation_parallelize.converters_of(job_config, dims):
        converter.convert(model)


def dealt_out(tokens, labels, resets, mesh, balancer):
    """(tokens, labels, resets or None) of this rank of a context-parallel mesh."""
    if IS_V02:
        extra = {"attention_masks": resets}
        tokens, labels, extra = prepare_context_parallel_input(
            tokens, labels, extra, mesh, torch.device("cpu"), balancer
        )
        return tokens, labels, extra["attention_masks"]
    inputs = {"input": tokens} | ({} if resets is None else {"resets": resets})
    tokens, labels, extra = deal_out(inputs, labels, mesh, balancer)
    return tokens, labels, extra.get("resets")
