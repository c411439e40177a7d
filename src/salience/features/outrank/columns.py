"""Columns as category codes: what a table holds, in quantile bins, combined, and as controls that mean nothing."""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int, UInt

from salience.errors import DataError
from salience.io import as_numbers

CONTROL = "CONTROL-"
TARGET_CONTROL, VOLUME_CONTROL = CONTROL + "target", CONTROL + "volume"
_RANDOM = {"binary": 2, "card100": 100, "card2k": 2_000, "card10k": 10_000, "card50k": 50_000}
CONTROLS = (
    CONTROL + "constant0", CONTROL + "gaussian", CONTROL + "uniform", *(f"{CONTROL}random-{kind}" for kind in _RANDOM),
    CONTROL + "int-sequence", VOLUME_CONTROL, TARGET_CONTROL,
)  # fmt: skip
NOISE = tuple(name for name in CONTROLS if name not in (TARGET_CONTROL, VOLUME_CONTROL))


class Coded(NamedTuple):
    """A column as codes.

    Attributes
    ----------
    codes : (n,) uint32
        Position of each row's value in `values`.
    values : Arrow array, (values,)
        Distinct values; a null is one of them.
    counts : (values,) int64
        How often each occurs; 0 for some values of a column of integers.
    """

    codes: UInt[np.ndarray, " n"]
    values: pa.Array
    counts: Int[np.ndarray, " values"]


