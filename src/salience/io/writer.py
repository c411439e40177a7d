"""The one writer of records: chosen ones as they were read, unreadable ones with the reason."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool

from salience.errors import DataError, InputError
from salience.io.corpus import COMPRESSIONS, FORMATS, Corpus, Source
from salience.io.lines import Bad, csv_header, open_bytes
from salience.io.reader import Batch, as_json

_GROUP_BYTES = 64 << 20


class RecordWriter:
    """Write chosen records of a corpus into one file: byte for byte in the input's own format, or as JSON lines.

    Parameters
    ----------
    path : path
        Temporary file to write; `name` is the final name, whose ending says the format.
    corpus : Corpus
        Where the records come from.

    Raises
    ------
    InputError
        The ending is unknown, or neither .jsonl nor the format of every input.
    DataError
        CSV or Parquet inputs whose columns differ.
    """

    def __init__(self, path: Path, name: str, corpus: Corpus) -> None:
        suffixes = Path(name).suffixes
        compression = COMPRESSIONS.get(suffixes[-1].lower()) if suffixes else None
        ending = suffixes[-2] if compression and len(suffixes) > 1 else (suffixes or [""])[-1]
        self.format = FORMATS.get(ending.lower(), "")
        if not self.format or (compression and self.format == "parquet"):
            raise InputError(f"output {name} has an unknown ending; use .jsonl, .csv, .txt or .parquet")
        rows = {"table": "parquet"}
        others = sorted(
            {source.format for source in corpus.sources if rows.get(source.format, source.format) != self.format}
        )
        if self.format != "jsonl" and others:
            raise InputError(
                f"output {name} cannot take {', '.join(others)} records; use an output that ends in .jsonl"
            )
        self._path, self._name = path, name
        self._parquet: Any = None  # a ParquetWriter from the first table on
        self._waiting: list[pa.Table] = []  # for the next row group, of
        self._held = 0  # bytes
        self._stream: Any = None  # of a line format
        if self.format != "parquet":
            raw = pa.OSFile(str(path), "wb")
            self._stream = pa.CompressedOutputStream(raw, compression) if compression else raw
        if self.format == "csv":
            self._stream.write(_common_header([source for source in corpus.sources if source.size]))

    def write(self, records: list[bytes] | pa.Table) -> int:
        """Append what `records_of` returned; gives the number of records."""
        if isinstance(records, list):
            if records:
                self._stream.write(b"\n".join(records) + b"\n")
            return len(records)
        if self._parquet is None:
            self._parquet = pq.ParquetWriter(self._path, records.schema, write_page_checksum=True)
        try:
            self._waiting.append(records.cast(self._parquet.schema))
        except (pa.ArrowException, ValueError) as error:
            raise DataError(f"inputs have different columns, which one Parquet file cannot hold: {error}") from error
        self._held += records.nbytes
        if self._held >= _GROUP_BYTES:
            self._write_group()
        return records.num_rows

    def _write_group(self) -> None:
        if any(table.num_rows for table in self._waiting):
            self._parquet.write_table(pa.concat_tables(self._waiting))
        self._waiting, self._held = [], 0

    def close(self) -> None:
        """Finish the file."""
        if self._parquet is not None:
            self._write_group()
            self._parquet.close()
        if self._stream is not None:
            self._stream.close()


def records_of(batch: Batch, mask: Bool[np.ndarray, " documents"], format: str) -> list[bytes] | pa.Table:
    """The records of a batch (read with ``whole=True``) where `mask` holds, ready for a `RecordWriter` of `format`."""
    where = mask.nonzero()[0]
    if batch.lines is not None and format == batch.source.format:
        block, starts, stops = batch.lines
        return [block[start:stop] for start, stop in zip(starts[where].tolist(), stops[where].tolist())]
    table = batch.table if batch.table is not None else pa.table({"text": batch.text})
    table = table.take(pa.array(where))
    return table if format == "parquet" else as_json(table, batch.source.path or batch.source.name)


def _common_header(sources: Sequence[Source]) -> bytes:
    headers = {tuple(csv_header(source)[0]): source for source in sources}
    if len(headers) > 1:
        first, second = list(headers.values())[:2]
        raise DataError(f"{first.path} and {second.path} have different columns; use an output that ends in .jsonl")
    with open_bytes(sources[0]) as stream:
        return stream.read(csv_header(sources[0])[1]).rstrip(b"\r\n") + b"\n"


def write_quarantine(path: Path, bad: Iterable[tuple[str, Bad]]) -> None:
    """Write the unreadable records as JSON lines: file, offset or row, reason, raw bytes."""
    with open(path, "w", encoding="utf-8") as file:
        for file_name, record in bad:
            line: dict[str, Any] = {"file": file_name, "offset": record.offset, "reason": record.reason}
            try:
                line["raw"] = record.raw.decode("utf-8")
            except UnicodeDecodeError:
                line["raw_base64"] = base64.b64encode(record.raw).decode("ascii")
            file.write(json.dumps(line) + "\n")
