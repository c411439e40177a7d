"""Read a unit of a corpus in batches; every record is delivered, counted as blank, or named as bad."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from salience.errors import DataError, NothingToDo
from salience.io import lines
from salience.io.corpus import Corpus, Source, Unit

BATCH_ROWS = 8192


class Batch(NamedTuple):
    """Some documents of one unit.

    Attributes
    ----------
    source : Source
    rows : (documents,) int64
        Identity of each document within its file: byte offset for JSONL and text, row number otherwise.
    text : Arrow string array, (documents,)
        No nulls, valid UTF-8.
    lines : (bytes, starts, stops) or None
        The raw records of a line format; record i is ``block[starts[i]:stops[i]]``.
    table : pa.Table or None
        All columns (Parquet, tables and CSV; the first two only when read with `whole`).
    blank : int
        Blank lines passed over.
    bad : list of Bad
        Records that could not be read.
    """

    source: Source
    rows: Int[np.ndarray, " documents"]
    text: pa.Array
    lines: tuple[bytes, np.ndarray, np.ndarray] | None
    table: pa.Table | None
    blank: int
    bad: list[lines.Bad]

    def __len__(self) -> int:
        return len(self.rows)


def read(
    corpus: Corpus, unit: Unit, whole: bool = False, rows: Int[np.ndarray, " wanted"] | None = None
) -> Iterator[Batch]:
    """Read one unit.

    Parameters
    ----------
    corpus : Corpus
    unit : Unit
        One of ``corpus.units``.
    whole : bool
        Also read the other columns of Parquet files and tables.
    rows : (wanted,) int64, optional
        Read these documents only (which an earlier reading has named).

    Raises
    ------
    DataError
        The file cannot be read at all (damaged, truncated, vanished).
    """
    try:
        if unit.source.format in ("parquet", "table"):
            yield from _read_rows(corpus, unit, whole, rows)
        else:
            yield from _read_lines(corpus, unit, rows)
    except (pa.ArrowException, OSError, EOFError) as error:
        raise DataError(f"{unit.source.path} cannot be read: {error}") from error


def peek(corpus: Corpus) -> None:
    """Fail early when the first records of a JSONL corpus all lack the text field.

    Raises
    ------
    DataError
        None of them has it; the nearest names are told.
    NothingToDo
        The corpus holds no record.
    """
    for unit in corpus.units:
        for batch in read(corpus, unit):
            if len(batch):
                return
            missing = [bad for bad in batch.bad if bad.reason.startswith("no field")]
            if missing and len(missing) == len(batch.bad):
                raise DataError(f"{unit.source.path}: {missing[0].reason}, nor do the {len(missing)} first records")
            if batch.bad:
                return
    raise NothingToDo(f"nothing to read: {corpus.sources[0].path or corpus.sources[0].name} holds only blank lines")


def _read_lines(corpus: Corpus, unit: Unit, wanted: np.ndarray | None) -> Iterator[Batch]:
    source, kind = unit.source, unit.source.format
    names = lines.csv_header(source)[0] if kind == "csv" else []
    compressed = source.compression is not None
    stop = None if compressed else unit.stop
    with lines.open_bytes(source) as stream:
        splitter = lines.Splitter(stream, 0 if compressed else unit.start, stop, quoted=kind == "csv")
        row = unit.first_row
        for block, offset, ends in splitter:
            starts, stops = lines.trimmed(block, ends)
            if compressed and kind == "csv" and offset + starts[0] < unit.start:
                block, offset, starts, stops = _behind_header(block, offset, starts, stops, unit.start)
            numbers = np.arange(row, row + len(starts)) if kind == "csv" else offset + starts
            row += len(starts)
            if wanted is not None:
                numbers, block, starts, stops = _only(wanted, numbers, block, starts, stops)
            if kind == "jsonl":
                parsed = lines.parse_jsonl(block, starts, stops, corpus.text)
            elif kind == "csv":
                parsed = lines.parse_csv(block, starts, stops, corpus.text, names)
            else:
                parsed = lines.parse_txt(block, starts, stops)
            rows = numbers[parsed.kept]
            bad = [
                lines.Bad(offset + int(starts[i]), reason, block[starts[i] : stops[i]][: 1 << 16])
                for i, reason in parsed.bad
            ]
            raw = block, starts[parsed.kept], stops[parsed.kept]
            yield Batch(source, rows, parsed.text, raw, parsed.table, parsed.blank, bad + splitter.too_long)
            splitter.too_long = []
        if splitter.too_long:
            yield Batch(source, np.empty(0, np.int64), pa.array([], pa.string()), None, None, 0, splitter.too_long)


def _only(wanted, numbers, block, starts, stops):
    """Cut a block down to the wanted records."""
    where = np.flatnonzero(np.isin(numbers, wanted))
    records = [block[starts[i] : stops[i]] for i in where]
    sizes = np.array([len(record) + 1 for record in records], np.int64)
    ends = np.cumsum(sizes)
    return numbers[where], b"".join(record + b"\n" for record in records), ends - sizes, ends - 1


def _behind_header(block, offset, starts, stops, begin):
    """Drop the header from the first block of a compressed CSV file."""
    cut = begin - offset
    keep = starts >= cut
    return block[cut:], begin, starts[keep] - cut, stops[keep] - cut


def _read_rows(corpus: Corpus, unit: Unit, whole: bool, wanted: np.ndarray | None) -> Iterator[Batch]:
    row = unit.first_row
    for table in map(plain_types, _tables(corpus, unit, whole)):
        text = table[corpus.text].combine_chunks()
        if pa.types.is_dictionary(text.type):
            text = text.cast(pa.large_string())
        rows = np.arange(row, row + len(text), dtype=np.int64)
        row += len(text)
        good, bad = _usable(text, rows, corpus.text)
        if wanted is not None:
            good &= np.isin(rows, wanted)
        if not good.all():
            rows, text, table = rows[good], text.filter(pa.array(good)), table.filter(pa.array(good))
        yield Batch(unit.source, rows, text, None, table if whole else None, 0, bad)


def plain_types(table: pa.Table) -> pa.Table:
    """The table without Arrow's view types, which have no kernels to filter and take by."""
    plain = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}
    fields = [field.with_type(plain.get(field.type, field.type)) for field in table.schema]
    schema = pa.schema(fields, table.schema.metadata)
    return table if schema.equals(table.schema) else table.cast(schema)


