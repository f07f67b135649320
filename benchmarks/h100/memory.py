"""What loads and stores cost, in sectors of global memory and wavefronts of shared memory, and what they move."""

import functools
from typing import NamedTuple

import numpy as np

from .machine_code import Instruction
from .threads import PREDICATE, Threads, Unknown

__all__ = ["Access", "Arguments", "GLOBAL", "Memory", "SHARED", "addresses_of", "sectors_of", "wavefronts", "width_of"]

GLOBAL, SHARED = ("LDG", "STG", "LDGSTS"), ("LDS", "STS", "LDSM", "STSM")
SECTOR, LINE, BANKS = 32, 128, 32  # bytes, bytes, words
WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
SHARED_BYTES = 256 * 1024  # more than there are
PLACE = 40  # the address of argument n is n << PLACE


class Access(NamedTuple):
    """Of one warp: sectors and lines of global memory, of the sectors those that are new to the program, of those the
    numbers of what it loads and has not stored itself; wavefronts of shared memory."""

    sectors: int = 0
    lines: int = 0
    new: int = 0
    fetched: tuple[int, ...] = ()
    waves: int = 0


NOTHING = Access()


def width_of(x: Instruction) -> int:
    """Bytes that a thread loads or stores."""
    return next((WIDTHS[name] for name in x.modifiers if name in WIDTHS), 4)


@functools.cache
def _terms(place):
    """Of [R1+UR2+0x10] or desc[UR4][R2.64+0x10]: registers, whether they are pairs, and the offset."""
    inner = place[place.rindex("[") + 1 : -1].replace("-0x", "+-0x")
    terms = [term for term in inner.split("+") if term]
    numbers = [int(term, 16) for term in terms if "0x" in term]
    names = [(term.partition(".")[0], ".64" in term or ("desc" in place and term.startswith("U")))
             for term in terms if "0x" not in term]  # fmt: skip
    return names, sum(numbers)


def addresses_of(threads: Threads, place: str) -> np.ndarray:
    """uint64 [threads] of an operand in brackets."""
    names, offset = _terms(place)
    total = np.full(len(threads.zero), offset & (2**64 - 1), np.uint64)
    for name, pair in names:
        total = total + (threads.pair(name) if pair else threads.read(name))
    return total


def _distinct(x):
    """[n, m] sorted along its rows, and which of each row are not there before."""
    x = np.sort(x, axis=1)
    first = np.ones(x.shape, bool)
    first[:, 1:] = x[:, 1:] != x[:, :-1]
    return x, first


def _by_group(addresses, mask, lanes):
    """Addresses [groups, lanes], those of threads that do not take part replaced by one that does; and which groups
    have any."""
    addresses, mask = addresses.reshape(-1, lanes), mask.reshape(-1, lanes)
    some = addresses[np.arange(len(mask)), mask.argmax(1)]
    return np.where(mask, addresses, some[:, None]), mask.any(1)


