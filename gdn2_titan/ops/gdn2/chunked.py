"""Gated DeltaNet-2 in chunkwise form, forward and hand-written backward, in plain PyTorch (any device): the
twin of the Triton kernels in ``triton/chunk``.

Per chunk of C tokens (arXiv 2605.22791, chunkwise WY form), with E = exp(G) * b * k, Z = w * v, Q = exp(G) * q,
Kt = exp(G_C - G) * k and A_qk, A = (I + T)^-1 from ``intra``:

    R = A (Z - E S_in)     O = scale * (Q S_in + A_qk R)     S_out = exp(G_C) * S_in + Kt^T R

and backward, with dO already times scale,

    dR = A_qk^T dO + Kt dS_out    dZ = A^T dR    dS_in = exp(G_C) * dS_out + Q^T dO - E^T dZ
    dQ = dO S_in^T    dE = -dZ S_in^T    dKt = R dS_out^T    dA_qk = dO R^T    dT = -dZ R^T

Where nothing is erased (b None) there is no E and nothing to solve: R = Z, dZ = dR. A token then has one row in what is
called qe and doz below, not two.

The value heads of one key head are laid side by side along the value axis, which is all that grouped heads need:
every product above treats the columns of V independently.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_cu_seqlens
from .arguments import GDN2Inputs, GDN2Options
from .flops import CHUNK
from .gates import activate, activate_backward
from .intra import intra_chunk, intra_chunk_backward

__all__ = ["chunk_backward", "chunk_forward", "segment_forward"]

# Tokens times heads that are worked on at a time: each intermediate result is then about 2 MB (K = 64), which stays in
# the cache and in memory that malloc already holds, and a sequence of any length needs no more of them.
SEGMENT = 8192


@functools.cache
def _prime_malloc(device):
    """Keep glibc from handing every freed intermediate result back to the kernel.

    Blocks above a threshold are mapped and unmapped each time, and every page of theirs faults anew, which can take
    longer than the arithmetic. Freeing one large block raises that threshold to its size, and the one above which free
    memory at the top of the heap is returned to twice that, for the rest of the process (mallopt(3), M_MMAP_THRESHOLD:
    dynamic, up to 32 MB). The block is never touched, so it costs nothing.
    """
    if device.type == "cpu":
        torch.empty(31 << 20, dtype=torch.uint8)


@dataclass(frozen=True)
class PaddedChunks:
    """Where tokens go: ``slots`` [T] of packed sequences in a row padded so that each starts on a chunk, None where
    B sequences of equal length run side by side; which sequence a chunk begins or ends (None: all B, or none)."""

    batch: int
    length: int  # tokens per row after padding, a multiple of chunk
    chunk: int
    slots: torch.Tensor | None
    bounds: list[tuple[int, int]]  # chunks [first, last) of each sequence; one entry for all where slots is None

    def pad(self, x):
        """x [B, T, H, D] -> [B, length, H, D], x itself where there is nothing to pad."""
        B, T, H, D = x.shape
        if self.slots is not None:
            return x.new_zeros(B, self.length, H, D).index_copy_(1, self.slots, x)
        return torch.nn.functional.pad(x, (0, 0, 0, 0, 0, self.length - T)) if T != self.length else x

    def pad_all(self, tensors):
        """``pad`` of those that are there."""
        return [None if x is None else self.pad(x) for x in tensors]

    def unpad(self, x, T):
        """The inverse of ``pad``."""
        return x[:, :T].contiguous() if self.slots is None else x.index_select(1, self.slots)

    def segments(self, H):
        """The chunks in runs of about SEGMENT tokens times heads."""
        size = max(1, SEGMENT // (self.batch * H * self.chunk))
        count = self.length // self.chunk
        owner = [n for n, (first, last) in enumerate(self.bounds) for _ in range(first, last)]
        return [Segment(i, min(i + size, count), self.chunk, owner[i : i + size]) for i in range(0, count, size)]


@dataclass(frozen=True)
class Segment:
    """Chunks [first, last); owner: the entry of ``PaddedChunks.bounds`` that each belongs to."""

    first: int
    last: int
    chunk: int
    owner: list[int]

    def view(self, x):
        """The chunks of padded rows x [B, length, H, D], a view [NC, B, H, C, D]."""
        x = x[:, self.first * self.chunk : self.last * self.chunk]
        return x.unflatten(1, (-1, self.chunk)).permute(1, 0, 3, 2, 4)

    def views(self, tensors):
        """``view`` of those that are there."""
        return [None if x is None else self.view(x) for x in tensors]

    def steps(self, states, *tensors):
        """For each chunk: its sequence's entry of states, and its part [B * H, ...] of each [NC * B * H, ...]."""
        NC = len(self.owner)
        return list(zip([states[n] for n in self.owner], *(x.unflatten(0, (NC, -1)) for x in tensors), strict=True))


