"""TorchTitan 0.3's optimizers with a group of parameters that do not decay."""

from dataclasses import dataclass
from typing import Literal

from torch.optim import Adam, AdamW
from torchtitan.components.checkpointer.utils import canonical_fqn
from torchtitan.components.optimizer import OptimizersContainer

from ..optimizer import is_decayed

__all__ = ["GroupedOptimizers"]


class GroupedOptimizers(OptimizersContainer):
    """Two parameter groups per model part. ``param_groups`` of the stock config is not read."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        name: Literal["Adam", "AdamW"] = "AdamW"
        lr: float = 8e-4
        beta1: float = 0.9
        beta2: float = 0.95
        eps: float = 1e-8
        weight_decay: float = 0.1
        """Of matrices; A_log, dt_bias, norms and biases do not decay"""
        implementation: Literal["for-loop", "foreach", "fused"] = "fused"

    def __init__(self, config, *, model_parts):
        self.model_parts, self.optimizers = model_parts, []
        options = {
            "lr": config.lr,
            "betas": (config.beta1, config.beta2),
            "eps": config.eps,
            "weight_decay": config.weight_decay,
            **self._build_impl_kwargs(config),
        }
        everything = []
        for part in model_parts:
            named = [(canonical_fqn(name), p) for name, p in part.named_parameters() if p.requires_grad]
            groups = [_group(named, True, {}), _group(named, False, {"weight_decay": 0.0})]
            optimizer_cls = {"Adam": Adam, "AdamW": AdamW}[config.name]
            self.optimizers.append(optimizer_cls([group for group in groups if group["params"]], **options))
            everything += [p for _, p in named]
        self._post_init(everything)


def _group(named, decayed, options):
    found = [(name, p) for name, p in named if is_decayed(name, p) == decayed]
    # By these names TorchTitan keeps the optimizer's state in checkpoints.
    return {"params": [p for _, p in found], "param_names": [name for name, _ in found]} | options
