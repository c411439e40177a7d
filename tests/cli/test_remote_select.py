"""`salience select text` on remote stores: the rows of a local run, and no connection that nobody asked for."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import salience
from salience.io import Corpus, verify_output
from stores import put_tree, tree

SEA = ["wave", "tide", "harbour", "anchor", "sail", "reef", "gull", "salt", "net", "mast", "rope", "storm"]
LAW = ["court", "judge", "statute", "appeal", "clause", "ruling", "party", "claim", "contract", "duty", "motion"]
SMALL = ["--count", "40", "--buckets", "200", "--min-tokens", "5", "--smoothing", "1", "--report", "report.html"]


def texts(first: int, count: int) -> list[str]:
    words = [LAW if number % 5 else SEA for number in range(count)]
    return [" ".join(random.Random(first + n).choices(words[n], k=24)) for n in range(count)]


def as_lines(values: list[str]) -> str:
    return "".join(json.dumps({"text": text, "n": n}) + "\n" for n, text in enumerate(values))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``raw/`` with three files in two folders, and ``target/``; the current folder."""
    (tmp_path / "raw" / "deep").mkdir(parents=True)
    (tmp_path / "target").mkdir()
    (tmp_path / "raw" / "a.jsonl").write_text(as_lines(texts(0, 200)))
    (tmp_path / "raw" / "deep" / "b.jsonl.gz").write_bytes(gzip.compress(as_lines(texts(200, 200)).encode()))
    pq.write_table(pa.table({"text": texts(400, 200)}), tmp_path / "raw" / "c.parquet", row_group_size=50)
    sea = [" ".join(random.Random(1000 + n).choices(SEA, k=24)) for n in range(200)]
    (tmp_path / "target" / "t.jsonl").write_text(as_lines(sea))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(folder: Path, salience):
    return salience


def test_the_rows_of_a_local_run(run, folder: Path, store: str) -> None:
    code, _, err = run("select", "text", "raw", "--target", "target/t.jsonl", "-o", "out.jsonl", *SMALL)
    assert code == 0, err
    put_tree(folder / "raw", f"{store}/data/raw")
    put_tree(folder / "target", f"{store}/data/target")
    code, out, err = run(
        "select", "text", f"{store}/data/raw", "--target", f"{store}/data/target/t.jsonl", "-o", f"{store}/out.jsonl",
        *SMALL, "--overwrite", "--workers", "3", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["selected"] == 40
    found = tree(store)
    assert found["out.jsonl"] == (folder / "out.jsonl").read_bytes() and len(found["out.jsonl"].splitlines()) == 40
    there, here = json.loads(found["out.jsonl.manifest.json"]), json.loads(Path("out.jsonl.manifest.json").read_text())
    assert all(there[part] == here[part] for part in ("files", "counts", "proof"))
    assert there["facts"]["choice"] == here["facts"]["choice"]
    assert verify_output(f"{store}/out.jsonl").ok
    assert run("verify", "output", f"{store}/out.jsonl")[0] == 0
    code, _, err = run(
        "select", "text", f"{store}/data/raw", "--target", "target", "-o", f"{store}/out.jsonl", "--count", "3",
        "--report", "other.html",
    )  # fmt: skip
    assert code == 2 and "exists; pass --overwrite" in err
    assert tree(store) == found


def test_failures_leave_nothing_in_the_store(run, store: str, folder: Path) -> None:
    put_tree(folder / "raw", f"{store}/raw")
    before = tree(store)
    code, _, err = run(
        "select", "text", f"{store}/raw", "--target", "target", "-o", f"{store}/out.jsonl", "--count", "100000",
        "--report", "report.html",
    )  # fmt: skip
    assert code == 2 and "Traceback" not in err and tree(store) == before
    code, _, err = run("select", "text", f"{store}/absent", "--target", "target", "-o", f"{store}/out.jsonl", *SMALL)
    assert (code, err.count("\n")) == (2, 1) and err.endswith("absent does not exist\n")


def test_a_store_out_of_reach_is_exit_3(run, other_s3: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    code, _, err = run("select", "text", "s3://bucket/raw", "--target", "target", "-o", "out.jsonl", *SMALL)
    assert code == 3 and err.startswith("salience: s3://bucket/raw cannot be reached (") and err.count("\n") == 1


PROBE = """
import sys
opened = []
def watch(event, arguments):
    if event.startswith("socket."):
        opened.append(event)
sys.addaudithook(watch)
sys.argv = ["salience", *sys.argv[1:]]
from salience.cli import main
try:
    main()
finally:
    print("SOCKETS", opened, "fsspec" in sys.modules, "s3fs" in sys.modules)
"""


def probe(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(Path(salience.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_local_paths_open_no_socket(folder: Path, s3: str) -> None:
    arguments = ["select", "text", "raw", "--target", "target", "-o", "out.jsonl", *SMALL]
    assert probe(folder, *arguments) == "SOCKETS [] False False"
    assert probe(folder, "verify", "output", "out.jsonl") == "SOCKETS [] False False"
    put_tree(folder / "raw", f"{s3}/raw")  # the control: the probe sees a connection
    assert "socket.connect" in probe(folder, *arguments[:2], f"{s3}/raw", *arguments[3:], "--overwrite")


def test_a_remote_input_with_a_local_output(run, folder: Path) -> None:
    store = "memory://local-output"
    put_tree(folder / "raw", f"{store}/raw")
    for source, name in (("raw", "here.jsonl"), (f"{store}/raw", "there.jsonl")):
        assert run("select", "text", source, "--target", "target", "-o", name, *SMALL, "--overwrite")[0] == 0
    assert Path("here.jsonl").read_bytes() == Path("there.jsonl").read_bytes()
    assert Corpus("there.jsonl").sources[0].version == ""
