"""Launches of the chunkwise kernels: two for the forward, four for the backward, which recomputes from the inputs.

forward    prepare -> scan, which writes o and the final state
segment    prepare -> segment, which writes what o and the final state are as functions of the initial state
backward   prepare -> scan, which writes R and the state at each chunk -> reverse -> gradient
"""

from dataclasses import dataclass

import torch
import triton

from ...checks import check_cu_seqlens
from ...triton import launching, target
from ..flops import CHUNK
from . import configurations
from .gradient import gradient_kernel
from .prepare import prepare_kernel
from .scan import reverse_kernel, scan_kernel, segment_kernel
from .tree import LEVELS

__all__ = ["chunk_backward", "chunk_forward", "segment_forward"]


NORMS = ("norm_q", "norm_k")


@dataclass(frozen=True)
class Call:
    """What every launch of one call shares."""

    spans: dict  # cu_seqlens, ends, T, NT
    sizes: dict  # H, K, BK, PACKED, PRECISION
    chunks: int  # at least as many as there are
    sequences: int
    arch: int | str


def _call(q, v, cu_seqlens):
    B, T, H, K = q.shape
    ends, N, NT = None, B, triton.cdiv(T, CHUNK)
    chunks = B * NT
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, T)
        N = cu_seqlens.shape[0] - 1
        ends = ((cu_seqlens.diff() + CHUNK - 1) // CHUNK).cumsum(0)
        chunks = T // CHUNK + N  # known without reading cu_seqlens; programs past the last chunk return at once
    architecture = target.arch(q)
    precision = target.precision(architecture, q.dtype)
    sizes = dict(H=H, K=K, BK=max(16, triton.next_power_of_2(K)), PACKED=cu_seqlens is not None, PRECISION=precision)
    return Call(dict(cu_seqlens=cu_seqlens, ends=ends, T=T, NT=NT), sizes, chunks, N, architecture)


def _activation(q, options):
    """Constants of the kernels that read raw inputs."""
    return dict(
        GATE=options["gate"], SIGMOID=options["sigmoid"], ERASE=options["erase_scale"],
        SPLIT=q.dtype != torch.float32,
    )  # fmt: skip


def _prepare(call, q, k, g, b, A_log, dt_bias, resets, scale, options):
    """Q, E, Kt, total, A_qk, A by name; and norm_q, norm_k, None where q and k are used as they are."""
    H, BK = call.sizes["H"], call.sizes["BK"]
    wide, square = (call.chunks, H, CHUNK, BK), (call.chunks, H, CHUNK, CHUNK)
    out = {name: q.new_empty(wide) for name in ("Q", "E", "Kt")}
    out["total"] = q.new_empty(wide[:2] + wide[3:], dtype=torch.float32)
    out |= {name: q.new_empty(square) for name in ("A_qk", "A")}
    norms = {name: q.new_empty(wide[:3], dtype=torch.float32) if options["l2norm"] else None for name in NORMS}
    launching.launch(
        prepare_kernel, lambda meta: (call.chunks * H,), configurations.prepare(q.element_size()),
        dict(q=q, k=k, g=g, b=b, A_log=A_log, dt_bias=dt_bias, resets=resets, N=call.sequences, scale=scale)
        | dict(levels=_levels(q.device))
        | call.spans | out | norms,
        call.sizes | _activation(q, options),
    )  # fmt: skip
    return out, norms


_LEVELS = {}  # by device


def _levels(device):
    """LEVELS in memory: see ``tree``. It is kept, and any stream may read it: the copy is over when this returns. In a
    CUDA graph's capture no copy can be waited for: there a kernel of the graph writes what the graph's kernels read."""
    if device not in _LEVELS:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return torch.full((1,), LEVELS.value, dtype=torch.int32, device=device)
        _LEVELS[device] = torch.tensor([LEVELS.value], dtype=torch.int32, device=device)
    return _LEVELS[device]


def _scan(call, prepared, v, w, initial_state, sigmoid, o=None, final_state=None, R=None, states=None):
    HV, V = v.shape[2:]
    launching.launch(
        scan_kernel, lambda meta: (triton.cdiv(V, meta["BV"]) * call.sequences * HV,),
        configurations.scan(call.arch, call.sizes["BK"], V, v.element_size()),
        dict(v=v, w=w, initial_state=initial_state, o=o, final_state=final_state, R=R, states=states)
        | call.spans | prepared,
        call.sizes | dict(HV=HV, V=V, SIGMOID=sigmoid),
    )  # fmt: skip


def _contiguous(*tensors):
    return [None if x is None else x.contiguous() for x in tensors]


def chunk_forward(q, k, v, g, b, w, A_log, dt_bias, initial_state, cu_seqlens, resets, scale, options):
    """o [B, T, HV, V] in v's dtype and the final state [N, HV, K, V] fp32. options: those of ``gates.activate``."""
    q, k, v, g, b, w, A_log, dt_bias, initial_state, cu_seqlens, resets = _contiguous(
        q, k, v, g, b, w, A_log, dt_bias, initial_state, cu_seqlens, resets
    )
    call = _call(q, v, cu_seqlens)
    prepared, _ = _prepare(call, q, k, g, b, A_log, dt_bias, resets, scale, options)
    o = torch.empty_like(v)
    final_state = q.new_empty((call.sequences, v.shape[2], q.shape[3], v.shape[3]), dtype=torch.float32)
    _scan(call, prepared, v, w, initial_state, options["sigmoid"], o=o, final_state=final_state)
    return o, final_state


def segment_forward(q, k, v, g, b, w, A_log, dt_bias, resets, scale, options):
    """o [B, T, HV, V] and read [B, T, H, K] in the dtype of q and v, transition [B, H, K, K] and contribution
    [B, HV, K, V] fp32: see ``segments``. options: those of ``gates.activate``."""
    q, k, v, g, b, w, A_log, dt_bias, resets = _contiguous(q, k, v, g, b, w, A_log, dt_bias, resets)
    (B, _, H, K), (HV, V) = q.shape, v.shape[2:]
    call = _call(q, v, None)
    prepared, _ = _prepare(call, q, k, g, b, A_log, dt_bias, resets, scale, options)
    o, read = torch.empty_like(v), torch.empty_like(q)
    transition, contribution = (q.new_empty(shape, dtype=torch.float32) for shape in ((B, H, K, K), (B, HV, K, V)))
    launching.launch(
        segment_kernel, lambda meta: ((triton.cdiv(V, meta["BV"]) + triton.cdiv(K, meta["BV"])) * B * HV,),
        configurations.scan(call.arch, call.sizes["BK"], max(K, V), v.element_size()),
        dict(v=v, w=w, resets=resets, o=o, contribution=contribution, read=read, transition=transition)
        | call.spans | prepared,
        call.sizes | dict(HV=HV, V=V, SIGMOID=options["sigmoid"]),
    )  # fmt: skip
    return o, read, transition, contribution


def chunk_backward(
    do, dfinal_state, q, k, v, g, b, w, A_log, dt_bias, initial_state, cu_seqlens, resets, scale, options
):
    """Gradients (dq, dk, dv, dg, db, dw, dA_log, ddt_bias, dinitial_state) in the dtype of their input; the last
    three None where the input is. do [B, T, HV, V] or None, dfinal_state [N, HV, K, V] or None."""
    do, dfinal_state, q, k, v, g, b, w, A_log, dt_bias, initial_state, cu_seqlens, resets = _contiguous(
        do, dfinal_state, q, k, v, g, b, w, A_log, dt_bias, initial_state, cu_seqlens, resets
    )
    (H, K), (HV, V) = q.shape[2:], v.shape[2:]
    call = _call(q, v, cu_seqlens)
    prepared, norms = _prepare(call, q, k, g, b, A_log, dt_bias, resets, scale, options)
    R, dZ = torch.empty_like(v), torch.empty_like(v)
    states, dstates = (q.new_empty(call.chunks, HV, V, K) for _ in range(2))
    _scan(call, prepared, v, w, initial_state, options["sigmoid"], R=R, states=states)
    dinitial_state = None if initial_state is None else torch.empty_like(initial_state)
    launching.launch(
        reverse_kernel, lambda meta: (triton.cdiv(V, meta["BV"]) * call.sequences * HV,),
        configurations.scan(call.arch, call.sizes["BK"], V, v.element_size()),
        dict(
            do=do, dfinal_state=dfinal_state, dZ=dZ, dstates=dstates, dinitial_state=dinitial_state
        ) | call.spans | prepared,
        call.sizes | dict(HV=HV, V=V),
    )  # fmt: skip
    grads = [torch.empty_like(x) for x in (q, k, v, g, b, w)]
    parts = dict(dA_log=None, ddt_bias=None)
    if options["gate"]:
        # Of chunks that there are not (see _call) nothing is written.
        new = q.new_empty if cu_seqlens is None else q.new_zeros
        parts["dA_log"] = new((call.chunks, H, 2, K), dtype=torch.float32)
        if dt_bias is not None:
            parts["ddt_bias"] = new((call.chunks, H, 2, K), dtype=torch.float32)
    launching.launch(
        gradient_kernel, lambda meta: (call.chunks * H,),
        configurations.gradient(call.arch, call.sizes["BK"], V, v.element_size()),
        dict(
            q=q, k=k, v=v, g=g, b=b, w=w, A_log=A_log, dt_bias=dt_bias, resets=resets, N=call.sequences, scale=scale,
            levels=_levels(q.device),
            do=do, R=R, dZ=dZ, states=states, dstates=dstates,
            squares=q.new_empty(call.chunks, H, 2, CHUNK, CHUNK),
        ) | call.spans | norms | parts | dict(zip(("dq", "dk", "dv", "dg", "db", "dw"), grads, strict=True)),
        call.sizes | dict(HV=HV, V=V) | _activation(q, options),
    )  # fmt: skip
    dA_log = None if A_log is None else parts["dA_log"].sum((0, 2, 3)).to(A_log.dtype)
    ddt_bias = None if dt_bias is None else parts["ddt_bias"].sum((0, 2)).to(dt_bias.dtype).view(dt_bias.shape)
    return (*grads, dA_log, ddt_bias, dinitial_state)
