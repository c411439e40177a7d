"""A table read into memory as a whole, for methods that need all of its rows at once."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float

from salience.errors import DataError, InputError, NothingToDo, nearest
from salience.io.tables import TableReader, as_numbers
from salience.io.tally import Tally

MAX_BAD = 0.01  # largest share of unreadable records to put up with


def whole_table(source: Any) -> pa.Table:
    """Read a table into memory.

    Parameters
    ----------
    source : path, or table
        Whatever `TableReader` reads, or a mapping of column name to values. A CSV file's columns become whole numbers,
        numbers or truth values where every value is one; "" is a missing value. Up to 1 % of unreadable records are
        left out, and a warning says so.

    Raises
    ------
    InputError
        The file does not exist, or `source` is nothing of the kind.
    DataError
        The file or more than 1 % of its records cannot be read, or two columns have one name.
    NothingToDo
        It has no rows.
    """
    table, notes = read_whole(source)
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return table


class Records(NamedTuple):
    """A table in memory, with where its rows come from.

    Attributes
    ----------
    table : pa.Table
        Columns of a CSV file as numbers where they are numbers.
    raw : pa.Table
        The same rows with the values as they stand in the file, to write them again.
    ids : pa.Array of str
        "file:row" of every row, as in the `Scores` of a corpus.
    read, bad : int
        Records read, and unreadable ones among them.
    notes : list of str
        What was left out.
    """

    table: pa.Table
    raw: pa.Table
    ids: pa.Array
    read: int
    bad: int
    notes: list[str]


def read_whole(source: Any) -> tuple[pa.Table, list[str]]:
    """As `whole_table`, with what was left out as notes in place of warnings."""
    found = read_records(source)
    return found.table, found.notes


def read_records(source: Any) -> Records:
    """As `whole_table`, with the rows as they stand in the file and their names."""
    if isinstance(source, Mapping):
        try:
            source = pa.table({str(name): pa.array(values, from_pandas=True) for name, values in source.items()})
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise DataError(f"the table cannot be read: {error}") from error
    reader, tally, parts, ids = TableReader(source), Tally(), [], []
    for batch in reader:
        tally.add(batch, 1.0)
        table = batch.table
        parts.append(table.cast(_widest(table.schema)) if batch.source.format == "csv" else table)
        rows = pa.array(batch.rows).cast(pa.large_string())
        name, colon = (pa.scalar(text, pa.large_string()) for text in (batch.source.name, ":"))
        ids.append(pc.binary_join_element_wise(name, rows, colon))
    if tally.bad:
        tally.check(MAX_BAD, "table")
    if not tally.documents:
        raise NothingToDo(f"{source if isinstance(source, str | os.PathLike) else 'the table'} has no rows")
    try:
        raw = pa.concat_tables(parts, promote_options="permissive")
    except pa.ArrowException as error:
        raise DataError(f"the files of the table do not fit together: {error}") from error
    table = raw
    if all(part.format == "csv" for part in reader.sources):
        table = pa.table({name: _typed(raw[name]) for name in raw.column_names})
    notes = []
    if tally.bad:
        file, first = tally.bad[0]
        where = f"the first in {file} at {first.offset}: {first.reason}"
        notes = [f"{len(tally.bad):,} unreadable records were left out, {where}"]
    names = pa.concat_arrays([part.cast(pa.large_string()) for part in ids])
    return Records(table, raw, names, tally.read - tally.blank, len(tally.bad), notes)


def _widest(schema: pa.Schema) -> pa.Schema:
    return pa.schema([(name, pa.large_string()) for name in schema.names])


def _typed(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of a CSV file as whole numbers, numbers or truth values if all of its values are; else as text."""
    column = pc.if_else(pc.equal(pc.utf8_trim_whitespace(column), ""), pa.scalar(None, column.type), column)
    if column.null_count == len(column):
        return pa.chunked_array([pa.nulls(len(column))])
    for kind in (pa.int64(), pa.bool_()):
        try:
            return pc.utf8_trim_whitespace(column).cast(kind)
        except pa.ArrowInvalid:
            continue
    numbers = as_numbers(column)
    return column if numbers is None else pa.chunked_array([pa.array(numbers, from_pandas=True)])


def column_of(table: pa.Table, name: str, what: str = "column") -> pa.ChunkedArray:
    """A column by its name; the nearest names are told where there is none."""
    if name not in table.column_names:
        raise InputError(f"{what} {name!r} is not in the table ({nearest(name, table.column_names)})")
    return table[name]


def is_text(column: pa.ChunkedArray) -> bool:
    """Whether a column holds words rather than numbers."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
                or pa.types.is_decimal(kind) or pa.types.is_null(kind))  # fmt: skip


def numbers_of(table: pa.Table, name: str, what: str = "column") -> Float[np.ndarray, " n"]:
    """A column of numbers as float64, NaN where a value is missing.

    Raises
    ------
    DataError
        It holds text.
    """
    column = column_of(table, name, what)
    if is_text(column):
        example = next((value for value in column.to_pylist() if value is not None), None)
        raise DataError(f"{what} {name!r} holds {example!r}; numbers are needed")
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    return np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False), dtype=np.float64)


def words_of(table: pa.Table, name: str, what: str = "column") -> np.ndarray:
    """A column as strings without blanks around them, None where a value is missing (or NaN).

    Whole numbers come without a decimal point.

    Raises
    ------
    DataError
        It holds lists or other values that are no words.
    """
    column = column_of(table, name, what)
    if pa.types.is_floating(column.type):
        values = column.to_numpy(zero_copy_only=False)
        return np.array([None if v != v else str(int(v)) if float(v).is_integer() else str(v) for v in values], object)
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    try:
        words = pc.utf8_trim_whitespace(pc.cast(column, pa.large_string()))
        return np.array(words.to_pylist(), dtype=object)
    except pa.ArrowException:
        raise DataError(
            f"{what} {name!r} holds values of the kind {column.type}; words or numbers are needed"
        ) from None
