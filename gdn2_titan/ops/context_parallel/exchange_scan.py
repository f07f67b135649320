"""The exchange of maps as a scan: log2(R) messages each way, for a number of ranks R that is a power of two.

Ranks meet as in a hypercube: before step s a rank knows the map of its block of 2^s segments; it swaps that with its
partner in the neighbouring block, R bit s apart, and knows the map of both. On the way it gathers what lies before its
own segment in the block, and the transitions that lie after it. Backward runs the same steps with the gradients alone;
every transition it needs was received forward.

The second segments of the head-tail layout lie in the opposite order of ranks. They are scanned as a second lane of the
same messages, and then follow the first ones as a whole. With contiguous shards the last step goes one way: nobody
but the later half needs what it brings, and of that only the states.

What a rank receives, S = 1 or 2 segments a rank: forward log2(R) S (M, D), backward log2(R) S dD; contiguous, without
the state after the whole sequence, at most (log2(R) - 1) (M, D) + D forward.

Shapes as in ``exchange_gather``; an axis of segments is an axis of lanes here.
"""

import math

import torch
from torch import Tensor

from ..gdn2.folding import advance
from .layout import SequenceShards

__all__ = ["kept", "ordered_after", "pending_back", "receive", "receive_back", "send", "send_back"]


@torch.library.custom_op("gdn2_titan::after", mutates_args=())
def ordered_after(x: Tensor, earlier: Tensor) -> Tensor:
    """A copy of x that cannot be computed before ``earlier`` is: an order of messages that a compiler keeps.

    The graphs of two ranks differ, so a compiler may place a message whose contents depend on nothing that came before,
    such as zeros, elsewhere in one graph than in the other. Two ranks then wait for each other's next message for ever.
    """
    return x.clone()


@ordered_after.register_fake
def _(x, earlier):
    return x.new_empty(x.shape)


def _steps(shards):
    return shards.size.bit_length() - 1


def _upper(shards, step):
    """For each lane, whether this rank's block is the later one of the two that meet."""
    places = (shards.rank, shards.size - 1 - shards.rank)
    return [bool(place >> step & 1) for place in places[: shards.per_rank]]


def _one_way(shards, step):
    return shards.per_rank == 1 and step == _steps(shards) - 1


def _swap(tensors, shards, step, to_later=None):
    """Begin to give ``tensors`` to the partner of a step and to take as much; or one way, to the later of the two
    blocks or to the earlier."""
    takes = to_later is None or _upper(shards, step)[0] == to_later
    gives = to_later is None or not takes
    flat = torch.cat([x.reshape(-1) for x in tensors])
    sizes = [flat.numel() if rank == shards.rank ^ (1 << step) else 0 for rank in range(shards.size)]
    nothing = [0] * shards.size
    return torch.ops._c10d_functional.all_to_all_single(
        flat if gives else ordered_after(flat[:0], flat), sizes if takes else nothing, sizes if gives else nothing,
        shards.group,
    )  # fmt: skip


def _wait(flat, *shapes):
    """What was taken, in these shapes."""
    flat = torch.ops._c10d_functional.wait_tensor(flat)
    parts = flat.split([math.prod(shape) for shape in shapes]) if shapes else ()
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _through(M, S, D, backend, transposed=False):
    """M S + D, or M^T S + D; None is the identity for M or S, zeros for D."""
    if M is not None and S is not None:
        return advance(M, S, D, backend, transposed)
    product = M if S is None else S
    return product if D is None else product + D


def kept(shards: SequenceShards) -> int:
    """How many transitions ``receive`` keeps for backward."""
    count, passed = 0, [False] * shards.per_rank
    for step in range(_steps(shards)):
        for lane, upper in enumerate(_upper(shards, step)):
            count += (not _one_way(shards, step)) + (not upper and passed[lane])
            passed[lane] = passed[lane] or not upper
    return count + (shards.per_rank == 2 and passed[0])


def _send(M, D, shards, step, final):
    if _one_way(shards, step) and not final:
        return _swap([D], shards, step, to_later=True)
    return _swap([M, D], shards, step)


