"""Initialisation that is the same however parameters are sharded.

A sharded parameter is drawn whole, from the same random stream on every rank, and each rank keeps its shard: one
process and eight start from the same model. The stages of a pipeline do not: each draws for its own layers alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = ["fill_", "normal_"]


@torch.no_grad()
def fill_(param: Tensor, draw: Callable[[Tensor], Any]) -> None:
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


def normal_(param: Tensor, std: float) -> None:
    """``fill_`` from a normal distribution around 0."""
    fill_(param, lambda x: nn.init.normal_(x, std=std))
