"""What an exchange of maps costs, and which form of it should take less time."""

__all__ = ["choose", "received", "seconds"]

# A message between two devices, the products that follow it, and the rate of a link between machines; what matters is
# their proportion. On a faster link the gather gains a little, never much: both forms then wait for messages.
MESSAGE = 20e-6  # seconds
PRODUCT = 5e-6  # seconds: a launch; the product itself is smaller
BANDWIDTH = 50e9  # bytes per second


def received(form, size, per_rank, transition, state, final=False):
    """Bytes that a rank receives at most, (forward, backward). size: ranks; transition, state: bytes of one segment."""
    if form == "gather":
        return (size - 1) * per_rank * (transition + state), (size - 1) * per_rank * state
    steps = size.bit_length() - 1
    if per_rank == 2 or final:
        forward = steps * per_rank * (transition + state)
    else:
        forward = (steps - 1) * (transition + state) + state
    return forward, steps * per_rank * state


def seconds(form, size, per_rank, transition, state, final=False):
    """Forward and backward, of which nothing is hidden behind other work."""
    steps = size.bit_length() - 1
    messages = 2 if form == "gather" else 2 * steps
    products = 2 * per_rank * size if form == "gather" else 6 * per_rank * steps
    bytes_ = sum(received(form, size, per_rank, transition, state, final))
    return messages * MESSAGE + products * PRODUCT + bytes_ / BANDWIDTH


def choose(shards, transition, state, final):
    """ "gather" or "scan"; transition, state: bytes of one segment's, of a whole batch."""
    size = shards.size
    if size & (size - 1):
        return "gather"
    costs = [seconds(form, size, shards.per_rank, transition, state, final) for form in ("gather", "scan")]
    # Not min with a key: a compiler for whom the batch is open cannot read that.
    return "gather" if costs[0] <= costs[1] else "scan"
