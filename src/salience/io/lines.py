"""Line formats (JSONL, CSV, plain text): our own record splitter, block parsing, and a per-record fall-back.

A block of whole records is parsed at once by pyarrow. Only if that fails, or if its rows cannot be matched one to one
with the records, is every record of the block parsed on its own, so that the bad ones can be named.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numba
import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq
from jaxtyping import Int

from salience.errors import DataError, nearest
from salience.io.json_texts import json_texts
from salience.io.remote import open_url

if TYPE_CHECKING:
    from salience.io.corpus import Source

BLOCK_BYTES = 4 << 20
MAX_RECORD_BYTES = 32 << 20
_BOM = b"\xef\xbb\xbf"
_HEAD_BYTES = 4096
_FIELD, _TEXT, _QUOTED, _CLOSED = range(4)  # at a CSV field's start, in it, in its quotes, behind them


class Bad(NamedTuple):
    """A record that cannot be used: byte offset, why, and its raw bytes (the first 64 KiB of them)."""

    offset: int
    reason: str
    raw: bytes


class Parsed(NamedTuple):
    """The records of a block: which are good (`kept`), their texts, all their columns, and the others.

    `table` holds all columns of the good records where the format has columns (CSV), else None.
    """

    kept: Int[np.ndarray, " good"]
    text: pa.Array
    table: pa.Table | None
    blank: int
    bad: list[tuple[int, str]]


def check_column(where: str, names: Sequence[str], text: str) -> None:
    """Raise `DataError` naming the nearest columns when `text` is not one of `names`."""
    if text not in names:
        raise DataError(f"{where} has no column {text!r} ({nearest(text, names)})")
    if list(names).count(text) > 1:
        raise DataError(f"{where} has {list(names).count(text)} columns called {text!r}")


def open_bytes(source: Source) -> BinaryIO:
    """Open a file for reading its decompressed bytes."""
    if source.compression is None:
        return open_url(source.path, source.version) if source.is_remote else open(source.path, "rb")
    file = open_url(source.path, source.version) if source.is_remote else pa.OSFile(source.path)
    return pa.CompressedInputStream(file, source.compression)


def open_parquet(source: Source) -> pq.ParquetFile:
    """Open a Parquet file; the checksums of its pages are compared as they are read."""
    file = open_url(source.path, source.version) if source.is_remote else source.path
    return pq.ParquetFile(file, page_checksum_verification=True)


# --- splitting ----------------------------------------------------------------------------------------------


def _record_ends(block, quoted, state):
    """Positions one past each newline that ends a record, and the state behind the last byte."""
    if quoted and (state == _QUOTED or 34 in block):
        return _csv_ends(block, state)
    return np.flatnonzero(block == 10) + 1, state


@numba.njit(nogil=True, cache=True)
def _csv_ends(block, state):
    """As in RFC 4180 a quote opens a field only as its first byte; elsewhere it is text."""
    ends = np.empty(len(block), np.int64)
    found = 0
    for at in range(len(block)):
        byte = block[at]
        if byte == 10 and state != _QUOTED:
            ends[found] = at + 1
            found += 1
            state = _FIELD
        elif state == _QUOTED:
            state = _CLOSED if byte == 34 else _QUOTED
        elif byte == 44:
            state = _FIELD
        elif byte == 34 and state != _TEXT:
            state = _QUOTED  # opens a field, or is the second of a doubled quote
        else:
            state = _TEXT
    return ends[:found].copy(), state


class Splitter:
    """Cut a stream into blocks of whole records, those that begin in ``[start, stop)``.

    Parameters
    ----------
    stream : binary file
        Positioned at the beginning of the decompressed file.
    quoted : bool
        Whether a newline inside double quotes belongs to the record (CSV).
    """

    def __init__(self, stream: BinaryIO, start: int, stop: int | None, quoted: bool) -> None:
        self._stream, self._stop, self._quoted = stream, stop, quoted
        self._position, self._rest = start, b""
        self.too_long: list[Bad] = []
        if start > 0 and quoted:
            stream.seek(start)  # CSV pieces are cut at records
        elif start > 0:
            stream.seek(start - 1)  # the record that straddles the start belongs to the unit before
            self._position = start - 1
            self._skip_record()

    def __iter__(self) -> Iterator[tuple[bytes, int, np.ndarray]]:
        """Yield (block, its offset in the file, ends of its records)."""
        while self._stop is None or self._position < self._stop:
            chunk = self._stream.read(BLOCK_BYTES)
            block = self._rest + chunk
            if self._position == 0 and block.startswith(_BOM):
                block, self._position = block[len(_BOM) :], len(_BOM)
            if not block:
                return
            self._rest = block
            ends, state = _record_ends(np.frombuffer(block, np.uint8), self._quoted, _FIELD)
            if not chunk and (not len(ends) or ends[-1] < len(block)):
                self._check_closed(state, self._position + (int(ends[-1]) if len(ends) else 0))
                ends = np.append(ends, len(block))  # the last record of a file needs no newline
            if not len(ends):
                if len(block) > MAX_RECORD_BYTES:
                    self._set_aside(self._position, block)
                    self._skip_record()
                continue
            offset = self._position
            if self._stop is not None:
                begins = offset + np.concatenate([[0], ends[:-1]])
                ends = ends[: np.searchsorted(begins, self._stop)]
            self._rest = block[ends[-1] :]
            self._position = offset + int(ends[-1])
            yield from self._fitting(block, offset, ends)

    def _fitting(self, block: bytes, offset: int, ends: np.ndarray) -> Iterator[tuple[bytes, int, np.ndarray]]:
        """The block without the records that are too long, which are set aside."""
        starts = np.concatenate([[0], ends[:-1]])
        first = 0
        for at in (*np.flatnonzero(ends - starts > MAX_RECORD_BYTES).tolist(), len(ends)):
            if first < at:
                begin = int(starts[first])
                yield block[begin : ends[at - 1]], offset + begin, ends[first:at] - begin
            if at < len(ends):
                self._set_aside(offset + int(starts[at]), block[starts[at] : ends[at]])
            first = at + 1

    def _set_aside(self, offset: int, record: bytes) -> None:
        self.too_long.append(Bad(offset, f"longer than {MAX_RECORD_BYTES:,} bytes", record[:_HEAD_BYTES]))

    def _check_closed(self, state: int, offset: int) -> None:
        """A quote that stays open swallows all that follows: no count of bad records would be true."""
        if state == _QUOTED:
            raise EOFError(f"a quote in the record at byte {offset} is never closed (is the file cut short?)")

    def _skip_record(self) -> None:
        """Move behind the end of the current record, keeping no more than a block of it in memory."""
        block, state, begin = self._rest or self._stream.read(BLOCK_BYTES), _FIELD, self._position
        self._rest = b""
        while block:
            ends, state = _record_ends(np.frombuffer(block, np.uint8), self._quoted, state)
            if len(ends):
                self._position += int(ends[0])
                self._rest = block[ends[0] :]
                return
            self._position += len(block)
            if self._stop is not None and self._position >= self._stop:
                return
            block = self._stream.read(BLOCK_BYTES)
        self._check_closed(state, begin)


def trimmed(block: bytes, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Starts and stops of the records of a block without their line ends."""
    data = np.frombuffer(block, np.uint8)
    starts = np.concatenate([[0], ends[:-1]])
    stops = ends.copy()
    for byte in (10, 13):
        stops -= (stops > starts) & (data[np.maximum(stops - 1, 0)] == byte)
    return starts, stops


