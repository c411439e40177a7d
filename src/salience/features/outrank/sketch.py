"""How many distinct values a stream has, and how often each occurs: exact up to a limit, then by a sketch.

Up to `EXACT` distinct values are counted one by one, under 64-bit hashes. From there on the number of distinct values
comes from a HyperLogLog of 2^16 registers (64 KiB, standard error 0.4 %), read by Ertl's improved estimator; values
already known are counted on.

Sources: Flajolet et al., "HyperLogLog", AofA 2007; Ertl, "New cardinality estimation algorithms for HyperLogLog
sketches", arXiv 1702.01284, algorithm 6.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import pyarrow as pa
from jaxtyping import Int, UInt

EXACT = 1 << 16
_BITS = 16  # of a hash choose the register
_SMALLEST = 1 << 8


class ValueCounter:
    """Counts of the values of one column, in at most a few MB.

    Attributes
    ----------
    exact : bool
        Whether every value seen has been counted.
    """

    def __init__(self) -> None:
        self._keys = np.zeros(_SMALLEST, np.uint64)  # open addressing; 0 is an empty place
        self._counts = np.zeros(_SMALLEST, np.int64)
        self._used = 0
        self._registers: np.ndarray | None = None

    @property
    def exact(self) -> bool:
        return self._registers is None

    def add(self, hashes: UInt[np.ndarray, " n"], counts: Int[np.ndarray, " n"]) -> None:
        """Add values, given by their hashes, and how often each occurred."""
        while len(self._keys) < 2 * min(self._used + len(hashes), EXACT):
            self._grow()
        self._used, left_out = _insert(self._keys, self._counts, self._used, EXACT, hashes, counts)
        if left_out and self._registers is None:
            self._registers = np.zeros(1 << _BITS, np.uint8)
            _register(self._registers, self._keys[self._keys != 0])
        if self._registers is not None:
            _register(self._registers, hashes)

    def distinct(self) -> int:
        """Number of distinct values: exact, or estimated beyond `EXACT` of them."""
        if self._registers is None:
            return self._used
        return max(round(_estimate(self._registers)), EXACT + 1)

    def counts(self) -> Int[np.ndarray, " values"]:
        """How often each of the counted values occurred."""
        return self._counts[self._keys != 0]

    def _grow(self) -> None:
        taken = self._keys != 0
        keys, counts = self._keys[taken], self._counts[taken]
        size = 2 * len(self._keys)
        self._keys, self._counts = np.zeros(size, np.uint64), np.zeros(size, np.int64)
        self._used, _ = _insert(self._keys, self._counts, 0, size, keys, counts)


def hashes_of(text: pa.Array) -> UInt[np.ndarray, " n"]:
    """64-bit hashes of strings, never 0: FNV-1a with SplitMix64's finaliser.

    Parameters
    ----------
    text : Arrow large_string or large_binary array, (n,)
    """
    if not len(text):
        return np.empty(0, np.uint64)
    _, offsets, data = text.buffers()
    bounds = np.frombuffer(offsets, np.int64)[text.offset : text.offset + len(text) + 1]
    return _hash(np.frombuffer(data or b"", np.uint8), bounds)


@numba.njit(nogil=True, cache=True)
def _hash(data, bounds):
    hashes = np.empty(len(bounds) - 1, np.uint64)
    for i in range(len(hashes)):
        h = np.uint64(0xCBF29CE484222325)
        for at in range(bounds[i], bounds[i + 1]):
            h = (h ^ np.uint64(data[at])) * np.uint64(0x100000001B3)
        h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        h = h ^ (h >> np.uint64(31))
        hashes[i] = h if h != np.uint64(0) else np.uint64(1)
    return hashes


@numba.njit(nogil=True, cache=True)
def _insert(keys, counts, used, limit, hashes, added):
    """Add counts under hashes; new hashes are left out once `limit` are known. Gives the number known, and left out."""
    last, left_out = np.uint64(len(keys) - 1), 0
    for i in range(len(hashes)):
        place = hashes[i] & last
        while keys[place] != np.uint64(0) and keys[place] != hashes[i]:
            place = (place + np.uint64(1)) & last
        if keys[place] == np.uint64(0):
            if used == limit:
                left_out += 1
                continue
            keys[place] = hashes[i]
            used += 1
        counts[place] += added[i]
    return used, left_out


@numba.njit(nogil=True, cache=True)
def _register(registers, hashes):
    """Keep per register the longest run of leading zeros, plus one, behind the bits that choose it."""
    for h in hashes:
        at, rest, run = h >> np.uint64(64 - _BITS), h << np.uint64(_BITS), 1
        while run <= 64 - _BITS and not rest >> np.uint64(63):
            rest <<= np.uint64(1)
            run += 1
        registers[at] = max(registers[at], run)


def _estimate(registers: UInt[np.ndarray, " m"]) -> float:
    m, q = len(registers), 64 - _BITS
    runs = np.bincount(registers, minlength=q + 2).astype(float)
    z = m * _tau(1 - runs[q + 1] / m)
    for k in range(q, 0, -1):
        z = 0.5 * (z + runs[k])
    z += m * _sigma(runs[0] / m)
    return m / (2 * math.log(2)) * m / z


def _sigma(x: float) -> float:
    if x == 1:
        return math.inf
    total, y, before = x, 1.0, -1.0
    while total != before:
        x, before = x * x, total
        total, y = total + x * y, 2 * y
    return total


def _tau(x: float) -> float:
    if x in (0, 1):
        return 0.0
    total, y, before = 1 - x, 1.0, -1.0
    while total != before:
        x, before, y = math.sqrt(x), total, y / 2
        total -= (1 - x) ** 2 * y
    return total / 3
