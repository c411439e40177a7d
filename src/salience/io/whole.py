"""A table read into memory as a whole, for methods that need all of its rows at once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from jaxtyping import Float

from salience.errors import DataError, InputError, NothingToDo, nearest


def whole_table(source: Any) -> pa.Table:
    """Read a table into memory.

    Parameters
    ----------
    source : path, or table
        A CSV file (with a header, also .gz and .zst), a Parquet file, a mapping of column name to values, or anything
        with the Arrow stream protocol: pandas and polars frames, Arrow tables, `datasets`.

    Raises
    ------
    InputError
        The file does not exist, or `source` is nothing of the kind.
    DataError
        The file cannot be read, or two columns have one name.
    NothingToDo
        It has no rows.
    """
    table = _read(Path(source)) if isinstance(source, str | os.PathLike) else _arrow(source)
    twice = {name for name in table.column_names if table.column_names.count(name) > 1}
    if twice:
        raise DataError(f"column {sorted(twice)[0]!r} occurs more than once")
    if not table.num_rows:
        raise NothingToDo(f"{source if isinstance(source, str | os.PathLike) else 'the table'} has no rows")
    return table


def _read(path: Path) -> pa.Table:
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    endings = [ending.lower() for ending in path.suffixes]
    try:
        if endings[-1:] == [".parquet"]:
            return pq.read_table(path, page_checksum_verification=True, partitioning=None)
        if ".csv" in endings[-2:]:
            options = pa.csv.ConvertOptions(strings_can_be_null=True)
            return pa.csv.read_csv(path, convert_options=options)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    raise InputError(f"{path} has an unknown ending; use .csv, .csv.gz or .parquet")


def _arrow(source: Any) -> pa.Table:
    if isinstance(source, pa.Table):
        return source
    try:
        if isinstance(source, Mapping):
            return pa.table({str(name): pa.array(values, from_pandas=True) for name, values in source.items()})
        if hasattr(source, "__arrow_c_stream__"):
            table = pa.table(source)
            return table.drop_columns([n for n in table.column_names if n.startswith("__index_level_")])
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DataError(f"the table cannot be read: {error}") from error
    raise InputError(f"a table is a file, a mapping of columns or a data frame, not a {type(source).__name__}")


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
    """A column as strings, None where a value is missing (or NaN); whole numbers come without a decimal point."""
    column = column_of(table, name, what)
    if pa.types.is_floating(column.type):
        values = column.to_numpy(zero_copy_only=False)
        return np.array([None if v != v else str(int(v)) if float(v).is_integer() else str(v) for v in values], object)
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    return np.array(pc.cast(column, pa.large_string()).to_pylist(), dtype=object)
