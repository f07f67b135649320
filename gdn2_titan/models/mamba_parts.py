"""What the Mamba layers are made of beside projections, also where ranks share their heads (tensor parallelism)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .init import fill_
from .this_rank import of_this_rank

__all__ = ["GatedNorm", "Skip"]


class _SumOfRanks(torch.autograd.Function):
    """The sum over the ranks of a group, which all of them go on from: the gradient is a sum as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return _all_reduced(x, group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return _all_reduced(dy, ctx.group), None


def _all_reduced(x, group):
    functional = torch.ops._c10d_functional
    return functional.wait_tensor(functional.all_reduce(x.contiguous(), "sum", group))


class GatedNorm(nn.Module):
    """RMSNorm(y * silu(z)) * weight over all channels, which ranks may share: y, z [..., channels]."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.channels, self.eps = channels, eps
        self.weight = nn.Parameter(torch.empty(channels))
        self.group: str | None = None  # of the ranks that share the channels, as functional collectives know it

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        wide = torch.promote_types(y.dtype, torch.float32)
        x = (y * F.silu(z)).to(wide)
        total = x.square().sum(-1, keepdim=True)
        if self.group is not None:
            total = _SumOfRanks.apply(total, self.group)
        x = x * torch.rsqrt(total / self.channels + self.eps)
        return x.to(y.dtype) * of_this_rank(self.weight)

    def init_weights(self) -> None:
        fill_(self.weight, nn.init.ones_)


class Skip(nn.Module):
    """y + D x by heads: y, x [..., heads, channels], D [heads]."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads))

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return y + of_this_rank(self.weight).unsqueeze(-1) * x

    def init_weights(self) -> None:
        fill_(self.weight, nn.init.ones_)