def wavefronts(addresses: np.ndarray, mask: np.ndarray, width: int) -> np.ndarray:
    """Of each warp the clocks that an access to shared memory by the threads of the mask takes: lanes that fetch 128
    bytes together, whose words lie in 32 banks, wait for each other's in the same bank. [threads] -> [threads / 32]."""
    lanes = min(32, 128 // width)
    grouped, some = _by_group(addresses, mask, lanes)
    words = (grouped >> np.uint64(2))[:, :, None] + np.arange(max(1, width // 4), dtype=np.uint64)
    words, first = _distinct(words.reshape(len(grouped), -1))
    bank = (words % np.uint64(BANKS)).astype(int) + BANKS * np.arange(len(words))[:, None]
    loads = np.bincount(bank[first], minlength=BANKS * len(words)).reshape(-1, BANKS).max(1)
    return (loads * some).reshape(-1, 32 // lanes).sum(1)


def sectors_of(addresses: np.ndarray, mask: np.ndarray) -> list[list[int]]:
    """Of each warp the numbers of the sectors, of 32 bytes, that the threads of the mask touch."""
    grouped, some = _by_group(addresses, mask, 32)
    sectors, first = _distinct(grouped // np.uint64(SECTOR))
    return [row[there].tolist() if any_ else [] for row, there, any_ in zip(sectors, first, some, strict=True)]


def _words(read):
    """Bytes [threads, width] as words [threads] each."""
    whole = np.zeros((len(read), max(4, read.shape[1])), np.uint8)
    whole[:, : read.shape[1]] = read
    return list(whole.view(np.uint32).astype(np.uint64).T)


class Arguments:
    """The parameters of a launch in the constant bank: ``constants``, and what pointers point to.

    values: number, None or a NumPy array of integers, whose contents can be loaded, or of the type object for a tensor
    whose contents are unknown."""

    FIRST = 0x210  # of the constant bank on sm_90

    def __init__(self, parameters: list[tuple[int, int]], values: list, threads: int, programs: int):
        # Sizes of a program and of the grid in three dimensions, and where the stack begins.
        self.constants = {0x0: threads, 0x4: 1, 0x8: 1, 0xC: programs, 0x10: 1, 0x14: 1, 0x28: 0}
        self.contents = {}
        # Behind those of the signature Triton has pointers of its own to memory that our kernels do not use.
        values = values + [None] * (len(parameters) - len(values))
        for number, ((offset, size), value) in enumerate(zip(parameters, values, strict=True), 1):
            if isinstance(value, np.ndarray):
                self.contents[number] = value.view(np.uint8).ravel()
            if not isinstance(value, int | float):
                value = number << PLACE
            elif isinstance(value, float):
                value = int(np.float32(value).view(np.uint32))
            for k in range(0, size, 4):
                self.constants[self.FIRST + offset + k] = value >> 8 * k & 0xFFFFFFFF

    def load(self, addresses, width):
        """The words [threads] each that a load of these addresses gives, None for each that is unknown."""
        place, offset = addresses >> np.uint64(PLACE), addresses & np.uint64((1 << PLACE) - 1)
        contents = self.contents.get(int(place[0]))
        if contents is None:
            return [None] * max(1, width // 4)
        at = offset.astype(np.int64)[:, None] + np.arange(width)
        if (place != place[0]).any() or (at < 0).any() or (at >= len(contents)).any():
            raise IndexError
        return _words(contents[at])


class Memory:
    """What one program sees: sectors of global memory that it has loaded and stored, the integers that it has put into
    shared memory, and its local memory."""

    def __init__(self, arguments: Arguments):
        self.arguments = arguments
        self.loaded, self.stored = set(), set()
        self.shared, self.known = np.zeros(SHARED_BYTES, np.uint8), np.zeros(SHARED_BYTES, bool)
        self.local = {}

    def access(self, threads: Threads, x: Instruction, mask: np.ndarray) -> list[Access]:
        """Of each warp what a load or store by the threads of the mask costs. Raises Unknown for an unknown address."""
        places = [token for token in x.operands if "[" in token]
        width = width_of(x)
        if x.base in ("LDSM", "STSM"):  # each eight lanes have the rows of one of four matrices
            return [Access(waves=n) for n in wavefronts(addresses_of(threads, places[0]), mask, 16).tolist()]
        if x.base in SHARED:
            return [Access(waves=n) for n in wavefronts(addresses_of(threads, places[0]), mask, width).tolist()]
        waves = [0] * (len(mask) // 32)
        if x.base == "LDGSTS":
            waves = wavefronts(addresses_of(threads, places[0]), mask, width).tolist()
            # Where the last operand is a predicate and false, zeros are written and nothing is read.
            if PREDICATE.fullmatch(x.operands[-1].lstrip("!")):
                mask = mask & threads.predicate(x.operands[-1])
        return [
            self._global(x, sectors, waves)
            for sectors, waves in zip(sectors_of(addresses_of(threads, places[-1]), mask), waves, strict=True)
        ]

    def _global(self, x, sectors, waves):
        if not sectors:
            return Access(waves=waves)
        lines = len({sector * SECTOR // LINE for sector in sectors})
        before = self.stored if x.base == "STG" else self.loaded
        new = [sector for sector in sectors if sector not in before]
        before.update(new)
        fetched = () if x.base == "STG" else tuple(sector for sector in new if sector not in self.stored)
        return Access(len(sectors), lines, len(new), fetched, waves)

    def transfer(self, threads: Threads, x: Instruction, mask: np.ndarray):
        """Registers to memory, or from it: known where what they load is."""
        place = next(token for token in x.operands if "[" in token)
        addresses, width = addresses_of(threads, place), 16 if x.base in ("STSM", "LDGSTS") else width_of(x)
        if x.base == "LDSM":
            threads.lose(x)
        elif x.base in ("LDG", "LDS"):
            addresses = np.where(mask, addresses, addresses[mask.argmax()])
            words = self._shared_words(addresses, width) if x.base == "LDS" else self.arguments.load(addresses, width)
            threads.write(x.operands[0], None if mask.all() else mask, *words)
            if words[0] is None:
                threads.lose(x)
        elif x.base != "STG":
            at = addresses[mask].astype(np.int64)[:, None] + np.arange(width)
            words = [threads.nth(x.operands[1], k) for k in range(max(1, width // 4))] if x.base == "STS" else [None]
            self.known[at] = all(word is not None for word in words)
            if words[0] is not None and self.known[at].any():
                self.shared[at] = np.stack(words, 1).astype(np.uint32).view(np.uint8)[mask][:, :width]

    def _shared_words(self, addresses, width):
        at = addresses.astype(np.int64)[:, None] + np.arange(width)
        if not self.known[at].all():
            return [None] * max(1, width // 4)
        return _words(self.shared[at])

    def spill(self, threads: Threads, x: Instruction, mask: np.ndarray):
        """Registers to local memory or back."""
        store = x.base == "STL"
        place, register = x.operands if store else x.operands[::-1]
        address = addresses_of(threads, place)
        if width_of(x) < 4 or (address != address[0]).any():
            raise Unknown
        words = [int(address[0]) + k for k in range(0, width_of(x), 4)]
        if not store:
            threads.write(register, None if mask.all() else mask, *(self.local.get(word) for word in words))
            return
        for k, word in enumerate(words):
            value = threads.nth(register, k)
            if value is not None and word in self.local and self.local[word] is not None:
                value = np.where(mask, value, self.local[word])
            self.local[word] = value
