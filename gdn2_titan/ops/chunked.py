"""Gated DeltaNet-2 in chunkwise form, forward and hand-written backward, in plain PyTorch (any device).

Per chunk of C tokens (arXiv 2605.22791, chunkwise WY form), with E = exp(G) * b * k, Z = w * v, Q = scale * exp(G) * q,
Kt = exp(G_C - G) * k and A_qk, A from ``intra``:

    Y = A E     U = A Z     R = U - Y S_in     O = Q S_in + A_qk R     S_out = exp(G_C) * S_in + Kt^T R

The value heads of one key head are laid side by side along the value axis, which is all that grouped heads need:
every product above treats the columns of V independently.
"""

from dataclasses import dataclass

import torch

from .gates import activate, activate_backward, compute_dtype
from .intra import intra_chunk, intra_chunk_backward
from .validation import check_cu_seqlens

__all__ = ["chunk_backward", "chunk_forward"]

CHUNK = 64


@dataclass(frozen=True)
class Layout:
    """Where tokens go: ``slots`` [T] of packed sequences in a row padded so that each starts on a chunk, None where
    B sequences of equal length run side by side; which sequence a chunk begins or ends (None: all B, or none)."""

    batch: int
    length: int  # tokens per row after padding, a multiple of chunk
    chunk: int
    slots: torch.Tensor | None
    bounds: list[tuple[int, int]]  # chunks [first, last) of each sequence; one entry for all where slots is None

    def split(self, x):
        """x [B, T, H, D] -> chunks [NC, B * H, C, D], padded with zeros."""
        B, T, H, D = x.shape
        if self.slots is not None:
            x = x.new_zeros(B, self.length, H, D).index_copy_(1, self.slots, x)
        elif T != self.length:
            x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, self.length - T))
        x = x.reshape(B, -1, self.chunk, H, D).permute(1, 0, 3, 2, 4)
        return x.reshape(-1, B * H, self.chunk, D).contiguous()

    def join(self, x, T):
        """The inverse of ``split``: [NC, B * H, C, D] -> [B, T, H, D]."""
        NC, BH, C, D = x.shape
        x = x.view(NC, self.batch, -1, C, D).permute(1, 0, 3, 2, 4).reshape(self.batch, NC * C, -1, D)
        if self.slots is not None:
            return x.index_select(1, self.slots)
        return x[:, :T].contiguous()


