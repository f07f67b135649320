"""Device functions of the kernels: whose channels a program has, a walk over consecutive tokens, and what it loads."""

import triton
import triton.language as tl

__all__ = [
    "channel_mask", "enter", "load_bounds", "load_columns", "load_flags", "load_group", "load_parameters", "load_row",
    "load_state", "pre_activation", "pre_activation_gradient", "program", "sequence_of_walk", "the_one", "zeros",
]  # fmt: skip


@triton.jit
def program(D_0, D_1, D_2, BD: tl.constexpr):
    """What this program works on: row of the grid, tensor (0, 1 or 2), and block of that tensor's channels [BD]. Of one
    tensor, or of three, whose blocks are neighbours in the grid."""
    blocks_0 = tl.cdiv(D_0, BD)
    if D_1 is None:
        return tl.program_id(0) // blocks_0, 0, tl.program_id(0) % blocks_0 * BD + tl.arange(0, BD)
    else:
        blocks_1 = tl.cdiv(D_1, BD)
        blocks = blocks_0 + blocks_1 + tl.cdiv(D_2, BD)
        block = tl.program_id(0) % blocks
        i = tl.where(block < blocks_0, 0, tl.where(block < blocks_0 + blocks_1, 1, 2))
        block -= the_one(i, 0, blocks_0, blocks_0 + blocks_1)
        return tl.program_id(0) // blocks, i, block * BD + tl.arange(0, BD)


@triton.jit
def the_one(i, x_0, x_1, x_2):
    """Number i of three pointers or numbers: of the tensors that a program does not work on it knows nothing. The first
    where there is no other. Not None: up to Triton 3.6 no function returns it."""
    if x_1 is None:
        return x_0
    else:
        return tl.where(i == 0, x_0, tl.where(i == 1, x_1, x_2))


@triton.jit
def channel_mask(d, D, present):
    """The mask d < D, all False unless present, a scalar."""
    # As a bound, not as d < D & present: Triton 3.9's interpreter makes integers of a scalar truth that it spreads out.
    return d < tl.where(present, D, 0)


@triton.jit
def zeros(COUNT: tl.constexpr, BD: tl.constexpr):
    rows = ()
    for _ in tl.static_range(COUNT):
        rows = rows + (tl.zeros((BD,), tl.float32),)
    return rows


@triton.jit
def load_columns(x, n, d, D, COUNT: tl.constexpr):
    """x [N, D, COUNT] -> its entry n as COUNT rows, oldest first."""
    rows = ()
    for i in tl.static_range(COUNT):
        rows = rows + (tl.load(x + (n.to(tl.int64) * D + d) * COUNT + i, mask=d < D, other=0.0).to(tl.float32),)
    return rows


@triton.jit
def load_state(x, n, d, D, S: tl.constexpr, BD: tl.constexpr):
    if x is None:
        return zeros(S, BD)
    else:
        return load_columns(x, n, d, D, S)


@triton.jit
def load_row(x, stride, t, low, high, d, D):
    """Row t of x [T, D] in its dtype, zero unless low <= t < high."""
    return tl.load(x + t.to(tl.int64) * stride + d, mask=channel_mask(d, D, (low <= t) & (t < high)), other=0.0)


@triton.jit
def load_group(x, stride, t, low, high, d, D, COUNT: tl.constexpr):
    """Rows t to t + COUNT - 1, all asked for before the first is used, so that the waits for memory overlap."""
    rows = ()
    for i in tl.static_range(COUNT):
        rows = rows + (load_row(x, stride, t + i, low, high, d, D),)
    return rows


@triton.jit
def load_flags(resets, t, T, COUNT: tl.constexpr):
    """Whether each of the tokens t to t + COUNT - 1 begins a document."""
    flags = ()
    for i in tl.static_range(COUNT):
        if resets is None:
            flags = flags + (False,)
        else:
            flags = flags + (tl.load(resets + t + i, mask=(0 <= t + i) & (t + i < T), other=0) != 0,)
    return flags


@triton.jit
def sequence_at(t, low, cu_seqlens, N):
    """The packed sequence that token t lies in, one of low .. N - 1: the last that begins at or before it."""
    high = N
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(cu_seqlens + middle) <= t
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def load_bounds(n, cu_seqlens, T):
    """First token of sequence n and the one after its last."""
    if cu_seqlens is None:
        return tl.full((), 0, tl.int32), T
    else:
        return tl.load(cu_seqlens + n).to(tl.int32), tl.load(cu_seqlens + n + 1).to(tl.int32)


@triton.jit
def sequence_of_walk(b, first, T, N, cu_seqlens):
    """The sequence that a walk through batch row b begins in, and its bounds. first: the walk's first token, which
    may lie before 0."""
    n = b
    if cu_seqlens is not None:
        n = sequence_at(tl.maximum(first, 0), tl.full((), 0, tl.int32), cu_seqlens, N)
    start, end = load_bounds(n, cu_seqlens, T)
    return n, start, end


@triton.jit
def enter(
    t, reset, window, age, n, start, end, d, D, T, N, initial_state, cu_seqlens, S: tl.constexpr, BD: tl.constexpr
):
    """Step on to token t: the window that it sees, and which sequence it is in. age: how far back its own document
    and sequence reach, or more: the token j before it is visible if j <= age."""
    age += 1
    if cu_seqlens is not None:
        if (t == end) & (t < T):
            n = sequence_at(t, n + 1, cu_seqlens, N)
            start, end = load_bounds(n, cu_seqlens, T)
    if cu_seqlens is not None or initial_state is not None:
        if t == start:
            window = load_state(initial_state, n, d, D, S, BD)
            age = tl.zeros_like(age)
    if reset:
        window = zeros(S, BD)
        age = tl.zeros_like(age)
    return window, age, n, start, end


@triton.jit
def pre_activation(taps, weights, bias, W: tl.constexpr):
    pre = taps[0] * weights[0] + bias
    for i in tl.static_range(1, W):
        pre += taps[i] * weights[i]
    return pre


@triton.jit
def pre_activation_gradient(dy, taps, weights, bias, W: tl.constexpr, SILU: tl.constexpr):
    """Gradient of the pre-activation."""
    dpre = dy.to(tl.float32)
    if SILU:
        pre = pre_activation(taps, weights, bias, W)
        gate = tl.sigmoid(pre)
        dpre *= gate * (1 + pre * (1 - gate))
    return dpre


@triton.jit
def load_parameters(weight, bias, d, D, W: tl.constexpr):
    weights = load_columns(weight, tl.full((), 0, tl.int32), d, D, W)
    if bias is None:
        return weights, 0.0
    else:
        return weights, tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)
