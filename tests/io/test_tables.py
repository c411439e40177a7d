"""Tables are read whole or not at all: every record is delivered, counted as blank, or named as bad."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import compressed

from salience.errors import DataError, InputError, NothingToDo
from salience.io import TableReader, Tally, as_numbers, lines, tables

ROWS = [["1", "a,b"], ["2", 'say "x"\nagain'], ["3", ""], ["4", "ü"]]


def rows_of(source: TableReader) -> tuple[list[tuple], list[int], Tally]:
    found, numbers, tally = [], [], Tally()
    for batch in source:
        assert batch.table.column_names == source.columns and len(batch) == batch.table.num_rows
        found += [tuple(row.values()) for row in batch.table.to_pylist()]
        numbers += batch.rows.tolist()
        tally.add(batch, 1.0)
    return found, numbers, tally


def written(rows: list[list[str]], header: tuple[str, ...] = ("id", "text"), newline: str = "\n") -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator=newline).writerows([header, *rows])
    return buffer.getvalue()


# --- formats ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "csv.zst", "CSV"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("block_bytes", [8, 4 << 20])
def test_csv_is_text_as_it_stands(
    tmp_path: Path, ending: str, bom: str, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "BLOCK_BYTES", block_bytes)
    path, data = tmp_path / f"a.{ending}", (bom + written(ROWS)).encode()
    if path.suffix in (".gz", ".zst"):
        compressed(path, data, {".gz": "gzip", ".zst": "zstd"}[path.suffix])
    else:
        path.write_bytes(data)
    table = TableReader(path)
    assert table.columns == ["id", "text"]
    for _ in range(2):  # as often as one likes
        found, numbers, tally = rows_of(table)
        assert found == [tuple(row) for row in ROWS] and numbers == [0, 1, 2, 3] and tally.read == 4
    assert rows_of(TableReader(path, ["text"]))[0] == [(row[1],) for row in ROWS]
    assert rows_of(TableReader(path, ["text", "id"]))[0] == [tuple(row[::-1]) for row in ROWS]


def test_parquet_and_frames_keep_their_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "BATCH_ROWS", 3)
    table = pa.table({"n": [1, None, 3, 4, 5], "x": [0.5, 1.5, None, 2.5, 3.5], "s": ["a", "b", None, "d", "a"]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    expected = [tuple(row.values()) for row in table.to_pylist()]
    frames = (tmp_path / "a.parquet", table, table.to_batches()[0], pl.from_arrow(table), table.to_reader(2))
    for inputs in frames:
        found, numbers, tally = rows_of(TableReader(inputs))
        assert found == expected and numbers == [0, 1, 2, 3, 4] and tally.documents == 5
    found, _, _ = rows_of(TableReader(pd.DataFrame({"n": [1, 2], "s": ["a", None]}, index=[7, 8])))
    assert found == [(1, "a"), (2, None)]
    assert [len(batch) for batch in TableReader(tmp_path)] == [3, 2]


def test_several_files_are_one_table(tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_text("id,text\n1,a\n")
    (tmp_path / "a.csv").write_text("text,more,id\nb,x,2\n")  # another order, another column
    found, numbers, _ = rows_of(TableReader(tmp_path, ["id", "text"]))
    assert found == [("2", "b"), ("1", "a")] and numbers == [0, 0]
    with pytest.raises(DataError, match=r"b\.csv has no column 'more' \(there are: 'id', 'text'\)"):
        TableReader(tmp_path)


def test_a_stream_is_read_once() -> None:
    table = pa.table({"a": [1, 2]})
    source = TableReader(table.to_reader())
    assert rows_of(source)[0] == [(1,), (2,)]
    with pytest.raises(InputError, match="can be read once"):
        rows_of(source)


# --- bad records --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_bytes", [16, 4 << 20])
def test_every_bad_record_is_named_and_the_others_are_kept(
    tmp_path: Path, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "BLOCK_BYTES", block_bytes)
    data = b'id,text\n1,a\n\n2,b,c\n3\n4,"x\ny"\n5,\xff\xfe\n6,z\n'
    (tmp_path / "a.csv").write_bytes(data)
    found, numbers, tally = rows_of(TableReader(tmp_path))
    assert found == [("1", "a"), ("4", "x\ny"), ("6", "z")] and numbers == [0, 4, 6]
    assert (tally.read, tally.documents, tally.blank) == (7, 3, 1)
    bad = [(record.offset, record.reason, record.raw) for _, record in tally.bad]
    assert bad == [
        (data.index(b"2,b,c"), "3 fields where the header has 2", b"2,b,c"),
        (data.index(b"3\n"), "1 fields where the header has 2", b"3"),
        (data.index(b"5,"), "invalid UTF-8 at byte 2", b"5,\xff\xfe"),
    ]


def test_a_record_that_is_too_long_is_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_RECORD_BYTES", 100)
    (tmp_path / "a.csv").write_text(f"id,text\n1,a\n2,{'x' * 200}\n3,c\n4,{'x' * 200}\n")
    found, _, tally = rows_of(TableReader(tmp_path))
    assert found == [("1", "a"), ("3", "c")] and tally.read == 4
    assert [record.reason for _, record in tally.bad] == ["longer than 100 bytes"] * 2


def test_text_that_is_no_unicode_in_arrow_data() -> None:
    raw = pa.array([b"ok", b"\xff", None, b"ab\xfe"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 4, raw.buffers())
    found, numbers, tally = rows_of(TableReader(pa.table({"n": [0, 1, 2, 3], "s": text, "t": text})))
    assert found == [(0, "ok", "ok"), (2, None, None)] and numbers == [0, 2]
    bad = [(record.offset, record.reason, record.raw) for _, record in tally.bad]
    assert bad == [
        (1, "invalid UTF-8 at byte 0 of column 's'", b"\xff"),
        (3, "invalid UTF-8 at byte 2 of column 's'", b"ab\xfe"),
    ]


@settings(max_examples=60, deadline=None)
@given(
    records=st.lists(
        st.sampled_from([b"1,a", b'2,"b\nc"', b"", b"3", b"4,a,b", b"5,\xff", b'6,a"b', b"  ", b"7,"]), max_size=30
    ),
    block_bytes=st.sampled_from([8, 40, 4 << 20]),
    final=st.booleans(),
)
def test_no_record_is_lost(tmp_path_factory, records: list[bytes], block_bytes: int, final: bool) -> None:
    path = tmp_path_factory.mktemp("t") / "a.csv"
    path.write_bytes(b"id,text\n" + b"\n".join(records) + (b"\n" if final and records else b""))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "BLOCK_BYTES", block_bytes)
        found, numbers, tally = rows_of(TableReader(path))
    good = [record for record in records if record[:1] in b"1267" and record.strip()]
    blank = sum(not record.strip() for record in records[: len(records) if final else None])
    if not final and records and not records[-1]:
        blank -= 1  # nothing behind the last newline
    assert [row[0] for row in found] == [record[:1].decode() for record in good]
    assert tally.documents == len(good) and tally.blank == blank
    assert len(tally.bad) == len(records) - len(good) - sum(not record.strip() for record in records)
    assert numbers == [at for at, record in enumerate(records) if record[:1] in b"1267" and record.strip()]


# --- what cannot be read at all -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.csv.gz", "a.csv.zst", "a.parquet"])
@pytest.mark.parametrize("keep", [0.02, 0.5, 0.98])
def test_truncated_files_are_never_read_as_shorter_ones(tmp_path: Path, name: str, keep: float) -> None:
    values = [[str(n), np.random.default_rng(n).bytes(20).hex()] for n in range(2000)]
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.table({"text": [value for _, value in values]}), path, row_group_size=300)
    else:
        compressed(path, written(values).encode(), "gzip" if name.endswith("gz") else "zstd")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(DataError, match=name):
        rows_of(TableReader(path))


def test_an_open_quote_and_a_damaged_page_are_errors(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,text\n1,"a\n2,b\n')
    with pytest.raises(DataError, match=r"a\.csv cannot be read: a quote in the record at byte 8 is never closed"):
        rows_of(TableReader(tmp_path / "a.csv"))
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"row {n}" for n in range(2000)]}), path, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.parquet cannot be read"):
        rows_of(TableReader(path))


def test_what_is_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in {"e.csv": "", "blank.csv": "\n1,2\n", "twice.csv": "a,b,a\n1,2,3\n", "a.jsonl": "{}\n"}.items():
        Path(name).write_text(text)
    Path("fake.parquet").write_bytes(b"PAR1 not really")
    for inputs, kind, message in (
        ("e.csv", NothingToDo, "every input is empty"),
        (pd.DataFrame({"a": []}), NothingToDo, "every input is empty"),
        ("absent.csv", InputError, "absent.csv does not exist"),
        ("a.jsonl", InputError, "a.jsonl is no table; known endings"),
        ("blank.csv", DataError, "begins with a blank line"),
        ("twice.csv", DataError, "twice.csv has 2 columns called 'a'"),
        (pa.table([[1], [2]], names=["b", "b"]), DataError, "2 columns called 'b'"),
        ("fake.parquet", DataError, "fake.parquet cannot be read"),
        (7, InputError, "int is neither a path nor a table"),
    ):
        with pytest.raises(kind, match=message):
            TableReader(inputs)
    table = pa.table({"price": [1], "n": [2]})
    with pytest.raises(DataError, match=r"table 0 has no column 'prise' \(nearest names: 'price'"):
        TableReader(table, ["prise"])
    with pytest.raises(InputError, match="columns names 'n' more than once"):
        TableReader(table, ["n", "n"])


# --- numbers ------------------------------------------------------------------------------------------------


def test_as_numbers() -> None:
    nan = np.nan
    for column, missing, expected in (
        (pa.array(["1", " 2.5", "", "-3e2"]), ("",), [1, 2.5, nan, -300]),
        (pa.array(["1", "?", None]), ("", "?"), [1, nan, nan]),
        (pa.array([1, None, 3]), ("",), [1, nan, 3]),
        (pa.array([True, False]), ("",), [1, 0]),
        (pa.array([0.1, nan]), ("",), [0.1, nan]),
        (pa.chunked_array([["1"], ["2"]]), ("",), [1, 2]),
        (pa.array(["1", "2", "1"]).dictionary_encode(), ("",), [1, 2, 1]),
        (pa.array([2**63 - 1]), ("",), [float(2**63 - 1)]),
    ):
        np.testing.assert_array_equal(as_numbers(column, missing), expected)
    for column in (pa.array(["1", "x"]), pa.array(["", ""]), pa.array([b"1"]), pa.array([[1]]), pa.nulls(2)):
        assert as_numbers(column) is None
