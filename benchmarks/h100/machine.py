"""An H100 SXM (sm_90) in numbers: where each comes from, or that it is a guess."""

__all__ = [
    "CLOCK", "HBM", "HBM_OF_PROCESSOR", "L2", "L2_OF_PROCESSOR", "LATENCY", "MMA_SYNC", "PROCESSORS", "TENSOR",
    "resident",
]  # fmt: skip

PROCESSORS = 132
CLOCK = 1.755e9  # Hz; it boosts to 1.98 GHz, and under load of the tensor cores falls to 1.4 to 1.7
HBM = 0.88 * 3.35e12  # bytes/s: what copies reach of the data sheet's
L2 = 5.5e12  # bytes/s, of loads, as several have measured
# Bytes a clock that one processor can take while others leave L2 and HBM alone: a guess.
L2_OF_PROCESSOR, HBM_OF_PROCESSOR = 64.0, 48.0
# Multiplications of bf16 a clock, of a quarter of a processor: 989.4 TFLOP/s = 132 * 4 * 512 * 2 * 1.83 GHz.
TENSOR = 512
MMA_SYNC = 0.629  # of it that mma.sync reaches: Luo et al., arXiv 2402.13499

# In clocks. All are guesses between published measurements of Ampere and Hopper; moving all of them to their plausible
# ends changes the time of prepare_kernel by -7 to 11%, that of gradient_kernel by -8 to 13%.
LATENCY = {
    "shared": 29, "matrix": 33, "store operand": 16, "shuffle": 24, "shuffle operand": 12, "function": 22,
    "conversion": 24, "early operand": 10, "l1": 38, "l2": 262, "hbm": 680, "store": 30, "operand": 20,
    "special register": 25, "constant": 30, "uniform": 12, "barrier": 22, "fence": 20, "wgmma": 30,
}  # fmt: skip

REGISTERS, WARPS, PROGRAMS = 65536, 64, 32  # of a processor
SHARED, RESERVED = 228 * 1024, 1024  # bytes of a processor, and of each program beside its own


def resident(registers: int, shared: int, warps: int) -> int:
    """Programs that a processor holds at once, of so many registers a thread, bytes of shared memory and warps."""
    of_warp = -(-registers * 32 // 256) * 256
    return min(REGISTERS // (of_warp * warps), SHARED // (shared + RESERVED), WARPS // warps, PROGRAMS)
