"""What TorchTitan 0.2.2 needs to know to train the model: how it is parallelized, and how it is registered."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.tokenizer import BaseTokenizer, HuggingFaceTokenizer
from torchtitan.distributed import ParallelDims, context_parallel
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.distributed.tensor_parallel import maybe_enable_async_tp
from torchtitan.protocols import train_spec as titan_specs

from gdn2_titan.parallel import SAVED_OPS

from ..checkpoint import GDN2StateDictAdapter, keeps_decays_and_knows_old_names
from ..checks.command_line import torchtitan_reads_all_words
from ..checks.settings import check_settings, check_vocabulary
from ..dataloader import build_dataloader, for_trainer
from ..errors import refusing
from ..parallelize import apply_plans
from ..pipeline import modules_of_stages
from ..settings import Settings
from ..tasks import task_of
from ..tokens import check_tokenizer
from . import components
from .config import check_parsed_configs

__all__ = ["get_train_spec", "parallelize", "pipeline", "register"]


def parallelize(model: torch.nn.Module, parallel_dims: ParallelDims, job_config: Any) -> torch.nn.Module:
    """TorchTitan's ``parallelize_fn``, for the model or a pipeline stage of it."""
    settings = Settings.of(job_config)

    def checkpoint(model):
        apply_ac(
            model, job_config.activation_checkpoint, model_compile_enabled=settings.compiles("model"),
            op_sac_save_list=SAVED_OPS, base_folder=job_config.job.dump_folder,
        )  # fmt: skip

    return apply_plans(
        model,
        parallel_dims,
        settings,
        loss_parallel=not job_config.parallelism.disable_loss_parallel,
        async_tensor_parallel=lambda mesh: maybe_enable_async_tp(job_config, mesh),
        checkpoint=checkpoint,
        shards=parallel_dims.fsdp_enabled,  # also under context parallelism alone: its ranks hold shards of parameters
    )


def _per_token(loss_fn: Callable[..., torch.Tensor], tokens: int) -> Callable[..., torch.Tensor]:
    """loss_fn with the gradient of a mean over ``tokens``: under pipeline parallelism TorchTitan takes the gradient of
    the sum. The value stays the sum, which TorchTitan divides for its log."""

    def scaled(*args):
        total = loss_fn(*args)
        mean = total / tokens
        return mean + (total - mean).detach()

    return scaled


def pipeline(
    model: torch.nn.Module, parallel_dims: ParallelDims, job_config: Any, device: torch.device, model_args: Any,
    parallelize_fn: Callable[..., torch.nn.Module], loss_fn: Callable[..., torch.Tensor],
) -> tuple[Any, ...]:  # fmt: skip
    """TorchTitan's ``pipelining_fn``. Counts the tokens of the global batch that are learnt: with text every position,
    with a recall task its answers."""
    training = job_config.training
    sequences = training.global_batch_size
    if sequences < 0:
        sequences = training.local_batch_size * parallel_dims.dp_replicate * parallel_dims.dp_shard
    task = task_of(Settings.of(job_config))
    learnt = training.seq_len if task is None else task.answers(training.seq_len)
    stages = modules_of_stages(job_config.parallelism, model_args.n_layers)
    named = dataclasses.replace(job_config.parallelism, module_fqns_per_model_part=stages)
    return pipeline_llm(
        model, parallel_dims, dataclasses.replace(job_config, parallelism=named), device, model_args, parallelize_fn,
        _per_token(loss_fn, sequences * learnt),
    )  # fmt: skip


def deal_out_resets() -> None:
    """Let TorchTitan deal out masks that are tensors [B, T], which is how our resets travel, as it does tokens: it
    fails on anything but masks of flex attention. Once per process; again is harmless."""
    stock = context_parallel.cp_shard
    if hasattr(stock, "__wrapped__"):
        return

    @functools.wraps(stock)
    def cp_shard(cp_mesh, inputs, attention_masks, load_balancer_type="headtail", input_seq_dim=1):
        balancer = None if load_balancer_type == "none" else load_balancer_type
        if not isinstance(attention_masks, torch.Tensor):
            return stock(cp_mesh, inputs, attention_masks, balancer, input_seq_dim)
        (*inputs, masks), _ = stock(cp_mesh, (*inputs, attention_masks), None, balancer, input_seq_dim)
        return tuple(inputs), masks

    context_parallel.cp_shard = cp_shard


@refusing
def _build_tokenizer(job_config: Any) -> BaseTokenizer:
    # The first thing that TorchTitan builds from a config: the place to refuse one that was parsed before this package
    # was imported.
    settings = Settings.of(job_config)
    check_settings(settings)
    check_tokenizer(job_config.model.hf_assets_path)
    tokenizer = HuggingFaceTokenizer(job_config.model.hf_assets_path)
    check_vocabulary(settings, tokenizer)
    return tokenizer


def get_train_spec() -> titan_specs.TrainSpec:
    """TorchTitan's TrainSpec of the model, for a fork that registers it itself."""
    return titan_specs.TrainSpec(
        model_cls=components.TitanModel, model_args=components.titan_flavors(),
        parallelize_fn=parallelize, pipelining_fn=pipeline,
        build_optimizers_fn=components.build_optimizers, build_lr_schedulers_fn=components.build_lr_schedulers,
        build_dataloader_fn=for_trainer(build_dataloader), build_tokenizer_fn=_build_tokenizer,
        build_loss_fn=components.build_loss, build_validator_fn=refusing(components.GDN2Validator),
        build_metrics_processor_fn=components.GDN2MetricsProcessor, state_dict_adapter=GDN2StateDictAdapter,
    )  # fmt: skip


def register(name: str = "gdn2") -> None:
    """Make the model known to TorchTitan as ``model.name = "gdn2"``. Once per process; again is harmless."""
    if name not in titan_specs._extra_train_specs:
        titan_specs.register_train_spec(name, get_train_spec())
    components.register_converters()
    check_parsed_configs()
    torchtitan_reads_all_words()
    deal_out_resets()
    keeps_decays_and_knows_old_names(CheckpointManager)
