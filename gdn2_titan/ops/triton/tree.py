"""Device functions: decays between tokens of a chunk, by halving. The mathematics is that of ``ops/intra.py``.

Where row r lies in the right half of a block of 2m tokens and column s in its left half,

    exp(G_r - G_s) = exp(g summed from the middle to r) * exp(g summed from s + 1 to the middle),

two factors in [0, 1]. Each token belongs to one half, so that one factor per token and level is all there is: row i
sums g over the tokens j of ``level(i, j, m)``, which a product with that 0/1 matrix does on tensor cores. Sums of
numbers of one sign do not cancel, and no difference of sums is ever taken. The gradient goes down the same matrices.
"""

import triton
import triton.language as tl

from .products import dot
from .rows import C

__all__ = ["LEVELS", "after", "corner", "level", "pairs", "sum_over", "up_to"]

LEVELS = tl.constexpr(C.value.bit_length() - 1)


@triton.jit
def pairs():
    """Row and column numbers [C, 1], [1, C]."""
    rows = tl.arange(0, C)
    return rows[:, None], rows[None, :]


@triton.jit
def level(i, j, m: tl.constexpr):
    """Whether row i takes on the decay of token j when blocks of m tokens are joined."""
    right = (i // m) % 2 == 1
    return (i // m == j // m) & ((right & (j <= i)) | ((right == 0) & (j > i)))


@triton.jit
def corner(i, j, m: tl.constexpr):
    """Whether (i, j) lies in the corner that joins two blocks of m tokens: right half down, left half across."""
    return (i // (2 * m) == j // (2 * m)) & ((i // m) % 2 == 1) & ((j // m) % 2 == 0)


@triton.jit
def up_to(i, j):
    """The tokens whose decay separates row i from the state before the chunk."""
    return j <= i


@triton.jit
def after(i, j):
    """The tokens whose decay separates row i from the state after the chunk."""
    return j > i


@triton.jit
def sum_over(mask, x, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """mask [C, C] of 0/1 times x [C, D] fp32. SPLIT: x as the sum of two bf16, 16 bits: for inputs of 8 or 11."""
    if SPLIT:
        ones = mask.to(tl.bfloat16)
        high = x.to(tl.bfloat16)
        low = (x - high.to(tl.float32)).to(tl.bfloat16)
        return dot(ones, high, PRECISION) + dot(ones, low, PRECISION)
    return dot(mask.to(tl.float32), x, PRECISION)
