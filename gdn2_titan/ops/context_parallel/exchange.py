"""What an exchange of maps costs, and which form of it should take less time."""

from . import exchange_gather, exchange_scan
from .layout import SequenceShards

__all__ = ["FORMS", "choose", "received"]

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


def choose(shards: SequenceShards, transition: int, state: int, final: bool) -> str:
    """The form that should take less time, forward and backward, if nothing is hidden behind other work: "gather" or
    "scan". transition, state: bytes of one segment's, of a whole batch."""
    size, per_rank, steps = shards.size, shards.per_rank, shards.size.bit_length() - 1
    if size & (size - 1):
        return "gather"
    # Form: messages, and kernels of the rank that has most of them; with the final state there are at most 6 more. The
    # gather copies, and folds all in one kernel each way, in which a segment takes about as long as a launch.
    work = {
        "gather": (2, 6 + 2 * per_rank * size),
        "scan": (2 * steps, 10 * steps - 2 if per_rank == 1 else 15 * steps + 7),
    }
    gather, scan = (
        messages * MESSAGE + kernels * LAUNCH
        + sum(received(form, size, per_rank, transition, state, final)) / BANDWIDTH
        for form, (messages, kernels) in work.items()
    )  # fmt: skip
    return "gather" if gather <= scan else "scan"
