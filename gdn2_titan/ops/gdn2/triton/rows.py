"""Device functions: where a chunk's tokens lie, and the raw inputs made into what the recurrence reads."""

import math

import torch
import triton
import triton.language as tl

from ...triton.products import LOG2E, cast, exp2, reciprocal, sigmoid
from ..flops import CHUNK
from ..gates import NORM_EPS, SATURATED, STRONG

__all__ = [
    "C", "among", "bounded_argument", "chunk_of", "inverse_norms", "erase_of", "load_bounded_gate",
    "load_gate", "load_reset", "load_rows", "load_stored", "log_decay_of", "program", "softplus", "store_rows",
]  # fmt: skip

C = tl.constexpr(CHUNK)
EPS = tl.constexpr(NORM_EPS)
# 2 to it is exactly 0, and sums of 64 of it are far from overflow: a finite stand-in for -inf, whose products with the
# zeros of a mask would be NaN.
LEAST_DECAY = tl.constexpr(-160.0)
MOST = tl.constexpr(STRONG)
LEAST = tl.constexpr(math.log(torch.finfo(torch.float32).tiny))
FLAT = tl.constexpr(SATURATED)
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def program(H: tl.constexpr):
    """Chunk and key head of this program; chunks of one head are neighbours in the grid."""
    chunks = tl.num_programs(0) // H
    return tl.program_id(0) % chunks, tl.program_id(0) // chunks


@triton.jit
def chunk_of(i_c, packed, ends, cu_seqlens, T, NT, N):
    """Sequence, first token [row of the flat B * T] and number of tokens of chunk i_c; no tokens: no such chunk.

    NT: chunks per sequence of T tokens. Where packed is 1, and not 0: cu_seqlens [N + 1], and ends [N], the number of
    chunks up to and including each sequence."""
    if packed > 0:
        low = 0
        high = N
        while low < high:  # the first sequence that ends after the chunk begins
            middle = (low + high) // 2
            if tl.load(ends + middle) > i_c:
                high = middle
            else:
                low = middle + 1
        n = low
        there = n < N
        before = tl.load(ends + n - 1, mask=there & (n > 0), other=0)
        start = tl.load(cu_seqlens + n, mask=there, other=0) + (i_c - before) * C
        stop = tl.load(cu_seqlens + n + 1, mask=there, other=0)
        count = tl.where(there, tl.minimum(stop - start, C), 0).to(tl.int32)
    else:
        n = i_c // NT
        inside = (i_c % NT) * C
        start = n.to(tl.int64) * T + inside
        count = tl.minimum(T - inside, C)
    return n, start, count


@triton.jit
def among(cols, D: tl.constexpr):
    """Whether cols are less than D, the size of a head: known to the compiler if it is a power of two, never padded."""
    if D >= 16 and (D & (D - 1)) == 0:
        return tl.full(cols.shape, 1, tl.int1)
    else:
        return cols < D


@triton.jit
def load_stored(x, stride, cols, D: tl.constexpr, count, ROWS: tl.constexpr):
    """``load_rows`` in x's dtype: half the registers until they are wanted."""
    rows = tl.arange(0, ROWS)
    inside = (rows < count)[:, None] & among(cols, D)[None, :]
    return tl.load(x + rows[:, None] * stride + cols[None, :], mask=inside, other=0.0)


@triton.jit
def load_rows(x, stride, cols, D: tl.constexpr, count, ROWS: tl.constexpr):
    """ROWS rows in fp32, zeros from row count on: [ROWS, BLOCK]. x: at the first row and head; cols [BLOCK] of D."""
    return load_stored(x, stride, cols, D, count, ROWS).to(tl.float32)


@triton.jit
def store_rows(x, value, stride, cols, D: tl.constexpr, count, ROWS: tl.constexpr):
    """The inverse of ``load_rows``."""
    rows = tl.arange(0, ROWS)
    inside = (rows < count)[:, None] & among(cols, D)[None, :]
    tl.store(x + rows[:, None] * stride + cols[None, :], cast(value, x.dtype.element_ty), mask=inside)


@triton.jit
def inverse_norms(x, stride, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, count, ROWS: tl.constexpr):
    """1 / sqrt(sum of squares + eps) of each of ROWS rows [ROWS], BS columns at a time."""
    squares = tl.zeros([ROWS], tl.float32)
    for first in range(0, BD, BS):
        rows = load_rows(x, stride, first + tl.arange(0, BS), D, count, ROWS)
        squares += tl.sum(rows * rows, 1)
    return tl.rsqrt(squares + EPS)


