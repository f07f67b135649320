"""Gated DeltaNet-2 in chunkwise form, forward and hand-written backward, in plain PyTorch (any device).

Per chunk of C tokens (arXiv 2605.22791, chunkwise WY form), with E = exp(G) * b * k, Z = w * v, Q = exp(G) * q,
Kt = exp(G_C - G) * k and A_qk, A = (I + T)^-1 from ``intra``:

    R = A (Z - E S_in)     O = scale * (Q S_in + A_qk R)     S_out = exp(G_C) * S_in + Kt^T R

and backward, with dO already times scale,

    dR = A_qk^T dO + Kt dS_out    dZ = A^T dR    dS_in = exp(G_C) * dS_out + Q^T dO - E^T dZ
    dQ = dO S_in^T    dE = -dZ S_in^T    dKt = R dS_out^T    dA_qk = dO R^T    dT = -dZ R^T

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

    def chunks(self, x):
        """Padded rows x [B, length, H, D] -> a view [NC, B, H, C, D]."""
        B, _, H, D = x.shape
        return x.reshape(B, -1, self.chunk, H, D).permute(1, 0, 3, 2, 4)

    def split(self, x):
        """x [B, T, H, D] -> [NC, B, H, C, D], padded with zeros; a view of x where there is nothing to pad."""
        B, T, H, D = x.shape
        if self.slots is not None:
            x = x.new_zeros(B, self.length, H, D).index_copy_(1, self.slots, x)
        elif T != self.length:
            x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, self.length - T))
        return self.chunks(x)

    def empty(self, x):
        """Padded rows for a result like x [NC, B, H, C, D], and a view of them in the shape of x."""
        _, B, H, _, D = x.shape
        rows = x.new_empty(B, self.length, H, D)
        return rows, self.chunks(rows)

    def join(self, rows, T):
        """Padded rows [B, length, H, D] -> [B, T, H, D]."""
        if self.slots is not None:
            return rows.index_select(1, self.slots)
        return rows[:, :T].contiguous()


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
    """What a forward pass over all chunks yields and a backward pass starts from. M = NC * B * H."""

    gamma: torch.Tensor  # exp(g) [M, C, K]
    qe: torch.Tensor  # Q and E side by side [M, C, 2, K]
    kt: torch.Tensor  # [M, C, K]
    total: torch.Tensor  # exp(G_C) [M, K, 1]
    a_qk: torch.Tensor  # [M, C, C]
    a: torch.Tensor  # [M, C, C]
    state_in: torch.Tensor  # [M, K, V]
    r: torch.Tensor  # [M, C, V]
    final_state: torch.Tensor  # [N, H, K, V]
    keep: list | None  # for intra_chunk_backward


def _steps(NC, *tensors):
    """Each [NC * B * H, ...] -> a tuple of NC views [B * H, ...]."""
    return (x.unflatten(0, (NC, -1)).unbind(0) for x in tensors)


def _states(layout, state, H, K, V, like):
    """A fresh copy of state [N, H, K, V], zeros where it is None, and a view with one [B * H, K, V] per bounds entry."""
    if state is None:
        N = layout.batch if layout.slots is None else len(layout.bounds)
        state = like.new_zeros(N, H, K, V)
    else:
        state = state.clone(memory_format=torch.contiguous_format)
    return state, state.view(len(layout.bounds), -1, K, V)


def _run(layout, q, k, v, g, b, w, state, keep):
    """All chunks forward. Inputs activated and split; state [N, H, K, V] or None; keep: see ``intra_chunk``."""
    (NC, B, H, C, K), V = k.shape, v.shape[-1]
    # The copies into chunk order: each takes along the elementwise operation that is due anyway.
    qe = k.new_empty(NC, B, H, C, 2, K)
    qe[..., 0, :] = q
    torch.mul(b, k, out=qe[..., 1, :])
    kt, gamma = k.new_empty(NC, B, H, C, K).copy_(k), k.new_empty(NC, B, H, C, K).copy_(g).exp_()
    z = torch.mul(w, v, out=k.new_empty(NC, B, H, C, V))
    qe, kt, gamma, z = (x.flatten(0, 2) for x in (qe, kt, gamma, z))
    a_qk, a, total = intra_chunk(qe, kt, gamma, keep)

    total = total.unsqueeze(-1)
    state_in, r = k.new_empty(NC * B * H, K, V), torch.empty_like(z)
    final_state, finals = _states(layout, state, H, K, V, k)
    e_, kt_, total_, a_, z_, state_in_, r_ = _steps(NC, qe[:, :, 1], kt, total, a, z, state_in, r)
    for s, (first, last) in zip(finals, layout.bounds, strict=True):
        for i in range(first, last):
            state_in_[i].copy_(s)
            torch.bmm(a_[i], z_[i].baddbmm_(e_[i], s, alpha=-1), out=r_[i])
            s.mul_(total_[i]).baddbmm_(kt_[i].mT, r_[i])
    return _Chunks(gamma, qe, kt, total, a_qk, a, state_in, r, final_state, keep)


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
    q, k, vc, g, b, w = (layout.split(x) for x in (q, k, _group(v.to(dtype), H), g, b, _group(w, H)))
    c = _run(layout, q, k, vc, g, b, w, state, keep=None)
    o = torch.bmm(c.qe[:, :, 0], c.state_in).baddbmm_(c.a_qk, c.r)
    rows, chunks = layout.empty(vc)
    torch.mul(o.view(vc.shape), scale, out=chunks)
    o = layout.join(rows, T).view(B, T, HV, V)
    return o.to(v.dtype), _ungroup_state(c.final_state, HV)


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
    q, k, vc, g, b, w = (layout.split(x) for x in (q, k, _group(v.to(dtype), H), g, b, _group(w, H)))
    c = _run(layout, q, k, vc, g, b, w, state, keep=[])
    M, C, GV = c.r.shape
    # dO and -dZ of each token side by side, as Q and E are; the spare row is for intra_chunk_backward.
    doz = c.r.new_empty(M, 2 * C + 1, GV)
    doz[:, 2 * C :] = 0
    do_chunks = doz[:, : 2 * C : 2].view(vc.shape)
    if do is None:
        do_chunks.zero_()
    else:
        torch.mul(layout.split(_group(do.to(dtype), H)), scale, out=do_chunks)

    # The reverse scan.
    doz2 = doz[:, : 2 * C]
    dr = torch.bmm(c.a_qk.mT, doz2[:, ::2])
    dz, dstate_out = torch.empty_like(dr), torch.empty_like(c.state_in)
    dfinal = None if dfinal_state is None else _group_state(dfinal_state, H, dtype)
    dinitial, dinitials = _states(layout, dfinal, H, K, GV, c.r)
    NC = k.shape[0]
    qe_, kt_, total_, a_, dr_, dz_, doz_, dstate_out_ = _steps(
        NC, c.qe.view(M, 2 * C, K), c.kt, c.total, c.a, dr, dz, doz2, dstate_out
    )
    for ds, (first, last) in zip(dinitials, layout.bounds, strict=True):
        for i in reversed(range(first, last)):
            dstate_out_[i].copy_(ds)
            torch.bmm(a_[i].mT, dr_[i].baddbmm_(kt_[i], ds), out=dz_[i])
            torch.neg(dz_[i], out=doz_[i][:, 1::2])
            ds.mul_(total_[i]).baddbmm_(qe_[i].mT, doz_[i])

    dqe = torch.bmm(doz2, c.state_in.mT).view(M, C, 2, K)
    dkt = torch.bmm(c.r, dstate_out.mT)
    dproduct = torch.bmm(doz, c.r.mT)
    # What exp(G_C) gains from the state and from the rows of Kt, save the last, which knows no decay.
    dG_end = torch.linalg.vecdot(c.state_in, dstate_out).mul_(c.total.squeeze(-1)).unsqueeze(1)
    earlier = (torch.arange(C, device=dG_end.device) < C - 1).to(dtype).expand(M, 1, C)
    dG_end.baddbmm_(earlier, c.kt * dkt)
    intra_chunk_backward(dproduct, dqe, dkt, c.gamma, c.keep)

    dqe, dk = dqe.view(*q.shape[:-1], 2, K), dkt.view(k.shape)
    dq, dkb = dqe[..., 0, :], dqe[..., 1, :]
    (db_rows, db), (dk_rows, dk_), (dq_rows, dq_), (dg_rows, dg_) = (layout.empty(k) for _ in range(4))
    torch.mul(dkb, k, out=db)
    # A pair of tokens r > s met the factor exp(G_r - G_s), the state exp(G_r), exp(G_C) or exp(G_C - G_s): what q, b * k
    # and k gained, times their value, is what G_r gained and G_s lost. The diagonal of A_qk knows no decay: it comes after.
    dG = torch.mul(q, dq, out=c.kt.view(k.shape)).addcmul_(b, db)
    dG[..., :-1, :].addcmul_(k[..., :-1, :], dk[..., :-1, :], value=-1)
    dG[..., -1:, :].add_(dG_end.view(*k.shape[:3], 1, K))
    suffix = dG.new_ones(C, C).triu_().expand(M, C, C)
    dg_.copy_(torch.bmm(suffix, c.kt).view(k.shape))

    diagonal = dproduct[:, : 2 * C : 2].diagonal(dim1=1, dim2=2).view(*k.shape[:-1], 1)
    torch.addcmul(dq, diagonal, k, out=dq_)
    torch.addcmul(dk.addcmul_(diagonal, q), dkb, b, out=dk_)
    (dv_rows, dv_), (dw_rows, dw_) = layout.empty(vc), layout.empty(vc)
    torch.mul(dz.view(vc.shape), w, out=dv_)
    torch.mul(dz.view(vc.shape), vc, out=dw_)
    dq, dk, dv, dg, db, dw = (
        layout.join(x, T) for x in (dq_rows, dk_rows, dv_rows, dg_rows, db_rows, dw_rows)
    )
    grads = activate_backward(
        (dq, dk, dg, db, dw.view(v.shape)), *raw, A_log, dt_bias, resets, **options
    )  # fmt: skip
    dq, dk, dg, db, dw, dA_log, ddt_bias = grads
    dinitial_state = None
    if initial_state is not None:
        dinitial_state = _ungroup_state(dinitial, HV).to(initial_state.dtype)
    return (
        dq.to(raw[0].dtype), dk.to(raw[1].dtype), dv.view(v.shape).to(v.dtype), dg.to(raw[2].dtype),
        db.to(raw[3].dtype), dw.to(raw[4].dtype),
        None if dA_log is None else dA_log.to(A_log.dtype),
        None if ddt_bias is None else ddt_bias.to(dt_bias.dtype),
        dinitial_state,
    )  # fmt: skip
