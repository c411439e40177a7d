"""Nothing that changes in an output stays unseen: every flipped bit, every cut, every file lost or added."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from salience.errors import InputError
from salience.io import Corpus, Output, RecordWriter, checksum, read, records_of, verify_output, writer

WORDS = ["wave", "tide", "harbour", "anchor", "sail", "reef", "gull", "salt", "net", "mast"]


def table(rows: int) -> pa.Table:
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=20)) for _ in range(rows)]
    tags = pa.array([["a", "b"][: n % 3] for n in range(rows)], pa.list_(pa.string()))
    return pa.table({"text": texts, "n": np.arange(rows) / 7, "tags": tags})


def make(out: Path) -> None:
    """An output as `select text` writes it: records, and a quarantine."""
    pool = Corpus(table(300))
    with Output(out) as output:
        records = RecordWriter(output.file(), out.name, pool)
        for unit in pool.units:
            for batch in read(pool, unit, whole=True):
                records.write(records_of(batch, np.ones(len(batch), bool), records.format))
        records.close()
        output.file(".quarantine.jsonl").write_text('{"file": "a", "offset": 3, "reason": "r", "raw": "x"}\n')
        output.commit({"command": "select text", "counts": {"read": 300}})


def damage(out: Path, flips: int, cuts: int, seed: int) -> None:
    """Flip bits and cut files, the manifest included, and demand that each is found and named."""
    draw = random.Random(seed)
    files = sorted(out.parent.iterdir())
    whole = {path: path.read_bytes() for path in files}
    for number in range(flips + cuts):
        path = files[0] if number % 5 else draw.choice(files)  # four of five in the records themselves
        data = bytearray(whole[path])
        if number < flips:
            bit = draw.randrange(8 * len(data))
            data[bit // 8] ^= 1 << bit % 8
        else:
            del data[draw.randrange(len(data)) :]
        path.write_bytes(data)
        result = verify_output(out)
        path.write_bytes(whole[path])
        assert not result.ok and [name for name, _ in result.damaged] == [path.name], (path.name, number)
    assert verify_output(out).ok


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_GROUP_BYTES", 10_000)
    monkeypatch.setattr("salience.io.corpus.TABLE_ROWS", 50)


ENDINGS = [".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_flipped_bits_and_cuts_are_found(tmp_path: Path, ending: str, small_groups: None) -> None:
    make(tmp_path / f"out{ending}")
    if ending == ".parquet":
        assert pq.read_metadata(tmp_path / "out.parquet").num_row_groups == 3
    damage(tmp_path / f"out{ending}", 60, 20, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("ending", ENDINGS)
def test_1500_flipped_bits_and_200_cuts_are_found(tmp_path: Path, ending: str, small_groups: None) -> None:
    make(tmp_path / f"out{ending}")
    damage(tmp_path / f"out{ending}", 1500, 200, seed=1)


def test_readers_alone_would_not_have_found_them(tmp_path: Path) -> None:
    """The control: JSON lines with a flipped bit are often read without an error, and differ."""
    make(tmp_path / "out.jsonl")
    whole, silent = (tmp_path / "out.jsonl").read_bytes(), 0
    for seed in range(50):
        data = bytearray(whole)
        data[random.Random(seed).randrange(len(data))] ^= 1
        try:
            silent += [json.loads(line) for line in data.splitlines()] != [
                json.loads(line) for line in whole.splitlines()
            ]
        except ValueError:
            continue
    assert silent > 10


@pytest.mark.parametrize("folder", [False, True])
def test_files_lost_and_added_are_named(tmp_path: Path, folder: bool) -> None:
    out = tmp_path / "out"
    with Output(out, folder=folder) as output:
        for name in ("", ".quarantine.jsonl") if not folder else ("a.txt", "deep/b.txt"):
            output.file(name).write_text("x")
        output.commit({})
    result = verify_output(out)
    assert (result.ok, result.files, result.bytes) == (True, 2, 2)
    assert result.manifest["files"].keys() == ({"a.txt", "deep/b.txt"} if folder else {"out", "out.quarantine.jsonl"})
    lost = out / "deep" / "b.txt" if folder else tmp_path / "out.quarantine.jsonl"
    lost.unlink()
    result = verify_output(out)
    assert not result.ok and result.missing == ["deep/b.txt" if folder else "out.quarantine.jsonl"]
    assert not result.damaged and not result.unexpected
    lost.write_text("y")
    assert verify_output(out).damaged == [("deep/b.txt" if folder else "out.quarantine.jsonl", "its checksum differs")]
    lost.write_text("xx")
    assert verify_output(out).damaged[0][1] == "holds 2 bytes, not 1"
    (out / "a.txt" if folder else out).unlink()
    assert verify_output(out).missing == ["a.txt" if folder else "out"]


def test_added_files_are_named_but_for_hidden_ones(tmp_path: Path) -> None:
    with Output(tmp_path / "out", folder=True) as output:
        output.file("a.txt").write_text("x")
        output.commit({})
    with Output(tmp_path / "out.jsonl") as output:
        output.file().write_text("x")
        output.commit({})
    (tmp_path / "out" / ".DS_Store").write_text("x")
    (tmp_path / "out.jsonl.report.html").write_text("x")
    assert verify_output(tmp_path / "out").ok and verify_output(tmp_path / "out.jsonl").ok
    (tmp_path / "out" / "more.txt").write_text("x")
    (tmp_path / "out.jsonl.quarantine.jsonl").write_text("x")
    assert verify_output(tmp_path / "out").unexpected == ["more.txt"]
    assert verify_output(tmp_path / "out.jsonl").unexpected == ["out.jsonl.quarantine.jsonl"]


def test_parquet_that_was_broken_before_its_checksum_was_taken(tmp_path: Path) -> None:
    with Output(tmp_path / "out", folder=True) as output:
        path = output.file("a.parquet")
        pq.write_table(table(100), path, write_page_checksum=True, compression="none")
        data = bytearray(path.read_bytes())
        data[data.index(b"harbour")] ^= 1
        path.write_bytes(data)
        output.commit({})
    ((name, reason),) = verify_output(tmp_path / "out").damaged
    assert name == "a.parquet" and reason.startswith("it was damaged before its checksum was taken (row group 0: ")


def test_without_a_manifest_nothing_can_be_said(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("x")
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("out.jsonl", r"has no manifest \(.*out\.jsonl\.manifest\.json\)"),
        ("folder", r"has no manifest \(.*manifest\.json\)"),
        ("absent", "does not exist"),
    ):
        with pytest.raises(InputError, match=message):
            verify_output(tmp_path / name)


def forged(files: object) -> bytes:
    body = json.dumps({"salience": "0.1.0", "files": files}, indent=1).removesuffix("\n}")
    return f'{body},\n "manifest_xxh3_128": "{xxhash.xxh3_128_hexdigest(body.encode())}"\n}}\n'.encode()


def test_manifests_that_we_did_not_write(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (tmp_path / "out").mkdir()
    entry = {"bytes": 1, "xxh3_128": checksum(tmp_path / "secret")}
    for data, reason in (
        (b"", "is no manifest of salience"),
        (b"\xff\xfe{}", "is no manifest of salience"),
        (b'{"name": "app", "icons": []}', "is no manifest of salience"),
        (forged([]), "is no manifest of salience"),
        (forged({"a": 1}), "is no manifest of salience"),
        (forged({"a": {"bytes": "1", "xxh3_128": ""}}), "is no manifest of salience"),
        (forged({})[:-3], "is cut short or changed"),
        (forged({}) + b"\n", "is cut short or changed"),
    ):
        (tmp_path / "out" / "manifest.json").write_bytes(data)
        assert verify_output(tmp_path / "out").damaged == [("manifest.json", reason)]
    for name in ("../secret", str(tmp_path / "secret"), "a/../../secret"):
        (tmp_path / "out" / "manifest.json").write_bytes(forged({name: entry}))
        assert verify_output(tmp_path / "out").damaged == [(name, "lies outside of the output")]
