"""A cubin as instructions, with the fields that tell the processor when to issue them, and what a program takes."""

import re
import subprocess
import tempfile
from dataclasses import dataclass, field

import triton

__all__ = ["Instruction", "MachineCode", "disassemble"]

FIRST = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s+/\* 0x[0-9a-f]{16} \*/")
SECOND = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/")
PARAMETER = re.compile(r"Ordinal : 0x([0-9a-f]+)\s+Offset\s+: 0x([0-9a-f]+)\s+Size\s+: 0x([0-9a-f]+)")


@dataclass(frozen=True)
class Instruction:
    """stall: clocks until this warp's next. written, read: the scoreboard, 7 for none, that is let go when the result
    is there or the operands are read; waits: bits of those waited for. guard: the predicate it runs under, or None."""

    text: str
    address: int = 0
    stall: int = 1
    written: int = 7
    read: int = 7
    waits: int = 0
    guard: str | None = field(init=False)
    op: str = field(init=False)  # "IMAD.WIDE.U32"
    base: str = field(init=False)  # "IMAD"
    modifiers: tuple[str, ...] = field(init=False)  # ("WIDE", "U32")
    operands: tuple[str, ...] = field(init=False)

    def __post_init__(self):
        guard, op, rest = re.fullmatch(r"(?:@(\S+)\s+)?(\S+)\s*(.*)", self.text).groups()
        base, *modifiers = op.split(".")
        # Commas within brackets do not part operands.
        operands = tuple(x.strip() for x in re.split(r",(?![^\[(]*[\])])", rest) if x.strip())
        for name, value in dict(guard=guard, op=op, base=base, modifiers=tuple(modifiers), operands=operands).items():
            object.__setattr__(self, name, value)

    def __str__(self):
        return f"{self.text} at {self.address:#x}"


@dataclass(frozen=True)
class MachineCode:
    """parameters: offset and size in bytes of each, in order. registers and stack, in bytes: of a thread."""

    instructions: list[Instruction]
    parameters: list[tuple[int, int]]
    registers: int
    stack: int


def _instructions(text):
    found, first = [], None
    for line in text.splitlines():
        if match := FIRST.match(line):
            first = match
        elif first and (match := SECOND.match(line)):
            control = int(match[1], 16) >> 41
            fields = dict(stall=control & 15, written=control >> 5 & 7, read=control >> 8 & 7, waits=control >> 11 & 63)
            found.append(Instruction(first[2], int(first[1], 16), **fields))
            first = None
    return found


def disassemble(cubin: bytes) -> MachineCode:
    """The one kernel of a cubin of sm_90."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", "-elf", "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    places = {int(number, 16): (int(offset, 16), int(size, 16)) for number, offset, size in PARAMETER.findall(text)}
    parameters = [places[number] for number in range(len(places))]
    return MachineCode(_instructions(text), parameters, int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"]))
