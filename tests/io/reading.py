"""Read corpora and write their files: helpers of the reader's tests."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from salience.io import Corpus, read


class Found(NamedTuple):
    documents: list[tuple[str, int, str]]  # file, row, text
    bad: list[tuple[int, str, bytes]]
    blank: int


def collect(pool: Corpus, whole: bool = False) -> Found:
    documents, bad, blank = [], [], 0
    for unit in pool.units:
        for batch in read(pool, unit, whole):
            assert len(batch.text) == len(batch.rows) and batch.text.null_count == 0
            if whole and batch.table is not None:
                assert batch.table[pool.text].to_pylist() == batch.text.to_pylist()
            documents += zip([batch.source.name] * len(batch), batch.rows.tolist(), batch.text.to_pylist())
            bad += [(record.offset, record.reason, record.raw) for record in batch.bad]
            blank += batch.blank
    return Found(documents, bad, blank)


def texts(pool: Corpus) -> list[str]:
    return [text for _, _, text in collect(pool).documents]


def jsonl(path: Path, values: list[str], **fields: object) -> Path:
    path.write_text("".join(json.dumps({**fields, "text": text}) + "\n" for text in values), encoding="utf-8")
    return path


def compressed(path: Path, data: bytes, codec: str) -> Path:
    with pa.CompressedOutputStream(str(path), codec) as stream:
        stream.write(data)
    return path


def as_csv(values: list[str]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["id", "text"])
    writer.writerows((number, text) for number, text in enumerate(values))
    return buffer.getvalue()


def laid_out(records: list[bytes], newline: bytes, final: bool, bom: bool) -> tuple[bytes, list[int]]:
    """The bytes of a file and where each record begins."""
    data, starts = b"\xef\xbb\xbf" if bom else b"", []
    for record in records:
        starts.append(len(data))
        data += record + newline
    return (data if final or not records else data[: -len(newline)]), starts
