"""A long sequence on one device as segments side by side, where batch and heads are too few to fill the device."""

import numbers
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..dispatch import triton_can_serve
from .arguments import GDN2Inputs, GDN2Options
from .flops import CHUNK
from .segmented import segmented_gdn2

__all__ = ["check_num_segments", "number_of_segments", "segments_of", "split_gdn2"]

COUNTS = (64, 32, 16, 8, 4, 2)
SHORTEST = 16 * CHUNK  # tokens of a segment: the products that join two segments cost about as much as two chunks
COLUMNS = 64  # of the state, to a program of the kernel that goes from chunk to chunk


def number_of_segments(B: int, T: int, H: int, HV: int, K: int, V: int, processors: int) -> int:
    """As many as ``processors`` run side by side. Sizes that a compiler leaves open count as too small or too large."""
    programs = B * (HV * -(-V // COLUMNS) + H * -(-K // COLUMNS))  # of one segment: for its values and for its map
    for count in COUNTS:
        if statically_known_true(count * programs <= processors) and statically_known_true(count * SHORTEST <= T):
            return count
    return 1


def check_num_segments(value: int | str) -> None:
    """Raise ValueError unless value is "auto" or a whole number of at least 1."""
    if value != "auto" and (isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1):
        raise ValueError(f"num_segments is {value!r}; it must be 'auto' or a whole number of at least 1")


def segments_of(q: Tensor, v: Tensor, num_segments: int | str, backend: str = "auto") -> int:
    """The number asked for, "auto" resolved: PyTorch's kernels gain nothing by segments."""
    check_num_segments(num_segments)
    if num_segments != "auto":
        return int(num_segments)
    if not triton_can_serve(q, backend, (q.shape[-1], v.shape[-1])):
        return 1
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    return number_of_segments(*q.shape[:3], v.shape[2], *q.shape[3:], *v.shape[3:], processors)


def split_gdn2(op: Callable, count: int, inputs: GDN2Inputs, options: GDN2Options) -> tuple[Tensor, Tensor]:
    """``op`` (o, final state; without cu_seqlens) of ``count`` segments of equal length, whole chunks unless
    count divides T. What is left over follows them and runs by ``op`` itself; so does a sequence that is too short."""
    T = inputs.q.shape[1]
    length = T // count if T % count == 0 else T // (count * CHUNK) * CHUNK
    cut = length * count
    if length == 0:
        return op(*inputs, *options)
    o, state = segmented_gdn2(inputs.map_tokens(lambda x: x[:, :cut], inputs.initial_state), count, options)
    if cut == T:
        return o, state
    o_rest, state = op(*inputs.map_tokens(lambda x: x[:, cut:], state), *options)
    return torch.cat((o, o_rest), 1), state
