"""An erase gate that knows what the memory holds: its logit also gets a low-rank term of what the layer read in the
chunk before.

    logit_t = (projection of x_t) + U P m        m: the mean of o over the CHUNK tokens of the chunk before

for each key head, with o of its value heads. Chunks are counted from the start of a document; its first has no chunk
before it, m = 0, and nothing of another document is in any m. It is our reading of the abstract of CARVE (arXiv
2606.27229).

A chunk's gates depend on outputs of the one before, so a sequence is a loop of calls of the operator, which hand on the
state. Where the chunks of documents begin is not known beforehand, and shapes are to stay what they are. So the loop is
over windows of CHUNK tokens from the first on. In a window at most one chunk ends that another of the same document
follows: the operator runs once to have its mean, and once more with all gates known.

Shapes: B batch, T tokens, H key heads of size K, HV value heads of size V, C = K channels of the erase gate, or 1.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gdn2_titan.ops.gdn2.flops import CHUNK

from .init import fill_
from .this_rank import of_this_rank

__all__ = ["RANK", "ContentGate", "Reading", "mix_documents", "mix_windows"]

RANK = 16  # of U P


class Reading(NamedTuple):
    """Where a sequence stands in its chunks."""

    memory: Tensor | None  # [B, HV, K, V]
    total: Tensor  # [B, HV, V], of o in the chunk that is not full yet
    mean: Tensor  # [B, HV, V], of o in the chunk before, zeros where there is none
    count: Tensor  # int64 [B], tokens in ``total``, fewer than CHUNK


class ContentGate(nn.Module):
    """U P of every key head by itself, so that ranks that share the heads need nothing of each other: means [B, HV, V]
    -> what is added to the erase gate's logits [B, H, C]. U is zero at the start."""

    def __init__(self, num_heads: int, channels: int, value_size: int) -> None:
        """channels: C; value_size: V of all value heads that read one key head."""
        super().__init__()
        self.down = nn.Parameter(torch.empty(num_heads, RANK, value_size))  # P
        self.up = nn.Parameter(torch.empty(num_heads, channels, RANK))  # U

    def forward(self, mean: Tensor) -> Tensor:
        down, up = of_this_rank(self.down), of_this_rank(self.up)
        mean = mean.to(down.dtype).reshape(mean.shape[0], down.shape[0], -1)  # value heads of a key head side by side
        return torch.einsum("bhr,hcr->bhc", torch.einsum("bhv,hrv->bhr", mean, down), up)

    def init_weights(self, gain: float) -> None:
        """P of each head Xavier-uniform."""
        bound = gain * (6 / sum(self.down.shape[1:])) ** 0.5
        fill_(self.down, lambda x: nn.init.uniform_(x, -bound, bound))
        fill_(self.up, nn.init.zeros_)


# Of q, k, v, g, b, w by position, and initial_state, output_final_state, resets and cu_seqlens by name.
Operator = Callable[..., tuple[Tensor, Tensor | None]]


def mix_windows(
    gate: ContentGate, op: Operator, tokens: tuple[Tensor, ...], resets: Tensor | None, reading: Reading | None,
    keep: bool,
) -> tuple[Tensor, Reading, Tensor]:  # fmt: skip
    """o [B, T, HV, V], where the sequences stand after it (without the memory unless ``keep``), and the erase gate's
    logits [B, T, H, K] with the term.

    tokens: q, k, v, g, b, w as the operator takes them, b logits. resets: bool [B, T], True where a document begins.
    """
    T = tokens[0].shape[1]
    on_edges = T == 0 or (reading is None and resets is None)
    reading = _begun(tokens[2], len(tokens[2])) if reading is None else reading
    outputs, logits = [], []
    for start in range(0, max(T, 1), CHUNK):
        within = slice(start, start + CHUNK)
        window = [x[:, within] for x in tokens]
        of_window = functools.partial(op, output_final_state=keep or start + CHUNK < T)
        if on_edges:
            o, reading, b = _chunk(gate, of_window, window, reading)
        else:
            here = None if resets is None else resets[:, within]
            o, reading, b = _window(gate, of_window, window, here, reading)
        outputs.append(o)
        logits.append(b)
    return torch.cat(outputs, 1), reading, torch.cat(logits, 1)