def _usable(text: pa.Array, rows: np.ndarray, name: str) -> tuple[np.ndarray, list[lines.Bad]]:
    """Mask of the rows that hold valid text, and the others."""
    good = np.array(text.is_valid())
    bad = [lines.Bad(int(row), f"column {name!r} is null", b"") for row in rows[~good]]
    try:
        text.validate(full=True)
    except pa.ArrowInvalid:
        for at, raw in enumerate(text.cast(pa.large_binary()).to_pylist()):
            try:
                (raw or b"").decode("utf-8")
            except UnicodeDecodeError as error:
                good[at] = False
                bad.append(lines.Bad(int(rows[at]), f"invalid UTF-8 at byte {error.start}", raw[: 1 << 16]))
    return good, bad


def _tables(corpus: Corpus, unit: Unit, whole: bool) -> Iterator[pa.Table]:
    source = unit.source
    if source.table is not None:
        part = source.table.slice(unit.start, unit.stop - unit.start)
        part = part if whole else part.select([corpus.text])
        for start in range(0, part.num_rows, BATCH_ROWS):
            yield part.slice(start, BATCH_ROWS)
        return
    with lines.open_parquet(source) as file:
        columns = None if whole else [corpus.text]
        for batch in file.iter_batches(BATCH_ROWS, row_groups=[unit.start], columns=columns, use_threads=False):
            yield pa.Table.from_batches([batch])


def as_json(table: pa.Table, where: str) -> list[bytes]:
    """Rows of a table as lines of JSON.

    Raises
    ------
    DataError
        A column holds something that JSON has no form for, or two columns have one name.
    """
    twice = [name for name, count in Counter(table.column_names).items() if count > 1]
    if twice:
        raise DataError(f"{where} has several columns called {twice[0]!r}, which JSON cannot have")

    def refuse(value: object) -> str:
        if isinstance(value, bytes):
            raise DataError(f"{where} holds bytes, which JSON cannot; write Parquet (an output that ends in .parquet)")
        return str(value)

    try:
        rows = table.to_pylist()
        return [json.dumps(row, ensure_ascii=False, allow_nan=False, default=refuse).encode("utf-8") for row in rows]
    except DataError:
        raise
    except ValueError as error:  # NaN or infinity; bytes that are no UTF-8
        raise DataError(f"{where} holds what JSON cannot: {error}; write the format of the input") from error
