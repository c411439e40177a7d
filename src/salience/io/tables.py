"""Read tables of any size in batches: CSV and Parquet files, and whatever has the Arrow stream protocol.

    reader = TableReader("clicks/*.csv")
    for batch in reader:
        batch.table     # some rows, all columns
        batch.rows      # their numbers within batch.source

Every record of a file is delivered in a batch, counted as blank, or named as bad; `Tally` adds them up. A CSV file's
columns are text as it stands in the file (a missing value is ""); Parquet files and frames keep their types. Memory is
bounded by one block of a file (a few MB), whatever the file's size.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int

from salience.errors import DataError, InputError, NothingToDo, nearest
from salience.io import lines
from salience.io.corpus import Source, find_sources
from salience.io.reader import BATCH_ROWS, plain_types

_UNNAMED_INDEX = re.compile(r"__index_level_\d+__")  # row labels of a pandas frame, which are no column of it


class TableBatch(NamedTuple):
    """Some rows of one source.

    Attributes
    ----------
    source : Source
    rows : (n,) int64
        Number of each row within its source, from 0; blank and bad records are counted too.
    table : pa.Table
        The rows; text columns are valid UTF-8.
    blank : int
        Blank lines passed over.
    bad : list of Bad
        Records that could not be read: byte offset (CSV) or row number, reason, raw bytes.
    """

    source: Source
    rows: Int[np.ndarray, " n"]
    table: pa.Table
    blank: int
    bad: list[lines.Bad]

    def __len__(self) -> int:
        return len(self.rows)


class TableReader:
    """One table in one or several files or frames, read from the top as often as it is iterated.

    Parameters
    ----------
    inputs : str, path, table or a list of them
        Paths, globs, directories and URLs of .csv (also .gz and .zst) and .parquet; any object with the Arrow stream
        protocol (pandas, polars, `datasets.Dataset`, pyarrow). A `pyarrow.RecordBatchReader` can be read once.
    columns : sequence of str, optional
        Read these only, in this order; all by default.

    Attributes
    ----------
    columns : list of str
    sources : list of Source
        In the order in which they are read.

    Raises
    ------
    InputError
        A path that does not exist or is no table; `columns` names one twice.
    DataError
        A file that cannot be read, two columns with one name, a column that is missing (the nearest are told).
    NothingToDo
        No file, or only empty ones.
    """

    def __init__(self, inputs: Any, columns: Sequence[str] | None = None) -> None:
        stream = isinstance(inputs, pa.RecordBatchReader)
        self._stream: pa.RecordBatchReader | None = inputs if stream else None
        self.sources = [Source("stream", "", "stream")] if stream else find_sources(inputs)
        self.sources = [source for source in self.sources if stream or source.size or _rows(source)]
        if not self.sources:
            raise NothingToDo("nothing to read: every input is empty")
        names = [self._names(source) for source in self.sources]
        if columns is not None and len(set(columns)) < len(columns):
            raise InputError(f"columns names {Counter(columns).most_common(1)[0][0]!r} more than once")
        self.columns = list(names[0] if columns is None else columns)
        for source, found in zip(self.sources, names):
            missing = next((name for name in self.columns if name not in found), None)
            if missing is not None:
                raise DataError(f"{_place(source)} has no column {missing!r} ({nearest(missing, found)})")

    @property
    def bytes(self) -> int:
        """Size of all sources on disk (or in memory, for frames)."""
        return sum(source.size for source in self.sources)

    def __iter__(self) -> Iterator[TableBatch]:
        """Yield the rows of all sources, in batches of a few thousand.

        Raises
        ------
        DataError
            A file cannot be read to its end (damaged, truncated, vanished).
        InputError
            A `RecordBatchReader` is read a second time.
        """
        for source in self.sources:
            try:
                yield from self._csv(source) if source.format == "csv" else self._arrow(source)
            except (pa.ArrowException, OSError, EOFError) as error:
                raise DataError(f"{_place(source)} cannot be read: {error}") from error

    def _names(self, source: Source) -> list[str]:
        try:
            if source.format == "csv":
                names = lines.csv_header(source)[0]
            elif source.format == "parquet":
                with lines.open_parquet(source) as file:
                    names = file.schema_arrow.names
            elif source.format == "table":
                names = source.table.schema.names  # type: ignore[union-attr]
                names = [name for name in names if not _UNNAMED_INDEX.fullmatch(name)]
            elif source.format == "stream":
                names = self._stream.schema.names  # type: ignore[union-attr]
            else:
                raise InputError(f"input {source.path} is no table; known endings: .csv, .csv.gz, .csv.zst, .parquet")
        except (pa.ArrowException, OSError, EOFError) as error:
            raise DataError(f"{_place(source)} cannot be read: {error}") from error
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise DataError(f"{_place(source)} has {names.count(twice[0])} columns called {twice[0]!r}")
        return names

    def _csv(self, source: Source) -> Iterator[TableBatch]:
        names, begin = lines.csv_header(source)
        row = 0
        with lines.open_bytes(source) as stream:
            splitter = lines.Splitter(stream, 0, None, quoted=True)
            for block, offset, ends in splitter:
                starts, stops = lines.trimmed(block, ends)
                if offset + starts[0] < begin:  # the header
                    block, starts, stops = block[begin - offset :], starts[1:] - ends[0], stops[1:] - ends[0]
                    offset = begin
                parsed = lines.parse_csv(block, starts, stops, names[0], names)
                rows = row + parsed.kept
                row += len(starts) + len(splitter.too_long)
                bad = [
                    lines.Bad(offset + int(starts[i]), reason, block[starts[i] : stops[i]][: 1 << 16])
                    for i, reason in parsed.bad
                ]
                table = parsed.table.select(self.columns)  # type: ignore[union-attr]
                yield TableBatch(source, rows, table, parsed.blank, bad + splitter.too_long)
                splitter.too_long = []
            if splitter.too_long:
                empty = pa.table({name: pa.array([], pa.string()) for name in self.columns})
                yield TableBatch(source, np.empty(0, np.int64), empty, 0, splitter.too_long)

    def _arrow(self, source: Source) -> Iterator[TableBatch]:
        row = 0
        for table in map(plain_types, self._tables(source)):
            rows = np.arange(row, row + table.num_rows, dtype=np.int64)
            row += table.num_rows
            good, bad = _valid(table, rows)
            if bad:
                rows, table = rows[good], table.filter(pa.array(good))
            yield TableBatch(source, rows, table, 0, bad)

    def _tables(self, source: Source) -> Iterator[pa.Table]:
        if source.format == "parquet":
            with lines.open_parquet(source) as file:
                for batch in file.iter_batches(BATCH_ROWS, columns=self.columns, use_threads=False):
                    yield pa.Table.from_batches([batch]).select(self.columns)
        elif source.table is not None:
            for start in range(0, source.table.num_rows, BATCH_ROWS):
                yield source.table.slice(start, BATCH_ROWS).select(self.columns)
        elif self._stream is None:
            raise InputError("a RecordBatchReader can be read once; pass a table or a file to read it again")
        else:
            stream, self._stream = self._stream, None
            for batch in stream:
                for start in range(0, batch.num_rows, BATCH_ROWS):
                    yield pa.Table.from_batches([batch.slice(start, BATCH_ROWS)]).select(self.columns)


def as_numbers(column: pa.ChunkedArray | pa.Array, missing: Collection[str] = ("",)) -> Float[np.ndarray, " n"] | None:
    """The values of a column as numbers, or None if one of them is none.

    Parameters
    ----------
    column : Arrow array, (n,)
        Numbers, truth values, or text that may hold numbers.
    missing : collection of str
        Texts that stand for a missing value.

    Returns
    -------
    (n,) float64 or None
        NaN where a value is missing (or null). None too where every value is missing.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        column = pc.utf8_trim_whitespace(column)
        gone = pc.is_in(column, pa.array(list(missing), column.type))
        column = pc.if_else(gone, pa.scalar(None, column.type), column)
    elif not (pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)
              or pa.types.is_decimal(kind)):  # fmt: skip
        return None
    try:
        numbers = column.cast(pa.float64(), safe=False)
    except pa.ArrowInvalid:
        return None
    if numbers.null_count == len(numbers):
        return None
    chunks = numbers.chunks if isinstance(numbers, pa.ChunkedArray) else [numbers]
    return np.concatenate([chunk.to_numpy(zero_copy_only=False) for chunk in chunks])


def _valid(table: pa.Table, rows: Int[np.ndarray, " n"]) -> tuple[np.ndarray, list[lines.Bad]]:
    """Mask of the rows whose text is valid UTF-8, and the others."""
    good, bad = np.ones(len(rows), dtype=bool), []
    for name, column in zip(table.column_names, table.columns):
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            continue
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            for at, raw in enumerate(column.cast(pa.large_binary()).to_pylist()):
                try:
                    (raw or b"").decode("utf-8")
                except UnicodeDecodeError as error:
                    if good[at]:
                        reason = f"invalid UTF-8 at byte {error.start} of column {name!r}"
                        bad.append(lines.Bad(int(rows[at]), reason, raw[: 1 << 16]))
                    good[at] = False
    return good, bad


def _rows(source: Source) -> int:
    return 0 if source.table is None else source.table.num_rows


def _place(source: Source) -> str:
    return source.path or source.name
