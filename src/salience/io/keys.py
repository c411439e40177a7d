"""Random draws that are a function of (seed, purpose, file, row): the same on any number of workers.

    h = mix(mix(mix(seed, purpose) ^ file) ^ row),   u = (h >> 11 + 1/2) / 2^53   in (0, 1)

`mix` is the SplitMix64 finaliser (Steele, Lea, Flood, OOPSLA 2014). Two draws for different purposes are independent.
"""

from __future__ import annotations

import numpy as np
import xxhash
from jaxtyping import Float, Int

_MASK = (1 << 64) - 1


def key_of(text: str) -> int:
    """64-bit identity of a name, such as a file's path relative to its corpus (xxh3)."""
    return xxhash.xxh3_64_intdigest(text.encode("utf-8"))


def uniform(seed: int, purpose: str, file_id: int, rows: Int[np.ndarray, " rows"]) -> Float[np.ndarray, " rows"]:
    """Draw one number in (0, 1) for every row.

    Parameters
    ----------
    seed : int
    purpose : str
        What the draw is for, such as "hold-out"; draws for different purposes are independent.
    file_id : int
        The file's 64-bit identity.
    rows : (rows,) int64
        Row numbers or byte offsets within the file.
    """
    with np.errstate(over="ignore"):
        state = _mix(np.uint64(int(seed) & _MASK) + _mix(np.uint64(key_of(purpose))))
        state = _mix(state ^ np.uint64(file_id))
        drawn = _mix(state ^ _mix(np.asarray(rows).astype(np.uint64)))
    unit = (np.asarray(drawn >> np.uint64(11), dtype=np.float64) + 0.5) / 2.0**53
    return np.minimum(unit, np.nextafter(1.0, 0.0))  # the largest would round to 1


def gumbel(seed: int, purpose: str, file_id: int, rows: Int[np.ndarray, " rows"]) -> Float[np.ndarray, " rows"]:
    """Draw one standard Gumbel number ``-log(-log u)`` for every row."""
    return -np.log(-np.log(uniform(seed, purpose, file_id, rows)))


def _mix(x: np.uint64 | np.ndarray) -> np.uint64 | np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
