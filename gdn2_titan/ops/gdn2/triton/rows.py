"""Device functions: where a chunk's tokens lie, and the raw inputs made into what the recurrence reads."""

import math

import torch
import triton
import triton.language as tl

from ...triton.products import LOG2E, cast, exp2, reciprocal, sigmoid
from ..flops import CHUNK
from ..gates import NORM_EPS, STRONG

__all__ = [
    "C", "chunk_of", "inverse_norms", "load_erase", "load_gate", "load_log_decay", "load_reset", "load_rows", "program",
    "softplus", "store_rows",
]  # fmt: skip

C = tl.constexpr(CHUNK)
EPS = tl.constexpr(NORM_EPS)
# 2 to it is exactly 0, and sums of 64 of it are far from overflow: a finite stand-in for -inf, whose products with the
# zeros of a mask would be NaN.
LEAST_DECAY = tl.constexpr(-160.0)
MOST = tl.constexpr(STRONG)
LEAST = tl.constexpr(math.log(torch.finfo(torch.float32).tiny))


@triton.jit
def program(H: tl.constexpr):
    """Chunk and key head of this program; chunks of one head are neighbours in the grid."""
    chunks = tl.num_programs(0) // H
    return tl.program_id(0) % chunks, tl.program_id(0) // chunks


@triton.jit
def chunk_of(i_c, ends, cu_seqlens, T, NT, N, PACKED: tl.constexpr):
    """Sequence, first token [row of the flat B * T] and number of tokens of chunk i_c; no tokens: no such chunk.

    NT: chunks per sequence of T tokens. Packed: ends [N], the number of chunks up to and including each sequence."""
    if PACKED:
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
        start = tl.load(cu_seqlens + n, mask=there, other=0).to(tl.int64) + (i_c - before) * C
        stop = tl.load(cu_seqlens + n + 1, mask=there, other=0).to(tl.int64)
        count = tl.where(there, tl.minimum(stop - start, C), 0).to(tl.int32)
    else:
        n = i_c // NT
        inside = (i_c % NT) * C
        start = n.to(tl.int64) * T + inside
        count = tl.minimum(T - inside, C)
    return n, start, count


@triton.jit
def load_rows(x, stride, cols, D, count, ROWS: tl.constexpr):
    """ROWS rows in fp32, zeros from row count on: [ROWS, BLOCK]. x: at the first row and head; cols [BLOCK] of D."""
    rows = tl.arange(0, ROWS)
    inside = (rows < count)[:, None] & (cols < D)[None, :]
    return tl.load(x + rows[:, None] * stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_rows(x, value, stride, cols, D, count, ROWS: tl.constexpr):
    """The inverse of ``load_rows``."""
    rows = tl.arange(0, ROWS)
    inside = (rows < count)[:, None] & (cols < D)[None, :]
    tl.store(x + rows[:, None] * stride + cols[None, :], cast(value, x.dtype.element_ty), mask=inside)


@triton.jit
def inverse_norms(x, stride, D, BD: tl.constexpr, BS: tl.constexpr, count, ROWS: tl.constexpr):
    """1 / sqrt(sum of squares + eps) of each of ROWS rows [ROWS], BS columns at a time."""
    squares = tl.zeros([ROWS], tl.float32)
    for first in range(0, BD, BS):
        rows = load_rows(x, stride, first + tl.arange(0, BS), D, count, ROWS)
        squares += tl.sum(rows * rows, 1)
    return tl.rsqrt(squares + EPS)


@triton.jit
def load_erase(b, stride, cols, K, count, SIGMOID: tl.constexpr, ERASE_SCALE: tl.constexpr, ROWS: tl.constexpr):
    """Erase gates of ROWS rows [ROWS, BLOCK]. b: at the first row and head."""
    erase = load_rows(b, stride, cols, K, count, ROWS)
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
def load_log_decay(g, stride, cols, K, count, A_log, dt_bias, resets, GATE: tl.constexpr, ROWS: tl.constexpr):
    """Log-decays, to the base 2, of ROWS rows [ROWS, BLOCK], no less than LEAST_DECAY and 0 at resets, whose tokens see
    none before them; and the argument of softplus, which the gate's gradient needs.

    g, resets: at the first row; A_log, dt_bias: at the head."""
    x = load_rows(g, stride, cols, K, count, ROWS)
    if GATE:
        rate, stretch, shift, rest = load_gate(A_log)
        if dt_bias is not None:
            rest += tl.load(dt_bias + cols, mask=cols < K, other=0.0).to(tl.float32)[None, :] * stretch
        x = x * stretch + shift + rest
        decay = -(rate * LOG2E) * softplus(x)
        decay = tl.where((tl.arange(0, ROWS) < count)[:, None] & (cols < K)[None, :], decay, 0.0)
    else:
        decay = x * LOG2E
    decay = tl.where(decay < LEAST_DECAY, LEAST_DECAY, decay)  # a NaN stays one
    if resets is not None:
        decay = tl.where(load_reset(resets, count, ROWS)[:, None], 0.0, decay)
    return decay, x
