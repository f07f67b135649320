"""Tokens that ranks exchange: those before a segment (its halo), or all; and the short convolution on top.

Functional collectives, so that they are part of a compiled graph. Every rank of a group must make the same calls in the
same order; backward then does too, also where a rank has nothing to send or to receive.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh

from ..short_conv.api import causal_conv1d
from ..short_conv.arguments import checked_inputs
from .layout import SequenceShards

__all__ = ["context_parallel_conv1d", "gather_sequence", "halos", "preceding"]

# Its name up to torch 2.12, which later versions call deprecated.
_all_gather = getattr(collectives, "all_gather_single_autograd", None) or collectives.all_gather_tensor_autograd


def gather_sequence(x: Tensor, shards: SequenceShards) -> Tensor:
    """x [B, T_local, ...] of every rank -> all tokens in the order of the sequence [B, T, ...]."""
    return shards.global_order(_all_gather(x.contiguous(), 1, shards.group), 1)


def preceding(x: Tensor, shards: SequenceShards, count: int) -> Tensor:
    """The tokens before each of this rank's segments.

    x [B, T_local, ...] -> [B * n, count, ...], a row for each of the n segments; zeros before the sequence begins.
    Segments of ``count`` tokens and more send their last ``count`` to the rank that has the next one, and nothing else
    moves. Shorter ones are gathered from all ranks.
    """
    size = shards.segment_size(x.shape[1])
    if size < count:
        padded = torch.cat((x.new_zeros((x.shape[0], count, *x.shape[2:])), gather_sequence(x, shards)), 1)
        cuts = [padded[:, i * size : i * size + count] for i in shards.segments]
        return torch.stack(cuts, 1).flatten(0, 1)
    x = x.unflatten(1, (shards.per_rank, size))
    ends = x[:, :, size - count :].transpose(0, 1)  # [n, B, count, ...]
    sent, received, order = _routes(shards)
    ends = torch.stack([ends[i] for i in order]) if order else ends[:0]
    came = collectives.all_to_all_single_autograd(ends.contiguous(), received, sent, shards.group)
    if shards.rank == 0:  # its first segment is that of the sequence
        came = torch.cat((x.new_zeros((1, *ends.shape[1:])), came))
    return came.transpose(0, 1).flatten(0, 1)


def _routes(shards):
    """How many segments' ends this rank sends to each rank and receives from each, and which of its segments it sends,
    in the order of the ranks they go to. What it receives is then in the order of its own segments: the segment before
    its head is with the rank before, the one before its tail with the rank after or with itself."""
    last = shards.per_rank * shards.size - 1
    sent, received = [0] * shards.size, [0] * shards.size
    goes = {}
    for i, segment in enumerate(shards.segments):
        if segment < last:
            goes[_owner(segment + 1, shards)] = i
            sent[_owner(segment + 1, shards)] = 1
        if segment > 0:
            received[_owner(segment - 1, shards)] = 1
    return sent, received, [goes[rank] for rank in sorted(goes)]


def _owner(segment, shards):
    return segment if segment < shards.size else 2 * shards.size - 1 - segment


def halos(xs: list[Tensor], shards: SequenceShards, width: int, resets: Tensor | None = None) -> list[Tensor]:
    """What ``causal_conv1d`` of a width must know of the tokens before this rank's segments.

    Args:
        xs: a list of tensors [B, T_local, D_i] of one dtype: this rank's n segments, one after the other.
        shards: a SequenceShards.
        width: of the convolution; width - 1 tokens are looked back at.
        resets: bool [B, T_local] or None, the same on all ranks.

    Returns:
        For each x the initial states [B * n, D_i, width - 1] of its segments as rows of the batch: zeros before the
        sequence begins and where a token belongs to an earlier document than the last one before the segment.
        Differentiable in the xs. One exchange serves all; what a rank receives does not grow with T_local.
    """
    sizes = [x.shape[2] for x in xs]
    if resets is not None:
        xs = [*xs, resets[..., None].to(xs[0].dtype)]
    past = preceding(torch.cat(xs, 2) if len(xs) > 1 else xs[0], shards, width - 1)
    if resets is not None:
        past, begins = past[..., :-1], past[..., -1:].detach() != 0
        # How many documents begin after a token of the past: more than none, and it is hidden.
        later = begins.flip(1).long().cumsum(1).flip(1) - begins.long()
        # Not a product with 0: what a reset hides may be inf or NaN and must not show through.
        past = past.masked_fill(later > 0, 0)
    return [x.transpose(1, 2) for x in past.split(sizes, 2)]


def context_parallel_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, *,
    group: ProcessGroup | DeviceMesh, layout: str = "contiguous", resets: Tensor | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """:func:`causal_conv1d` over sequences of which each rank of a group has a part.

    Args:
        x: [B, T_local, D], this rank's segments one after the other; all ranks have the same shape.
        weight, bias, activation, backend: as in :func:`causal_conv1d`, the same on all ranks.
        group: a ProcessGroup or a 1-D DeviceMesh.
        layout: "contiguous", rank r has the r-th part of every sequence; or "head_tail", of 2 * size parts it has the
            r-th and the (2 * size - 1 - r)-th, and T_local is even.
        resets: bool [B, T_local], this rank's, True where a token begins a new document; None on all ranks or on none.

    Returns:
        y [B, T_local, D]. Gradients are those of the sum of all ranks' losses: that of x is complete, those of weight
        and bias are this rank's share, to be summed over the ranks.

    Raises:
        TypeError, ValueError: as :func:`causal_conv1d`, for an unknown layout, or a T_local that it cannot split.
    """
    checked_inputs(x, weight, bias, activation, None, None, resets, backend)
    shards = SequenceShards.of(group, layout)
    past = halos([x], shards, weight.shape[1], resets)
    rows = shards.rows(resets)
    y, _ = causal_conv1d(shards.rows(x), weight, bias, activation, initial_state=past[0], resets=rows, backend=backend)
    return y.view(x.shape)
