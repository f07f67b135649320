"""What a warp issues, as the simulator reads it: pipes and how long they are taken, latencies, bytes."""

import re

import numpy as np

from .emulator import Step
from .machine import LATENCY, MMA_SYNC, TENSOR
from .machine_code import Instruction, MachineCode
from .memory import GLOBAL, SHARED, Access, width_of
from .simulator import RECORD

__all__ = ["demand", "streams"]

PIPES = dict(none=0, fma=1, alu=2, heavy=3, xu=4, memory=5, tensor=6, uniform=7)
KINDS = dict(normal=0, barrier=1, wgmma=2, wgmma_wait=3, copy=4, copy_group=5, copy_wait=6, load=7, store=8, end=9)
NAMES = {
    "fma": {"FFMA", "FADD", "FMUL", "HFMA2", "HADD2", "HMUL2"},
    "heavy": {"IMAD"},
    "alu": {
        "BMSK", "CS2R", "F2FP", "FCHK", "FMNMX", "FSEL", "FSETP", "HMNMX2", "HSETP2", "I2FP", "IABS", "IADD3", "IMNMX",
        "ISETP", "LEA", "LOP3", "MOV", "P2R", "PLOP3", "PRMT", "R2P", "SEL", "SGXT", "SHF", "VIADD", "VIADDMNMX",
        "VIMNMX", "VIMNMX3",
    },
    "xu": {"F2F", "F2I", "FLO", "FRND", "I2F", "MUFU", "POPC", "REDUX"},
    "memory": {*GLOBAL, *SHARED, "LDL", "RED", "SHFL", "STL"},
    "tensor": {"HGMMA", "HMMA"},
    "uniform": {"R2UR", "S2UR"},
    "none": {
        "BAR", "BRA", "BREAK", "BSSY", "BSYNC", "DEPBAR", "EXIT", "FENCE", "LDC", "LDGDEPBAR", "MEMBAR", "NOP", "S2R",
        "VOTE", "WARPGROUP", "WARPSYNC",
    },
}  # fmt: skip
PIPE = {base: pipe for pipe, bases in NAMES.items() for base in bases}


def _pipe(x):
    if x.base in PIPE:
        return PIPE[x.base]
    if x.base.startswith("U"):
        return "uniform"
    raise ValueError(f"no pipe is known for {x}")


def _product(x):
    """Clocks that a quarter's tensor core takes for one warp's part of a product, and those of shared memory."""
    rate = TENSOR / 2 if "TF32" in x.modifiers else TENSOR
    if x.base == "HMMA":
        size = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "1684": 16 * 8 * 4}[x.modifiers[0]]
        return size / (rate * MMA_SYNC), 0
    columns, inner = map(int, re.match(r"64x(\d+)x(\d+)", x.modifiers[0]).groups())
    # A group of four warps reads the right operand, and the left one where it lies in shared memory too: 32 bytes of
    # each column or row at 128 bytes a clock.
    rows = 64 if x.operands[1].startswith("gdesc") else 0
    return 16 * max(columns, 32) * inner / rate, 32 * columns / 128 / 4 + 32 * rows / 128 / 4