@triton.jit
def erase_of(b, SIGMOID: tl.constexpr, ERASE_SCALE: tl.constexpr):
    """Erase gates of b as stored."""
    erase = b.to(tl.float32)
    if SIGMOID:
        erase = ERASE_SCALE * sigmoid(erase)
    return erase


@triton.jit
def softplus(x):
    """log(1 + exp(x)), to fp32 rounding also where it is small: 2 atanh(u / (2 + u)) as a series, u = exp(-|x|)."""
    u = exp2(tl.abs(x) * -LOG2E)
    z = u * reciprocal(2.0 + u)
    s = z * z
    series = 1.0 + s * (1 / 3 + s * (1 / 5 + s * (1 / 7 + s * (1 / 9 + s * (1 / 11 + s * (1 / 13 + s / 15))))))
    return tl.maximum(x, 0.0) + 2.0 * z * series


@triton.jit
def load_reset(resets, count, ROWS: tl.constexpr):
    """Which of ROWS rows begin a document [ROWS]. resets: at the first row."""
    rows = tl.arange(0, ROWS)
    return tl.load(resets + rows, mask=rows < count, other=0) != 0


@triton.jit
def load_gate(A_log):
    """rate, stretch, shift and rest: the log-decay is -rate * softplus(x), x = stretch * (g + dt_bias) + shift + rest.
    They are exp(A_log), 1, 0 and 0 unless that is too large or too small a number: see ``gates._gate``. A_log: at the
    head."""
    A = tl.load(A_log).to(tl.float32)
    rate = tl.exp(tl.where(A > MOST, MOST, tl.where(A < LEAST, LEAST, A)))  # a NaN stays one
    stretch = tl.exp(tl.minimum(tl.maximum(A - LEAST, LEAST), 0.0))
    return rate, stretch, tl.where(A > MOST, A, 0.0), tl.where(A > MOST, -MOST, 0.0)


@triton.jit
def load_bounded_gate(A_log):
    """rate and stretch, whose product is exp(A_log), 1 for None: one of them is 1 unless that is too large or too small
    a number, see ``gates._bounded_gate``. A_log: at the head."""
    rate = 1.0
    stretch = 1.0
    if A_log is not None:
        A = tl.load(A_log).to(tl.float32)
        held = tl.where(A > MOST, MOST, tl.where(A < LEAST, LEAST, A))  # a NaN stays one
        rate = tl.exp(held)
        stretch = tl.exp(tl.minimum(tl.maximum(A - held, LEAST), -LEAST))
    return rate, stretch


@triton.jit
def _within(x, most: tl.constexpr):
    """x between -most and most; a NaN stays one."""
    return tl.where(x > most, most, tl.where(x < -most, -most, x))


@triton.jit
def bounded_argument(x, rate, stretch):
    """The argument of the sigmoid of a bounded gate, x = g + dt_bias, as far as the sigmoid can tell."""
    return _within(_within(_within(x, LARGEST) * rate, FLAT) * stretch, FLAT)


@triton.jit
def log_decay_of(
    g, cols, K: tl.constexpr, count, A_log, dt_bias, resets, lower_bound, GATE: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Log-decays, to the base 2, of ROWS rows of g as stored [ROWS, BLOCK], no less than LEAST_DECAY and 0 at resets,
    whose tokens see none before them; and the argument of softplus or sigmoid, which the gate's gradient needs.

    resets: at the first row; A_log, dt_bias: at the head."""
    x = g.to(tl.float32)
    if GATE:
        bias = 0.0
        if dt_bias is not None:
            bias = tl.load(dt_bias + cols, mask=among(cols, K), other=0.0).to(tl.float32)[None, :]
        if lower_bound is None:
            rate, stretch, shift, rest = load_gate(A_log)
            x = x * stretch + shift + (rest + bias * stretch)
            decay = -(rate * LOG2E) * softplus(x)
        else:
            rate, stretch = load_bounded_gate(A_log)
            x = bounded_argument(x + bias, rate, stretch)
            decay = lower_bound * (LOG2E * sigmoid(x))
        decay = tl.where((tl.arange(0, ROWS) < count)[:, None] & among(cols, K)[None, :], decay, 0.0)
    else:
        decay = x * LOG2E
    decay = tl.where(decay < LEAST_DECAY, LEAST_DECAY, decay)  # a NaN stays one
    if resets is not None:
        decay = tl.where(load_reset(resets, count, ROWS)[:, None], 0.0, decay)
    return decay, x
