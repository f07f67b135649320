"""Device functions: a slice of a state in registers, transposed [BV, K].

It is a tuple of parts of the key channels: operands of 256 of them at once would leave no registers for the rest.
"""

import triton
import triton.language as tl

__all__ = ["load_state", "part_size", "store_state"]


@triton.constexpr_function
def part_size(BK: int) -> int:
    """Key channels of a part."""
    return BK if BK <= 128 else 64


@triton.jit
def load_state(state, given, cols, V, K: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """A state [K, V] in fp32 as parts [BV, PART]; zeros for None, and where given is 0 and not 1."""
    PART: tl.constexpr = part_size(BK)
    S = ()
    for i in tl.static_range(BK // PART):
        if state is None:
            S += (tl.zeros([BV, PART], tl.float32),)
        else:
            rows = i * PART + tl.arange(0, PART)
            inside = (rows < K * given)[None, :] & (cols < V)[:, None]
            S += (tl.load(state + rows[None, :] * V + cols[:, None], mask=inside, other=0.0),)
    return S


@triton.jit
def store_state(state, S, cols, V, K: tl.constexpr, BK: tl.constexpr):
    """The inverse of ``load_state``."""
    PART: tl.constexpr = part_size(BK)
    for i in tl.static_range(BK // PART):
        rows = i * PART + tl.arange(0, PART)
        inside = (rows < K)[None, :] & (cols < V)[:, None]
        tl.store(state + rows[None, :] * V + cols[:, None], S[i], mask=inside)
