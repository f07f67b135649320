"""One program of a launch: all threads of it, in the order of the machine code, side by side where they agree."""

import contextlib
from typing import NamedTuple

import numpy as np

from .integers import execute
from .machine_code import MachineCode
from .memory import GLOBAL, SHARED, Access, Arguments, Memory
from .threads import Threads, Unknown

__all__ = ["Step", "emulate"]

MOST_STEPS = 3_000_000
LOCAL = ("LDL", "STL")


class Step(NamedTuple):
    """number: of the instruction; warps, running [warps]: which come by, and in which some thread runs it. accesses: of
    each warp, for loads and stores of global and shared memory."""

    number: int
    warps: np.ndarray
    running: np.ndarray
    accesses: list[Access] | None


@contextlib.contextmanager
def _following(threads, x):
    """Where an instruction cannot be followed unless all that it reads is known."""
    try:
        yield
    except Unknown as unknown:
        why = ", ".join(map(threads.why, unknown.args)) or "the model knows no such form of it"
        raise ValueError(f"cannot follow {x}: {why}") from None


def _guarded(threads, x, mask):
    """The threads of the mask that run an instruction; None if that is not known and nobody needs it."""
    if x.guard is None:
        return mask
    if x.base in (*GLOBAL, *SHARED, "BRA", "EXIT"):
        with _following(threads, x):
            return mask & threads.predicate(x.guard)
    try:
        return mask & threads.predicate(x.guard)
    except Unknown:  # a choice between floats: what it writes becomes unknown, what it takes is the same
        return None


def _run(threads, memory, x, mask):
    """What an instruction leaves in registers and local memory. mask: None where it is not known who runs it."""
    if mask is None:
        threads.lose(x)
    elif x.base in LOCAL:
        with _following(threads, x):
            memory.spill(threads, x, mask)
    elif x.base in GLOBAL or x.base in SHARED:
        if mask.any():
            memory.transfer(threads, x, mask)
    elif mask.any():
        execute(threads, x, None if mask.all() else mask)


def emulate(code: MachineCode, arguments: Arguments, program: int, warps: int, floats: float = 0.0) -> list[Step]:
    """What ``program`` of a launch with this many warps runs, step by step.

    floats: what stands for a float that is compared with a constant. Raises ValueError, which names the instruction,
    where a branch, or who takes part in a load or store and where, depends on what is not known."""
    threads = Threads(32 * warps, arguments.constants, program, floats)
    memory = Memory(arguments)
    instructions = code.instructions
    numbers = {x.address: number for number, x in enumerate(instructions)}
    at = np.zeros(32 * warps, np.int64)
    alive = np.ones(32 * warps, bool)
    trace = []
    while alive.any():
        if len(trace) > MOST_STEPS:
            raise ValueError(f"a program of more than {MOST_STEPS} instructions")
        here = int(at[alive].min())
        mask = alive & (at == here)
        x = instructions[here]
        running = _guarded(threads, x, mask)
        accesses = None
        if x.base in GLOBAL or x.base in SHARED:
            with _following(threads, x):
                accesses = memory.access(threads, x, running)
        coming, active = (each.reshape(warps, 32).any(1) for each in (mask, mask if running is None else running))
        trace.append(Step(here, coming, active, accesses))
        at[mask] = here + 1
        if x.base == "EXIT":
            alive = alive & ~running
        elif x.base == "BRA" and len(x.operands) == 1 and not x.modifiers:
            at[running] = numbers[int(x.operands[0], 16)]
        elif x.base in ("BRA", "BRX", "CALL", "JMP", "RET"):
            raise ValueError(f"cannot follow {x}")
        else:
            _run(threads, memory, x, running)
    return trace