def _record(x: Instruction):
    """Of an instruction without what differs each time that it runs."""
    pipe = _pipe(x)
    record = dict.fromkeys(RECORD.names, 0)
    record |= dict(pipe=PIPES[pipe], stall=x.stall, written=x.written, read=x.read, waits=x.waits)
    record |= dict(pipe4=4, latency=LATENCY["constant"], operand_latency=LATENCY["operand"])
    if pipe in ("alu", "heavy"):
        record["pipe4"] = 8
    elif pipe == "uniform":
        record["latency"] = LATENCY["uniform"]
    elif pipe == "xu":
        record["pipe4"] = 32 if x.base == "MUFU" else 16
        record["latency"] = LATENCY["function" if x.base == "MUFU" else "conversion"]
        record["operand_latency"] = LATENCY["early operand"]
    elif pipe == "tensor":
        clocks, shared = _product(x)
        record.update(pipe4=max(1, round(4 * clocks)), memory4=round(4 * shared))
        if x.base == "HGMMA":
            record.update(kind=KINDS["wgmma"], last=int("gsb" in x.text))
    elif x.base == "SHFL":
        record.update(argument=1, memory4=4, latency=LATENCY["shuffle"], operand_latency=LATENCY["shuffle operand"])
    elif x.base in ("LDL", "STL"):
        record.update(memory4=4 * max(1, 32 * width_of(x) // 128), latency=LATENCY["l1"])
    elif x.base in SHARED:
        record.update(
            latency=LATENCY["matrix" if x.base == "LDSM" else "shared"], operand_latency=LATENCY["store operand"]
        )
    elif x.base in GLOBAL:
        record["kind"] = KINDS[{"LDG": "load", "STG": "store", "LDGSTS": "copy"}[x.base]]
    elif x.base == "BAR":
        record.update(kind=KINDS["barrier"], latency=LATENCY["barrier"])
    elif x.op.startswith("WARPGROUP.DEPBAR"):
        record.update(kind=KINDS["wgmma_wait"], argument=int(x.operands[-1], 16))
    elif x.base == "LDGDEPBAR":
        record["kind"] = KINDS["copy_group"]
    elif x.base == "DEPBAR":
        board, groups = re.search(r"SB(\d), 0x([0-9a-f]+)", x.text).groups()
        record.update(kind=KINDS["copy_wait"], argument=int(board) << 4 | min(15, int(groups, 16)))
    elif x.base == "FENCE":
        record["latency"] = LATENCY["fence"]
    elif x.base in ("S2R", "S2UR"):
        record["latency"] = LATENCY["special register"]
    return tuple(record[name] for name in RECORD.names)


def _access(x, access: Access, share):
    """What of a record an access changes."""
    if x.base in SHARED:
        return dict(memory4=4 * access.waves)
    if not access.sectors:
        return dict(memory4=4 * access.waves, latency=4)
    found = dict(memory4=4 * (access.waves + max(access.lines, -(-access.sectors // 4))))
    if x.base == "STG":
        return found | dict(l2=32 * access.sectors, hbm=32 * access.new, latency=LATENCY["store"])
    found["l2"] = 32 * (access.new if x.base == "LDG" else access.sectors)  # copies to shared memory pass L1 by
    if access.new:
        far = share * len(access.fetched)
        latency = (far * LATENCY["hbm"] + (access.new - far) * LATENCY["l2"]) / access.new
        return found | dict(hbm=round(32 * far), latency=round(latency))
    return found | dict(latency=LATENCY["l1" if x.base == "LDG" else "l2"])


def streams(code: MachineCode, trace: list[Step], shares: dict[int, float]) -> list[np.ndarray]:
    """What each warp issues, as RECORD. shares: of the sectors that an instruction of this number loads first within
    its program, the part that comes from HBM; what is not there comes from it all."""
    table = np.array([_record(x) for x in code.instructions], RECORD)
    numbers = np.array([step.number for step in trace])
    found = []
    for warp in range(len(trace[0].warps)):
        present = np.array([step.warps[warp] for step in trace])
        steps = [step for step, there in zip(trace, present, strict=True) if there]
        stream = table[numbers[present]]
        for place, step in enumerate(steps):
            x = code.instructions[step.number]
            if step.accesses is not None:
                for name, value in _access(x, step.accesses[warp], shares.get(step.number, 1.0)).items():
                    stream[name][place] = value
            elif x.base == "EXIT" and step.running[warp]:
                stream["kind"][place] = KINDS["end"]
        found.append(stream)
    return found


def demand(found: list[np.ndarray]) -> dict[str, float]:
    """What one program asks of a processor: bytes of "hbm" and "l2", and clocks of all four quarters' issue slots and
    pipes, or of what they share."""
    records = np.concatenate(found)

    def clocks(*pipes):
        chosen = np.isin(records["pipe"], [PIPES[pipe] for pipe in pipes])
        return records["pipe4"][chosen].sum() / 16

    return {
        "hbm": records["hbm"].sum(dtype=float),
        "l2": records["l2"].sum(dtype=float),
        "issue": len(records) / 4,
        "alu": clocks("alu"),
        "fma": clocks("fma", "heavy"),
        "xu": clocks("xu"),
        "tensor": clocks("tensor"),
        "shared": records["memory4"].sum(dtype=float) / 4,
    }  # fmt: skip
