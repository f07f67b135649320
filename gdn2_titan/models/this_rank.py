"""A rank's part of what tensor parallelism shards, or of what it leaves whole."""

import torch.distributed as dist
from torch import Tensor

__all__ = ["is_dtensor", "of_heads", "of_this_rank"]


def is_dtensor(x: Tensor) -> bool:
    """Whether x is a DTensor. None is without a process group, and importing their class takes a second."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def of_this_rank(param: Tensor) -> Tensor:
    """What this rank holds of a parameter: under tensor parallelism, the part of its heads."""
    return param.to_local() if is_dtensor(param) else param


def of_heads(x: Tensor) -> Tensor:
    """What all heads share, as this rank's heads read it: under tensor parallelism its gradient here is their share of
    it."""
    if not is_dtensor(x):
        return x
    from torch.distributed.tensor import Partial

    return x.to_local(grad_placements=[Partial()] * x.device_mesh.ndim)
