"""Launches of the chunkwise kernels: two for the forward, four for the backward, which recomputes from the inputs.

forward    prepare -> scan, which writes o and the final state
segment    prepare -> segment, which writes what o and the final state are as functions of the initial state
backward   prepare -> scan, which writes R and the state at each chunk -> reverse -> gradient

The backward may have A and A_qk of the forward, the costly part of what ``prepare`` makes. Where nothing is erased, b
is None, and so are A, E and R in all launches.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ...checks import check_cu_seqlens
from ...triton import launching, target
from ..arguments import GDN2Inputs, GDN2Options
from ..flops import CHUNK
from . import configurations
from .gradient import gradient_kernel
from .matrices import sum_matrices
from .prepare import prepare_kernel
from .scan import reverse_kernel, scan_kernel, segment_kernel

__all__ = ["chunk_backward", "chunk_forward", "segment_forward"]


# Of the decay of a block that is one product: exp of half of it, and of its negative, are factors of numbers in this
# dtype; in fp32 the sums round too.
LIMITS = {torch.bfloat16: 120.0, torch.float16: 8.0, torch.float32: 20.0}


@dataclass(frozen=True)
class Call:
    """What every launch of one call shares."""

    spans: dict  # packed, cu_seqlens, ends, T, NT
    sizes: dict  # H, K, BK, PRECISION
    chunks: int  # at least as many as there are
    sequences: int
    arch: int | str


def _call(inputs):
    q, cu_seqlens, N = inputs.q, inputs.cu_seqlens, inputs.num_sequences
    B, T, H, K = q.shape
    chunks = inputs.square_shape[0]  # programs past the last chunk return at once
    spans = dict(packed=int(cu_seqlens is not None), T=T, NT=triton.cdiv(T, CHUNK))
    if cu_seqlens is None:  # not read then; one compiled kernel serves packed sequences and others
        cu_seqlens = ends = q.new_empty(1, dtype=torch.int64)
    else:
        check_cu_seqlens(cu_seqlens, T)
        cu_seqlens = cu_seqlens.long()
        ends = ((cu_seqlens.diff() + CHUNK - 1) // CHUNK).cumsum(0)
    architecture = target.arch(q)
    precision = target.precision(architecture, q.dtype)
    sizes = dict(H=H, K=K, BK=configurations.padded(K), PRECISION=precision)
    return Call(spans | dict(cu_seqlens=cu_seqlens, ends=ends), sizes, chunks, N, architecture)


def _split(q):
    """Whether sums of decays are products in bf16."""
    return q.dtype != torch.float32


def _activation(q, options):
    """Constants of the kernels that read raw inputs."""
    gates = dict(GATE=options.gate, SIGMOID=options.sigmoid, ERASE_SCALE=options.erase_scale)
    return gates | dict(SPLIT=_split(q), LIMIT=LIMITS[q.dtype])


def _prepare(call, inputs, options, write=None, known=None):
    """Q, E, Kt, total, A, A_qk by name; and norm_q, norm_k, None where q and k are used as they are.

    A and A_qk: are written to the pair ``write``, or are the pair ``known``, or are made here. Where nothing is erased
    E and A are None."""
    q, H, BK = inputs.q, call.sizes["H"], call.sizes["BK"]
    wide = (call.chunks, H, CHUNK, BK)
    out = {name: q.new_empty(wide) for name in ("Q", "Kt")}
    out["E"] = None if inputs.b is None else q.new_empty(wide)
    out["total"] = q.new_empty(wide[:2] + wide[3:], dtype=torch.float32)
    A, A_qk = known or write or (q.new_empty(inputs.square_shape) for _ in range(2))
    squares = dict(A=None if inputs.b is None else A, A_qk=A_qk)
    norms = {name: q.new_empty(wide[:3], dtype=torch.float32) if options.l2norm else None
             for name in ("norm_q", "norm_k")}  # fmt: skip
    launching.launch(
        prepare_kernel, lambda meta: (call.chunks * H,),
        configurations.prepare(call.arch, BK, q.element_size(), known is not None, inputs.b is not None),
        dict(q=q, k=inputs.k, g=inputs.g, b=inputs.b) | _parameters(call, inputs, options) | call.spans | out | norms
        | (dict.fromkeys(squares) if known else squares),
        call.sizes | _activation(q, options),
    )  # fmt: skip
    return out | squares, norms


def _state(name, x, stand_in=None):
    """Arguments for a state, in fp32, or None. Where there is a ``stand_in``, which is not read, one compiled kernel
    serves whether the state is given or not."""
    given = x is not None
    return {name: x.float() if given else stand_in, f"has_{name.removesuffix('_state')}": int(given)}


def _parameters(call, inputs, options):
    """Arguments of the kernels that read raw inputs, beside those."""
    parameters = dict(A_log=inputs.A_log, dt_bias=inputs.dt_bias, resets=inputs.resets)
    matrices = sum_matrices(inputs.q.device, torch.bfloat16 if _split(inputs.q) else torch.float32)
    return parameters | dict(
        N=call.sequences, scale=options.scale, lower_bound=options.lower_bound, matrices=matrices
    )  # fmt: skip


def _scan_configurations(call, width, v, maps=0):
    """For a walk over ``width`` columns of the state of every sequence and value head, and of as many ``maps``."""
    states = call.sequences * (v.shape[2] + maps)
    return configurations.scan(call.arch, call.sizes["BK"], width, v.element_size(), states, target.processors(v))


def _scan(call, prepared, inputs, options, initial_state, o=None, final_state=None, R=None, states=None):
    """initial_state: what ``_state`` makes of it."""
    v, (HV, V) = inputs.v, inputs.v.shape[2:]
    launching.launch(
        scan_kernel, lambda meta: (triton.cdiv(V, meta["BV"]) * call.sequences * HV,),
        _scan_configurations(call, V, v),
        dict(v=v, w=inputs.w, o=o, final_state=final_state, R=R, states=states)
        | initial_state | call.spans | prepared,
        call.sizes | dict(HV=HV, V=V, SIGMOID=options.sigmoid),
    )  # fmt: skip


def chunk_forward(
    inputs: GDN2Inputs, options: GDN2Options, squares: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """o [B, T, HV, V] in v's dtype and the final state [N, HV, K, V] fp32. squares: to write A and A_qk to, of
    ``inputs.square_shape`` in q's dtype, which ``chunk_backward`` can start from. Without b there is no A."""
    inputs = inputs.map(Tensor.contiguous)
    call = _call(inputs)
    prepared, _ = _prepare(call, inputs, options, write=squares)
    o = torch.empty_like(inputs.v)
    final_state = inputs.q.new_empty(inputs.state_shape, dtype=torch.float32)
    # Two compiled forms: one that loads a state takes up to a tenth longer, its loop is scheduled otherwise.
    initial_state = _state("initial_state", inputs.initial_state)
    _scan(call, prepared, inputs, options, initial_state, o=o, final_state=final_state)
    return o, final_state


