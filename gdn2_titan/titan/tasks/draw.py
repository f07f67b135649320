"""Random numbers of one sequence, from the raw output of a bit generator: NumPy keeps that the same from version to
version, which it does not promise for the methods of ``Generator``; a checkpoint outlives such versions."""

import numpy as np

__all__ = ["Draw"]


class Draw:
    """A stream of random numbers that depends on ``seed``, whole numbers of at least 0, only."""

    def __init__(self, *seed):
        self._bits = np.random.PCG64(np.random.SeedSequence(seed))

    def below(self, limit, count):
        """int64 [count], each uniform in 0 .. limit - 1; limit: up to 2**31, a number or an array [count]."""
        return ((self._bits.random_raw(count) >> np.uint64(32)).astype(np.int64) * limit) >> 32

    def one(self, limit):
        """A number uniform in 0 .. limit - 1."""
        return ((self._bits.random_raw() >> 32) * limit) >> 32

    def order(self, count):
        """int64 [count]: a permutation of 0 .. count - 1."""
        return np.argsort(self._bits.random_raw(count), kind="stable")

    def some(self, limit, count):
        """int64 [count]: different numbers below limit, in rising order."""
        return np.sort(self.order(limit)[:count])
