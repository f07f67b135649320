"""Device functions: decays between the tokens of half a chunk, by halving. The mathematics is in ``gdn2/intra.py``.

Where row r lies in the right half of a block of 2m tokens and column s in its left half,

    exp(G_r - G_s) = exp(g summed from the middle to r) * exp(g summed from s + 1 to the middle),

two factors in [0, 1]. Each token belongs to one half, so that one factor per token and level is all there is: row i
sums g over the tokens j of ``level(i, j, depth)``, which a product with that 0/1 matrix does on tensor cores. Sums of
numbers of one sign do not cancel, and no difference of sums is ever taken. The gradient goes down the same matrices.

A chunk is worked on as two halves of HALF tokens and the off-diagonal block that joins them, so that every square fits
in few registers. For the same reason the loops over levels are not unrolled, and their number is read from memory each
time: masks that the compiler can compute in advance it keeps, and spills everything else.
"""

import triton
import triton.language as tl

from ...triton.products import cast, dot
from .rows import C

__all__ = ["HALF", "LEVELS", "from_start", "level", "off_diagonal", "opaque", "row_and_column", "sum_over", "to_end"]

HALF = tl.constexpr(C.value // 2)
LEVELS = tl.constexpr(HALF.value.bit_length() - 1)  # at depth n, blocks of m = 2^n tokens are joined


@triton.jit
def opaque(number: tl.constexpr, levels):
    """The number, opaque to the compiler: a loop of so many iterations stays one, which nothing is moved out of or
    into. Of straight code products are put off to where they are needed, their operands in registers until then."""
    return number + (tl.load(levels) - LEVELS)


@triton.jit
def row_and_column(levels):
    """Row and column numbers [HALF, 1], [1, HALF]; levels points to LEVELS, which the compiler does not know."""
    rows = tl.arange(0, HALF) + (tl.load(levels) - LEVELS)
    return rows[:, None], rows[None, :]


@triton.jit
def level(i, j, depth):
    """Whether row i takes on the decay of token j when blocks of m tokens are joined."""
    right = ((i >> depth) & 1) == 1
    return ((i >> depth) == (j >> depth)) & (right == (j <= i))


@triton.jit
def off_diagonal(i, j, depth):
    """Whether (i, j) is off the diagonal where two blocks of m tokens are joined: right half down, left across."""
    return (i > j) & (((i ^ j) >> depth) == 1)


@triton.jit
def from_start(i, j, levels):
    """The tokens whose decay separates row i from what came before this half."""
    return level(i, j, tl.load(levels)) == 0


@triton.jit
def to_end(i, j, levels):
    """The tokens whose decay separates row i from what comes after this half."""
    return level(i, j, tl.load(levels))


@triton.jit
def sum_over(mask, x, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """mask [HALF, HALF] times x [HALF, D] fp32. SPLIT: x as the sum of two bf16, 16 bits: for inputs of 8 or 11."""
    ones = tl.where(mask, 1.0, 0.0)
    if SPLIT:
        high = cast(x, tl.bfloat16)
        low = cast(x - high.to(tl.float32), tl.bfloat16)
        ones = ones.to(tl.bfloat16)
        total = dot(ones, high, PRECISION) + dot(ones, low, PRECISION)
    else:
        total = dot(ones, x, PRECISION)
    return total