def segment_forward(
    inputs: GDN2Inputs, options: GDN2Options, squares: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o [B, T, HV, V] and read [B, T, H, K] in the dtype of q and v, transition [B, H, K, K] and contribution
    [B, HV, K, V] fp32: see ``segments``. squares: see ``chunk_forward``."""
    inputs = inputs.map(Tensor.contiguous)
    q, v = inputs.q, inputs.v
    (B, _, H, K), (HV, V) = q.shape, v.shape[2:]
    call = _call(inputs)
    prepared, _ = _prepare(call, inputs, options, write=squares)
    o, read = torch.empty_like(v), torch.empty_like(q)
    transition, contribution = (q.new_empty(shape, dtype=torch.float32) for shape in ((B, H, K, K), (B, HV, K, V)))
    launching.launch(
        segment_kernel, lambda meta: ((triton.cdiv(V, meta["BV"]) + triton.cdiv(K, meta["BV"])) * B * HV,),
        _scan_configurations(call, max(K, V), v, maps=H),
        dict(v=v, w=inputs.w, resets=inputs.resets, o=o, contribution=contribution, read=read, transition=transition)
        | {name: call.spans[name] for name in ("T", "NT")} | prepared,
        call.sizes | dict(HV=HV, V=V, SIGMOID=options.sigmoid),
    )  # fmt: skip
    return o, read, transition, contribution


def chunk_backward(
    do: Tensor | None, dfinal_state: Tensor | None, inputs: GDN2Inputs, options: GDN2Options,
    squares: tuple[Tensor, Tensor] | None = None,
) -> GDN2Inputs:  # fmt: skip
    """The gradients of the inputs in their dtypes, None where the input is. do [B, T, HV, V] or None, dfinal_state
    [N, HV, K, V] or None. squares: those that ``chunk_forward`` wrote for these inputs."""
    inputs = inputs.map(Tensor.contiguous)
    do, dfinal_state = (None if x is None else x.contiguous() for x in (do, dfinal_state))
    q, v = inputs.q, inputs.v
    (H, K), (HV, V) = q.shape[2:], v.shape[2:]
    call = _call(inputs)
    prepared, norms = _prepare(call, inputs, options, known=squares)
    R, dZ = None if inputs.b is None else torch.empty_like(v), torch.empty_like(v)
    states, dstates = (q.new_empty(call.chunks, HV, V, K) for _ in range(2))
    stand_in, wanted = prepared["total"], inputs.initial_state is not None
    _scan(call, prepared, inputs, options, _state("initial_state", inputs.initial_state, stand_in), R=R, states=states)
    dinitial_state = torch.empty_like(inputs.initial_state, dtype=torch.float32) if wanted else stand_in
    launching.launch(
        reverse_kernel, lambda meta: (triton.cdiv(V, meta["BV"]) * call.sequences * HV,),
        _scan_configurations(call, V, v),
        dict(do=do, dZ=dZ, dstates=dstates, dinitial_state=dinitial_state, wants_dinitial=int(wanted))
        | _state("dfinal_state", dfinal_state, stand_in) | call.spans | prepared,
        call.sizes | dict(HV=HV, V=V),
    )  # fmt: skip
    tokens = dict(zip(("q", "k", "v", "g", "b", "w"), inputs.tokens, strict=True))
    grads = {f"d{name}": None if x is None else torch.empty_like(x) for name, x in tokens.items()}
    parts = dict(dA_log=None, ddt_bias=None)
    for name, parameter in (("dA_log", inputs.A_log), ("ddt_bias", inputs.dt_bias)):
        if parameter is not None:
            # Of chunks that there are not (see _call) nothing is written.
            new = q.new_empty if inputs.cu_seqlens is None else q.new_zeros
            parts[name] = new((call.chunks, H, K), dtype=torch.float32)
    launching.launch(
        gradient_kernel, lambda meta: (call.chunks * H,),
        configurations.gradient(call.arch, call.sizes["BK"], V, v.element_size()),
        dict(do=do, R=R, dZ=dZ, states=states, dstates=dstates)
        | tokens | _parameters(call, inputs, options) | call.spans | norms | parts | grads,
        call.sizes | dict(HV=HV, V=V) | _activation(q, options),
    )  # fmt: skip
    dA_log = None if inputs.A_log is None else parts["dA_log"].sum((0, 2)).to(inputs.A_log.dtype)
    ddt_bias = inputs.dt_bias
    if ddt_bias is not None:
        ddt_bias = parts["ddt_bias"].sum(0).to(ddt_bias.dtype).view(ddt_bias.shape)
    dinitial_state = dinitial_state.to(inputs.initial_state.dtype) if wanted else None
    return GDN2Inputs(*grads.values(), dA_log, ddt_bias, dinitial_state)
