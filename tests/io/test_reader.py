"""Every record is read exactly once, at its offset, or named as bad: whatever the format and however it is cut."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from salience.errors import DataError, InputError, NothingToDo
from salience.io import Corpus, Tally, corpus, lines, peek, read, reader

TEXTS = ["one", 'two, "quoted"\nsecond line', "", "dréi 🦆", "  spaces  "]


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


# --- formats ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["jsonl", "ndjson", "json", "jsonl.gz", "jsonl.zst", "JSONL"])
def test_jsonl_and_its_compressed_forms(tmp_path: Path, ending: str) -> None:
    data = jsonl(tmp_path / "plain", TEXTS, id=1).read_bytes()
    path = tmp_path / f"a.{ending}"
    if ending.endswith("gz"):
        path.write_bytes(gzip.compress(data))
    elif ending.endswith("zst"):
        compressed(path, data, "zstd")
    else:
        path.write_bytes(data)
    found = collect(Corpus(path))
    assert [text for _, _, text in found.documents] == TEXTS
    starts = np.cumsum([0, *map(len, data.splitlines(keepends=True))])[:-1]
    assert [row for _, row, _ in found.documents] == starts.tolist()  # offsets of the decompressed file


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "csv.zst"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_csv_with_quoted_commas_and_newlines(tmp_path: Path, ending: str, bom: str, newline: str) -> None:
    values = ["a", 'b, "c"\nd', "", " e", "f\n\ng", "ü"]
    # the newline inside quotes stays as it is
    rows = "".join(f'{n},"{v.replace(chr(34), chr(34) * 2)}"{newline}' for n, v in enumerate(values))
    data = (bom + f"id,text{newline}" + rows).encode()
    path = tmp_path / f"a.{ending}"
    if ending == "csv":
        path.write_bytes(data)
    else:
        compressed(path, data, "gzip" if ending.endswith("gz") else "zstd")
    found = collect(Corpus(path), whole=True)
    assert found == Found([(path.name, row, text) for row, text in enumerate(values)], [], 0)


@pytest.mark.parametrize("codec", [None, "gz", "zst"])
def test_a_line_of_a_text_file_is_a_document(tmp_path: Path, codec: str | None) -> None:
    data = "one\r\n\n  \n two \nü".encode()
    path = tmp_path / ("a.txt" + (f".{codec}" if codec else ""))
    if codec:
        compressed(path, data, {"gz": "gzip", "zst": "zstd"}[codec])
    else:
        path.write_bytes(data)
    assert collect(Corpus(path)) == Found([(path.name, 0, "one"), (path.name, 9, " two "), (path.name, 15, "ü")], [], 2)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_row_groups_are_units_and_nulls_are_named(tmp_path: Path, kind: pa.DataType) -> None:
    values = [*TEXTS, None, "last"]
    table = pa.table({"id": range(7), "text": pa.array(values).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    pool = Corpus(tmp_path / "a.parquet")
    assert [unit.first_row for unit in pool.units] == [0, 3, 6]
    for whole in (False, True):
        found = collect(pool, whole)
        assert [(row, text) for _, row, text in found.documents] == [*enumerate(TEXTS), (6, "last")]
        assert found.bad == [(5, "column 'text' is null", b"")]


def frames() -> dict[str, object]:
    values = ["a", "b", None, "d"]
    table = pa.table({"text": values, "n": [1, 2, 3, 4]})
    return {
        "pandas": pd.DataFrame({"text": values, "n": [1, 2, 3, 4]}, index=[9, 8, 7, 6]),
        "polars": pl.DataFrame({"text": values, "n": [1, 2, 3, 4]}),
        "polars, all columns text": pl.DataFrame({"text": values, "other": ["w", "x", "y", "z"]}),
        "pyarrow table": table,
        "record batch": table.to_batches()[0],
        "stream": pa.RecordBatchReader.from_batches(table.schema, table.to_batches(max_chunksize=2)),
        "string views": pa.table(
            {"text": pa.array(values, pa.string_view()), "b": pa.array([b"x"] * 4, pa.binary_view())}
        ),
    }


@pytest.mark.parametrize("kind", list(frames()))
def test_anything_that_speaks_arrow(kind: str) -> None:
    pool = Corpus(frames()[kind])
    for whole in (False, True):
        found = collect(pool, whole)
        assert [(row, text) for _, row, text in found.documents] == [(0, "a"), (1, "b"), (3, "d")]
        assert found.bad == [(2, "column 'text' is null", b"")]


def test_tables_are_cut_into_units_whose_bytes_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "TABLE_ROWS", 7)
    monkeypatch.setattr(reader, "BATCH_ROWS", 3)
    table = pa.table({"text": [str(n) for n in range(30)]})
    pool = Corpus(table)
    assert len(pool.units) == 5 and abs(sum(unit.bytes for unit in pool.units) - table.nbytes) < 5
    assert [(row, text) for _, row, text in collect(pool).documents] == [(n, str(n)) for n in range(30)]


def test_directories_and_globs(tmp_path: Path) -> None:
    for name in ("b/x.jsonl", "a/y.jsonl", "a/z.txt", "a/notes.md", ".cache/x.jsonl", "a/.x.jsonl.partial/x.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        jsonl(tmp_path / name, [name])
    # what an earlier run left beside its output is no corpus
    jsonl(tmp_path / "a/out.jsonl.manifest.json", ["m"])
    jsonl(tmp_path / "a/out.jsonl.quarantine.jsonl", ["q"])
    (tmp_path / "folder.jsonl").mkdir()
    whole = Corpus(tmp_path)
    assert [source.name for source in whole.sources] == ["a/y.jsonl", "a/z.txt", "b/x.jsonl"]
    again = Corpus([str(tmp_path / "b" / "*.jsonl"), tmp_path / "a", str(tmp_path / "a/y.jsonl")])
    assert [source.name for source in again.sources] == ["a/y.jsonl", "a/z.txt", "b/x.jsonl"]  # once each
    deep = Corpus(str(tmp_path / "**" / "?.jsonl"))
    assert [source.name for source in deep.sources] == ["a/y.jsonl", "b/x.jsonl"]
    assert len({source.file_id for source in whole.sources}) == 3
    assert [source.file_id for source in deep.sources] == [whole.sources[0].file_id, whole.sources[2].file_id]


def test_a_name_with_glob_characters_is_a_name_first(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a[1].jsonl", ["x"])
    assert texts(Corpus(str(path))) == ["x"]


def test_a_file_name_must_be_unicode(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/a\xff\n.jsonl"
    with open(name, "wb") as file:
        file.write(b'{"text": "x"}\n')
    with pytest.raises(InputError, match="has a name that is not UTF-8; rename it"):
        Corpus(tmp_path)


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.zst", "csv", "csv.gz", "txt", "parquet", "table"])
@pytest.mark.parametrize("block_bytes", [24, 4 << 20])
def test_wanted_rows_alone_can_be_read(
    tmp_path: Path, ending: str, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(corpus, "UNIT_BYTES", 50)
    values = [f"text {n}" for n in range(20)]
    path, table = tmp_path / f"a.{ending}", pa.table({"text": values, "n": range(20)})
    written = as_csv(values) if "csv" in ending else "\n".join(values)
    if ending.startswith("jsonl"):
        written = "".join(json.dumps({"text": text}) + "\n\n" for text in values)
    if ending == "parquet":
        pq.write_table(table, path, row_group_size=6)
    elif path.suffix in (".gz", ".zst"):
        compressed(path, written.encode(), {".gz": "gzip", ".zst": "zstd"}[path.suffix])
    else:
        path.write_text(written)
    pool = Corpus(table if ending == "table" else path)
    every = collect(pool).documents
    assert [text for _, _, text in every] == values
    wanted = np.array([row for _, row, _ in every])[[0, 3, 4, 11, 19]]
    found = []
    for unit in pool.units:
        for batch in read(pool, unit, whole=True, rows=wanted):
            found += zip(batch.rows.tolist(), batch.text.to_pylist())
            if batch.lines is not None:
                block, starts, stops = batch.lines
                raw = [block[a:b].decode() for a, b in zip(starts.tolist(), stops.tolist())]
                assert all(text in record for text, record in zip(batch.text.to_pylist(), raw, strict=True))
            if batch.table is not None:
                assert batch.table["text"].to_pylist() == batch.text.to_pylist()
    assert found == [every[at][1:] for at in (0, 3, 4, 11, 19)]


# --- where records are cut ----------------------------------------------------------------------------------

LINE = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12).map(
        lambda text: json.dumps({"text": text}).encode()
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30).map(
        lambda text: json.dumps({"x": [1, {"text": 2}], "text": text}, ensure_ascii=False).encode()
    ),
    st.sampled_from([b"", b"   ", b"\t"]),
)
CUTS = st.integers(4, 60)


def laid_out(records: list[bytes], newline: bytes, final: bool, bom: bool) -> tuple[bytes, list[int]]:
    """The bytes of a file and where each record begins."""
    data, starts = b"\xef\xbb\xbf" if bom else b"", []
    for record in records:
        starts.append(len(data))
        data += record + newline
    return (data if final or not records else data[: -len(newline)]), starts


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(LINE, min_size=1, max_size=12), st.sampled_from([b"\n", b"\r\n"]), st.booleans(), st.booleans(), CUTS, CUTS
)
def test_every_line_is_read_once_wherever_units_and_blocks_end(
    tmp_path_factory, records: list[bytes], newline: bytes, final: bool, bom: bool, unit_bytes: int, block_bytes: int
) -> None:
    data, starts = laid_out(records, newline, final, bom)
    path = tmp_path_factory.getbasetemp() / "cut.jsonl"
    path.write_bytes(data)
    expected = [(start, json.loads(record)["text"]) for start, record in zip(starts, records) if record.strip()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "UNIT_BYTES", unit_bytes)
        patch.setattr(lines, "BLOCK_BYTES", block_bytes)
        if not data:
            with pytest.raises(NothingToDo):
                Corpus(path)
            return
        pool = Corpus(path)
        assert len(pool.units) == -(-len(data) // unit_bytes)
        found = collect(pool)
    assert [(row, text) for _, row, text in found.documents] == expected
    blank = sum(not record.strip() for record in records)
    if not final and not records[-1]:
        blank -= 1  # nothing stands behind the last newline
    assert (found.bad, found.blank) == ([], blank)


FIELD = st.text(st.sampled_from(['"', "\n", ",", "a", "é", " "]), max_size=6)


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(FIELD, FIELD) | st.none(), min_size=1, max_size=10), st.booleans(), st.booleans(), CUTS, CUTS)
def test_every_csv_row_is_read_once_wherever_units_and_blocks_end(
    tmp_path_factory, rows: list[tuple[str, str] | None], final: bool, bom: bool, unit_bytes: int, block_bytes: int
) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["text", "other"])
    for row in rows:
        buffer.write("\n") if row is None else writer.writerow(row)
    data = buffer.getvalue() if final else buffer.getvalue().removesuffix("\n")
    path = tmp_path_factory.getbasetemp() / "cut.csv"
    path.write_bytes((("\ufeff" if bom else "") + data).encode())
    expected = [(number, row[0]) for number, row in enumerate(rows) if row is not None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "UNIT_BYTES", unit_bytes)
        patch.setattr(lines, "BLOCK_BYTES", block_bytes)
        try:
            found = collect(Corpus(path), whole=True)
        except NothingToDo:
            found = Found([], [], 0)
    assert [(row, text) for _, row, text in found.documents] == expected
    assert found.bad == []


MUTANTS = [
    b'{"text": "a", "n": 1}', b'{"text": "a\\u00e9"}', b'{"n": [1, {"text": "in"}], "text": "b"}', b'{"text": null}',
    b'{"text": 3}', b'{"text": {"a": 1}}', b'{}', b'{"text": "a"}{"text": "b"}', b'{"text": "a", "text": "b"}',
    b'{"text": "a}', b'{b"}', b'{"te\\u0078t": "c"}', b'{"text": "d", "x": "\\udc00"}', b'{"text": "\\ud800"}',
    b'{"text": "e", "n": ' + b"9" * 5000 + b"}", b'{"text": "f", "n": ' + b"[" * 3000 + b"]" * 3000 + b"}",
    b'{"n": ' + b"[" * 3000 + b"]" * 3000 + b"}", b'{"text": "g", "n": NaN}', b'{"text": "h"} ', b'{"text": "\xff"}', b"",
]  # fmt: skip


@settings(max_examples=200)
@given(st.data())
def test_a_block_is_parsed_like_its_lines_one_by_one(data: st.DataObject) -> None:
    records = data.draw(st.lists(st.sampled_from(MUTANTS), min_size=1, max_size=4))
    if data.draw(st.booleans()):  # change one byte of one record
        at = data.draw(st.integers(0, len(records) - 1))
        record = bytearray(records[at])
        if record:
            place = data.draw(st.integers(0, min(len(record), 30) - 1))
            record[place] = data.draw(st.sampled_from(b'{}[]",:\\ \x00\x0bntu01e.-\xff'))
            records[at] = bytes(record)

    def parse(parts: list[bytes]) -> list[str | None]:
        block = b"".join(part + b"\n" for part in parts)
        starts, stops = lines.trimmed(block, np.cumsum([len(part) + 1 for part in parts]))
        parsed = lines.parse_jsonl(block, starts, stops, "text")
        assert len(parsed.kept) + parsed.blank + len(parsed.bad) == len(parts)
        result: list[str | None] = [None] * len(parts)
        for index, text in zip(parsed.kept.tolist(), parsed.text.to_pylist()):
            result[index] = text
        return result

    assert parse(records) == [parse([record])[0] for record in records]


CSV_LINE = st.text(st.sampled_from(['"', ",", "a", "b", " ", "\r", "\t", "\x00"]), max_size=7)


@settings(max_examples=400)
@given(st.lists(CSV_LINE, min_size=1, max_size=4), st.integers(1, 2))
def test_a_csv_block_is_parsed_like_its_records_one_by_one(written: list[str], columns: int) -> None:
    names = ["text", "other"][:columns]
    block = "".join(line + "\n" for line in written).encode()
    ends, _state = lines._record_ends(np.frombuffer(block, np.uint8), True, lines._FIELD)
    if not len(ends):
        return  # all of it one open quote
    block = block[: ends[-1]]
    starts, stops = lines.trimmed(block, ends)

    def rows(block: bytes, starts: np.ndarray, stops: np.ndarray) -> tuple[list[int], list[dict]]:
        parsed = lines.parse_csv(block, starts, stops, "text", names)
        assert len(parsed.kept) + parsed.blank + len(parsed.bad) == len(starts)
        assert parsed.table is None or parsed.table["text"].to_pylist() == parsed.text.to_pylist()
        return parsed.kept.tolist(), [] if parsed.table is None else parsed.table.to_pylist()

    alone = [rows(block[a:b] + b"\n", np.array([0]), np.array([b - a])) for a, b in zip(starts, stops)]
    expected = [n for n, (index, _) in enumerate(alone) if index], [row for _, found in alone for row in found]
    assert rows(block, starts, stops) == expected


# --- bad records --------------------------------------------------------------------------------------------

BAD = {
    "cut-off": (b'{"text": "abc', "not JSON"),
    "null": (b'{"text": null}', "field 'text' holds null"),
    "missing field": (b'{"texts": "a"}', "no field 'text' (nearest names: 'texts'"),
    "wrong type": (b'{"text": 7}', "field 'text' holds number"),
    "invalid UTF-8": (b'{"text": "a\xff"}', "invalid UTF-8 at byte 11"),
    "byte-order mark": (b'\xef\xbb\xbf{"text": "a"}', "byte-order mark"),
    "lone surrogate": (b'{"text": "a\\ud800b"}', "lone surrogate in field 'text' at character 1"),
    "too long": (b'{"text": "' + b"a" * 400 + b'"}', "longer than 300 bytes"),
    "NUL byte": (b'{"text": "a\x00b"}', "not JSON"),
    "duplicate key": (b'{"text": "a", "text": "b"}', "field 'text' appears twice"),
    "nested text": (b'{"text": {"text": "a"}}', "field 'text' holds object"),
    "no object": (b'["text"]', "a JSON array"),
    "two objects": (b'{"text": "a"} {"text": "b"}', "not JSON"),
}


@pytest.mark.parametrize("kind", [*BAD, "all"])
@pytest.mark.parametrize("block_bytes", [64, 4 << 20])
def test_a_bad_record_is_named_and_its_neighbours_are_read(
    tmp_path: Path, kind: str, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "MAX_RECORD_BYTES", 300)
    monkeypatch.setattr(lines, "BLOCK_BYTES", block_bytes)
    wanted = BAD if kind == "all" else {kind: BAD[kind]}
    records = [b'{"text": "first"}']
    for raw, _ in wanted.values():
        records += [raw, b"", b'{"text": "next"}']
    data, starts = laid_out(records, b"\n", True, False)
    (tmp_path / "a.jsonl").write_bytes(data)
    found = collect(Corpus(tmp_path / "a.jsonl"))
    assert [(row, text) for _, row, text in found.documents] == [
        (start, json.loads(record)["text"])
        for start, record in zip(starts, records)
        if record in (records[0], records[3])
    ]
    assert found.blank == len(wanted)
    bad = sorted(found.bad)
    assert [offset for offset, _, _ in bad] == starts[1::3]
    for (_, reason, raw), (written, expected) in zip(bad, wanted.values()):
        assert expected in reason
        assert raw.rstrip(b"\n") == written or (expected.startswith("longer") and written.startswith(raw))


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.sampled_from([None, "", *BAD]), min_size=1, max_size=40), st.integers(20, 2000), st.integers(20, 500),
)  # fmt: skip
def test_no_record_is_unaccounted_for(
    tmp_path_factory, kinds: list[str | None], unit_bytes: int, block_bytes: int
) -> None:
    kinds = [None, *kinds]  # a byte-order mark at the beginning of a file is fine
    records = [b'{"text": "ok"}' if kind is None else b"" if not kind else BAD[kind][0] for kind in kinds]
    path = tmp_path_factory.getbasetemp() / "mixed.jsonl"
    path.write_bytes(b"\n".join(records) + b"\n")
    tally = Tally()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "MAX_RECORD_BYTES", 300)
        patch.setattr(lines, "BLOCK_BYTES", block_bytes)
        patch.setattr(corpus, "UNIT_BYTES", unit_bytes)
        pool = Corpus(path)
        for unit in pool.units:
            for batch in read(pool, unit):
                tally.add(batch, max_bad=1.0)
    good, blank = sum(kind is None for kind in kinds), sum(kind == "" for kind in kinds)
    assert (tally.documents, tally.blank, len(tally.bad)) == (good, blank, len(kinds) - good - blank)
    assert tally.read == len(kinds)
    share = len(tally.bad) / len(kinds)
    if share:
        with pytest.raises(DataError, match=r"records of the pool are bad .* first in .*mixed.jsonl at "):
            tally.check(share - 1e-9, "pool")
    if good:
        tally.check(share, "pool")
    else:
        with pytest.raises(NothingToDo, match="no document"):
            tally.check(1.0, "pool")


def test_strict_stops_at_the_first_bad_record(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": 1}\n')
    pool = Corpus(tmp_path)
    with pytest.raises(DataError, match=r"a.jsonl at 14: field 'text' holds number"):
        for batch in read(pool, pool.units[0]):
            Tally().add(batch, max_bad=0)


def test_ragged_and_broken_csv(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'id,text\n1,a\n2\n3,b,c\n4,"d"x\n5,\xff\n\n  \n6,"g\ng"\n')
    found = collect(Corpus(tmp_path), whole=True)
    assert [(row, text) for _, row, text in found.documents] == [(0, "a"), (3, "dx"), (7, "g\ng")]
    assert found.blank == 2
    reasons = [(12, "1 fields where the header has 2"), (14, "3 fields where"), (27, "invalid UTF-8")]
    for (offset, reason, _), (where, why) in zip(found.bad, reasons, strict=True):
        assert offset == where and why in reason


def test_a_quote_within_a_field_is_text(tmp_path: Path) -> None:
    """Quotes in mid-field must not join rows: 18 rows between two of them would count as one bad record."""
    rows = ['5" nail', *[f"row {n}" for n in range(18)], '6" nail', 'a""b']
    (tmp_path / "a.csv").write_text("id,text\n" + "".join(f"{n},{text}\n" for n, text in enumerate(rows)))
    assert texts(Corpus(tmp_path)) == rows


@pytest.mark.parametrize("max_bytes", [32 << 20, 100])
def test_a_quote_that_is_never_closed_stops_the_run(
    tmp_path: Path, max_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "MAX_RECORD_BYTES", max_bytes)
    monkeypatch.setattr(lines, "BLOCK_BYTES", 64)
    (tmp_path / "a.csv").write_text("id,text\n1,a\n" + '2,"b\n' + "3,c\n" * 1000)
    with pytest.raises(DataError, match=r"a.csv .*quote in the record at byte 12 is never closed"):
        collect(Corpus(tmp_path))


def test_too_long_a_csv_record_is_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_RECORD_BYTES", 50)
    (tmp_path / "a.csv").write_text("id,text\n1,a\n2," + "b" * 60 + "\n3,c\n" + "4," + "d" * 70)
    for block_bytes in (8, 16, 1000):
        monkeypatch.setattr(lines, "BLOCK_BYTES", block_bytes)
        found = collect(Corpus(tmp_path))
        assert [text for _, _, text in found.documents] == ["a", "c"]
        assert [(offset, reason) for offset, reason, _ in found.bad] == [(n, "longer than 50 bytes") for n in (12, 79)]


@pytest.mark.slow
def test_a_line_of_100_mb_is_set_aside_in_little_memory(tmp_path: Path) -> None:
    with open(tmp_path / "a.jsonl", "wb") as file:
        file.write(b'{"text": "first"}\n{"text": "')
        for _ in range(100):
            file.write(b"a" * (1 << 20))
        file.write(b'"}\n{"text": "last"}\n')
    found = collect(Corpus(tmp_path))
    assert [text for _, _, text in found.documents] == ["first", "last"]
    ((offset, reason, raw),) = found.bad
    assert offset == 18 and reason == "longer than 33,554,432 bytes" and len(raw) == 4096


def test_parquet_text_that_is_not_utf8_is_named_by_its_row(tmp_path: Path) -> None:
    raw = pa.array([b"fine", None, b"a\xff", "ü".encode()], pa.binary())
    broken = pa.Array.from_buffers(pa.string(), 4, raw.buffers())
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    found = collect(Corpus(tmp_path), whole=False)
    assert [(row, text) for _, row, text in found.documents] == [(0, "fine"), (3, "ü")]
    assert sorted(found.bad) == [(1, "column 'text' is null", b""), (2, "invalid UTF-8 at byte 1", b"a\xff")]


# --- what cannot be read at all -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.csv.gz", "a.csv.zst", "a.txt.gz", "a.parquet"])
@pytest.mark.parametrize("keep", [0.02, 0.5, 0.98])
def test_truncated_files_are_never_read_as_shorter_ones(tmp_path: Path, name: str, keep: float) -> None:
    values = [f"{n} {np.random.default_rng(n).bytes(20).hex()}" for n in range(2000)]
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.table({"text": values}), path, row_group_size=300)
    else:
        data = as_csv(values) if "csv" in name else "".join(json.dumps({"text": text}) + "\n" for text in values)
        compressed(path, data.encode(), "gzip" if name.endswith("gz") else "zstd")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(DataError, match=name):
        collect(Corpus(path))


def test_a_damaged_parquet_page_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"document {n}" for n in range(2000)]}), path, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.parquet cannot be read"):
        collect(Corpus(path))


def test_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n  \n")
    (tmp_path / "header.csv").write_text("id,text\n")
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbf")
    (tmp_path / "folder").mkdir()
    with pytest.raises(NothingToDo, match=r"empty\.jsonl is empty"):
        Corpus(tmp_path / "empty.jsonl")
    with pytest.raises(NothingToDo, match=r"header\.csv is empty"):
        Corpus(tmp_path / "header.csv")
    with pytest.raises(NothingToDo, match=r"folder holds no file that ends in \.jsonl"):
        Corpus(tmp_path / "folder")
    with pytest.raises(NothingToDo, match="empty"):
        Corpus(pd.DataFrame({"text": pd.Series([], dtype=str)}))
    for name in ("blank.jsonl", "mark.txt"):
        with pytest.raises(NothingToDo, match="only blank lines"):
            peek(Corpus(tmp_path / name))
    (tmp_path / "header.csv").write_text("\n1,a\n")
    with pytest.raises(DataError, match="blank line where the column names"):
        Corpus(tmp_path / "header.csv")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("absent.jsonl", "absent.jsonl does not exist"),
        ("*.nothing", "matches no file"),
        ("folder*", "matches no file"),
        ("a.xlsx", "unknown ending"),
        ("a.parquet.gz", "unknown ending"),
        ([], "no input was named"),
        (7, "int is neither a path nor a table"),
        ({"text": ["a"]}, "dict is neither a path nor a table"),
        ((text for text in "ab"), "Corpus.of_texts"),
    ],
)
def test_inputs_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: object, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folders").mkdir()
    for name in ("a.xlsx", "a.parquet.gz"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match=message):
        Corpus(inputs)


@pytest.mark.parametrize(
    "table",
    [pd.DataFrame({"text": ["a", 1]}), pl.Series("text", ["a"])],
)
def test_tables_that_are_none(table: object) -> None:
    with pytest.raises(DataError, match="cannot be read as a table"):
        Corpus(table)


def test_texts_that_are_none() -> None:
    for values in (["a", 1], ["a", "\ud800"]):
        with pytest.raises(DataError, match="the texts cannot be read"):
            Corpus.of_texts(values)


def test_a_missing_column_is_told_with_the_nearest_names(tmp_path: Path) -> None:
    table = pa.table({"texts": ["a"], "id": [1], "n": [2]})
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("texts,id,n\na,1,2\n")
    jsonl(tmp_path / "a.jsonl", ["x"]).write_text('{"texts": "a", "id": 1}\n' * 3)
    for inputs in (tmp_path / "a.parquet", tmp_path / "a.csv", table):
        with pytest.raises(
            DataError, match=r"no column 'text' \(nearest names: 'texts'; there are: 'id', 'n', 'texts'"
        ):
            Corpus(inputs)
    with pytest.raises(DataError, match=r"no field 'text' \(nearest names: 'texts'.*nor do the 3 first records"):
        peek(Corpus(tmp_path / "a.jsonl"))
    for column, message in (("id", "holds int64, not text"), ("n", "holds int64")):
        with pytest.raises(DataError, match=message):
            Corpus(tmp_path / "a.parquet", column)
    with pytest.raises(DataError, match="2 columns called 'text'"):
        Corpus(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]))


def test_a_file_that_vanishes_or_fails_is_a_data_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonl(tmp_path / "a.jsonl", ["x"])
    pool = Corpus(tmp_path)
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(DataError, match=r"a\.jsonl cannot be read: .*No such file"):
        collect(pool)
    (tmp_path / "b.csv").write_text("text\nx\n")

    def refuse(source: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(lines, "open_bytes", refuse)
        with pytest.raises(DataError, match=r"b\.csv cannot be read: .*Permission denied"):
            Corpus(tmp_path)
    os.symlink(tmp_path / "gone.jsonl", tmp_path / "c.jsonl")
    with pytest.raises(InputError, match=r"c\.jsonl does not exist"):
        Corpus(tmp_path / "c.jsonl")
