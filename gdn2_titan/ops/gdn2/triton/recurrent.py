"""Decoding: the recurrence token by token, each slice of the state in registers from its first token to its last.

At one token per sequence, a step of decoding, it is bound by reading and writing the state once: a row of a slice is
128 bytes, loaded 16 bytes to the thread. The final state may be the memory of the initial one: every program reads its
slice, all of it, before it writes it, and nobody else's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...checks import check_cu_seqlens
from ...triton import launching
from ...triton.products import LOG2E, cast, exp2, sigmoid
from ..arguments import GDN2Inputs, GDN2Options
from ..gates import NORM_EPS
from .configurations import padded
from .rows import bounded_argument, load_bounded_gate, load_gate, softplus

__all__ = ["recurrent_forward"]


@triton.jit
def l2_normalized(x, EPS: tl.constexpr):
    return x * tl.rsqrt(tl.sum(x * x, 0) + EPS)


@triton.jit(do_not_specialize=["T", "block_stride"])
def recurrent_kernel(
    q, k, v, g, b, w, A_log, dt_bias, initial_state, cu_seqlens, resets, state_indices, o, final_state, T, scale,
    lower_bound, block_stride,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    L2NORM: tl.constexpr, GATE: tl.constexpr, SIGMOID: tl.constexpr, ERASE_SCALE: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """One sequence, one value head, BV columns of its state; the slices of a head are neighbours in the grid.

    q, k, g, b [B, T, H, K], b None where nothing is erased; v, w, o [B, T, HV, V]; states [N, HV, K, V], or with
    state_indices [N] a pool of blocks [HV, K, V] that lie block_stride apart; all contiguous, T any number when packed.
    """
    SLICES: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    row = (program // SLICES).to(tl.int64)  # of the states: n * HV + hv
    n, hv = row // HV, row % HV
    h = hv // (HV // H)
    kk = tl.arange(0, BK)
    vv = program % SLICES * BV + tl.arange(0, BV)
    in_k, in_v = kk < K, vv < V
    cell = kk[:, None] * V + vv[None, :]
    in_cell = in_k[:, None] & in_v[None, :]
    first, length = n * T, T
    if cu_seqlens is not None:
        first = tl.load(cu_seqlens + n).to(tl.int64)
        length = (tl.load(cu_seqlens + n + 1) - first).to(tl.int32)
    block = n
    if state_indices is not None:
        block = tl.load(state_indices + n).to(tl.int64)
        if block < 0:
            for t in range(length):
                at_value = ((first + t) * HV + hv) * V
                tl.store(o + at_value + vv, tl.zeros([BV], o.dtype.element_ty), mask=in_v)
            return
    state = block * block_stride + hv * K * V
    if initial_state is None:
        S = tl.zeros([BK, BV], tl.float32)
    else:
        S = tl.load(initial_state + state + cell, mask=in_cell, other=0).to(tl.float32)

    if GATE:
        if A_log is not None:
            A_log += h
        bias = 0.0
        if dt_bias is not None:
            bias = tl.load(dt_bias + h * K + kk, mask=in_k, other=0).to(tl.float32)
        if lower_bound is None:
            rate, stretch, shift, rest = load_gate(A_log)
            rest += stretch * bias
        else:
            rate, stretch = load_bounded_gate(A_log)

    for t in range(length):
        token = first + t
        at_key = (token * H + h) * K
        at_value = (token * HV + hv) * V
        q_t = tl.load(q + at_key + kk, mask=in_k, other=0).to(tl.float32)
        k_t = tl.load(k + at_key + kk, mask=in_k, other=0).to(tl.float32)
        g_t = tl.load(g + at_key + kk, mask=in_k, other=0).to(tl.float32)
        if b is not None:
            b_t = tl.load(b + at_key + kk, mask=in_k, other=0).to(tl.float32)
        v_t = tl.load(v + at_value + vv, mask=in_v, other=0).to(tl.float32)
        w_t = tl.load(w + at_value + vv, mask=in_v, other=0).to(tl.float32)
        if L2NORM:
            q_t, k_t = l2_normalized(q_t, EPS), l2_normalized(k_t, EPS)
        if GATE:
            if lower_bound is None:
                g_t = -rate * softplus(g_t * stretch + shift + rest)
            else:
                g_t = lower_bound * sigmoid(bounded_argument(g_t + bias, rate, stretch))
        if SIGMOID:
            w_t = sigmoid(w_t)
            if b is not None:
                b_t = ERASE_SCALE * sigmoid(b_t)
        decay = exp2(g_t * LOG2E)
        if resets is not None:
            decay = tl.where(tl.load(resets + token) != 0, 0.0, decay)

        S = decay[:, None] * S
        write = w_t * v_t
        # Both sums are over the decayed state, so that neither waits for the other.
        if b is not None:
            write -= tl.sum((b_t * k_t)[:, None] * S, 0)
        kept = tl.sum(q_t[:, None] * S, 0)
        S += k_t[:, None] * write[None, :]
        o_t = scale * (kept + tl.sum(q_t * k_t, 0) * write)
        tl.store(o + at_value + vv, cast(o_t, o.dtype.element_ty), mask=in_v)
    tl.store(final_state + state + cell, S, mask=in_cell)


def configuration(BK, V):
    """The one candidate: measuring several would take several steps of a state that is updated in place.

    A slice is up to 32 columns wide; a thread holds 64 numbers of it (16 of a small head: more spill on some GPU), at
    least 4, so that no two hold the same one.
    """
    BV = min(32, padded(V))
    return {"BV": BV, "num_warps": max(1, BK * BV // (512 if BK <= 64 else 2048))}


def recurrent_forward(
    inputs: GDN2Inputs, options: GDN2Options, final_state: Tensor | None = None, state_indices: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """o [B, T, HV, V] and the final state [N, HV, K, V] fp32, written to ``final_state`` where that is given, which may
    be the initial state itself."""
    T, H, K = inputs.q.shape[1:]
    HV, V = inputs.v.shape[2:]
    if inputs.cu_seqlens is not None:
        check_cu_seqlens(inputs.cu_seqlens, T)
    N, BK = inputs.num_sequences, padded(K)
    if final_state is None:
        final_state = inputs.q.new_empty(inputs.state_shape, dtype=torch.float32)
    o = inputs.v.new_empty(inputs.v.shape)
    tensors = inputs._replace(initial_state=None).map(Tensor.contiguous)._asdict()
    tensors |= dict(initial_state=inputs.initial_state, state_indices=state_indices)
    if final_state is not inputs.initial_state and inputs.initial_state is not None:
        tensors["initial_state"] = inputs.initial_state.contiguous()
    launching.launch(
        recurrent_kernel, lambda meta: (N * HV * triton.cdiv(V, meta["BV"]),), (configuration(BK, V),),
        tensors | dict(o=o, final_state=final_state, T=T, scale=options.scale, lower_bound=options.lower_bound,
                       block_stride=final_state.stride(0)),
        dict(H=H, HV=HV, K=K, V=V, BK=BK, L2NORM=options.l2norm, GATE=options.gate, SIGMOID=options.sigmoid,
             ERASE_SCALE=options.erase_scale, EPS=NORM_EPS),
    )  # fmt: skip
    return o, final_state
