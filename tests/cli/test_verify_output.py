"""`salience verify output`: exit codes, names of what is wrong, nothing hostile on a terminal."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from salience.io import Output


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, salience):
    monkeypatch.chdir(tmp_path)
    with Output(tmp_path / "out", folder=True) as output:
        output.file("a\x1b[31m.txt").write_text("x")
        output.file("b.txt").write_text("x")
        output.commit({})
    return partial(salience, "verify", "output")


def test_an_output_as_it_was_written(run) -> None:
    assert run("out") == (0, "2 files, 2 bytes: all as they were written\n", "")
    code, out, err = run("out", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {
        "path": "out", "ok": True, "files": 2, "bytes": 2, "damaged": {}, "missing": [], "unexpected": []
    }  # fmt: skip


def test_what_is_wrong_is_named(run, tmp_path: Path) -> None:
    (tmp_path / "out" / "a\x1b[31m.txt").write_text("y")
    (tmp_path / "out" / "b.txt").rename(tmp_path / "out" / "c.txt")
    code, out, err = run("out")
    assert code == 3 and err == "salience: out is not what was written\n"
    assert out == "damaged: a\\x1b[31m.txt: its checksum differs\nmissing: b.txt\nunexpected: c.txt\n"
    code, out, err = run("out", "--json")
    assert code == 3 and err.endswith("unexpected: c.txt\nsalience: out is not what was written\n")
    found = json.loads(out)
    assert (found["ok"], found["missing"], found["unexpected"]) == (False, ["b.txt"], ["c.txt"])


def test_no_output_or_no_manifest_is_exit_2(run, tmp_path: Path) -> None:
    assert run("absent") == (2, "", "salience: absent does not exist\n")
    (tmp_path / "out" / "manifest.json").unlink()
    code, out, err = run("out")
    assert (code, out) == (2, "") and err.startswith("salience: out has no manifest (")