# --- parsing ------------------------------------------------------------------------------------------------


def parse_jsonl(block: bytes, starts: np.ndarray, stops: np.ndarray, text: str) -> Parsed:
    """Read one string field of every line of JSON."""
    data = np.frombuffer(block, np.uint8)
    full = np.flatnonzero(stops > starts)
    # Every record begins with { and ends with }, and Arrow finds as many rows: then row i is record i.
    if len(full) and (data[starts[full]] == 123).all() and (data[stops[full] - 1] == 125).all() and _is_utf8(block):
        column = json_texts(block, starts[full], stops[full], text)
        if column is None:
            column = _json_column(block, text)
        if column is not None and len(column) == len(full):
            index, bad = full, []
            if column.null_count:
                empty = np.asarray(column.is_null())
                bad = [(int(i), _json_text(block[starts[i] : stops[i]], text)[1]) for i in full[empty]]
                index, column = full[~empty], column.drop_null()
            return Parsed(index, column, None, len(starts) - len(full), bad)
    return _one_by_one(block, starts, stops, lambda raw: _json_text(raw, text))


def _json_column(block: bytes, text: str) -> pa.Array | None:
    try:
        table = pa_json.read_json(
            pa.BufferReader(block),
            read_options=pa_json.ReadOptions(use_threads=False, block_size=len(block) + 1),
            parse_options=pa_json.ParseOptions(
                explicit_schema=pa.schema([(text, pa.string())]), unexpected_field_behavior="ignore"
            ),
        )
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None
    return table[text].combine_chunks()


