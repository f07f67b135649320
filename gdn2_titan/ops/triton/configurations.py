"""The configurations of the chunkwise kernels: for each a few candidates, the default first.

They depend on the architecture, the dtype and the head sizes, never on a length or a number of sequences: packing must
not tune again. No default spills a register (docs/kernels.md).
"""

import triton

__all__ = ["gradient", "prepare", "scan"]


def _padded(size):
    return max(16, triton.next_power_of_2(size))


def prepare(BK):
    return tuple(dict(BS=16, num_warps=warps, num_stages=1) for warps in (2, 4))


def _amd(arch):
    return isinstance(arch, str)


def scan(arch, BK, V):
    """For the scan and for its reverse: BV value channels of the state [BV, BK] to a program.

    From sm_90 on 128 fit, so that a head of 128 reads Q, E, Kt, A_qk and A once; 64 is the least that wgmma takes. A
    head of 256 with 64 wants more tensor memory than sm_100 has."""
    if _amd(arch):
        most, stages = 64, 1
    elif arch == 80:
        most, stages = 32, 2
    elif BK <= 128:
        most, stages = 128, 2
    else:
        most, stages = (64 if arch == 90 else 32), 1
    BV = min(_padded(V), most)
    return (dict(BV=BV, num_warps=8 if BV == 128 else 4, num_stages=stages),)


def gradient(arch, BK, V):
    """BS key channels and BV value channels at a time."""
    size, warps = (32, 4) if _amd(arch) else (64, 8)
    return (dict(BS=min(BK, size), BV=min(_padded(V), size), num_warps=warps, num_stages=1),)
