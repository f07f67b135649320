"""Device functions: decays between the tokens of a chunk. The mathematics is in ``gdn2/intra.py``.

Tokens r and s of a block whose whole decay is not too strong for the dtype meet around its middle,

    2^(G_r - G_s) = 2^x_r * 2^-x_s,    x_r = (g summed up to r - g summed behind r) / 2    within the block,

one product for the whole block. Nearly always that is the chunk; else ``steps_of`` says how long the blocks may be,
2^depth tokens, and they are joined by halving: where row r lies in the right half of a block of 2m tokens and column s
in its left half,

    2^(G_r - G_s) = 2^(g summed from the middle to r) * 2^(g summed from s + 1 to the middle),

two factors in [0, 1]. Every sum is a product with a 0/1 matrix, on tensor cores, and of numbers of one sign; the
gradient goes through the same matrices turned. All logarithms are to the base 2.
"""

import triton
import triton.language as tl

from ...triton.products import cast, dot, exp2, opaque
from .rows import C, load_reset

__all__ = [
    "DEPTH", "documents_of", "factors_of", "gradient_of_sums", "off_diagonal", "row_and_column", "step_mask",
    "step_weights", "steps_of", "sum_over", "sums_of",
]  # fmt: skip

DEPTH = tl.constexpr(C.value.bit_length() - 1)  # at depth n, blocks of 2^n tokens


@triton.jit
def row_and_column():
    """Row and column numbers [C, 1], [1, C]."""
    rows = opaque(tl.arange(0, C))
    return rows[:, None], rows[None, :]


@triton.jit
def documents_of(resets, count):
    """The document of each token of a chunk [C], from 0, the one that began before the chunk; and the newest of them.
    resets: at the first row."""
    document = tl.cumsum(load_reset(resets, count, C).to(tl.int32), 0)
    return document, tl.max(document, 0)


@triton.jit
def steps_of(decay, weak, LIMIT: tl.constexpr):
    """depth and number of steps for the decay [C, D] of a chunk: one where it is weak, else blocks of 2^depth tokens
    whose decay, of every channel, is at most LIMIT, and what joins them."""
    depth = DEPTH + 0
    if not weak:
        strongest = tl.min(tl.min(decay, 0), 0)
        depth = 0
        for n in tl.static_range(1, DEPTH):
            depth += (strongest * (1 << n) >= -LIMIT).to(tl.int32)
    return depth, 1 - depth + DEPTH


@triton.jit
def step_weights(i, j, depth, step):
    """Weights of the log of the factors of a step [C, C]: step 0 takes blocks of 2^depth tokens around their middle,
    step n joins two blocks of 2^(depth + n - 1)."""
    level = depth + step - 1
    right = ((i >> level) & 1) == 1
    joins = ((i >> level) == (j >> level)) & (right == (j <= i))
    block = ((i >> depth) == (j >> depth)) & (depth > 0)
    return tl.where(step == 0, tl.where(block, tl.where(j <= i, 0.5, -0.5), 0.0), tl.where(joins, 1.0, 0.0))


@triton.jit
def step_mask(i, j, depth, step):
    """Which products of row i and column j <= i a step makes [C, C]."""
    return tl.where(step == 0, (i >> depth) == (j >> depth), ((i ^ j) >> (depth + step - 1)) == 1)


@triton.jit
def off_diagonal(i, j, depth):
    """Whether (i, j) is off the diagonal where two blocks of 2^depth tokens are joined: right half down, left along."""
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


@triton.jit
def sums_of(decay, LIMIT: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """Of the decay [C, D] of a chunk: its sums G up to each token, and behind each [C, D], over all [D], and whether
    they are weak enough for one product of the whole chunk.

    They then are small, and what is behind a token is what is left of the whole. Of strong ones that would lose it."""
    i, j = row_and_column()
    G = sum_over(tl.where(j <= i, 1.0, 0.0), decay, SPLIT, PRECISION)
    whole = tl.sum(tl.where(i == C - 1, G, 0.0), 0)
    rest = whole[None, :] - G
    weak = tl.min(whole, 0) >= -LIMIT
    if not weak:
        rest = sum_over(tl.where(j > i, 1.0, 0.0), decay, SPLIT, PRECISION)
    return G, rest, whole, weak


@triton.jit
def factors_of(G, rest, log_whole, resets, document, newest):
    """What each token has of the state before the chunk, and the state behind it of each token [C, D]; and of the state
    before [D]. document, newest: ``documents_of`` where resets are given."""
    before, after, whole = exp2(G), exp2(rest), exp2(log_whole)
    if resets is not None:
        before = tl.where((document == 0)[:, None], before, 0.0)
        after = tl.where((document == newest)[:, None], after, 0.0)
        whole = tl.where(newest == 0, whole, 0.0)
    return before, after, whole


@triton.jit
def gradient_of_sums(into_G, into_rest, weak: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """The gradient of the decay [C, D], given those of the first two of ``sums_of``."""
    i, j = row_and_column()
    if weak:
        difference = into_rest - into_G
        below = sum_over(tl.where(j <= i, 1.0, 0.0), difference, SPLIT, PRECISION) - difference
        return below + tl.sum(into_G, 0)[None, :]
    else:
        above = sum_over(tl.where(j >= i, 1.0, 0.0), into_G, SPLIT, PRECISION)
        return above + sum_over(tl.where(j < i, 1.0, 0.0), into_rest, SPLIT, PRECISION)
