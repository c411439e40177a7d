"""What can be read, in which formats, and what is said of that which cannot."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reading import Found, as_csv, collect, compressed, jsonl, texts

from salience.errors import DataError, InputError, NothingToDo
from salience.io import Corpus, corpus, lines, peek, read, reader

TEXTS = ["one", 'two, "quoted"\nsecond line', "", "dréi 🦆", "  spaces  "]


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
def test_parquet_row_groups_are_units_and_nulls_are_named(
    tmp_path: Path, kind: pa.DataType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "BATCH_ROWS", 2)
    values = [*TEXTS, None, "last"]
    table = pa.table({"id": range(7), "text": pa.array(values).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    pool = Corpus(tmp_path / "a.parquet")
    assert [unit.first_row for unit in pool.units] == [0, 5]
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


def test_rows_keep_their_numbers_behind_a_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "BATCH_ROWS", 2)
    table = pa.table({"text": ["a", None, "b", None, "c"]})
    pq.write_table(table, tmp_path / "a.parquet")
    for pool in (Corpus(table), Corpus(tmp_path)):
        assert [row for _, row, _ in collect(pool).documents] == [0, 2, 4]


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