def _json_text(raw: bytes, text: str) -> tuple[str | None, str]:
    """The text of one JSON line, or None and why there is none."""
    if raw.startswith(_BOM):
        return None, "starts with a byte-order mark"
    pairs: list[tuple[str, object]] = []

    def remember(found: list[tuple[str, object]]) -> dict[str, object]:
        pairs[:] = found  # the outermost object is closed last
        return dict(found)

    try:
        record = json.loads(raw.decode("utf-8"), object_pairs_hook=remember, parse_int=float)  # any number of digits
    except UnicodeDecodeError as error:
        return None, f"invalid UTF-8 at byte {error.start}"
    except RecursionError:  # Arrow parses any depth, and whether a record is good must not depend on its block
        column = _json_column(raw, text)
        value = column[0].as_py() if column is not None and len(column) == 1 else None
        return value, "nested too deeply" if value is None else ""
    except ValueError as error:
        return None, f"not JSON: {error}"
    if not isinstance(record, dict):
        return None, f"a JSON {_kind(record)}, not an object"
    if text not in record:
        return None, f"no field {text!r} ({nearest(text, record)})"
    if Counter(name for name, _ in pairs)[text] > 1:
        return None, f"field {text!r} appears twice"
    value = record[text]
    if not isinstance(value, str):
        return None, f"field {text!r} holds {_kind(value)}, not text"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        return None, f"lone surrogate in field {text!r} at character {error.start}"
    return value, ""


def _kind(value: object) -> str:
    names = {dict: "object", list: "array", bool: "true or false", int: "number", float: "number", str: "string"}
    return names.get(type(value), "null")


def parse_txt(block: bytes, starts: np.ndarray, stops: np.ndarray) -> Parsed:
    """Every line is a document."""

    def decode(raw: bytes) -> tuple[str | None, str]:
        try:
            return raw.decode("utf-8"), ""
        except UnicodeDecodeError as error:
            return None, f"invalid UTF-8 at byte {error.start}"

    return _one_by_one(block, starts, stops, decode)


