"""Initialisation that is the same however parameters are sharded.

A sharded parameter is drawn whole, from the same random stream on every rank, and each rank keeps its shard: one
process and eight start from the same model. The stages of a pipeline do not: each draws for its own layers alone.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = ["depth_scale", "fill_", "xavier_"]


@torch.no_grad()
def fill_(param: torch.Tensor, draw: Callable[[torch.Tensor], Any]) -> None:
    """Fill a parameter or its shards by ``draw(tensor)``, which initialises a full-size tensor in place. One on the
    meta device has nothing to fill."""
    if param.is_meta:
        return
    if isinstance(param, DTensor):
        full = torch.empty(param.shape, dtype=param.dtype, device=param.to_local().device)
        draw(full)
        param.copy_(distribute_tensor(full, param.device_mesh, param.placements, src_data_rank=None))
    else:
        draw(param)


def xavier_(param: torch.Tensor, gain: float = 1.0) -> None:
    """Xavier-uniform for a linear weight [out, in]."""
    fill_(param, lambda x: nn.init.xavier_uniform_(x, gain=gain))


def depth_scale(n_layers: int) -> float:
    """What a residual branch's output projection is multiplied by, two branches a layer."""
    return 1 / math.sqrt(2 * n_layers)
