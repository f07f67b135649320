"""What an exchange of maps costs, and which form of it should take less time."""

from . import exchange_gather, exchange_scan
from .layout import SequenceShards

__all__ = ["FORMS", "choose", "launches", "received", "seconds"]

FORMS = {"gather": exchange_gather, "scan": exchange_scan}

# A message between two devices, a kernel that puts maps together, and the rate of a link between machines; what matters
# is their proportion. On a link nine times as fast a gather can be a third faster where 4 or 8 ranks scan; more ranks
# wait for its bytes there too.
MESSAGE = 20e-6  # seconds
LAUNCH = 2.5e-6  # seconds. The work in it is left out: where there is much of it there are still more bytes.
BANDWIDTH = 50e9  # bytes per second


def received(form: str, size: int, per_rank: int, transition: int, state: int, final: bool = False) -> tuple[int, int]:
    """Bytes that a rank receives at most, (forward, backward). size: ranks; transition, state: bytes of one segment."""
    if form == "gather":
        return (size - 1) * per_rank * (transition + state), (size - 1) * per_rank * state
    steps = size.bit_length() - 1
    if per_rank == 2 or final:
        forward = steps * per_rank * (transition + state)
    else:
        forward = (steps - 1) * (transition + state) + state
    return forward, steps * per_rank * state


def launches(form: str, size: int, per_rank: int) -> int:
    """Kernels, forward and backward, of the rank that has most of them; with the final state there are at most 6 more.
    The gather multiplies and adds for each segment, the scan on both sides of each step."""
    if form == "gather":
        return 4 * per_rank * size
    steps = size.bit_length() - 1
    return 15 * steps - 7 if per_rank == 1 else 21 * steps + 7


def seconds(form: str, size: int, per_rank: int, transition: int, state: int, final: bool = False) -> float:
    """Forward and backward, of which nothing is hidden behind other work."""
    steps = size.bit_length() - 1
    messages = 2 if form == "gather" else 2 * steps
    bytes_ = sum(received(form, size, per_rank, transition, state, final))
    return messages * MESSAGE + launches(form, size, per_rank) * LAUNCH + bytes_ / BANDWIDTH


def choose(shards: SequenceShards, transition: int, state: int, final: bool) -> str:
    """ "gather" or "scan"; transition, state: bytes of one segment's, of a whole batch."""
    size = shards.size
    if size & (size - 1):
        return "gather"
    costs = [seconds(form, size, shards.per_rank, transition, state, final) for form in ("gather", "scan")]
    # Not min with a key: a compiler for whom the batch is open cannot read that.
    return "gather" if costs[0] <= costs[1] else "scan"