def mix_documents(
    gate: ContentGate, op: Operator, tokens: tuple[Tensor, ...], cu_seqlens: Tensor, reading: Reading | None
) -> tuple[Tensor, Reading, Tensor]:  # fmt: skip
    """As ``mix_windows``, for N documents end to end as one row [1, T, ...], which ``cu_seqlens`` [N + 1] tells, and a
    Reading of N: all first chunks in one call, then all second ones. Waits for the device."""
    v, N = tokens[2], len(cu_seqlens) - 1
    reading = _begun(v, N) if reading is None else reading
    at = torch.arange(v.shape[1], device=v.device)
    document = torch.searchsorted(cu_seqlens, at, right=True) - 1  # int64 [T]
    chunk = (reading.count[document] + at - cu_seqlens[document]) // CHUNK
    outputs, logits, places = [], [], []
    for index in range(int(chunk.max()) + 1):
        (place,) = (chunk == index).nonzero(as_tuple=True)
        owner = document[place]
        counts = torch.bincount(owner, minlength=N)
        q, k, values, g, b, w = (x[:, place] for x in tokens)
        b = _with(b, gate(reading.mean)[owner][None])
        bounds = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        states = dict(initial_state=reading.memory, output_final_state=True, cu_seqlens=bounds)
        o, memory = op(q, k, values, g, b, w, **states)
        total = reading.total.index_add(0, owner, o[0].to(reading.total.dtype))
        reading = _turned(Reading(memory, total, reading.mean, reading.count + counts))
        outputs.append(o)
        logits.append(b)
        places.append(place)
    order = torch.cat(places)
    o, b = (torch.empty_like(x).index_copy(1, order, x) for x in (torch.cat(outputs, 1), torch.cat(logits, 1)))
    return o, reading, b


def _begun(v, sequences):
    """Before the first token."""
    wide = torch.promote_types(v.dtype, torch.float32)
    nothing = v.new_zeros(sequences, *v.shape[2:], dtype=wide)
    return Reading(None, nothing, nothing, v.new_zeros(sequences, dtype=torch.int64))


def _turned(reading):
    """Past a chunk that is full."""
    full = reading.count == CHUNK
    wide = full[:, None, None]
    total, mean = reading.total.masked_fill(wide, 0), torch.where(wide, reading.total / CHUNK, reading.mean)
    return Reading(reading.memory, total, mean, reading.count.masked_fill(full, 0))


def _with(b, term):
    return b + term.to(b.dtype)


def _chunk(gate, op, window, reading):
    """A window that is a chunk, or the beginning of one."""
    q, k, v, g, b, w = window
    b = _with(b, gate(reading.mean)[:, None])
    o, memory = op(q, k, v, g, b, w, initial_state=reading.memory)
    total = reading.total + o.to(reading.total.dtype).sum(1)
    return o, _turned(Reading(memory, total, reading.mean, reading.count + v.shape[1])), b


def _window(gate, op, window, resets, reading):
    """A window in which chunks end and documents begin anywhere."""
    q, k, v, g, logits, w = window
    n = v.shape[1]
    place = reading.count[:, None] + torch.arange(n, device=v.device)  # in its chunk, where no document begins
    documents = torch.zeros_like(place) if resets is None else resets.long().cumsum(1)
    goes_on = documents == 0
    before, after = goes_on & (place < CHUNK), goes_on & (place >= CHUNK)  # the edge of a chunk, bool [B, n]
    states = dict(initial_state=reading.memory, resets=resets)

    def of(tokens, x):
        """x [B, ...] for these tokens, zeros for the others: [B, n, ...]"""
        return tokens[..., None, None] * x[:, None]

    b, mean = _with(logits, of(before, gate(reading.mean))), reading.mean
    if n > 1:
        o, _ = op(q, k, v, g, b, w, **states | {"output_final_state": False})
        total = reading.total + (before[..., None, None] * o.to(mean.dtype)).sum(1)
        mean = torch.where(after.any(1)[:, None, None], total / CHUNK, mean)
        b = _with(b, of(after, gate(mean)))
    o, memory = op(q, k, v, g, b, w, **states)
    # What the last token's chunk has so far.
    other = documents[:, -1] > 0
    current = (documents == documents[:, -1:]) & (after == after[:, -1:])
    begun = other | after[:, -1]
    total = reading.total.masked_fill(begun[:, None, None], 0)
    total = total + (current[..., None, None] * o.to(mean.dtype)).sum(1)
    count = reading.count.masked_fill(begun, 0) + current.sum(1)
    mean = mean.masked_fill(other[:, None, None], 0)
    return o, _turned(Reading(memory, total, mean, count)), b
