"""Outputs are complete or absent; chosen records come out as they went in; what is refused is refused early."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from salience.errors import DataError, InputError
from salience.io import Corpus, Output, RecordWriter, checksum, lines, read, records_of, write_quarantine, writer


def copy(pool: Corpus, path: Path, keep) -> int:
    """Write the records whose text `keep` wants; gives their number."""
    records = RecordWriter(path, path.name, pool)
    count = 0
    for unit in pool.units:
        for batch in read(pool, unit, whole=True):
            mask = np.array([keep(text) for text in batch.text.to_pylist()], dtype=bool)
            count += records.write(records_of(batch, mask, records.format))
    records.close()
    return count


def inflated(path: Path) -> bytes:
    codec = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    if codec is None:
        return path.read_bytes()
    with pa.CompressedInputStream(pa.OSFile(str(path)), codec) as stream:
        return stream.read()


def wanted(text: str) -> bool:
    return "w" in text


# --- records ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("block_bytes", [16, 4 << 20])
def test_json_lines_are_copied_byte_for_byte(
    tmp_path: Path, ending: str, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "BLOCK_BYTES", block_bytes)
    kept = [b'{"n":1e0,  "text":"w\\u00e9"}', b'{"text": "w2", "x": "\\udc00"}', '{"text":"wü"}'.encode()]
    data = b"\xef\xbb\xbf" + kept[0] + b"\r\n\n" + b'{"text":"no"}\n{"text":1}\n' + kept[1] + b"\n" + kept[2]
    (tmp_path / "in.jsonl").write_bytes(data)
    out = tmp_path / f"out{ending}"
    assert copy(Corpus(tmp_path / "in.jsonl"), out, wanted) == 3
    assert inflated(out) == b"".join(record + b"\n" for record in kept)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_csv_rows_are_copied_under_their_header(tmp_path: Path, newline: str) -> None:
    rows = [["1", 'w, "x"\nz'], ["2", "no"], ["3", ""], ["4", "w"]]
    for name, part in (("a.csv", rows[:2]), ("b.csv", rows[2:])):
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator=newline).writerows([["id", "text"], *part])
        (tmp_path / name).write_bytes(buffer.getvalue().encode())
    (tmp_path / "empty.csv").touch()
    pool = Corpus([tmp_path / name for name in ("a.csv", "b.csv", "empty.csv")])
    assert copy(pool, tmp_path / "out.csv", wanted) == 2
    with open(tmp_path / "out.csv", newline="") as file:
        assert list(csv.reader(file)) == [["id", "text"], rows[0], rows[3]]
    assert b"\r" not in (tmp_path / "out.csv").read_bytes()
    assert copy(pool, tmp_path / "out.jsonl", wanted) == 2
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert found == [{"id": "1", "text": 'w, "x"\nz'}, {"id": "4", "text": "w"}]


def test_a_csv_header_without_a_line_end_gets_one(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,n")
    (tmp_path / "b.csv").write_text("text,n\nw,1")
    copy(Corpus(tmp_path), tmp_path / "out.csv", wanted)
    assert (tmp_path / "out.csv").read_text() == "text,n\nw,1\n"


def test_lines_of_text_are_copied_as_lines_or_as_json(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("wü\r\nno\n\n w".encode())
    pool = Corpus(tmp_path / "a.txt", "body")
    copy(pool, tmp_path / "out.txt", wanted)
    assert (tmp_path / "out.txt").read_bytes() == "wü\n w\n".encode()
    copy(pool, tmp_path / "out.jsonl", wanted)
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [
        {"text": "wü"},
        {"text": " w"},
    ]


TABLE = pa.table(
    {
        "text": ["w1", "no", None, "w2"],
        "tags": pa.array([["a"], [], None, ["b", "c"]], pa.list_(pa.field("element", pa.string()))),
        "when": pa.array([0, 1, 2, 3], pa.timestamp("ms")),
        "raw": pa.array([b"\xff", b"", None, b"x"]),
    }
)


def test_parquet_rows_keep_all_columns_and_types(tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "a.parquet", row_group_size=1)
    pq.write_table(TABLE.slice(3), tmp_path / "b.parquet")
    assert copy(Corpus(tmp_path), tmp_path / "out.parquet", wanted) == 3
    chosen = pa.concat_tables([TABLE.slice(0, 1), TABLE.slice(3), TABLE.slice(3)])
    assert pq.read_table(tmp_path / "out.parquet").equals(chosen)
    assert pq.read_metadata(tmp_path / "out.parquet").num_row_groups == 1  # not one per batch


def test_parquet_row_groups_stay_small_enough_for_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_GROUP_BYTES", 1000)
    table = pa.table({"text": [f"w{n:099d}" for n in range(100)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    copy(Corpus(tmp_path / "a.parquet"), tmp_path / "out.parquet", wanted)
    assert pq.read_table(tmp_path / "out.parquet")["text"].to_pylist() == table["text"].to_pylist()
    assert pq.read_metadata(tmp_path / "out.parquet").num_row_groups == 10


def test_a_flipped_bit_in_parquet_that_we_wrote_is_found(tmp_path: Path) -> None:
    copy(Corpus(pa.table({"text": [f"w{n}" for n in range(2000)]})), tmp_path / "out.parquet", wanted)
    data = bytearray((tmp_path / "out.parquet").read_bytes())
    data[len(data) // 3] ^= 1
    (tmp_path / "out.parquet").write_bytes(data)
    with pytest.raises(OSError, match="CRC checksum"):
        pq.read_table(tmp_path / "out.parquet", page_checksum_verification=True)


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
@pytest.mark.parametrize("frame", [pd.DataFrame, pl.DataFrame, pa.table])
def test_tables_in_memory(tmp_path: Path, frame, ending: str) -> None:
    out = tmp_path / f"out{ending}"
    pool = Corpus(frame({"text": ["w", "no", None, "ww"], "kind": ["a", "b", "c", "d"]}))
    assert copy(pool, out, wanted) == 2
    found = (
        pq.read_table(out).to_pylist()
        if ending == ".parquet"
        else [json.loads(line) for line in out.read_text().splitlines()]
    )
    assert found == [{"text": "w", "kind": "a"}, {"text": "ww", "kind": "d"}]


def test_an_empty_choice_is_a_readable_file(tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "a.parquet")
    assert copy(Corpus(tmp_path / "a.parquet"), tmp_path / "out.parquet", lambda text: False) == 0
    assert pq.read_table(tmp_path / "out.parquet").schema.equals(TABLE.schema)


def test_what_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    broken = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"], pa.binary()).buffers())
    for column, message in (
        (pa.array([b"x"]), "holds bytes, which JSON cannot"),
        (pa.array([float("nan")]), "holds what JSON cannot"),
        (pa.array([[1.0, float("inf")]]), "holds what JSON cannot"),
        (broken, "holds what JSON cannot: .*utf-8"),
    ):
        pq.write_table(pa.table({"text": ["w"], "other": column}), tmp_path / "a.parquet")
        with pytest.raises(DataError, match=rf"a\.parquet {message}"):
            copy(Corpus(tmp_path / "a.parquet"), tmp_path / "out.jsonl", wanted)
    (tmp_path / "a.csv").write_text("text,n,n\nw,1,2\n")
    with pytest.raises(DataError, match="several columns called 'n'"):
        copy(Corpus(tmp_path / "a.csv"), tmp_path / "out.jsonl", wanted)


@pytest.mark.parametrize(
    ("inputs", "name", "message"),
    [
        (["a.jsonl"], "out", "unknown ending"),
        (["a.jsonl"], "out.xlsx", "unknown ending"),
        (["a.jsonl"], "out.gz", "unknown ending"),
        (["a.parquet"], "out.parquet.gz", "unknown ending"),
        (["a.jsonl"], "out.csv", "cannot take jsonl records"),
        (["a.jsonl", "a.parquet", "a.csv"], "out.parquet", "cannot take csv, jsonl records"),
    ],
)
def test_outputs_that_cannot_take_the_inputs(tmp_path: Path, inputs: list[str], name: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "w"}\n')
    (tmp_path / "a.csv").write_text("text\nw\n")
    pq.write_table(TABLE, tmp_path / "a.parquet")
    with pytest.raises(InputError, match=message):
        RecordWriter(tmp_path / "temporary", name, Corpus([tmp_path / file for file in inputs]))


def test_inputs_with_other_columns_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,a\nw,1\n")
    (tmp_path / "b.csv").write_text("text,b\nw,1\n")
    with pytest.raises(DataError, match=r"a\.csv and .*b\.csv have different columns"):
        copy(Corpus([tmp_path / "a.csv", tmp_path / "b.csv"]), tmp_path / "out.csv", wanted)
    assert copy(Corpus([tmp_path / "a.csv", tmp_path / "b.csv"]), tmp_path / "out.jsonl", wanted) == 2
    for other in (TABLE.drop_columns(["raw"]), TABLE.set_column(1, "tags", pa.array(["x"] * 4))):
        pq.write_table(TABLE, tmp_path / "a.parquet")
        pq.write_table(other, tmp_path / "b.parquet")
        with pytest.raises(DataError, match="different columns"):
            copy(Corpus([tmp_path / "a.parquet", tmp_path / "b.parquet"]), tmp_path / "out.parquet", wanted)


# --- the output as a whole ----------------------------------------------------------------------------------


def fill(output: Output, text: str, quarantine: bool = False) -> None:
    output.file().write_text(text)
    if quarantine:
        output.file(".quarantine.jsonl").write_text("{}\n")


def test_commit_writes_a_manifest_with_true_checksums(tmp_path: Path) -> None:
    with Output(tmp_path / "out.txt") as output:
        fill(output, "hello\n", quarantine=True)
        output.file(".unused")  # never written
        assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".partial")] == []
        manifest = output.commit({"seed": 3})
    assert sorted(os.listdir(tmp_path)) == ["out.txt", "out.txt.manifest.json", "out.txt.quarantine.jsonl"]
    written = json.loads((tmp_path / "out.txt.manifest.json").read_text())
    assert written == manifest and manifest["seed"] == 3
    assert manifest["files"]["out.txt"] == {"bytes": 6, "xxh3_128": xxhash.xxh3_128_hexdigest(b"hello\n")}
    assert set(manifest["files"]) == {"out.txt", "out.txt.quarantine.jsonl"}
    assert checksum(tmp_path / "out.txt") == xxhash.xxh3_128_hexdigest(b"hello\n")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("before", [False, True])
def test_an_exception_leaves_nothing_new(tmp_path: Path, error: type[BaseException], before: bool) -> None:
    if before:
        with Output(tmp_path / "out.txt") as output:
            fill(output, "old\n", quarantine=True)
            output.commit({})
    names = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(error), Output(tmp_path / "out.txt", overwrite=True) as output:
        fill(output, "new\n", quarantine=True)
        raise error
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == names


def test_an_existing_output_is_refused_or_replaced_as_a_whole(tmp_path: Path) -> None:
    with Output(tmp_path / "out.txt") as output:
        fill(output, "old\n", quarantine=True)
        output.commit({})
    with pytest.raises(InputError, match=r"out\.txt exists; pass --overwrite"):
        Output(tmp_path / "out.txt")
    with Output(tmp_path / "out.txt", overwrite=True) as output:
        fill(output, "new\n")
        manifest = output.commit({})
    assert sorted(os.listdir(tmp_path)) == ["out.txt", "out.txt.manifest.json"]  # no stale quarantine
    assert (tmp_path / "out.txt").read_text() == "new\n" and list(manifest["files"]) == ["out.txt"]


@pytest.mark.parametrize("step", range(1, 6))
def test_no_manifest_ever_stands_beside_files_that_it_does_not_describe(
    tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop `commit` before each of its renames and removals, as a kill would."""
    with Output(tmp_path / "out.txt") as output:
        fill(output, "old\n", quarantine=True)
        output.commit({})
    steps = []

    def counted(function):
        def call(*arguments, **options):
            steps.append(function)
            if len(steps) == step:
                raise KeyboardInterrupt
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", counted(os.replace))
        patch.setattr(Path, "unlink", counted(Path.unlink))
        with pytest.raises(KeyboardInterrupt), Output(tmp_path / "out.txt", overwrite=True) as output:
            fill(output, "new\n", quarantine=True)
            output.commit({})
    assert (tmp_path / "out.txt").read_text() in ("old\n", "new\n")
    assert not list(tmp_path.glob("*.partial"))
    if (tmp_path / "out.txt.manifest.json").exists():
        files = json.loads((tmp_path / "out.txt.manifest.json").read_text())["files"]
        assert {name: checksum(tmp_path / name) for name in files} == {
            name: entry["xxh3_128"] for name, entry in files.items()
        }


