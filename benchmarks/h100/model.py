"""The time of a launch on an H100: one program emulated, as many simulated as a processor holds, the rest by counting.

A kernel whose programs go from chunk to chunk is emulated on two short sequences, and each further chunk takes what
those between the two took.
"""

import collections
import functools
from dataclasses import dataclass

from . import machine
from .emulator import emulate
from .machine_code import MachineCode
from .memory import Arguments
from .records import demand, streams
from .simulator import WAITS, simulate

__all__ = ["Kernel", "Time", "time_of"]

MOST_NEIGHBOURS = 16
FOLLOWERS = 16  # programs simulated one after the other in each place of a processor
LEAST_SHARED = 0.05  # of what a program loads, for a neighbour to count as one that reads the same


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel. shared: bytes of a program; warps: of a program."""

    code: MachineCode
    shared: int
    warps: int

    @property
    def resident(self) -> int:
        return machine.resident(self.code.registers, self.shared, self.warps)


@dataclass(frozen=True)
class Time:
    """Of one launch, in seconds: low and high; bounds, what each resource alone would take; and the part of warps'
    time that goes to each of ``WAITS``."""

    low: float
    high: float
    bounds: dict[str, float]
    waits: dict[str, float]


def _run(kernel, arguments, floats, program):
    return emulate(kernel.code, arguments, program, kernel.warps, floats)


def _sectors(trace):
    return set().union(*(access.fetched for step in trace for access in step.accesses or ()))


def _neighbours(reads, count, middle, common):
    """The programs beside ``middle`` in the grid that read much of what it reads, and itself. common: what all read."""
    own = reads(middle) - common
    found = [middle]
    for direction in (-1, 1):
        for distance in range(1, MOST_NEIGHBOURS):
            other = middle + direction * distance
            if not 0 <= other < count or len(own & reads(other)) <= LEAST_SHARED * len(own):
                break
            found.append(other)
    return found


def _shares(trace, readers, common):
    """Number of an instruction -> of the sectors that it loads first, the part that comes from HBM."""
    found = {}
    for step in trace:
        for access in step.accesses or ():
            loaded, far = found.get(step.number, (0, 0.0))
            far += sum(1 / readers[sector] for sector in access.fetched if sector not in common)
            found[step.number] = loaded + len(access.fetched), far
    return {number: far / loaded for number, (loaded, far) in found.items() if loaded}


def _sample(run, count):
    """The program to stand for all, and of each of its instructions the part of what it loads that comes from HBM: what
    all programs read comes from L2, what m neighbours read by 1 / m from HBM.

    Of neighbours that read the same, as the values and the map of segment_kernel do, it is the one that runs most."""
    reads = functools.cache(lambda program: _sectors(run(program)))
    middle = count // 2
    common = reads(middle) & reads(0)
    group = _neighbours(reads, count, middle, common)
    chosen = max(group, key=lambda program: len(run(program)))
    readers = collections.Counter(sector for program in group for sector in reads(program))
    return chosen, _shares(run(chosen), readers, common)


def _rates(processors):
    """Bytes a clock of L2 and HBM for one of so many processors: its share, or what it wants if others leave that."""
    share = (machine.L2 / processors / machine.CLOCK, machine.HBM / processors / machine.CLOCK)
    most = (machine.L2_OF_PROCESSOR, machine.HBM_OF_PROCESSOR)
    return tuple(map(min, share, most)), most


def _walk(kernel, found, lengths, length, count, alone):
    """Clocks that ``count`` programs take, each of ``length`` chunks: rounds of as many as all processors hold, one
    after the other. found: the streams of walks over ``lengths``."""
    slots = machine.PROCESSORS * kernel.resident
    total = 0.0
    for programs, rounds in ((slots, count // slots), (count % slots, 1)):
        if programs * rounds:
            resident = -(-programs // machine.PROCESSORS)
            l2, hbm = _rates(min(machine.PROCESSORS, programs))[alone]
            short, long = (simulate(found[n], resident, resident, l2, hbm)[0] for n in lengths)
            total += rounds * _extended(short, long, lengths, length)
    return total


def _extended(short, long, lengths, length):
    """Of a quantity at two lengths, what it is at another if it grows evenly."""
    return short + (long - short) * (length - lengths[0]) / (lengths[1] - lengths[0])


def _stream(kernel, stream, count, alone):
    """Clocks that ``count`` programs of these records take: by what one more takes where many follow each other."""
    resident = kernel.resident
    programs = max(FOLLOWERS * resident, 3 * FOLLOWERS)
    l2, hbm = _rates(machine.PROCESSORS)[alone]
    _, ends, _ = simulate(stream, resident, programs, l2, hbm)
    one_more = (ends[-1] - ends[resident - 1]) / (programs - resident)
    return count / machine.PROCESSORS * one_more + simulate(stream, 1, 1)[0] / 2


def _bounds(wanted, count, processors):
    """Seconds. wanted: what one program asks for."""
    clocks = {name: count / processors / machine.CLOCK * value for name, value in wanted.items()}
    return clocks | {"hbm": count * wanted["hbm"] / machine.HBM, "l2": count * wanted["l2"] / machine.L2}


def time_of(kernel: Kernel, count: int, length: int, arguments: dict[int, Arguments], floats: float = 0.0) -> Time:
    """Of a launch of ``count`` programs on sequences of ``length`` chunks. arguments: chunks of a sequence -> those of
    such a launch with as many programs; {length: ...} alone for a kernel whose programs each have a chunk of their own.

    floats: see ``emulate``, whose ValueError is passed on. Simulated times lie between a processor having its share of
    L2 and HBM at any time, and having as much as it can take, as while others compute. No time is below a bound."""
    lengths = sorted(arguments)
    runs = {n: functools.cache(functools.partial(_run, kernel, arguments[n], floats)) for n in lengths}
    chosen, shares = _sample(runs[lengths[0]], count)
    found = {n: streams(kernel.code, run(chosen), shares) for n, run in runs.items()}
    wanted = {n: demand(stream) for n, stream in found.items()}
    if len(lengths) == 1:
        resident, processors, wanted = kernel.resident, machine.PROCESSORS, wanted[lengths[0]]
        both = [_stream(kernel, found[lengths[0]], count, alone) for alone in (False, True)]
    else:
        processors = min(machine.PROCESSORS, count)
        resident = min(kernel.resident, -(-count // processors))
        short, long = (wanted[n] for n in lengths)
        wanted = {name: _extended(short[name], long[name], lengths, length) for name in short}
        both = [_walk(kernel, found, lengths, length, count, alone) for alone in (False, True)]
    bounds = _bounds(wanted, count, processors)
    low, high = sorted(clocks / machine.CLOCK for clocks in both)
    low = max(low, *bounds.values())
    _, _, waits = simulate(found[lengths[-1]], resident, resident if len(lengths) == 2 else 3 * resident)
    return Time(low, max(low, high), bounds, dict(zip(WAITS, (waits / waits.sum()).tolist(), strict=True)))
