"""Rows of a table with a label, and their columns as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from salience.errors import DataError
from salience.io.whole import is_text, numbers_of, read_whole, words_of

_LEVELS = 30  # of a text column
_CLASSES = 50


@dataclass(frozen=True)
class Encoded:
    """A table as numbers.

    Attributes
    ----------
    rows : (n, M) float
    names : list of str
        ``column`` or ``column=level``.
    notes : list of str
        What was left out or filled in.
    """

    rows: Float[np.ndarray, "n columns"]
    names: list[str]
    notes: list[str]


def labelled(data: Any, label: str) -> tuple[pa.Table, np.ndarray, list[str]]:
    """The rows of a table that have a label, their labels, and notes on what was left out.

    Raises
    ------
    InputError, DataError
        The column does not exist, or has one class or too many.
    """
    table, notes = read_whole(data)
    words = words_of(table, label, "label column")
    known = np.array([word is not None for word in words])
    if not known.all():
        notes.append(f"{int((~known).sum())} rows without a label were left out")
    kinds = len(set(words[known]))
    if not 2 <= kinds <= _CLASSES:
        raise DataError(f"label {label!r} has {kinds:,} different values; 2 to {_CLASSES} classes are needed")
    return table.filter(pa.array(known)), words[known].astype(str), notes


def encode(table: pa.Table, columns: Sequence[str], train: Int[np.ndarray, " t"]) -> Encoded:
    """Turn columns into numbers: text into a column per level, missing numbers into the median.

    Levels and medians are those of the training rows; a level that occurs in others only is none of them.

    Parameters
    ----------
    table : pyarrow Table
    columns : list of str
    train : (t,) int
        Training rows.

    Raises
    ------
    DataError
        Nothing is left.
    """
    parts: list[np.ndarray] = []
    names: list[str] = []
    notes: list[str] = []
    for name in columns:
        if is_text(table[name]):
            values = words_of(table, name)
            levels = sorted({value for value in values[train] if value is not None})
            if len(levels) > _LEVELS:
                notes.append(f"column {name!r} was left out: {len(levels):,} different texts")
                continue
            parts += [(values == level).astype(np.float64) for level in levels]
            names += [f"{name}={level}" for level in levels]
            continue
        numbers = numbers_of(table, name)
        bad = ~np.isfinite(numbers)
        known = numbers[train][~bad[train]]
        if not len(known):
            notes.append(f"column {name!r} was left out: it holds no number")
            continue
        if bad.any():
            notes.append(f"column {name!r}: {int(bad.sum())} missing values became the median")
            numbers = np.where(bad, np.median(known), numbers)
        parts.append(numbers)
        names.append(name)
    if not parts:
        raise DataError("no column is left to work with")
    return Encoded(np.column_stack(parts), names, notes)
