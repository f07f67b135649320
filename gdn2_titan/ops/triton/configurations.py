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


def scan(arch, BK, V, itemsize):
    """For the scan and for its reverse: BV value channels of the state [BV, BK] to a program.

    On sm_90 128 fit at a head of 128, which then reads Q, E, Kt, A_qk and A once; 64 is the least that wgmma and
    tcgen05 take. A head of 256 leaves registers for 32, which only mma takes. itemsize: of Q, E and Kt, of which two
    chunks fit shared memory up to 512 bytes a row."""
    if _amd(arch):
        return (dict(BV=min(_padded(V), 64 if BK <= 128 else 32), num_warps=4, num_stages=1),)
    if arch == 80 or BK > 128:
        most = 32
    else:
        most = 128 if arch == 90 else 64
    BV = min(_padded(V), most)
    return (dict(BV=BV, num_warps=4 if max(BK, BV) <= 64 else 8, num_stages=2 if BK * itemsize <= 512 else 1),)


def gradient(arch, BK, V):
    """BS key channels and BV value channels at a time."""
    size, warps = (32, 4) if _amd(arch) else (64, 8)
    return (dict(BS=min(BK, size), BV=min(_padded(V), size), num_warps=warps, num_stages=1),)
