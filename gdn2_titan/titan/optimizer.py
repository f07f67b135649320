"""The optimizers of a model as [optimizer] asks for them, and the learning rate after the last step of its schedule."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Adam, AdamW
from torch.optim.lr_scheduler import LambdaLR

from gdn2_titan.parallel import Muon, muon_matrices

from .settings import OptimizerFields

__all__ = ["build_optimizers", "hold_last_rate", "is_decayed", "trained"]

# With "Muon", what is no matrix has AdamW.
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"Adam": Adam, "AdamW": AdamW, "Muon": AdamW}


def is_decayed(name: str, param: torch.Tensor) -> bool:
    """Whether weight decay applies to a parameter of the decoder where weight_decay_on is "matrices", the convolutions'
    among them: not to A_log, dt_bias, norms, biases and scales."""
    return param.ndim > 1 and not name.endswith(("bias", "_scale", "norm.weight"))


def build_optimizers(
    part: torch.nn.Module, section: Any, implementation: dict[str, bool], name_of: Callable[[str], str] | None = None
) -> list[torch.optim.Optimizer]:
    """Adam or AdamW of a model or a stage of it, and with "Muon" a Muon, if it has matrices, after the AdamW.

    section: of [optimizer]; of a fork's own, which may lack our fields. implementation: "fused" and "foreach" of Adam
    and AdamW. name_of: where groups say their parameters' names, by which TorchTitan 0.3 keeps the state in
    checkpoints: how they follow from the model's.
    """
    own = OptimizerFields(**{n: getattr(section, n) for n in vars(OptimizerFields()) if hasattr(section, n)})
    heads = muon_matrices(part) if section.name == "Muon" else {}
    grouped: dict[Any, dict[str, Any]] = {}
    for name, p in part.named_parameters():
        if not p.requires_grad:
            continue
        decayed = own.weight_decay_on == "all" or is_decayed(name, p)
        options = {"head_rows": heads[p]} if p in heads else {} if decayed else {"weight_decay": 0.0}
        group = grouped.setdefault((p in heads, *options.items()), {"params": []} | options)
        group["params"].append(p)
        if name_of:
            group.setdefault("param_names", []).append(name_of(name))
    common = {name: getattr(section, name) for name in ("lr", "eps", "weight_decay")}
    rest = [group for group in grouped.values() if "head_rows" not in group]
    found = [OPTIMIZERS[section.name](rest, betas=(section.beta1, section.beta2), **common, **implementation)]
    if matrices := [group for group in grouped.values() if "head_rows" in group]:
        found.append(
            Muon(
                matrices,
                lr=section.lr if own.muon_lr is None else own.muon_lr,
                weight_decay=section.weight_decay,
                momentum=own.muon_momentum,
                nesterov=own.muon_nesterov,
                ns_steps=own.muon_ns_steps,
                adjust_lr_fn=own.muon_adjust_lr_fn,
            )  # fmt: skip
        )
    return found


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
