"""The registers, predicates and constants of a program's threads, side by side in arrays, and what operands name.

Values are 32 bits in uint64 [threads]. What is not known, as floats are not, is not there.
"""

import functools
import re

import numpy as np

from .machine_code import Instruction

__all__ = ["BITS", "Threads", "Unknown", "signed"]

BITS = 0xFFFFFFFF
REGISTER = re.compile(r"([~-]?)(U?R)(Z|\d+)(?:\.reuse|\.64)*")
NUMBER = re.compile(r"-?0x[0-9a-f]+|-?\d+")
PREDICATE = re.compile(r"U?P[T\d]")
COMPARISONS = ("FSETP", "HSETP2", "ISETP", "UISETP", "PLOP3", "UPLOP3")  # write predicates alone
# Write neither registers nor predicates.
SILENT = {
    "BAR", "BRA", "BREAK", "BSSY", "BSYNC", "DEPBAR", "EXIT", "FENCE", "LDGDEPBAR", "LDGSTS", "MEMBAR", "NOP", "STG",
    "STL", "STS", "STSM", "WARPGROUP", "WARPSYNC",
}  # fmt: skip


class Unknown(Exception):
    """An instruction reads what is not known."""


def signed(x):
    """32 bits as int64."""
    return x.astype(np.uint32).view(np.int32).astype(np.int64)


@functools.cache
def _register(token):
    """(sign, "R" or "UR", number or None for zero), or None."""
    match = REGISTER.fullmatch(token)
    return match and (match[1], match[2], None if match[3] == "Z" else int(match[3]))


def results(x: Instruction) -> int:
    """Registers that an instruction writes."""
    if x.base == "HGMMA":
        columns = int(re.match(r"64x(\d+)x", x.modifiers[0])[1])
        return columns // 2 if "F32" in x.modifiers else columns // 4
    if x.base in ("HMMA", "LDSM"):
        return 4
    if "128" in x.modifiers:
        return 4
    if "WIDE" in x.modifiers or ("64" in x.modifiers and x.base.lstrip("U").startswith("LD")):
        return 2
    return 2 if x.op == "CS2R" else 1


class Threads:
    """``threads`` of program number ``program``. constants: 32-bit words of the constant bank by their offset. floats:
    what stands for a float in its comparison with a constant.

    A mask of threads is bool [threads], or None for all of them."""

    def __init__(self, threads: int, constants: dict[int, int] | None = None, program: int = 0, floats: float = 0.0):
        self.program = program
        self.number = np.arange(threads, dtype=np.uint64)
        self.zero = np.zeros(threads, np.uint64)
        # Code sets single bits of registers that it never wrote.
        self.registers = {f"R{k}": self.zero for k in range(255)}
        self.predicates = {}
        self.constants = constants or {}
        self.floats = floats
        self.lost = {}  # register or predicate -> the instruction with which its being unknown began

    def full(self, number):
        return np.full(len(self.zero), number & BITS, np.uint64)

    def _named(self, name):
        x = self.registers.get(name)
        if x is None:
            raise Unknown(name)
        return x

    def wide(self, token):
        """An operand of 32 bits; a negative one may be 2^32, which carries as the adder does."""
        if register := _register(token):
            sign, kind, number = register
            x = self.zero if number is None else self._named(f"{kind}{number}")
            if sign == "~":
                return x ^ np.uint64(BITS)
            return (x ^ np.uint64(BITS)) + np.uint64(1) if sign else x
        if NUMBER.fullmatch(token):
            return self.full(int(token, 0))
        raise Unknown(token)

    def read(self, token):
        return self.wide(token) & np.uint64(BITS)

    def pair(self, token):
        """A pair of registers, 64 bits."""
        sign, kind, number = _register(token) or (token, "", None)
        if sign:
            raise Unknown(token)
        if number is None:
            return self.zero
        return self._named(f"{kind}{number}") | self._named(f"{kind}{number + 1}") << np.uint64(32)

    def nth(self, token, k):
        """The k-th register from one on, None where it is unknown."""
        _, kind, number = _register(token)
        return self.zero if number is None else self.registers.get(f"{kind}{number + k}")

    def predicate(self, token):
        name = token.lstrip("!")
        x = np.ones(len(self.zero), bool) if name in ("PT", "UPT") else self.predicates.get(name)
        if x is None:
            raise Unknown(name)
        return ~x if token[0] == "!" else x

    def write(self, token, mask, *values):
        """To the register and those after it; None for what is not known."""
        _, kind, number = _register(token)
        if number is None:
            return
        for k, value in enumerate(values):
            name = f"{kind}{number + k}"
            if value is None:
                self.registers.pop(name, None)
            elif mask is None:
                self.registers[name] = value & np.uint64(BITS)
            else:
                # Where the rest of a register is unknown, no code reads it there.
                self.registers[name] = np.where(mask, value & np.uint64(BITS), self.registers.get(name, self.zero))

    def write_predicate(self, token, mask, value):
        if token in ("PT", "UPT"):
            return
        if mask is not None:
            value = np.where(mask, value, self.predicates.get(token, False))
        self.predicates[token] = value

    def lose(self, x: Instruction, missing: str | None = None):
        """What an instruction writes is not known from here on, as ``missing`` was, which it reads, if that is why."""
        began = self.lost.get(missing, x)
        if x.base in SILENT:
            return
        operands = list(x.operands)
        names = []
        while operands and PREDICATE.fullmatch(operands[0]):
            names.append(operands.pop(0))
        if x.base not in COMPARISONS:
            _, kind, number = _register(operands.pop(0))
            if number is not None:
                names += [f"{kind}{number + k}" for k in range(results(x))]
            while x.base != "VOTE" and operands and PREDICATE.fullmatch(operands[0]):
                names.append(operands.pop(0))
        for name in names:
            self.registers.pop(name, None)
            self.predicates.pop(name, None)
            self.lost[name] = began

    def why(self, name):
        """For a message: with which instruction it began that a register or predicate is unknown."""
        return f"{name} is not known, from {self.lost[name]} on" if name in self.lost else f"{name} is not known"
