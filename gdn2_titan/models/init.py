"""Initialisation that is the same however parameters are sharded.

A sharded parameter is drawn whole, from the same random stream on every rank, and each rank keeps its shard: one
process and eight start from the same model. The stages of a pipeline do not: each draws for its own layers alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .this_rank import is_dtensor

__all__ = ["fill_", "linear_", "normal_"]


@torch.no_grad()
def fill_(param: Tensor, draw: Callable[[Tensor], Any]) -> None:
    """Fill a parameter or its shards by ``draw(tensor)``, which initialises a full-size tensor in place. One on the
    meta device has nothing to fill."""
    if param.is_meta:
        return
    if is_dtensor(param):
        from torch.distributed.tensor import distribute_tensor

        full = torch.empty(param.shape, dtype=param.dtype, device=param.to_local().device)
        draw(full)
        param.copy_(distribute_tensor(full, param.device_mesh, param.placements, src_data_rank=None))
    else:
        draw(param)


def normal_(param: Tensor, std: float) -> None:
    """``fill_`` from a normal distribution around 0."""
    fill_(param, lambda x: nn.init.normal_(x, std=std))


def linear_(param: Tensor, std: float | None, scale: float = 1.0) -> None:
    """``fill_`` the weight [out, in] of a linear map, times ``scale``: from a normal distribution, or where std is None
    uniformly between +-1 / sqrt(in), as PyTorch itself starts its linear layers."""
    if std is not None:
        normal_(param, std * scale)
    else:
        bound = scale * param.shape[1] ** -0.5
        fill_(param, lambda x: nn.init.uniform_(x, -bound, bound))
