r"""Cardinality-aware mutual information of category codes, by joint counting.

For codes f of a feature and y of a target on n rows, with n_v rows in class v and n_cv of them with value c,

    H(f|y) = 1/n sum_v ( n_v ln n_v - sum_c n_cv ln n_cv )                   (nats; classes of one row add 0)
    f~_i   = f_{(i + n_{y_i}) mod n}                                         the spoofed feature
    score  = H(f~|y) - H(f|y) = I(f; y) - I(f~; y)

Every row of the spoofed feature borrows the value found as many rows further down as its class has rows: f~ has the
values and counts of f and no relation to y. So the score is the mutual information less what noise of this cardinality
would show on as many rows; it may be negative. With several `shifts`, ``f~`` is the mean over the steps
``n_y, 2 n_y, …``.

The feature is conditioned on the target, never the other way round: of a pair (a, b) it is ``H(a~|b) - H(a|b)``.

The work is O(n) per column whatever its cardinality: a small table of all (c, v) is counted in one pass over the rows;
where the table would be large, the rows are sorted by y once per target, and class after class is counted and undone.

Source: Škrlj and Mramor, "OutRank", RecSys 2023 (arXiv 2309.01552), and its official code.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
from jaxtyping import Float, Int, UInt

from salience.errors import InputError

_CELLS = 4  # a table of (value, class) is laid out where it has at most this many cells a row


class Target(NamedTuple):
    """One column of a batch, prepared for others to be conditioned on it.

    Attributes
    ----------
    y : (n,) uint32
        Its codes.
    bounds : (classes + 1,) int64
        Rows ``bounds[v]:bounds[v + 1]`` of the batch sorted by y are those of class v.
    rows : (1 + shifts, n) uint32
        The rows of the batch, then those whose values the spoofed features borrow.
    by_class : (1 + shifts, n) uint32
        The same sorted by y.
    """

    y: UInt[np.ndarray, " n"]
    bounds: Int[np.ndarray, " classes_1"]
    rows: UInt[np.ndarray, "shifts_1 n"]
    by_class: UInt[np.ndarray, "shifts_1 n"]


def ca_mutual_info(
    feature: Int[np.ndarray, " n"], target: Int[np.ndarray, " n"], *, correction: bool = True, shifts: int = 1
) -> float:
    r"""Cardinality-aware mutual information ``H(f~|y) - H(f|y)`` in nats.

    Parameters
    ----------
    feature, target : (n,) integers
        Category codes, 0 or larger.
    correction : bool
        False gives plain mutual information ``H(f) - H(f|y)``. Of a feature that is the target itself, row by row, the
        entropy ``H(f)`` is given either way.
    shifts : int
        Number of spoofed features whose mean is subtracted.

    Raises
    ------
    InputError
        Other shapes or types, a negative code, no row.

    Examples
    --------
    >>> round(ca_mutual_info(np.array([0, 1, 0, 1, 0, 1]), np.array([0, 1, 0, 1, 0, 0]), correction=False), 4)
    0.3183
    """
    f, y = _codes("feature", feature), _codes("target", target)
    if len(f) != len(y):
        raise InputError(f"feature has {len(f)} rows and target {len(y)}")
    if not isinstance(shifts, int | np.integer) or not shifts >= 1:
        raise InputError(f"shifts must be a whole number of at least 1, not {shifts!r}")
    terms = count_terms(len(f))
    if np.array_equal(f, y):
        return entropy(np.bincount(f))
    cardinality = np.array([int(f.max()) + 1])
    sums = class_sums(f[None], np.array([0]), cardinality, target_of(y, int(y.max()) + 1, shifts), terms)[0]
    if correction:
        return float(sums[0] - sums[1:].mean()) / len(f)
    return entropy(np.bincount(f)) + entropy(np.bincount(y)) - float(entropy_of(sums[0], len(f)))


def entropy(counts: Int[np.ndarray, " values"]) -> float:
    """Entropy in nats of a column whose values occur `counts` times."""
    counts = counts[counts > 0].astype(np.float64)
    return float(np.log(counts.sum()) - counts @ np.log(counts) / counts.sum())


def entropy_of(sums: Float[np.ndarray, ...] | float, n: int) -> Float[np.ndarray, ...] | float:
    """Entropy ``ln n - sums / n`` of a column with ``sums = sum_c n_c ln n_c``."""
    return np.log(n) - sums / n


def count_terms(n: int) -> Float[np.ndarray, "2 n"]:
    """``c ln c`` for the counts c = 1 … n, and by how much each exceeds the one before."""
    counts = np.arange(1, n + 1, dtype=np.float64)
    terms = counts * np.log(counts)
    return np.stack([terms, np.diff(terms, prepend=0.0)])


def target_of(y: UInt[np.ndarray, " n"], cardinality: int, shifts: int = 1) -> Target:
    """Prepare a column, with codes below `cardinality`, for others to be conditioned on it."""
    return Target(y, *_sorted_by(y, cardinality, shifts))


@numba.njit(nogil=True, cache=True)
def _sorted_by(y, cardinality, shifts):
    n = len(y)
    bounds = np.zeros(cardinality + 1, np.int64)
    for code in y:
        bounds[code + np.uint32(1)] += 1
    bounds[:] = np.cumsum(bounds)
    at = bounds[:-1].copy()
    rows = np.empty((1 + shifts, n), np.uint32)
    by_class = np.empty((1 + shifts, n), np.uint32)
    for row in range(n):
        code = y[row]
        place = at[code]
        at[code] = place + 1
        size = bounds[code + np.uint32(1)] - bounds[code]
        for k in range(1 + shifts):
            rows[k, row] = by_class[k, place] = (row + k * size) % n
    return bounds, rows, by_class


def class_sums(
    codes: UInt[np.ndarray, "columns n"], which: Int[np.ndarray, " chosen"],
    cardinalities: Int[np.ndarray, " columns"], target: Target, terms: Float[np.ndarray, "2 n"],
) -> Float[np.ndarray, "chosen shifts_1"]:  # fmt: skip
    """``sum_v sum_c n_cv ln n_cv`` of chosen columns, and of their spoofed features.

    Parameters
    ----------
    codes : (columns, n) uint32
        Codes of all columns.
    which : (chosen,) int64
        Columns to count.
    cardinalities : (columns,) int64
        What the codes of each column stay below.
    terms : (2, n) float64
        `count_terms` of n or more.
    """
    return _class_sums(codes, which, cardinalities, *target, terms[0], terms[1])


def value_sums(
    codes: UInt[np.ndarray, "columns n"], which: Int[np.ndarray, " chosen"],
    cardinalities: Int[np.ndarray, " columns"], terms: Float[np.ndarray, "2 n"],
) -> Float[np.ndarray, " chosen"]:  # fmt: skip
    """``sum_c n_c ln n_c`` of chosen columns, for their own entropies; parameters as in `class_sums`."""
    return _value_sums(codes, which, cardinalities, terms[0])


@numba.njit(nogil=True, cache=True)
def _value_sums(codes, which, cardinalities, terms):
    widest = np.int64(0)
    for column in which:
        widest = max(widest, cardinalities[column])
    counts = np.empty(widest, np.uint32)
    sums = np.zeros(len(which))
    for position in range(len(which)):
        f, cardinality = codes[which[position]], cardinalities[which[position]]
        counts[:cardinality] = 0
        for code in f:
            counts[code] += np.uint32(1)
        for code in range(cardinality):
            if counts[code] > 1:
                sums[position] += terms[counts[code] - np.uint32(1)]
    return sums


@numba.njit(nogil=True, cache=True)
def _class_sums(codes, which, cardinalities, y, bounds, rows, by_class, terms, steps):
    n, versions, classes = len(y), len(rows), len(bounds) - 1
    widest = np.int64(0)
    for column in which:
        widest = max(widest, cardinalities[column])
    sums = np.zeros((len(which), versions))
    cells = np.zeros(max(int(widest), _CELLS * n), np.uint32)
    seen = np.empty(n, np.uint32)
    for position in range(len(which)):
        f, cardinality = codes[which[position]], cardinalities[which[position]]
        for k in range(versions):
            if cardinality * classes <= _CELLS * n:
                sums[position, k] = _by_table(f, cardinality, y, classes, rows[k], cells, terms)
            else:
                sums[position, k] = _by_class(f, bounds, by_class[k], cells, seen, steps)
    return sums


@numba.njit(nogil=True, cache=True)
def _by_table(f, cardinality, y, classes, rows, cells, terms):
    """Few cells (c, v): count them all in one pass."""
    width = np.uint32(classes)
    for row in range(len(y)):
        cells[f[rows[row]] * width + y[row]] += np.uint32(1)
    total = 0.0
    for cell in range(cardinality * classes):
        count = cells[cell]
        if count > 1:
            total += terms[count - np.uint32(1)]
        cells[cell] = 0
    return total


@numba.njit(nogil=True, cache=True)
def _by_class(f, bounds, by_class, counts, seen, steps):
    """Many cells: count one class after the other, and undo it, so that the work does not grow with their number."""
    total = 0.0
    for v in range(len(bounds) - 1):
        low, high = bounds[v], bounds[v + 1]
        if high - low < 2:
            continue
        for j in range(low, high):
            code = f[by_class[j]]
            seen[j] = code
            count = counts[code]
            total += steps[count]
            counts[code] = count + np.uint32(1)
        for j in range(low, high):
            counts[seen[j]] = 0
    return total


def _codes(name: str, values: Int[np.ndarray, " n"]) -> UInt[np.ndarray, " n"]:
    codes = np.asarray(values)
    if codes.ndim != 1 or not len(codes) or codes.dtype.kind not in "iu":
        raise InputError(f"{name} must be a non-empty array of integer codes, not {codes.dtype} of shape {codes.shape}")
    if codes.min() < 0:
        raise InputError(f"{name} holds the code {codes.min()}; codes must be 0 or larger")
    if int(codes.max()) > max(4 * len(codes), 1 << 16):  # sparse codes: number them anew
        codes = np.unique(codes, return_inverse=True)[1]
    return np.ascontiguousarray(codes, dtype=np.uint32)