def _layout(B, T, cu_seqlens):
    if cu_seqlens is None:
        longest = T
    else:
        check_cu_seqlens(cu_seqlens, T)
        bounds = cu_seqlens.tolist()
        lengths = [j - i for i, j in zip(bounds[:-1], bounds[1:], strict=True)]
        longest = max(lengths)
    # Short sequences get short chunks: no work on padding, and one token costs one step.
    C = min(CHUNK, 1 << (longest - 1).bit_length())
    if cu_seqlens is None:
        NC = -(-T // C)
        return Layout(B, NC * C, C, None, [(0, NC)])
    spans, first, shifts = [], 0, []
    for start, length in zip(bounds, lengths, strict=False):
        spans.append((first, first - (-length // C)))
        shifts.append(first * C - start)
        first = spans[-1][1]
    shift = torch.tensor(shifts, device=cu_seqlens.device).repeat_interleave(torch.tensor(lengths).to(cu_seqlens.device))
    slots = torch.arange(T, device=cu_seqlens.device) + shift
    return Layout(1, first * C, C, slots, spans)


@dataclass
class _Chunks:
    """What a forward pass over all chunks yields and a backward pass starts from. [NC, B * H, C, ...] each."""

    q: torch.Tensor  # times scale
    k: torch.Tensor
    b: torch.Tensor
    v: torch.Tensor
    w: torch.Tensor
    q_up: torch.Tensor  # Q
    e: torch.Tensor
    y: torch.Tensor
    u: torch.Tensor
    kt: torch.Tensor
    up: torch.Tensor  # exp(G)
    down: torch.Tensor  # exp(G_C - G)
    total: torch.Tensor  # exp(G_C) [NC, B * H, K, 1]
    a_qk: torch.Tensor  # [NC * B * H, C, C]
    a: torch.Tensor
    state_in: torch.Tensor  # [NC, B * H, K, V]
    r: torch.Tensor
    keep: list | None


def _bmm(x, y):
    """Matrix products over [NC, B * H]."""
    return torch.bmm(x.flatten(0, 1), y.flatten(0, 1)).view(*x.shape[:2], x.shape[2], y.shape[3])


def _run(layout, q, k, v, g, b, w, state, scale, keep):
    """All chunks forward. Inputs activated, [B, T, H, K] and [B, T, H, V]; state [N, H, K, V] or None.

    Returns the chunks and the final state [N, H, K, V].
    """
    H, V = v.shape[2:]
    q, k, v, g, b, w = (layout.split(x) for x in (q * scale, k, v, g, b, w))
    NC, BH, C, K = k.shape
    kb = b * k
    a_qk, a, decays = intra_chunk(*(x.flatten(0, 1) for x in (q, kb, k, g.exp())), keep=keep)
    a_qk, a = a_qk.view(NC, BH, C, C), a.view(NC, BH, C, C)
    up, down, total = decays.up.view_as(k), decays.down.view_as(k), decays.total.view(NC, BH, K, 1)
    e = kb.mul_(up)
    y, u, kt = _bmm(a, e), _bmm(a, w * v), down * k
    state_in = k.new_empty(NC, BH, K, V)
    r = torch.empty_like(v)
    finals = []
    for n, (first, last) in enumerate(layout.bounds):
        if state is None:
            s = k.new_zeros(BH, K, V)
        else:
            s = (state if layout.slots is None else state[n : n + 1]).reshape(BH, K, V)
        for i in range(first, last):
            state_in[i] = s
            torch.baddbmm(u[i], y[i], s, alpha=-1, out=r[i])
            s = torch.baddbmm(total[i] * s, kt[i].mT, r[i])
        finals.append(s.view(-1, H, K, V))
    final_state = torch.cat(finals) if len(finals) > 1 else finals[0].clone()
    return _Chunks(q, k, b, v, w, q * up, e, y, u, kt, up, down, total, a_qk, a, state_in, r, keep), final_state


def _group(x, H):
    """[B, T, HV, V] -> [B, T, H, HV / H * V]: the value heads of a key head side by side."""
    return x.reshape(*x.shape[:2], H, -1)


def _group_state(state, H, dtype):
    """[N, HV, K, V] -> [N, H, K, HV / H * V]."""
    N, HV, K, V = state.shape
    return state.to(dtype).view(N, H, HV // H, K, V).transpose(2, 3).reshape(N, H, K, HV // H * V)


def _ungroup_state(state, HV):
    N, H, K, V = state.shape
    return state.view(N, H, K, HV // H, -1).transpose(2, 3).reshape(N, HV, K, V * H // HV)


def chunk_forward(q, k, v, g, b, w, A_log, dt_bias, initial_state, cu_seqlens, resets, scale, options):
    """o [B, T, HV, V] in v's dtype, final state [N, HV, K, V] in the compute dtype. options: those of ``activate``."""
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    dtype = compute_dtype(q)
    layout = _layout(B, T, cu_seqlens)
    q, k, g, b, w = activate(q, k, g, b, w, A_log, dt_bias, resets, **options)
    state = None if initial_state is None else _group_state(initial_state, H, dtype)
    c, final_state = _run(layout, q, k, _group(v.to(dtype), H), g, b, _group(w, H), state, scale, keep=None)
    o = _bmm(c.q_up, c.state_in).flatten(0, 1).baddbmm_(c.a_qk.flatten(0, 1), c.r.flatten(0, 1))
    o = layout.join(o.view_as(c.v), T).view(B, T, HV, V)
    return o.to(v.dtype), _ungroup_state(final_state, HV)


def chunk_backward(
    do, dfinal_state, q, k, v, g, b, w, A_log, dt_bias, initial_state, cu_seqlens, resets, scale, options
):
    """Gradients (dq, dk, dv, dg, db, dw, dA_log, ddt_bias, dinitial_state) in the dtype of their input; the last
    three None where the input is. do [B, T, HV, V] or None, dfinal_state [N, HV, K, V] or None."""
    raw = q, k, g, b, w
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    dtype = compute_dtype(q)
    layout = _layout(B, T, cu_seqlens)
    q, k, g, b, w = activate(*raw, A_log, dt_bias, resets, **options)
    state = None if initial_state is None else _group_state(initial_state, H, dtype)
    c, _ = _run(layout, q, k, _group(v.to(dtype), H), g, b, _group(w, H), state, scale, keep=[])
    del q, k, g, b, w
    NC, BH, C, _ = c.k.shape
    do = torch.zeros_like(c.v) if do is None else layout.split(_group(do.to(dtype), H))

    # The reverse scan: dR = A_qk^T dO + Kt dS_out, dS_in = Q^T dO + exp(G_C) * dS_out - Y^T dR.
    dr, dstate_in = _bmm(c.a_qk.mT, do), _bmm(c.q_up.mT, do)
    dstate_out = torch.empty_like(dstate_in)
    dfinal = None if dfinal_state is None else _group_state(dfinal_state, H, dtype)
    dinitial = []
    for n, (first, last) in enumerate(layout.bounds):
        if dfinal is None:
            ds = torch.zeros_like(dstate_in[0])
        else:
            ds = (dfinal if layout.slots is None else dfinal[n : n + 1]).reshape(dstate_in[0].shape)
        for i in reversed(range(first, last)):
            dstate_out[i] = ds
            dr[i].baddbmm_(c.kt[i], ds)
            ds = torch.baddbmm(dstate_in[i], c.y[i].mT, dr[i], alpha=-1).addcmul_(c.total[i], dstate_out[i])
        dinitial.append(ds.view(-1, H, K, ds.shape[-1]))

    de = _bmm(c.a.mT, _bmm(dr, c.state_in.mT)).neg_()  # dE = A^T dY with dY = -dR S_in^T
    dz = _bmm(c.a.mT, dr)
    # dT = -A^T dA A^T with dA = dU Z^T + dY E^T, hence -(dZ U^T + dE Y^T)
    dt = torch.bmm(de.flatten(0, 1), c.y.flatten(0, 1).mT)
    dt = dt.baddbmm_(dz.flatten(0, 1), c.u.flatten(0, 1).mT).neg_()
    da_qk = _bmm(do, c.r.mT).flatten(0, 1)
    dqb, dk = intra_chunk_backward(da_qk, dt, K, c.keep)
    dqb, dk = dqb.view(NC, BH, C, 2, K), dk.view_as(c.k)
    dq, dkb = dqb[..., 0, :], dqb[..., 1, :]
    dq.addcmul_(c.up, _bmm(do, c.state_in.mT))
    dkb.addcmul_(c.up, de)
    dk_out = _bmm(c.r, dstate_out.mT).mul_(c.down)
    dG_end = (c.k * dk_out).sum(2) + (c.state_in * dstate_out).sum(-1) * c.total.squeeze(-1)
    dk.add_(dk_out)
    # A pair of tokens r > s met the factor exp(G_r - G_s), the state exp(G_r), exp(G_C) or exp(G_C - G_s): what q, b * k
    # and k gained, times their value, is what G_r gained and G_s lost. The diagonal of A_qk knows no decay: it comes after.
    kb = c.b * c.k
    dG = (c.q * dq).addcmul_(kb, dkb).addcmul_(c.k, dk, value=-1)
    suffix = dG.new_ones(C, C).triu_().expand(NC * BH, C, C)
    dg = torch.bmm(suffix, dG.flatten(0, 1)).view_as(dG).add_(dG_end.unsqueeze(2))

    diagonal = da_qk.diagonal(dim1=1, dim2=2).reshape(NC, BH, C, 1)
    dq = (dq + diagonal * c.k).mul_(scale)
    dk.addcmul_(diagonal, c.q).addcmul_(dkb, c.b)
    db, dv, dw = dkb * c.k, dz * c.w, dz * c.v
    dq, dk, dv, dg, db, dw = (layout.join(x, T) for x in (dq, dk, dv, dg, db, dw))
    grads = activate_backward(
        (dq, dk, dg, db, dw.view(v.shape)), *raw, A_log, dt_bias, resets, **options
    )  # fmt: skip
    dq, dk, dg, db, dw, dA_log, ddt_bias = grads
    dinitial_state = None
    if initial_state is not None:
        dinitial_state = _ungroup_state(torch.cat(dinitial), HV).to(initial_state.dtype)
    return (
        dq.to(raw[0].dtype), dk.to(raw[1].dtype), dv.view(v.shape).to(v.dtype), dg.to(raw[2].dtype),
        db.to(raw[3].dtype), dw.to(raw[4].dtype),
        None if dA_log is None else dA_log.to(A_log.dtype),
        None if ddt_bias is None else ddt_bias.to(dt_bias.dtype),
        dinitial_state,
    )  # fmt: skip