def encode(name: str, column: pa.ChunkedArray) -> Coded:
    """Give every distinct value of a column a code; a null is a value of its own.

    Raises
    ------
    DataError
        The column holds lists or other nested values.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if pa.types.is_null(kind):
        return Coded(np.zeros(len(column), np.uint32), pa.nulls(1), np.array([len(column)]))
    if pa.types.is_integer(kind) and not column.null_count:
        numbers = column.to_numpy()
        low, high = int(numbers.min()), int(numbers.max())
        if high - low < 2 * len(numbers):  # dense: the value is its code
            codes, counts = _offsets(numbers, numbers.dtype.type(low), high - low + 1)
            # In the column's own type, whose wrapping round is right here: low + 200 may not fit it, the sum does.
            values = numbers.dtype.type(low) + np.arange(high - low + 1).astype(numbers.dtype)
            return Coded(codes, pa.array(values), counts)
    if pa.types.is_string(kind) and column.nbytes > 1 << 30:
        column = column.cast(pa.large_string())  # more than 2 GiB do not fit into one array of strings
    try:
        found = column.combine_chunks().dictionary_encode(null_encoding="encode")
    except pa.ArrowNotImplementedError:
        raise DataError(
            f"column {name!r} holds {kind}, not one value a row; leave it out or turn it into text"
        ) from None
    codes = found.indices.to_numpy(zero_copy_only=False).astype(np.uint32)
    return Coded(codes, found.dictionary, np.bincount(codes, minlength=len(found.dictionary)))


@numba.njit(nogil=True, cache=True)
def _offsets(numbers, low, size):
    codes = np.empty(len(numbers), np.uint32)
    counts = np.zeros(size, np.int64)
    for row in range(len(numbers)):
        code = np.uint32(numbers[row] - low)
        codes[row] = code
        counts[code] += 1
    return codes, counts


def as_text(values: pa.Array) -> pa.Array:
    """Distinct values as large strings (bytes stay bytes), nulls kept."""
    if pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type):
        return values.cast(pa.large_binary())
    return values.cast(pa.large_string())


def trimmed(values: pa.Array, text: pa.Array) -> pa.Array:
    """The texts without blanks around them, where the values are texts at all."""
    blanks = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
    return pc.utf8_trim_whitespace(text) if blanks else text


def is_missing(values: pa.Array, text: pa.Array, missing: tuple[str, ...]) -> np.ndarray:
    """Which distinct values stand for a missing one: null, NaN, or one of the given texts, with or without blanks."""
    symbols = pa.array([symbol.strip().encode() for symbol in missing], pa.large_binary()).cast(text.type)
    gone = pc.or_(pc.is_null(values, nan_is_null=True), pc.is_in(trimmed(values, text), symbols))
    return gone.to_numpy(zero_copy_only=False)


class Bins:
    """Quantile bins of a numeric column with many values, fixed on the first rows that are seen.

    Parameters
    ----------
    coded : Coded
    bins : int
    missing : tuple of str
        Texts that stand for a missing value, which gets a bin of its own.

    Attributes
    ----------
    edges : (bins - 1,) float64 or None
        None where the column is not numeric, or has no more than `bins` distinct values; it is then left as it is.
    """

    def __init__(self, coded: Coded, bins: int, missing: tuple[str, ...]) -> None:
        self._missing, self.edges = missing, None
        numbers = self._numbers(coded)
        if numbers is not None:
            known = np.isfinite(numbers) & (coded.counts > 0)
            if known.sum() > bins:
                everything = np.repeat(numbers[known], coded.counts[known])
                self.edges = np.unique(np.quantile(everything, np.arange(1, bins) / bins))

    def __call__(self, coded: Coded) -> Coded:
        """The column in bins: codes of bins, the last one that of missing values (and of text, if any comes later)."""
        if self.edges is None:
            return coded
        numbers = self._numbers(coded)
        last = len(self.edges) + 1
        if numbers is None:
            bin_of = np.full(len(coded.values), last, np.uint32)
        else:
            bin_of = np.searchsorted(self.edges, numbers, side="right").astype(np.uint32)
            bin_of[np.isnan(numbers)] = last
        codes = bin_of[coded.codes]
        return Coded(codes, pa.array(np.arange(last + 1)), np.bincount(codes, minlength=last + 1))

    def _numbers(self, coded: Coded) -> Float[np.ndarray, " values"] | None:
        return as_numbers(coded.values, self._missing)


def combine(
    first: UInt[np.ndarray, " n"], cardinality: int, second: UInt[np.ndarray, " n"], other: int
) -> tuple[UInt[np.ndarray, " n"], int]:
    """Codes of the pairs of values of two columns with codes below `cardinality` and `other`, and what they are below.

    Pairs are told apart by both values. (The reference joins their texts, so that "1","12" and "11","2" are one.)
    """
    n = len(first)
    if cardinality * other <= 2 * n:
        return first * np.uint32(other) + second, cardinality * other
    return _numbered(first, second, 1 << int(2 * n - 1).bit_length())


@numba.njit(nogil=True, cache=True)
def _numbered(first, second, size):
    """Number pairs in the order of their first appearance, by open addressing."""
    places = np.zeros(size, np.uint64)  # the pair; 0 is empty, so that pairs are kept plus one
    numbers = np.zeros(size, np.uint32)
    codes = np.empty(len(first), np.uint32)
    last, used = np.uint64(size - 1), np.uint32(0)
    for row in range(len(first)):
        pair = (np.uint64(first[row]) << np.uint64(32) | np.uint64(second[row])) + np.uint64(1)
        h = (pair ^ (pair >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        place = (h ^ (h >> np.uint64(32))) & last
        while places[place] != np.uint64(0) and places[place] != pair:
            place = (place + np.uint64(1)) & last
        if places[place] == np.uint64(0):
            places[place] = pair
            numbers[place] = used
            used += np.uint32(1)
        codes[row] = numbers[place]
    return codes, np.int64(used)


def controls(rng: np.random.Generator, columns: list[Coded], label: Coded) -> list[tuple[UInt[np.ndarray, " n"], int]]:
    """The columns `CONTROLS`, as codes and what they stay below: noise of several cardinalities, and the label itself.

    No two rows share a Gaussian, a uniform or a running number; all three look alike to any measure of categories. The
    volume is the whole row as one value: noise too, unless equal rows repeat with their label.
    """
    n = len(label.codes)
    unique = np.arange(n, dtype=np.uint32)
    noise = [(rng.integers(0, size, n, dtype=np.uint32), size) for size in _RANDOM.values()]
    whole, size = columns[0].codes, len(columns[0].values)
    for column in columns[1:]:
        if size < n:  # else no two rows are alike any more
            whole, size = combine(whole, size, column.codes, len(column.values))
    return [
        (np.zeros(n, np.uint32), 1), (unique, n), (unique, n), *noise, (unique, n), (whole, size),
        (label.codes, len(label.values)),
    ]  # fmt: skip