def _padded_chunks(B, T, cu_seqlens):
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
        return PaddedChunks(B, NC * C, C, None, [(0, NC)])
    spans, first, shifts = [], 0, []
    for start, length in zip(bounds, lengths, strict=False):
        spans.append((first, first - (-length // C)))
        shifts.append(first * C - start)
        first = spans[-1][1]
    shift = torch.tensor(shifts).repeat_interleave(torch.tensor(lengths))
    slots = (torch.arange(T) + shift).to(cu_seqlens.device)
    return PaddedChunks(1, first * C, C, slots, spans)


@dataclass
class _Chunks:
    """What a forward pass over the chunks of a segment yields and a backward pass starts from. M = NC * B * H."""

    gamma: torch.Tensor  # exp(g) [M, C, K]
    qe: torch.Tensor  # Q and E side by side [M, C, 2, K]; Q alone [M, C, 1, K] where nothing is erased
    kt: torch.Tensor  # [M, C, K]
    total: torch.Tensor  # exp(G_C) [M, K, 1]
    a_qk: torch.Tensor  # [M, C, C]
    a: torch.Tensor | None  # [M, C, C]
    state_in: torch.Tensor  # [M, K, V]
    r: torch.Tensor  # [M, C, V]


def _run(segment, q, k, v, g, b, w, states, keep=None):
    """The chunks of a segment forward. Inputs activated, as ``Segment.view`` gives them; keep: see ``intra_chunk``.

    states[n] [B * H, K, V]: the state that sequence n enters the segment with, updated in place.
    """
    (NC, B, H, C, K), V = k.shape, v.shape[-1]
    # The copies into chunk order: each takes along the elementwise operation that is due anyway.
    qe = k.new_empty(NC, B, H, C, 1 if b is None else 2, K)
    qe[..., 0, :] = q
    if b is not None:
        torch.mul(b, k, out=qe[..., 1, :])
    kt, gamma = k.new_empty(NC, B, H, C, K).copy_(k), k.new_empty(NC, B, H, C, K).copy_(g).exp_()
    z = torch.mul(w, v, out=k.new_empty(NC, B, H, C, V))
    qe, kt, gamma, z = (x.flatten(0, 2) for x in (qe, kt, gamma, z))
    a_qk, a, total = intra_chunk(qe, kt, gamma, keep)
    total = total.unsqueeze(-1)
    state_in = k.new_empty(NC * B * H, K, V)
    if a is None:
        for s, s_in, kt_i, total_i, z_i in segment.steps(states, state_in, kt, total, z):
            s_in.copy_(s)
            s.mul_(total_i).baddbmm_(kt_i.mT, z_i)
        return _Chunks(gamma, qe, kt, total, a_qk, a, state_in, z)
    r = torch.empty_like(z)
    for s, s_in, e_i, kt_i, total_i, a_i, z_i, r_i in segment.steps(states, state_in, qe[:, :, 1], kt, total, a, z, r):
        s_in.copy_(s)
        torch.bmm(a_i, z_i.baddbmm_(e_i, s, alpha=-1), out=r_i)
        s.mul_(total_i).baddbmm_(kt_i.mT, r_i)
    return _Chunks(gamma, qe, kt, total, a_qk, a, state_in, r)


def _group(x, H):
    """[B, T, HV, V] -> [B, T, H, HV / H * V]: the value heads of a key head side by side."""
    return x.reshape(*x.shape[:2], H, -1)


def _group_state(state, like, chunks, H, K, GV):
    """A fresh copy [len(bounds), B * H, K, HV / H * V] of state [N, HV, K, V] in the dtype of like; None: zeros."""
    if state is None:
        return like.new_zeros(len(chunks.bounds), chunks.batch * H, K, GV)
    N, HV, K, V = state.shape
    out = like.new_empty(N, H, K, HV // H, V)
    out.copy_(state.view(N, H, HV // H, K, V).transpose(2, 3))
    return out.view(len(chunks.bounds), -1, K, GV)


def _ungroup_state(state, H, HV):
    """The inverse of ``_group_state``."""
    K, GV = state.shape[2:]
    return state.view(-1, H, K, HV // H, GV * H // HV).transpose(2, 3).reshape(-1, HV, K, GV * H // HV)


def _outputs(chunks, tensors, states, scale):
    """O, grouped and padded like the values. tensors: (q, k, v, g, b, w) activated, grouped and padded; states:
    see ``_run``."""
    H, o = tensors[0].shape[2], torch.empty_like(tensors[2], memory_format=torch.contiguous_format)
    for segment in chunks.segments(H):
        c = _run(segment, *segment.views(tensors), states)
        out = segment.view(o)
        torch.mul(torch.bmm(c.qe[:, :, 0], c.state_in).baddbmm_(c.a_qk, c.r).view(out.shape), scale, out=out)
    return o


def _activated(inputs, options):
    """Where the tokens go, and q, k, v, g, b, w activated, grouped and padded."""
    (B, T, H, _), device = inputs.q.shape, inputs.q.device
    _prime_malloc(device)
    chunks = _padded_chunks(B, T, inputs.cu_seqlens)
    q, k, v, g, b, w = activate(inputs, options)
    return chunks, [q, k, _group(v, H), g, b, _group(w, H)]


def chunk_forward(inputs: GDN2Inputs, options: GDN2Options) -> tuple[Tensor, Tensor]:
    """o [B, T, HV, V] in v's dtype, final state [N, HV, K, V] in the compute dtype."""
    v, (_, T, H, K) = inputs.v, inputs.q.shape
    chunks, tensors = _activated(inputs, options)
    tensors = chunks.pad_all(tensors)
    states = _group_state(inputs.initial_state, tensors[0], chunks, H, K, tensors[2].shape[-1])
    o = _outputs(chunks, tensors, states, options.scale)
    return chunks.unpad(o, T).view(v.shape).to(v.dtype), _ungroup_state(states, H, v.shape[2])


def segment_forward(inputs: GDN2Inputs, options: GDN2Options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``segment_gdn2``: o and read in q's dtype, transition and contribution in the compute dtype.

    K more value columns, into which nothing is written: what they hold is what became of the entering state, here I.
    Where nothing is erased that is known without them: it has only decayed.
    """
    v, (B, T, H, K) = inputs.v, inputs.q.shape
    chunks, (q, k, values, g, b, gates) = _activated(inputs, options)
    if b is None:
        return _decayed_segment(chunks, (q, k, values, g, b, gates), inputs, options.scale)
    values, gates = (torch.nn.functional.pad(x, (0, K)) for x in (values, gates))
    tensors = chunks.pad_all((q, k, values, g, b, gates))
    GV = values.shape[-1] - K
    states = q.new_zeros(1, B * H, K, GV + K)
    states[..., GV:] = torch.eye(K, dtype=q.dtype, device=q.device)
    o = chunks.unpad(_outputs(chunks, tensors, states, options.scale), T)
    # Copies, also where a part happens to be contiguous as it is: results must not share memory.
    parts = (*o.to(v.dtype).split((GV, K), -1), *states.split((GV, K), -1))
    o, read, contribution, transition = (x.clone(memory_format=torch.contiguous_format) for x in parts)
    return o.view(v.shape), read, transition.view(B, H, K, K), _ungroup_state(contribution, H, v.shape[2])


def _decayed_segment(chunks, tensors, inputs, scale):
    v, (B, T, H, K) = inputs.v, inputs.q.shape
    q, _, values, g, *_ = tensors
    states = q.new_zeros(1, B * H, K, values.shape[-1])
    o = chunks.unpad(_outputs(chunks, chunks.pad_all(tensors), states, scale), T)
    kept = g.cumsum(1).exp_()  # of the entering state
    read = (scale * q * kept).to(v.dtype)
    return o.view(v.shape).to(v.dtype), read, kept[:, -1].diag_embed(), _ungroup_state(states, H, v.shape[2])


def chunk_backward(
    do: Tensor | None, dfinal_state: Tensor | None, inputs: GDN2Inputs, options: GDN2Options
) -> GDN2Inputs:
    """The gradients of the inputs in their dtypes, None where the input is. do [B, T, HV, V] or None, dfinal_state
    [N, HV, K, V] or None."""
    v, (_, T, H, K), initial_state = inputs.v, inputs.q.shape, inputs.initial_state
    chunks, tensors = _activated(inputs, options)
    tensors = chunks.pad_all(tensors)
    q = tensors[0]
    grads = [None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]
    do = None if do is None else chunks.pad(_group(do.to(q.dtype), H))
    state_size = chunks, H, K, tensors[2].shape[-1]
    dstates = _group_state(dfinal_state, q, *state_size)

    # Forward, to know the state at the start of each segment; then segment by segment in reverse, forward and backward.
    segments = chunks.segments(H)
    states, starts = _group_state(initial_state, q, *state_size), []
    for segment in segments:
        starts.append(states[segment.owner[0]].clone())
        if segment is not segments[-1]:
            _run(segment, *segment.views(tensors), states)
    initial = _group_state(initial_state, q, *state_size)
    for segment, start in zip(reversed(segments), reversed(starts), strict=True):
        states = {n: initial[n].clone() for n in set(segment.owner)} | {segment.owner[0]: start}
        raw, outputs = segment.views(tensors), segment.views(grads)
        do_view = None if do is None else segment.view(do)
        _segment_backward(segment, raw, do_view, options.scale, states, dstates, outputs)

    dq, dk, dv, dg, db, dw = (None if x is None else chunks.unpad(x, T) for x in grads)
    grads = activate_backward((dq, dk, dv.view(v.shape), dg, db, dw.view(v.shape)), inputs, options)
    if initial_state is None:
        return grads
    return grads._replace(initial_state=_ungroup_state(dstates, H, v.shape[2]).to(initial_state.dtype))


def _scan_backward(segment, c, doz, dstates):
    """dZ [M, C, V] and the gradient of each chunk's outgoing state [M, K, V].

    doz [M, 2C, V]: dO of each token in the even rows; the odd ones receive -dZ. Where nothing is erased dO [M, C, V].
    dstates: see ``_segment_backward``.
    """
    dr = torch.bmm(c.a_qk.mT, doz[:, :: c.qe.shape[2]])
    dstate_out = torch.empty_like(c.state_in)
    if c.a is None:
        parts = segment.steps(dstates, dstate_out, c.qe.flatten(1, 2), c.kt, c.total, dr, doz)
        for ds, ds_out, q_i, kt_i, total_i, dr_i, do_i in reversed(parts):
            ds_out.copy_(ds)
            dr_i.baddbmm_(kt_i, ds)
            ds.mul_(total_i).baddbmm_(q_i.mT, do_i)
        return dr, dstate_out
    dz = torch.empty_like(dr)
    for ds, ds_out, qe_i, kt_i, total_i, a_i, dr_i, dz_i, doz_i in reversed(
        segment.steps(dstates, dstate_out, c.qe.flatten(1, 2), c.kt, c.total, c.a, dr, dz, doz)
    ):
        ds_out.copy_(ds)
        torch.bmm(a_i.mT, dr_i.baddbmm_(kt_i, ds), out=dz_i)
        torch.neg(dz_i, out=doz_i[:, 1::2])
        ds.mul_(total_i).baddbmm_(qe_i.mT, doz_i)
    return dz, dstate_out


def _segment_backward(segment, inputs, do, scale, states, dstates, grads):
    """Recomputes a segment from the states it starts with and writes its gradients (dq, dk, dv, dg, db, dw) to grads.

    inputs, do, grads: as ``Segment.view`` gives them, do None where zero. dstates[n] [B * H, K, V]: the gradient of the
    state that sequence n leaves the segment with, updated in place to that of the state it enters with.
    """
    q, k, v, g, b, w = inputs
    dq_out, dk_out, dv_out, dg_out, db_out, dw_out = grads
    keep = []
    c = _run(segment, q, k, v, g, b, w, states, keep)
    M, C, V = c.r.shape
    R, K = c.qe.shape[2:]
    # dO and -dZ of each token side by side, as Q and E are, and the spare row that intra_chunk_backward asks for.
    padded = c.r.new_empty(M, R * C + 1, V)
    padded[:, R * C] = 0
    doz = padded[:, : R * C]
    if do is None:
        doz[:, ::R] = 0
    else:
        torch.mul(do, scale, out=doz[:, ::R].view(do.shape))
    dz, dstate_out = _scan_backward(segment, c, doz, dstates)
    # Results are let go as soon as they have served: more than 62 MB in all, and free() would give pages back.
    del c.qe, c.kt, c.a_qk, c.a

    dqe = torch.bmm(doz, c.state_in.mT).view(M, C, R, K)
    dk = torch.bmm(c.r, dstate_out.mT)
    dproduct = torch.bmm(padded, c.r.mT)
    dtotal = torch.linalg.vecdot(c.state_in, dstate_out).mul_(c.total.squeeze(-1))
    gamma = c.gamma
    del c, padded, doz, dstate_out
    dg = intra_chunk_backward(dproduct, dqe, dk, dtotal, gamma, keep).view(k.shape)
    dqe, dk = dqe.view(*k.shape[:-1], R, K), dk.view(k.shape)
    dq = dqe[..., 0, :]
    if b is None:
        torch.addcmul(dg, q, dq, out=dg_out)
    else:
        dkb = dqe[..., 1, :]
        torch.mul(dkb, k, out=db_out)
        torch.addcmul(dg.addcmul_(q, dq), b, db_out, out=dg_out)
    # The diagonal of A_qk knows no decay, hence after dg.
    diagonal = dproduct[:, : R * C : R].diagonal(dim1=1, dim2=2).view(*k.shape[:-1], 1)
    torch.addcmul(dq, diagonal, k, out=dq_out)
    dk.addcmul_(diagonal, q)
    if b is None:
        dk_out.copy_(dk)
    else:
        torch.addcmul(dk, dkb, b, out=dk_out)
    dz = dz.view(v.shape)
    torch.mul(dz, w, out=dv_out)
    torch.mul(dz, v, out=dw_out)
