"""Many models at once through the operators: ``torch.vmap`` over a call of theirs becomes one call.

What mixes tokens treats heads alike, and the short convolution channels: the heads, or channels, of all models side by
side are those of one call. Without these rules PyTorch would loop over the models.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

__all__ = ["fold_models"]

# The axis of heads or channels, by the name of an argument. What has another name is of all models in common.
TOKENS = dict.fromkeys(("q", "k", "v", "g", "b", "w", "x", "do", "dy", "dq", "dk", "dv"), 2)
STATES = dict.fromkeys(("initial_state", "dfinal_state", "q_state", "k_state", "v_state"), 1)
GRADIENTS_OF_STATES = dict.fromkeys(("dq_state", "dk_state", "dv_state"), 1)
WEIGHTS = dict.fromkeys(("A_log", "dt_bias", "weight", "bias", "q_weight", "k_weight", "v_weight"), 0)
AXES = TOKENS | STATES | GRADIENTS_OF_STATES | WEIGHTS
OUTPUTS = {
    "chunk_gdn2": (2, 1),
    "chunk_gdn2_backward": (2, 2, 2, 2, 2, 2, 0, 0, 1),
    "causal_conv1d": (2, 1),
    "causal_conv1d_backward": (2, 0, 0, 1),
    "causal_conv1d_qkv": (2, 2, 2, 1, 1, 1),
    "causal_conv1d_qkv_backward": (2, 2, 2, 0, 0, 0, 1, 1, 1),
}


def _fold(x: Tensor, dim: int | None, axis: int, models: int) -> Tensor:
    """The models' axis ``dim`` of x, or that of a copy for each, laid before its axis of heads and joined with it."""
    x = x.unsqueeze(axis).expand(*x.shape[:axis], models, *x.shape[axis:]) if dim is None else x.movedim(dim, axis)
    return x.flatten(axis, axis + 1)


def _of_all(op: OpOverload, axes: tuple[int, ...], info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
    """The rule of ``torch.library.register_vmap``."""
    folded, models = [], info.batch_size
    for argument, dim, x in zip(op._schema.arguments, in_dims, args, strict=False):
        axis = AXES.get(argument.name)
        if axis is None and dim is not None:
            raise NotImplementedError(f"{argument.name} is another one for each model; it must be the same for all")
        folded.append(_fold(x, dim, axis, models) if axis is not None and isinstance(x, Tensor) else x)
    results = op(*folded)
    # A gradient of what was not given is empty, for all models alike.
    given = [x.numel() > 0 for x in results]
    split = [x.unflatten(axis, (models, -1)) if any_ else x for x, axis, any_ in zip(results, axes, given, strict=True)]
    return tuple(split), tuple(axis if any_ else None for axis, any_ in zip(axes, given, strict=True))


@functools.cache
def fold_models() -> None:
    """Register the rules, once in a process."""
    from gdn2_titan import ops  # noqa: F401  which registers the operators

    for name, axes in OUTPUTS.items():
        op = getattr(torch.ops.gdn2_titan, name).default
        torch.library.register_vmap(op, functools.partial(_of_all, op, axes))
