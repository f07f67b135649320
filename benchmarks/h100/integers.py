"""The instructions of sm_90 that compute with integers and predicates, on all threads at once.

Each takes the threads, the instruction and the mask of threads that run it, and raises ``Unknown`` where it reads what
is not known, or is of a variant that our kernels do not need.
"""

import re

import numpy as np

from .machine_code import Instruction
from .threads import BITS, PREDICATE, Threads, Unknown, results, signed

__all__ = ["OPERATIONS", "execute"]

OPERATIONS = {}
COMPARE = {
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
    "EQ": np.equal,
    "NE": np.not_equal,
}
COMBINE = {"AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor}
LOW = np.uint64(BITS)
HALF = np.uint64(32)
ONE = np.uint64(1)


def execute(threads: Threads, x: Instruction, mask: np.ndarray | None = None) -> None:
    """Run an instruction for the threads of the mask. What it cannot compute becomes unknown."""
    try:
        if x.base not in OPERATIONS:
            raise Unknown
        OPERATIONS[x.base](threads, x, mask)
    except Unknown as unknown:
        threads.lose(x, *unknown.args)


def _operation(*names):
    def enter(function):
        OPERATIONS.update(dict.fromkeys(names, function))
        return function

    return enter


def _carries(operands):
    """The predicates at the start of operands, and the rest."""
    count = next((k for k, token in enumerate(operands) if not PREDICATE.fullmatch(token)), len(operands))
    return operands[:count], operands[count:]


@_operation("MOV", "UMOV")
def _mov(threads, x, mask):
    threads.write(x.operands[0], mask, threads.read(x.operands[1]))


@_operation("CS2R")
def _cs2r(threads, x, mask):
    if x.operands[1] != "SRZ":
        raise Unknown
    threads.write(x.operands[0], mask, *[threads.zero] * results(x))


@_operation("S2R", "S2UR")
def _s2r(threads, x, mask):
    dest, name = x.operands
    if name == "SR_TID.X":
        value = threads.number
    elif name == "SR_CTAID.X":
        value = threads.full(threads.program)
    elif name in ("SR_TID.Y", "SR_TID.Z", "SR_CTAID.Y", "SR_CTAID.Z", "SR_CgaCtaId"):  # the grid has one dimension
        value = threads.zero
    else:
        raise Unknown
    threads.write(dest, mask, value)


@_operation("LDC", "ULDC")
def _ldc(threads, x, mask):
    match = re.fullmatch(r"c\[0x0\]\[0x([0-9a-f]+)\]", x.operands[1])
    if not match or set(x.modifiers) - {"64"}:
        raise Unknown
    offset = int(match[1], 16)
    words = [threads.constants.get(offset + 4 * k) for k in range(results(x))]
    threads.write(x.operands[0], mask, *(None if word is None else threads.full(word) for word in words))


@_operation("IMAD", "UIMAD")
def _imad(threads, x, mask):
    a, b, c, *extra = x.operands[1:]
    a, b = threads.read(a), threads.read(b)
    if "WIDE" in x.modifiers or "HI" in x.modifiers:
        product = a * b if "U32" in x.modifiers else (signed(a) * signed(b)).astype(np.uint64)
        total = product + threads.pair(c)
        threads.write(x.operands[0], mask, *([total, total >> HALF] if "WIDE" in x.modifiers else [total >> HALF]))
        return
    total = a * b + threads.read(c)
    if "X" in x.modifiers:
        total = total + threads.predicate(extra[0])
    threads.write(x.operands[0], mask, total)


@_operation("IADD3", "UIADD3")
def _iadd3(threads, x, mask):
    carries, rest = _carries(x.operands[1:])
    total = sum(threads.wide(token) for token in rest[:3])
    if "X" in x.modifiers:
        total = total + sum(threads.predicate(token).astype(np.uint64) for token in rest[3:5])
    for k, name in enumerate(carries):
        threads.write_predicate(name, mask, total >> HALF > k)
    threads.write(x.operands[0], mask, total)


@_operation("VIADD")
def _viadd(threads, x, mask):
    threads.write(x.operands[0], mask, threads.read(x.operands[1]) + threads.read(x.operands[2]))


@_operation("LEA", "ULEA")
def _lea(threads, x, mask):
    """(a << shift) + b; of HI the upper half, where c is above a, or with SX32 the sign of a is."""
    carry, (a, b, *rest) = _carries(x.operands[1:])
    a, b = threads.read(a), threads.wide(b)
    if "HI" in x.modifiers:
        wide = signed(a).astype(np.uint64) if "SX32" in x.modifiers else a | threads.read(rest.pop(0)) << HALF
        total = (wide << threads.read(rest.pop(0)) >> HALF) + b
    else:
        total = (a << threads.read(rest.pop(0)) & LOW) + b
    if "X" in x.modifiers:
        total = total + threads.predicate(rest[0])
    for name in carry:
        threads.write_predicate(name, mask, total >> HALF > 0)
    threads.write(x.operands[0], mask, total)


def _table(table, values, ones):
    """The function of three bits with this table of truth. A value that it ignores may be None."""
    out = None
    known = [ones & ~ones if value is None else value for value in values]
    for row in range(8):
        if table >> row & 1:
            a, b, c = (value if row >> 2 - k & 1 else value ^ ones for k, value in enumerate(known))
            out = a & b & c if out is None else out | a & b & c
    return ones & ~ones if out is None else out


def _used(threads, read, tokens, table):
    """The values of three operands, None for those that a table of truth ignores."""
    for k, token in enumerate(tokens):
        bit = 4 >> k
        ignored = all((table >> row & 1) == (table >> (row ^ bit) & 1) for row in range(8))
        yield None if ignored else read(token)


@_operation("LOP3", "ULOP3")
def _lop3(threads, x, mask):
    outs, (dest, *rest) = _carries(x.operands)
    table = int(rest[3], 16)
    out = _table(table, list(_used(threads, threads.read, rest[:3], table)), threads.full(BITS))
    for name in outs:
        threads.write_predicate(name, mask, (out != 0) | threads.predicate(rest[4]))
    threads.write(dest, mask, out)


@_operation("PLOP3", "UPLOP3")
def _plop3(threads, x, mask):
    tables = [int(token, 16) for token in x.operands[-2:]]
    for name, table in zip(x.operands[:2], tables, strict=True):
        if name not in ("PT", "UPT"):
            values = list(_used(threads, threads.predicate, x.operands[2:5], table))
            threads.write_predicate(name, mask, _table(table, values, np.ones(len(threads.zero), bool)))


@_operation("SHF", "USHF")
def _shf(threads, x, mask):
    """To the left a, or with U64.HI the upper half of b above a; to the right b, or with U64 the lower half of b above
    a."""
    a, shift, b = (threads.read(token) for token in x.operands[1:4])
    shift = np.minimum(shift, np.uint64(63))
    if x.modifiers == ("L", "U32"):
        out = a << shift
    elif x.modifiers == ("L", "U64", "HI"):
        out = (a | b << HALF) << shift >> HALF
    elif x.modifiers == ("R", "U64"):
        out = (a | b << HALF) >> shift
    elif x.modifiers == ("R", "S32", "HI"):
        out = signed(b) >> shift.astype(np.int64)
    elif x.modifiers == ("R", "U32", "HI"):
        out = b >> shift
    else:
        raise Unknown
    threads.write(x.operands[0], mask, out.astype(np.uint64))


@_operation("ISETP", "UISETP")
def _isetp(threads, x, mask):
    first, second, a, b, before, *low = x.operands
    a, b = threads.read(a), threads.read(b)
    compare, combine = x.modifiers[0], next(m for m in x.modifiers if m in COMBINE)
    if "U32" not in x.modifiers:
        a, b = signed(a), signed(b)
    if "EX" in x.modifiers:  # the upper halves of 64 bits; low is what the lower ones said
        low = threads.predicate(low[0])
        if compare in ("EQ", "NE"):
            out = (a == b) & low if compare == "EQ" else (a != b) | low
        else:
            out = COMPARE[compare[0] + "T"](a, b) | (a == b) & low
    else:
        out = COMPARE[compare](a, b)
    before = threads.predicate(before)
    threads.write_predicate(first, mask, COMBINE[combine](out, before))
    threads.write_predicate(second, mask, COMBINE[combine](~out, before))


@_operation("FSETP")
def _fsetp(threads, x, mask):
    """Floats are not known. Of those that are compared with a constant, as a decay with the limit of what one product
    can hold, ``threads.floats`` stands for all: nothing else decides where our kernels go."""
    first, second, a, b, before = x.operands
    if (
        not re.fullmatch(r"R\d+(\.reuse)?", a)
        or not re.fullmatch(r"-?\d[\d.e+]*", b)
        or second != "PT"
        or before != "PT"
    ):
        raise Unknown
    out = COMPARE[x.modifiers[0][:2]](threads.floats, float(b))
    threads.write_predicate(first, mask, np.full(len(threads.zero), out))


@_operation("SEL", "USEL")
def _sel(threads, x, mask):
    dest, a, b, chosen = x.operands
    chosen = threads.predicate(chosen)
    if chosen.all() or not chosen.any():  # the other need not be known
        out = threads.read(a if chosen.all() else b)
    else:
        out = np.where(chosen, threads.read(a), threads.read(b))
    threads.write(dest, mask, out)


@_operation("IABS")
def _iabs(threads, x, mask):
    threads.write(x.operands[0], mask, np.abs(signed(threads.read(x.operands[1]))).astype(np.uint64))


@_operation("VIMNMX", "VIMNMX3", "VIADDMNMX")
def _minimum_or_maximum(threads, x, mask):
    """The least operand where the predicate holds, else the greatest; of VIADDMNMX the first is a sum of two."""
    dest, *operands, least = x.operands
    out, *others = (threads.read(token) for token in operands)
    if x.base == "VIADDMNMX":
        out = out + others.pop(0) & LOW
    least = threads.predicate(least)
    for other in others:
        compared = (out, other) if "U32" in x.modifiers else (signed(out), signed(other))
        out = np.where(np.less(*compared) == least, out, other)
    threads.write(dest, mask, out)


@_operation("SGXT", "USGXT")
def _sgxt(threads, x, mask):
    """The lowest bits, the rest filled with their sign, or with zeros."""
    value, bits = threads.read(x.operands[1]), threads.read(x.operands[2])
    out = value & (ONE << bits) - ONE
    if "U32" not in x.modifiers:
        out = np.where(out >> bits - ONE & ONE, out | LOW << bits, out)
    threads.write(x.operands[0], mask, out)


@_operation("PRMT")
def _prmt(threads, x, mask):
    """Four of the eight bytes of b above a, each named by four bits, of which the highest asks for its sign."""
    a, select, b = (threads.read(token) for token in x.operands[1:4])
    wide = a | b << HALF
    out = threads.zero
    for k in range(4):
        name = select >> np.uint64(4 * k) & np.uint64(15)
        byte = wide >> (name & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        out = out | np.where(name & np.uint64(8), sign, byte) << np.uint64(8 * k)
    threads.write(x.operands[0], mask, out)


@_operation("POPC")
def _popc(threads, x, mask):
    threads.write(x.operands[0], mask, np.bitwise_count(threads.read(x.operands[1])).astype(np.uint64))


@_operation("P2R")
def _p2r(threads, x, mask):
    dest, _, keep, bits = x.operands
    chosen = int(bits, 16)
    out = threads.read(keep) & np.uint64(~chosen & BITS)
    for k in range(7):
        if chosen >> k & 1:
            out = out | threads.predicate(f"P{k}").astype(np.uint64) << np.uint64(k)
    threads.write(dest, mask, out)


@_operation("R2UR")
def _r2ur(threads, x, mask):
    """Of each warp the value of its first thread that runs."""
    dest, source = (token for token in x.operands if not PREDICATE.fullmatch(token))
    value = threads.read(source).reshape(-1, 32)
    first = np.zeros(len(value), int) if mask is None else mask.reshape(-1, 32).argmax(1)
    threads.write(dest, mask, np.take_along_axis(value, first[:, None], 1).repeat(32))


@_operation("REDUX")
def _redux(threads, x, mask):
    """The least or greatest of a warp."""
    if x.modifiers[1:] != ("S32",) or mask is not None:
        raise Unknown
    of_warps = signed(threads.read(x.operands[1])).reshape(-1, 32)
    out = of_warps.min(1) if x.modifiers[0] == "MIN" else of_warps.max(1)
    threads.write(x.operands[0], None, out.repeat(32).astype(np.uint64))


# Divisions of integers go by the reciprocal of a float.


@_operation("I2F")
def _i2f(threads, x, mask):
    value = threads.read(x.operands[1])
    value = (value if "U32" in x.modifiers else signed(value)).astype(np.float64)
    out = value.astype(np.float32)
    if "RP" in x.modifiers:  # up
        out = np.where(out < value, np.nextafter(out, np.float32(np.inf)), out)
    threads.write(x.operands[0], mask, out.view(np.uint32).astype(np.uint64))


@_operation("MUFU")
def _mufu(threads, x, mask):
    if x.modifiers[0] != "RCP":
        raise Unknown
    value = threads.read(x.operands[1]).astype(np.uint32).view(np.float32)
    with np.errstate(divide="ignore"):
        out = np.float32(1) / value
    threads.write(x.operands[0], mask, out.view(np.uint32).astype(np.uint64))


@_operation("F2I")
def _f2i(threads, x, mask):
    value = threads.read(x.operands[1]).astype(np.uint32).view(np.float32)
    if not np.isfinite(value).all():
        raise Unknown
    threads.write(x.operands[0], mask, np.trunc(value).astype(np.int64).astype(np.uint64))