def send(M: Tensor, D: Tensor, shards: SequenceShards, final: bool) -> list[Tensor]:
    """Begin. final: whether the state after the whole sequence will be asked for."""
    return [_send(M, D, shards, 0, final)]


def receive(
    pending: list[Tensor], M: Tensor, D: Tensor, shards: SequenceShards, final: bool, backend: str
) -> tuple[Tensor, Tensor | None, Tensor]:
    """As ``exchange_gather.receive``."""
    lanes = range(shards.per_rank)
    entering = [torch.zeros_like(D[lane]) for lane in lanes]  # the states, were the block entered with zero
    before, behind, keep = [None for _ in lanes], [None for _ in lanes], []
    for step in range(_steps(shards)):
        (flat,) = pending if step == 0 else (_send(M, D, shards, step, final),)
        whole = final or not _one_way(shards, step)
        if whole:
            other_M, other_D = _wait(flat, M.shape, D.shape)
        elif _upper(shards, step)[0]:
            (other_D,) = _wait(flat, D.shape)
        else:
            _wait(flat)
        next_M, next_D = [], []
        for lane, upper in enumerate(_upper(shards, step)):
            if not _one_way(shards, step):
                keep.append(other_M[lane] if upper else M[lane])
            if not upper and behind[lane] is not None:
                keep.append(behind[lane])
            if upper:
                entering[lane] = _through(before[lane], other_D[lane], entering[lane], backend)
            if not whole:
                continue
            if upper:
                before[lane] = _through(before[lane], other_M[lane], None, backend)
                early, late = (other_M[lane], other_D[lane]), (M[lane], D[lane])
            else:
                behind[lane] = _through(other_M[lane], behind[lane], None, backend)
                early, late = (M[lane], D[lane]), (other_M[lane], other_D[lane])
            next_M.append(_through(late[0], early[0], None, backend))
            next_D.append(_through(late[0], early[1], late[1], backend))
        if whole:
            M, D = torch.stack(next_M), torch.stack(next_D)
    if shards.per_rank == 2:
        entering[1] = _through(before[1], D[0], entering[1], backend)
        if behind[0] is not None:
            keep.append(behind[0])
    final_state = None
    if final:
        final_state = D[0] if shards.per_rank == 1 else _through(M[1], D[0], D[1], backend)
    return torch.stack(entering), final_state, torch.stack(keep) if keep else M.new_empty(0, *M.shape[1:])


def pending_back(shape: torch.Size, shards: SequenceShards) -> tuple[int, ...]:
    """The shape of what ``send_back`` begins to receive, for dD of this shape."""
    return (0,) if _one_way(shards, 0) and _upper(shards, 0)[0] else (math.prod(shape),)


def send_back(dD: Tensor, shards: SequenceShards, step: int = 0) -> Tensor:
    """Begin. dD [S, B, HV, K, V]: the gradient of each entering state that this rank's own outputs give."""
    return _swap([dD], shards, step, to_later=False if _one_way(shards, step) else None)


def receive_back(pending: Tensor, dD: Tensor, kept: Tensor, shards: SequenceShards, backend: str) -> Tensor:
    """As ``exchange_gather.receive_back``."""
    lanes, kept = range(shards.per_rank), iter(kept)
    leaving, passed = [torch.zeros_like(dD[lane]) for lane in lanes], [False for _ in lanes]
    for step in range(_steps(shards)):
        flat = pending if step == 0 else send_back(dD, shards, step)
        whole = not _one_way(shards, step)
        other = _wait(flat, *([dD.shape] if whole or not _upper(shards, step)[0] else []))
        totals = []
        for lane, upper in enumerate(_upper(shards, step)):
            early = next(kept) if whole else None  # the transition through the earlier of the two blocks
            if not upper:
                transition = next(kept) if passed[lane] else None
                leaving[lane] = _through(transition, other[0][lane], leaving[lane], backend, True)
                passed[lane] = True
            if whole:
                first, second = (other[0][lane], dD[lane]) if upper else (dD[lane], other[0][lane])
                totals.append(_through(early, second, first, backend, True))
        if whole:
            dD = torch.stack(totals)
    if shards.per_rank == 2:
        leaving[0] = _through(next(kept) if passed[0] else None, dD[1], leaving[0], backend, True)
    return torch.stack(leaving)
