"""The short convolution over sequences that ranks share: every segment starts from the tokens before it."""

import torch

from ..short_conv.api import causal_conv1d, check_conv_inputs
from .exchange_tokens import preceding
from .shards import SequenceShards

__all__ = ["context_parallel_conv1d", "halos"]


def halos(xs, shards, width, resets=None):
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
    x, weight, bias=None, activation=None, *, group, layout="contiguous", resets=None, backend="auto"
):
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
    check_conv_inputs(x, weight, bias, activation, None, None, resets)
    shards = SequenceShards.of(group, layout)
    past = halos([x], shards, weight.shape[1], resets)
    rows = shards.rows(resets)
    y, _ = causal_conv1d(shards.rows(x), weight, bias, activation, initial_state=past[0], resets=rows, backend=backend)
    return y.view(x.shape)
