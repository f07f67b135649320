"""Context parallelism as TorchTitan deals out sequences: which load balancer makes which layout."""

import math

from .errors import ConfigError
from .tasks import validation_lengths

__all__ = ["check_lengths", "layout_of"]

# None is TorchTitan's word for no balancer, which TOML cannot say.
LAYOUTS = {"headtail": "head_tail", "none": "contiguous", None: "contiguous"}


def layout_of(parallelism):
    """The layout of ``gdn2_titan.ops.shards`` in which TorchTitan deals out sequences.

    Raises:
        ConfigError: if [parallelism] asks for a balancer whose shards are no segments of the sequence.
    """
    balancer = parallelism.context_parallel_load_balancer
    if balancer not in LAYOUTS:
        raise ConfigError(
            f"parallelism.context_parallel_load_balancer is {balancer!r}; it must be 'headtail' or 'none', which give "
            "a rank unbroken segments of the sequence"
        )
    return LAYOUTS[balancer]


def check_lengths(job_config):
    """Raise ConfigError unless the ranks of context and tensor parallelism can share every sequence equally."""
    parallelism = job_config.parallelism
    context, tensor = parallelism.context_parallel_degree, parallelism.tensor_parallel_degree
    per_rank = 2 if layout_of(parallelism) == "head_tail" else 1
    reasons, divisor = [], tensor
    if context > 1:
        divisor = context * math.lcm(per_rank, tensor)
        reasons.append(f"parallelism.context_parallel_degree = {context}")
        if per_rank == 2:
            reasons.append("parallelism.context_parallel_load_balancer = 'headtail' (two segments a rank)")
    if tensor > 1:
        reasons.append(f"parallelism.tensor_parallel_degree = {tensor}")
    for name, length in (("training.seq_len", job_config.training.seq_len), *validation_lengths(job_config)):
        if length % divisor:
            raise ConfigError(f"{name} is {length}; with {' and '.join(reasons)} it must be a multiple of {divisor}")
