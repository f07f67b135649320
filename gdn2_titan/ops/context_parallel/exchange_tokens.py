"""What ranks that share sequences give each other: the tokens before a segment, or all tokens.

Functional collectives, so that they are part of a compiled graph. Every rank of a group must make the same calls in the
same order; backward then does too, also where a rank has nothing to send or to receive.
"""

import torch
from torch.distributed import _functional_collectives as collectives

__all__ = ["gather_sequence", "preceding"]

# Its name up to torch 2.12, which later versions call deprecated.
_all_gather = getattr(collectives, "all_gather_single_autograd", None) or collectives.all_gather_tensor_autograd


def gather_sequence(x, shards):
    """x [B, T_local, ...] of every rank -> all tokens in the order of the sequence [B, T, ...]."""
    return shards.global_order(_all_gather(x.contiguous(), 1, shards.group), 1)


def preceding(x, shards, count):
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
