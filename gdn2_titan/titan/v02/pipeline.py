"""Pipeline parallelism by TorchTitan's splitter, with the gradients' scale that it leaves out."""

import dataclasses

from torchtitan.distributed.pipeline_parallel import pipeline_llm

from ..pipeline import modules_of_stages
from ..tasks import task_of

__all__ = ["pipeline"]


def _per_token(loss_fn, tokens):
    """loss_fn with the gradient of a mean over ``tokens``: under pipeline parallelism TorchTitan takes the gradient of
    the sum. The value stays the sum, which TorchTitan divides for its log."""

    def scaled(*args):
        total = loss_fn(*args)
        mean = total / tokens
        return mean + (total - mean).detach()

    return scaled


def pipeline(model, parallel_dims, job_config, device, model_args, parallelize_fn, loss_fn):
    """TorchTitan's ``pipelining_fn``. Counts the tokens of the global batch that are learnt: with text every position,
    with a recall task its answers."""
    training = job_config.training
    sequences = training.global_batch_size
    if sequences < 0:
        sequences = training.local_batch_size * parallel_dims.dp_replicate * parallel_dims.dp_shard
    task = task_of(job_config)
    learnt = training.seq_len if task is None else task.answers(training.seq_len)
    stages = modules_of_stages(job_config.parallelism, model_args.n_layers)
    named = dataclasses.replace(job_config.parallelism, module_fqns_per_model_part=stages)
    return pipeline_llm(
        model,
        parallel_dims,
        dataclasses.replace(job_config, parallelism=named),
        device,
        model_args,
        parallelize_fn,
        _per_token(loss_fn, sequences * learnt),
    )
