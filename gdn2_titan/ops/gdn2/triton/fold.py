"""Kernel: the states between segments, of which each is a map of the state (``segments``), all in one launch.

    S <- M S + D from segment to segment, or dS <- M^T dS + dD from the last one to the first

One program per sequence, value head and slice of V, the state in registers, transposed as ``scan`` has it.
"""

import triton
import triton.language as tl
from torch import Tensor

from ...triton import launching, target
from ...triton.products import dot
from . import configurations
from .state import load_state, part_size, store_state

__all__ = ["fold"]


@triton.jit
def _block(M, i: tl.constexpr, j: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    """Parts i of the rows and j of the columns of M [K, K]."""
    PART: tl.constexpr = part_size(BK)
    rows, cols = i * PART + tl.arange(0, PART), j * PART + tl.arange(0, PART)
    inside = (rows < K)[:, None] & (cols < K)[None, :]
    return tl.load(M + rows[:, None] * K + cols[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=["has_D", "has_state", "count"])
def fold_kernel(
    M, D, has_D, state, has_state, count, entered, left,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """M [B, count, H, K, K], D [B, count, HV, K, V], state [B, HV, K, V], all in fp32; D and state are read where has_D
    and has_state are 1, else zeros.

    Writes entered [B, count, HV, K, V], the state that each map is applied to, and left [B, HV, K, V]."""
    SLICES: tl.constexpr = (V + BV - 1) // BV
    PARTS: tl.constexpr = BK // part_size(BK)
    row = tl.program_id(0) // SLICES
    cols = tl.program_id(0) % SLICES * BV + tl.arange(0, BV)
    n, hv = row // HV, row % HV
    of_row = row.to(tl.int64) * K * V
    S = load_state(state + of_row, has_state, cols, V, K, BK, BV)
    for step in range(count):
        segment = n.to(tl.int64) * count + step
        if TRANSPOSED:
            segment = n.to(tl.int64) * count + (count - 1 - step)
        of_segment = (segment * HV + hv) * K * V
        transition = M + (segment * H + hv // (HV // H)) * K * K
        store_state(entered + of_segment, S, cols, V, K, BK)
        sums = load_state(D + of_segment, has_D, cols, V, K, BK, BV)
        for j in tl.static_range(PARTS):  # and not outermost i: then all of S were operands at once
            more = ()
            for i in tl.static_range(PARTS):
                if TRANSPOSED:
                    block = _block(transition, j, i, K, BK)
                else:
                    block = tl.trans(_block(transition, i, j, K, BK))
                more += (sums[i] + dot(S[j], block, PRECISION),)
            sums = more
        S = sums
    store_state(left + of_row, S, cols, V, K, BK)


def fold(M: Tensor, D: Tensor | None, state: Tensor | None, transposed: bool = False) -> tuple[Tensor, Tensor]:
    """``maps.fold``, all in fp32, which NVIDIA's tensor cores multiply as three products of tf32."""
    M, D, state = (None if x is None else x.contiguous() for x in (M, D, state))
    B, count, H, K, _ = M.shape
    HV, _, V = (state if D is None else D).shape[-3:]
    entered, left = M.new_empty(B, count, HV, K, V), M.new_empty(B, HV, K, V)
    arch, BK = target.arch(M), configurations.padded(K)
    flags = dict(has_D=int(D is not None), has_state=int(state is not None))
    D, state = (M if x is None else x for x in (D, state))  # which is not read then
    launching.launch(
        fold_kernel, lambda meta: (B * HV * triton.cdiv(V, meta["BV"]),), configurations.fold(arch, BK),
        dict(M=M, D=D, state=state, count=count, entered=entered, left=left) | flags,
        dict(H=H, HV=HV, K=K, V=V, BK=BK, TRANSPOSED=transposed, PRECISION=target.precision(arch, M.dtype)),
    )  # fmt: skip
    return entered, left