def test_outputs_that_cannot_be_written_are_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "in.jsonl")
    pool = Corpus(tmp_path / "in.jsonl")
    for path, message in (
        (tmp_path, "is a directory"),
        (tmp_path / "absent" / "out.txt", r"folder .*absent does not exist"),
        (tmp_path / "in.jsonl" / "out.txt", r"folder .*in\.jsonl does not exist"),
        (tmp_path / "in.jsonl", "is one of the inputs"),
        (tmp_path / "link.jsonl", "is one of the inputs"),
    ):
        with pytest.raises(InputError, match=message):
            Output(path, True, [pool, Corpus.of_texts(["a"])])
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(InputError, match="cannot be written to"):
        Output(tmp_path / "out.txt")
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "link.jsonl"]


def test_the_quarantine_holds_file_offset_reason_and_raw_bytes(tmp_path: Path) -> None:
    bad = [b'{"text": 1}', b'{"text": "\xff"}', '{"tëxt": "\u2028"}'.encode(), b'{"text": "\x00\x1b"}']
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(bad) + b"\n")
    pool = Corpus(tmp_path / "in.jsonl")
    records = [(batch.source.path, record) for batch in read(pool, pool.units[0]) for record in batch.bad]
    write_quarantine(tmp_path / "bad.jsonl", records)
    written = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text(encoding="ascii").split("\n")[:-1]]
    assert [line["file"] for line in written] == [str(tmp_path / "in.jsonl")] * 4
    assert [line["offset"] for line in written] == np.cumsum([0, *(len(raw) + 1 for raw in bad[:-1])]).tolist()
    assert all(line["reason"] for line in written)
    raw = [base64.b64decode(line["raw_base64"]) if "raw_base64" in line else line["raw"].encode() for line in written]
    assert raw == bad and "raw_base64" in written[1]
