"""How the ranks of a group share sequences, and which of its tokens a rank therefore has."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..checks import check_choice

__all__ = ["LAYOUTS", "SequenceShards"]

LAYOUTS = ("contiguous", "head_tail")


@dataclass(frozen=True)
class SequenceShards:
    """Sequences of T tokens cut into segments of equal length, and dealt to the ranks of a group.

    contiguous: rank r has segment r of ``size``. head_tail: rank r has segments r and 2 size - 1 - r of 2 size, in this
    order, which gives all ranks the same share of causal attention; it is what TorchTitan's load balancer deals.

    Plain numbers and a name, so that a compiler can read them; ``of`` makes one.
    """

    group: str  # the name under which functional collectives know it
    rank: int
    size: int
    per_rank: int  # segments of each rank: 1 contiguous, 2 head_tail

    def __post_init__(self) -> None:
        for name, value in (("rank", self.rank), ("size", self.size), ("per_rank", self.per_rank)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} is {value!r}; it must be a whole number")
        if self.size < 1:
            raise ValueError(f"size is {self.size}; it must be at least 1")
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank is {self.rank}; with size {self.size} it must be from 0 to {self.size - 1}")
        if self.per_rank not in (1, 2):
            raise ValueError(f"per_rank is {self.per_rank}; it must be 1 (contiguous) or 2 (head_tail)")

    @classmethod
    def of(cls, group: dist.ProcessGroup | DeviceMesh, layout: str) -> "SequenceShards":
        """group: a ProcessGroup or a 1-D DeviceMesh; layout: of LAYOUTS."""
        check_choice("layout", layout, LAYOUTS)
        if not isinstance(group, dist.ProcessGroup):
            group = group.get_group()
        return cls(group.group_name, group.rank(), group.size(), LAYOUTS.index(layout) + 1)

    @property
    def layout(self) -> str:
        return LAYOUTS[self.per_rank - 1]

    @property
    def segments(self) -> tuple[int, ...]:
        """The indices of this rank's segments, in the order in which it has them."""
        return (self.rank,) if self.per_rank == 1 else (self.rank, 2 * self.size - 1 - self.rank)

    def segment_size(self, length: int) -> int:
        """Tokens of a segment where a rank has ``length``; ValueError if its segments cannot have the same number."""
        if length % self.per_rank:
            raise ValueError(
                f"a rank has {length} tokens of a sequence; with layout {self.layout!r} their number must be even"
            )
        return length // self.per_rank

    def rows(self, x: Tensor | None) -> Tensor | None:
        """x [B, T, ...] of this rank, or None -> its S segments as rows of the batch [B * S, T / S, ...]; a view."""
        return None if x is None else x.unflatten(1, (self.per_rank, self.segment_size(x.shape[1]))).flatten(0, 1)

    def refuse_states(self, state: object, return_state: bool) -> None:
        """Raise ValueError for a layer that is given a state, or asked for one."""
        if state is not None or return_state:
            name = "return_state is True" if state is None else "state is given"
            raise ValueError(f"{name}; with context parallelism states pass between ranks only, so it must be left out")

    def refuse_rows(self, rows: object) -> None:
        """Raise ValueError for a layer that is given rows of unequal lengths."""
        if rows is not None:
            raise ValueError("rows is given; with context parallelism rows are of one length, so it must be left out")

    def positions(self, length: int, device: torch.device | None = None) -> Tensor:
        """The places in the whole sequence of this rank's ``length`` tokens, int64 [length]."""
        size = length // self.per_rank
        return torch.cat([torch.arange(i * size, (i + 1) * size, device=device) for i in self.segments])

    def global_order(self, x: Tensor, dim: int) -> Tensor:
        """x, gathered from all ranks in the order of ranks along ``dim``, in the order of the sequence."""
        if self.per_rank == 1:
            return x
        x = x.unflatten(dim, (self.size, 2, -1))
        heads, tails = x.select(dim + 1, 0), x.select(dim + 1, 1)
        return torch.cat((heads, tails.flip(dim)), dim).flatten(dim, dim + 1)
