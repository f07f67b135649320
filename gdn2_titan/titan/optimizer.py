"""Which parameters decay, as the paper has it, and the learning rate after the last step of its schedule."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Adam, AdamW
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["OPTIMIZERS", "decay_groups", "hold_last_rate", "is_decayed", "trained"]

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"Adam": Adam, "AdamW": AdamW}


def is_decayed(name: str, param: torch.Tensor) -> bool:
    """Whether weight decay applies to a parameter of the decoder: to matrices, the convolutions' among them."""
    return param.ndim > 1 and not name.endswith("dt_bias")


def decay_groups(model: torch.nn.Module, name_of: Callable[[str], str] | None = None) -> list[dict[str, Any]]:
    """The optimizer's groups of parameters that decay, and of A_log, dt_bias, norms and biases, which do not.

    name_of: where groups say their parameters' names, by which TorchTitan 0.3 keeps the state in checkpoints: how they
    follow from the model's.
    """
    groups = []
    for decayed, options in ((True, {}), (False, {"weight_decay": 0.0})):
        found = {n: p for n, p in model.named_parameters() if p.requires_grad and is_decayed(n, p) == decayed}
        names = {"param_names": [name_of(name) for name in found]} if name_of else {}
        groups.append({"params": list(found.values())} | names | options)
    return [group for group in groups if group["params"]]


def trained(model_parts: list[torch.nn.Module]) -> list[torch.nn.Parameter]:
    """The parameters of all parts that an optimizer changes."""
    return [p for part in model_parts for p in part.parameters() if p.requires_grad]


def hold_last_rate(schedulers: Iterable[LambdaLR], last_step: int) -> None:
    """Let LambdaLR schedulers keep the rate that they have at ``last_step``.

    Both generations of TorchTitan have a rate for steps up to there. Later ones, of a training that is longer than
    ``lr_scheduler.total_steps`` or that continues a checkpoint of more steps than its own, would get an AssertionError,
    a negative rate (linear, sqrt) or one that rises again (cosine).
    """
    for one in schedulers:
        one.lr_lambdas = [_held(factor, last_step) for factor in one.lr_lambdas]


def _held(factor: Callable[[int], float], last_step: int) -> Callable[[int], float]:
    return lambda step: factor(min(step, last_step))
