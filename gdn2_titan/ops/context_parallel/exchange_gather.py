"""The exchange of maps as an all-gather: every rank gets every segment's map and folds those before its own.

One message each way. What a rank receives grows with the number of ranks R, for S = 1 or 2 segments a rank: forward
(R - 1) S (M, D), backward (R - 1) S dD: the transitions it got forward serve backward too.

Shapes: M [S, B, H, K, K], D [S, B, HV, K, V] of a rank's S segments, S first.
"""

import torch
from torch import Tensor

from ..gdn2.folding import fold_maps
from .layout import SequenceShards

__all__ = ["kept", "pending_back", "receive", "receive_back", "send", "send_back"]


def _order(shards):
    """Where the segments lie in what was gathered, in the order of the sequence."""
    if shards.per_rank == 1:
        return range(shards.size)
    return [*range(0, 2 * shards.size, 2), *range(2 * shards.size - 1, 0, -2)]


def kept(shards: SequenceShards) -> int:
    """How many transitions ``receive`` keeps for backward."""
    return shards.size * shards.per_rank


def _segments(x, places):
    """Those at ``places`` of x [segments, B, ...] as an axis of their own, [B, places, ...]."""
    return torch.stack([x[place] for place in places], 1)


def _gather(tensors, shards):
    # Its own operator, so that activation checkpointing can keep these results and not those of every all-gather.
    return torch.ops._c10d_functional.all_gather_into_tensor_coalesced(tensors, shards.size, shards.group)


def _wait(tensors):
    return [torch.ops._c10d_functional.wait_tensor(x) for x in tensors]


def send(M: Tensor, D: Tensor, shards: SequenceShards, final: bool) -> list[Tensor]:
    """Begin. final: whether the state after the whole sequence will be asked for."""
    return _gather([M, D], shards)


def receive(
    pending: list[Tensor], M: Tensor, D: Tensor, shards: SequenceShards, final: bool, backend: str
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The states that this rank's segments are entered with [S, B, HV, K, V], the one after the whole sequence or
    None, and the transitions to keep [kept, B, H, K, K]. backend: of ``chunk_gdn2``."""
    M, D = _wait(pending)
    mine = shards.segments
    before = _order(shards)[: None if final else mine[-1]]
    if not before:
        return torch.zeros_like(D[:1]), None, M
    entered, left = fold_maps(*(_segments(x, before) for x in (M, D)), None, backend)
    states = [*entered.unbind(1), left]
    return torch.stack([states[segment] for segment in mine]), left if final else None, M


def pending_back(shape: torch.Size, shards: SequenceShards) -> tuple[int, ...]:
    """The shape of what ``send_back`` begins to receive, for dD of this shape."""
    return (shards.size * shape[0], *shape[1:])


def send_back(dD: Tensor, shards: SequenceShards) -> Tensor:
    """Begin. dD [S, B, HV, K, V]: the gradient of each entering state that this rank's own outputs give."""
    return _gather([dD], shards)[0]


def receive_back(pending: Tensor, dD: Tensor, kept: Tensor, shards: SequenceShards, backend: str) -> Tensor:
    """The gradients of the states that this rank's segments leave [S, B, HV, K, V]."""
    (dD,) = _wait([pending])
    first = shards.segments[0]
    behind = _order(shards)[first + 1 :]
    if not behind:
        return torch.zeros_like(dD[:1])
    left, entering = fold_maps(*(_segments(x, behind) for x in (kept, dD)), None, backend, transposed=True)
    states = [entering, *left.unbind(1)]
    return torch.stack([states[segment - first] for segment in shards.segments])
