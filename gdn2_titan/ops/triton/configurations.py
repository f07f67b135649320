"""The configurations of the chunkwise kernels: for each a few candidates, the default first.

They depend on the architecture, the dtype and the head sizes, never on a length or a number of sequences: packing must
not tune again. No default spills a register (docs/kernels.md).
"""

import torch
import triton

__all__ = ["gradient", "prepare", "scan"]


def _padded(size):
    return max(16, triton.next_power_of_2(size))


def prepare(BK):
    return tuple(dict(BS=16, num_warps=warps, num_stages=1) for warps in (2, 4))


def scan(arch, dtype, BK, V):
    """For the scan and for its reverse: BV value channels of the state [BV, BK], four warps for 64 of them."""
    BV = min(_padded(V), 128)
    return (dict(BV=BV, num_warps=8 if BV == 128 else 4, num_stages=2),)


def gradient(dtype, BK, V):
    return (dict(BS=min(BK, 64), BV=min(_padded(V), 64), num_warps=8, num_stages=1),)