def parse_csv(block: bytes, starts: np.ndarray, stops: np.ndarray, text: str, names: list[str]) -> Parsed:
    """Read CSV records as strings, all columns of them."""
    full = np.flatnonzero(stops > starts)
    # Arrow's rows are our records, but for lines of white space, and lone carriage returns, which end its rows.
    plain = len(full) and (np.frombuffer(block, np.uint8)[starts[full]] > 32).all()
    if plain and (b"\r" not in block or block.count(b"\r") == block.count(b"\r\n")):
        table = _csv_table(block, names)
        if table is not None and table.num_rows == len(full):
            column = table[text].combine_chunks()
            return Parsed(full, column, table, len(starts) - len(full), [])
    rows: list[list[str]] = []
    position = names.index(text)

    def one(raw: bytes) -> tuple[str | None, str]:
        try:
            found = list(csv.reader(io.StringIO(raw.decode("utf-8"), newline="")))  # as lenient as Arrow is
        except UnicodeDecodeError as error:
            return None, f"invalid UTF-8 at byte {error.start}"
        except csv.Error as error:
            return None, f"not CSV: {error}"
        if len(found) != 1:
            return None, f"{len(found)} rows in one record"
        if len(found[0]) != len(names):
            return None, f"{len(found[0])} fields where the header has {len(names)}"
        rows.append(found[0])
        return found[0][position], ""

    csv.field_size_limit(MAX_RECORD_BYTES)
    parsed = _one_by_one(block, starts, stops, one)
    columns = [pa.array([row[i] for row in rows], pa.string()) for i in range(len(names))]
    return parsed._replace(table=pa.table(columns, names=names))


def _csv_table(block: bytes, names: list[str]) -> pa.Table | None:
    try:
        return pa_csv.read_csv(
            pa.BufferReader(block),
            read_options=pa_csv.ReadOptions(column_names=names, use_threads=False, block_size=len(block) + 1),
            parse_options=pa_csv.ParseOptions(newlines_in_values=True),
            convert_options=pa_csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False
            ),
        )
    except pa.ArrowInvalid:
        return None


def _one_by_one(block, starts, stops, parse) -> Parsed:
    index, texts, bad, blank = [], [], [], 0
    for record, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist())):
        raw = block[start:stop]
        if not raw.strip():
            blank += 1
            continue
        text, reason = parse(raw)
        if text is None:
            bad.append((record, reason))
        else:
            index.append(record)
            texts.append(text)
    return Parsed(np.array(index, np.int64), pa.array(texts, pa.large_string()), None, blank, bad)


def _is_utf8(block: bytes) -> bool:
    offsets = pa.py_buffer(np.array([0, len(block)], np.int64))
    try:
        pa.Array.from_buffers(pa.large_string(), 1, [None, offsets, pa.py_buffer(block)]).validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


# --- CSV headers and pieces ---------------------------------------------------------------------------------


def csv_header(source: Source) -> tuple[list[str], int]:
    """Column names of a CSV file, and the byte at which its first record begins."""
    with open_bytes(source) as stream:
        for block, offset, ends in Splitter(stream, 0, None, quoted=True):
            try:
                line = block[: ends[0]].decode("utf-8")
                rows = list(csv.reader(io.StringIO(line, newline=""), strict=True))
            except (UnicodeDecodeError, csv.Error) as error:
                raise DataError(f"{source.path} has an unreadable header: {error}") from error
            if not rows or not any(rows[0]):
                raise DataError(f"{source.path} begins with a blank line where the column names should stand")
            return rows[0], offset + int(ends[0])
    raise DataError(f"{source.path} has no header")


def csv_pieces(source: Source, text: str, unit_bytes: int) -> list[tuple[int, int, int, int]]:
    """Cut a CSV file at records: (start, stop, number of the first row, bytes) of every piece.

    A quoted newline cannot be told from a record's end without reading from the top, so this reads the file once.
    """
    names, begin = csv_header(source)
    check_column(source.path, names, text)
    if source.compression:
        return [(begin, -1, 0, source.size)]
    pieces: list[tuple[int, int, int, int]] = []
    start, row, row_at_start = begin, 0, 0
    with open_bytes(source) as stream:
        for _, offset, ends in Splitter(stream, begin, None, quoted=True):
            row += len(ends)
            stop = offset + int(ends[-1])
            if stop - start >= unit_bytes:
                pieces.append((start, stop, row_at_start, stop - start))
                start, row_at_start = stop, row
    if start < source.size:
        pieces.append((start, source.size, row_at_start, source.size - start))
    return pieces
