"""The configurations of the chunkwise kernels: for each a few candidates, the default first.

They depend on the architecture, the dtype and the head sizes, never on a length or a number of sequences: packing must
not tune again. itemsize: of q, k and v, 2 or 4 bytes; fp32 on NVIDIA is multiplied as three products of tf32, whose
parts take registers. Every default fits its target. In 16 bits none spills a register (docs/kernels.md). In fp32 spill,
in bytes of a thread on sm_80, sm_90 and sm_100, for plain inputs of benchmarks/aot.py: prepare 0, 24 and 32, gradient
up to 112, 216 and 192, scan at a head of 256 up to 808, 1312 and 1344, its reverse 168, 192 and 192 and segment 856,
968 and 1000, on sm_80 also 16 at 128; on gfx942 only the scans at 256, up to 836. Resets, raw gates, states and packing
move these figures: on sm_100 packing makes the reverse at 128 spill 48 too.
"""

import triton

__all__ = ["gradient", "padded", "prepare", "scan"]

# Without wgmma and tcgen05, and with 99 KB of shared memory to a program.
SMALL = (86, 89, 120, 121)


def padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def prepare(BK: int, itemsize: int) -> tuple[dict, ...]:
    """BS key channels at a time."""
    return (dict(BS=min(BK, 64 if itemsize == 2 else 32), num_warps=4, num_stages=1),)


def _amd(arch):
    return isinstance(arch, str)


def scan(arch: int | str, BK: int, V: int, itemsize: int) -> tuple[dict, ...]:
    """For the scan, its reverse and the segment: BV value channels of the state [BV, BK] to a program.

    On sm_90 128 fit at a head of 128, which then reads Q, E, Kt, A_qk and A once; 64 is the least that wgmma and
    tcgen05 take. A head of 256 leaves registers for 32, which only mma takes. fp32 leaves them for 16, and from 128 on
    none for loading a chunk ahead; nor does a head of 256 leave shared memory for that on a small GPU."""
    if _amd(arch):
        return (dict(BV=min(padded(V), 64 if BK <= 128 else 32), num_warps=4, num_stages=1),)
    if itemsize == 4 or (arch in SMALL and BK > 128):
        return (dict(BV=16, num_warps=8, num_stages=2 if BK <= 64 else 1),)
    if not 90 <= arch < 120 or BK > 128:
        most = 32
    else:
        most = 128 if arch == 90 else 64
    BV = min(padded(V), most)
    return (dict(BV=BV, num_warps=4 if max(BK, BV) <= 64 else 8, num_stages=2),)


def gradient(arch: int | str, BK: int, V: int, itemsize: int) -> tuple[dict, ...]:
    """BS key channels and BV value channels at a time."""
    if _amd(arch) or itemsize == 4:
        return (dict(BS=min(BK, 32), BV=min(padded(V), 32), num_warps=4, num_stages=1),)
    return (dict(BS=min(BK, 32), BV=min(padded(V), 64 if arch in SMALL else 128), num_warps=4, num_stages=1),)
