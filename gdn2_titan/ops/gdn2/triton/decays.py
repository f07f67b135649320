"""Device functions: decays between the tokens of a chunk. The mathematics is in ``gdn2/intra.py``.

Tokens r and s of a block whose whole decay is not too strong for the dtype meet around its middle,

    exp(G_r - G_s) = exp(x_r) * exp(-x_s),    x_r = (g summed up to r - g summed behind r) / 2    within the block,

one product for the whole block: ``safe_depth`` says how long the blocks may be, 2^depth tokens; nearly always that is the
chunk. Longer ones are joined by halving: where row r lies in the right half of a block of 2m tokens and column s in its
left half,

    exp(G_r - G_s) = exp(g summed from the middle to r) * exp(g summed from s + 1 to the middle),

two factors in [0, 1]. Every sum is a product with a 0/1 matrix, on tensor cores, and of numbers of one sign.
"""

import triton
import triton.language as tl

from ...triton.products import cast, dot
from .rows import C, load_reset

__all__ = [
    "DEPTH", "behind", "documents_of", "level", "middle", "off_diagonal", "row_and_column", "safe_depth", "same_block",
    "sum_over", "up_to",
]  # fmt: skip

DEPTH = tl.constexpr(C.value.bit_length() - 1)  # at depth n, blocks of 2^n tokens


@triton.jit
def row_and_column():
    """Row and column numbers [C, 1], [1, C]."""
    rows = tl.arange(0, C)
    return rows[:, None], rows[None, :]


@triton.jit
def safe_depth(decay, LIMIT: tl.constexpr):
    """The greatest n with blocks of 2^n tokens whose decay [C, D], of every channel, is at most LIMIT; 0 where none is."""
    whole = tl.min(tl.sum(decay, 0), 0)
    token = tl.min(tl.min(decay, 0), 0)
    n = (token * 2 >= -LIMIT).to(tl.int32)
    for depth in tl.static_range(2, DEPTH):
        n += (token * (1 << depth) >= -LIMIT).to(tl.int32)
    return tl.where(whole >= -LIMIT, DEPTH, n)


@triton.jit
def documents_of(resets, count):
    """Of the tokens of a chunk: whether each sees the state before the chunk [C], and is seen by the state behind it [C];
    whether the chunk is of one document that began before it; and which see each other [C, C]. resets: at the first row,
    or None."""
    document = tl.zeros([C], tl.int32)
    if resets is not None:
        document = tl.cumsum(load_reset(resets, count, C).to(tl.int32), 0)
    newest = tl.max(document, 0)
    return document == 0, document == newest, newest == 0, document[:, None] == document[None, :]


@triton.jit
def up_to(i, j):
    """Weights of G: all tokens up to row i."""
    return tl.where(j <= i, 1.0, 0.0)


@triton.jit
def behind(i, j):
    """Weights of G_C - G: all tokens behind row i."""
    return tl.where(j > i, 1.0, 0.0)


@triton.jit
def same_block(i, j, depth):
    """Whether row i and column j are of one block of 2^depth tokens."""
    return (i >> depth) == (j >> depth)


@triton.jit
def middle(i, j, depth):
    """Weights of x: of the decay of token j in x_i; zeros for blocks of one token."""
    return tl.where(same_block(i, j, depth) & (depth > 0), tl.where(j <= i, 0.5, -0.5), 0.0)


@triton.jit
def level(i, j, depth):
    """Whether row i takes on the decay of token j when blocks of 2^depth tokens are joined."""
    right = ((i >> depth) & 1) == 1
    return tl.where(same_block(i, j, depth) & (right == (j <= i)), 1.0, 0.0)


@triton.jit
def off_diagonal(i, j, depth):
    """Whether (i, j) is off the diagonal where two blocks of 2^depth tokens are joined: right half down, left across."""
    return (i > j) & (((i ^ j) >> depth) == 1)


@triton.jit
def sum_over(weights, x, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """weights [C, C] of 0, 1 and 1/2 times x [C, D] fp32. SPLIT: x as the sum of two bf16, 16 bits: for inputs of 8 or
    11."""
    if SPLIT:
        high = cast(x, tl.bfloat16)
        low = cast(x - high.to(tl.float32), tl.bfloat16)
        weights = weights.to(tl.bfloat16)
        total = dot(weights, high, PRECISION) + dot(weights, low, PRECISION)
    else:
        total = dot(weights, x, PRECISION)
    return total
