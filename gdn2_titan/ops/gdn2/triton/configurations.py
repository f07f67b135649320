"""The configurations of the chunkwise kernels: for each a few candidates, the default first.

They depend on the architecture, the dtype, the head sizes and on whether batch and heads fill the GPU, never on a
length: packing must not tune again. itemsize: of q, k and v, 2 or 4 bytes; fp32 on NVIDIA is multiplied as three
products of tf32, whose parts take registers.

Time chose them, by a model of sm_90's machine code: registers that gradient spills (docs/kernels.md) cost it less than
narrower slices, which read their operands more often.
"""

import triton

__all__ = ["fold", "gradient", "padded", "prepare", "scan"]

# Without wgmma and tcgen05, and with 99 KB of shared memory to a program.
SMALL = (86, 89, 120, 121)


def padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def prepare(arch: int | str, BK: int, itemsize: int, known: bool, erases: bool) -> tuple[dict, ...]:
    """BS key channels at a time. Where A and A_qk are known little is left to compute: on sm_90 four programs to a
    processor wait for memory at once; three where nothing is erased."""
    config = dict(BS=min(BK, 32), num_warps=4, num_stages=1)
    if arch == 90 and itemsize == 2 and (known or not erases):
        config["maxnreg"] = 128 if known else 168
    return (config,)


def _amd(arch):
    return isinstance(arch, str)


def scan(arch: int | str, BK: int, V: int, itemsize: int, states: int, processors: int) -> tuple[dict, ...]:
    """For the scan, its reverse and the segment: BV value channels of the state [BV, BK] to a program. states: of all
    sequences and heads.

    On sm_90 128 fit at a head of 128, which then reads Q, E, Kt, A_qk and A once; two slices are done sooner where all
    have a processor of their own. 64 is the least that wgmma and tcgen05 take. At a head of 256 two programs of 64 fill
    the registers of a processor of sm_90, no chunk loaded ahead: each computes while the other waits, which a single
    one would not hide; where slices of 32 have processors of their own, and where not even wgmma reads registers, 32.
    fp32 leaves them for 16, and from 128 on none for loading a chunk ahead; nor does a head of 256 leave shared memory
    for that on a small GPU."""
    if _amd(arch):
        return (dict(BV=min(padded(V), 64 if BK <= 128 else 32), num_warps=4, num_stages=1),)
    if itemsize == 4 or (arch in SMALL and BK > 128):
        return (dict(BV=16, num_warps=8, num_stages=2 if BK <= 64 else 1),)
    fills = states * triton.cdiv(V, 64 if BK <= 128 else 32) > processors
    if arch == 90 and fills and BK > 128 and padded(V) >= 64:
        return (dict(BV=64, num_warps=4, num_stages=1),)
    if not 90 <= arch < 120 or BK > 128:
        most = 32
    else:
        most = 128 if arch == 90 and fills else 64
    BV = min(padded(V), most)
    if arch == 90 and BV == 64 and BK <= 128:
        return (dict(BV=64, num_warps=4, num_stages=3),)
    return (dict(BV=BV, num_warps=4 if max(BK, BV) <= 64 else 8, num_stages=2),)


def gradient(arch: int | str, BK: int, V: int, itemsize: int) -> tuple[dict, ...]:
    """BS key channels and BV value channels at a time. On sm_90 three programs to a processor: each waits for products
    and memory most of its time."""
    if _amd(arch) or itemsize == 4:
        return (dict(BS=min(BK, 32), BV=min(padded(V), 32), num_warps=4, num_stages=1),)
    config = dict(BS=min(BK, 32), num_warps=4, num_stages=1)
    if arch == 90:
        return (config | dict(BV=min(padded(V), 128), maxnreg=168),)
    return (config | dict(BV=min(padded(V), 64)),)


def fold(arch: int | str, BK: int) -> tuple[dict, ...]:
    """BV value channels to a program, the fewest: where sequences are cut there are few heads. The next segment's map
    is loaded ahead where shared memory holds it."""
    ahead = BK <= 128 and not _amd(arch)
    return (dict(BV=16, num_warps=8, num_stages=2 if ahead else 1),)
