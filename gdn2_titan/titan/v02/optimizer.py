"""AdamW as the paper has it: no weight decay on A_log, dt_bias, norms and biases."""

from torch.optim import Adam, AdamW
from torchtitan.components.optimizer import OptimizersContainer

from ..optimizer import is_decayed

__all__ = ["build_optimizers"]


class GroupedOptimizers(OptimizersContainer):
    """TorchTitan's container with two parameter groups per model part."""

    def __init__(self, model_parts, optimizer_cls, optimizer_kwargs):
        self.model_parts = model_parts
        self.optimizers = []
        everything = []
        for part in model_parts:
            named = [(name, p) for name, p in part.named_parameters() if p.requires_grad]
            groups = [
                {"params": [p for name, p in named if is_decayed(name, p)]},
                {"params": [p for name, p in named if not is_decayed(name, p)], "weight_decay": 0.0},
            ]
            self.optimizers.append(optimizer_cls([group for group in groups if group["params"]], **optimizer_kwargs))
            everything += [p for _, p in named]
        self._validate_length(len(model_parts))
        self._post_init(everything, optimizer_kwargs)


def build_optimizers(model_parts, optimizer_config, parallel_dims):
    """TorchTitan's ``build_optimizers_fn``: the [optimizer] section, Adam or AdamW."""
    return GroupedOptimizers(
        model_parts,
        {"Adam": Adam, "AdamW": AdamW}[optimizer_config.name],
        {
            "lr": optimizer_config.lr,
            "betas": (optimizer_config.beta1, optimizer_config.beta2),
            "eps": optimizer_config.eps,
            "weight_decay": optimizer_config.weight_decay,
            "fused": optimizer_config.implementation == "fused",
            "foreach": optimizer_config.implementation == "foreach",
        },
    )
