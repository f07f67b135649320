"""Device functions: decays between the tokens of a chunk. The mathematics is in ``gdn2/intra.py``.

Tokens r and s of a block whose whole decay is not too strong for the dtype meet around its middle,

    2^(G_r - G_s) = 2^x_r * 2^-x_s,    x_r = (g summed up to r - g summed behind r) / 2    within the block,

one product for the whole block. Nearly always that is the chunk; else ``steps_of`` says how long the blocks may be,
2^depth tokens, and they are joined by halving: where row r lies in the right half of a block of 2m tokens and column s
in its left half,

    2^(G_r - G_s) = 2^(g summed from the middle to r) * 2^(g summed from s + 1 to the middle),

two factors in [0, 1]. Every sum is a product with a matrix of the table ``matrices``, on tensor cores, and of numbers
of one sign; the gradient goes through the same matrices turned. All logarithms are to the base 2.
"""

import triton
import triton.language as tl

from ...triton.products import cast, dot, exp2, opaque
from . import matrices
from .rows import C, load_reset

__all__ = [
    "BEHIND", "DEPTH", "FROM", "MASKS", "UP_TO", "WEIGHTS", "documents_of", "factors_of", "matrix_of", "off_diagonal",
    "row_and_column", "step_number", "steps_of", "sum_over", "sums_of",
]  # fmt: skip

DEPTH = tl.constexpr(C.value.bit_length() - 1)  # at depth n, blocks of 2^n tokens
UP_TO, BEHIND, FROM = tl.constexpr(matrices.UP_TO), tl.constexpr(matrices.BEHIND), tl.constexpr(matrices.FROM)
WEIGHTS, MASKS = tl.constexpr(matrices.WEIGHTS), tl.constexpr(matrices.MASKS)


@triton.jit
def row_and_column():
    """Row and column numbers [C, 1], [1, C]."""
    rows = opaque(tl.arange(0, C))
    return rows[:, None], rows[None, :]


@triton.jit
def _later(a, b):
    return tl.maximum(a, b)


@triton.jit
def documents_of(resets, count):
    """The document of each token of a chunk [C], by the row that it begins in, -1 before the chunk; and the newest of
    them. resets: at the first row."""
    begins = tl.where(load_reset(resets, count, C), tl.arange(0, C), -1)
    document = tl.associative_scan(begins, 0, _later)
    return document, tl.max(document, 0)


@triton.jit
def steps_of(decay, weak, LIMIT: tl.constexpr):
    """depth and number of steps for the decay [C, D] of a chunk: one where it is weak, else blocks of 2^depth tokens
    whose decay, of every channel, is at most LIMIT, and what joins them."""
    depth = DEPTH + 0
    if not weak:
        strongest = tl.min(decay)
        depth = 0
        for n in tl.static_range(1, DEPTH):
            depth += (strongest * (1 << n) >= -LIMIT).to(tl.int32)
    return depth, 1 - depth + DEPTH


@triton.jit
def matrix_of(matrices, number):
    """Matrix ``number`` of the table ``matrices`` [C, C]."""
    rows = tl.arange(0, C)
    return tl.load(matrices + number * C * C + rows[:, None] * C + rows[None, :])


@triton.jit
def step_number(depth, step):
    """Of a step, among weights or masks: blocks of 2^depth tokens in step 0, else joins of two of 2^(depth + step - 1)
    tokens."""
    return tl.where(step == 0, depth, DEPTH + depth + step - 1)


@triton.jit
def off_diagonal(i, j, depth):
    """Whether (i, j) is off the diagonal where two blocks of 2^depth tokens are joined: right half down, left along."""
    return (i > j) & (((i ^ j) >> depth) == 1)


@triton.jit
def sum_over(weights, x, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """weights [C, C] of 0, 1 and 1/2 times x [C, D] fp32. SPLIT: weights in bf16 and x as the sum of two bf16, 16 bits:
    for inputs of 8 or 11."""
    if SPLIT:
        high = cast(x, tl.bfloat16)
        low = cast(x - high.to(tl.float32), tl.bfloat16)
        total = dot(weights, high, PRECISION) + dot(weights, low, PRECISION)
    else:
        total = dot(weights, x, PRECISION)
    return total


@triton.jit
def sums_of(decay, matrices, LIMIT: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """Of the decay [C, D] of a chunk: its sums G up to each token, and behind each [C, D], over all [D], and whether
    they are weak enough for one product of the whole chunk.

    They then are small, and what is behind a token is what is left of the whole. Of strong ones that would lose it."""
    i, _ = row_and_column()
    G = sum_over(matrix_of(matrices, UP_TO), decay, SPLIT, PRECISION)
    whole = tl.sum(tl.where(i == C - 1, G, 0.0), 0)
    rest = whole[None, :] - G
    weak = tl.min(whole, 0) >= -LIMIT
    if not weak:
        rest = sum_over(matrix_of(matrices, BEHIND), decay, SPLIT, PRECISION)
    return G, rest, whole, weak


@triton.jit
def factors_of(G, rest, log_whole, resets, document, newest):
    """What each token has of the state before the chunk, and the state behind it of each token [C, D]; and of the state
    before [D]. document, newest: ``documents_of`` where resets are given."""
    before, after, whole = exp2(G), exp2(rest), exp2(log_whole)
    if resets is not None:
        before = tl.where((document < 0)[:, None], before, 0.0)
        after = tl.where((document == newest)[:, None], after, 0.0)
        whole = tl.where(newest < 0, whole, 0.0)
    return before, after, whole
