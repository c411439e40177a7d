"""Every record is read exactly once, at its offset, or named as bad: whatever the format and however it is cut."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reading import Found, collect, laid_out, texts

from salience.errors import DataError, NothingToDo
from salience.io import Corpus, Tally, corpus, lines, read

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
    b'{"n": ' + b"[" * 3000 + b"]" * 3000 + b"}", b'{"text": "g", "n": NaN}', b'{"text": "h"} ',
    b'{"text": "\xff"}', b"",
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
    ends, _ = lines._record_ends(np.frombuffer(block, np.uint8), True, lines._FIELD)
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
