"""A folder as output: absent, old or complete; nothing that we did not write is ever removed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from reading import texts

import salience
from salience.errors import InputError
from salience.io import Corpus, Output, checksum, verify_output
from salience.io.manifest import parse_manifest


def written(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


def make(path: Path, overwrite: bool = False, **files: str) -> dict:
    with Output(path, overwrite, folder=True) as output:
        for name, text in files.items():
            output.file(name.replace("_", "/") + ".txt").write_text(text)
        return output.commit({"seed": 3})


def test_the_folder_appears_whole_with_its_manifest(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Output(out, folder=True) as output:
        output.file("a.txt").write_text("hello\n")
        output.file("deep/er/b.txt").write_text("b")
        (output.folder / "saved").mkdir()  # as `save_pretrained` does
        (output.folder / "saved" / "c.bin").write_bytes(b"\x00")
        assert not out.exists()
        manifest = output.commit({"seed": 3})
    assert os.listdir(tmp_path) == ["out"]
    assert sorted(written(out)) == ["a.txt", "deep/er/b.txt", "manifest.json", "saved/c.bin"]
    assert parse_manifest((out / "manifest.json").read_bytes()) == manifest
    assert manifest["seed"] == 3 and list(manifest["files"]) == ["a.txt", "deep/er/b.txt", "saved/c.bin"]
    assert manifest["files"]["a.txt"] == {"bytes": 6, "xxh3_128": checksum(out / "a.txt")}
    (tmp_path / "plain").mkdir()
    assert out.stat().st_mode == (tmp_path / "plain").stat().st_mode  # not the mode of a temporary folder


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [False, True])
def test_an_exception_leaves_nothing_new(tmp_path: Path, error: type[BaseException], before: bool) -> None:
    if before:
        make(tmp_path / "out", a="old")
    names = written(tmp_path)
    with pytest.raises(error), Output(tmp_path / "out", overwrite=True, folder=True) as output:
        output.file("a.txt").write_text("new")
        raise error
    assert written(tmp_path) == names and len(os.listdir(tmp_path)) == before


def test_an_earlier_output_is_refused_or_replaced_as_a_whole(tmp_path: Path) -> None:
    make(tmp_path / "out", a="old", deep_b="old")
    with pytest.raises(InputError, match=r"out exists; pass --overwrite"):
        make(tmp_path / "out")
    manifest = make(tmp_path / "out", overwrite=True, a="new")
    assert os.listdir(tmp_path) == ["out"]
    assert sorted(written(tmp_path / "out")) == ["a.txt", "manifest.json"] and list(manifest["files"]) == ["a.txt"]


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_the_old_folder_comes_back_when_a_rename_fails(
    tmp_path: Path, step: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "out", a="old")
    before, rename, calls = written(tmp_path / "out"), os.rename, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == step:
            raise error
        rename(*arguments)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(error):
        make(tmp_path / "out", overwrite=True, a="new")
    assert written(tmp_path / "out") == before and os.listdir(tmp_path) == ["out"]


def test_what_cannot_come_back_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "out", a="old")
    rename = os.rename

    def once(*arguments):
        monkeypatch.setattr(os, "rename", broken)
        rename(*arguments)

    def broken(*arguments):
        raise OSError("broken")

    monkeypatch.setattr(os, "rename", once)
    with pytest.raises(OSError, match="broken"):
        make(tmp_path / "out", overwrite=True, a="new")
    (partial,) = tmp_path.iterdir()
    assert (partial / "replaced" / "a.txt").read_text() == "old"


def test_folders_that_we_did_not_write_are_never_replaced(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    (foreign / "manifest.json").write_text(json.dumps({"salience": "0.1.0", "files": {"thesis.txt": {}}}))
    with pytest.raises(InputError, match=r"is not replaced: its manifest\.json is no manifest of salience"):
        make(foreign, overwrite=True)
    (foreign / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"holds no manifest\.json of an earlier output"):
        make(foreign, overwrite=True)
    assert written(foreign) == {"thesis.txt": "mine"}
    for name in ("notes.txt", ".hidden", "deep/notes.txt"):
        make(tmp_path / "ours", overwrite=True, a="old")
        (tmp_path / "ours" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "ours" / name).write_text("mine")
        with pytest.raises(InputError, match=rf"holds {name}, which the earlier output did not write"):
            make(tmp_path / "ours", overwrite=True, a="new")
        assert (tmp_path / "ours" / name).read_text() == "mine"
        (tmp_path / "ours" / name).unlink()
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty", overwrite=True, a="new")


def test_folders_that_cannot_be_written_are_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    make(tmp_path / "out", a="old")
    (tmp_path / "out" / "in.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "link").symlink_to(tmp_path / "out")
    pool = Corpus(tmp_path / "out" / "in.jsonl")
    for path, inputs, message in (
        (tmp_path / "file", [], "is a file; name a folder"),
        (tmp_path / "absent" / "out", [], "absent does not exist"),
        (tmp_path / "out", [pool], "holds the input"),
        (tmp_path / "link", [pool], "holds the input"),
        (tmp_path / "out", [tmp_path / "out"], "is one of the inputs"),
        (tmp_path / "out" / "new", [tmp_path / "out"], "lies inside the input"),
    ):
        with pytest.raises(InputError, match=message):
            Output(path, True, inputs, folder=True)
    with pytest.raises(InputError, match="lies inside the input"):
        Output(tmp_path / "out" / "new.jsonl", inputs=[tmp_path / "out"])
    assert sorted(os.listdir(tmp_path)) == ["file", "link", "out"]


def test_a_folder_that_we_wrote_is_read_without_its_manifest_and_quarantine(tmp_path: Path) -> None:
    with Output(tmp_path / "out", folder=True) as output:
        output.file("part.jsonl").write_text('{"text": "a"}\n')
        output.file("quarantine.jsonl").write_text('{"text": "bad"}\n')
        output.commit({})
    assert texts(Corpus(tmp_path / "out")) == ["a"]


AGAIN_AND_AGAIN = """
import itertools, sys
from pathlib import Path
from salience.io import Output
for number in itertools.count():
    with Output(sys.argv[1], overwrite=True, folder=True) as output:
        for name in "abc":
            output.file(f"{name}/x.txt").write_text(f"{number}\\n" * 100)
        output.commit({"number": number})
    print(number, flush=True)
"""


def kill_often(folder: Path, times: int) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(salience.__file__).parents[1])}
    for number in range(times):
        out = folder / f"out{number}"
        process = subprocess.Popen(
            [sys.executable, "-c", AGAIN_AND_AGAIN, str(out)], env=environment, stdout=subprocess.PIPE
        )
        process.stdout.readline()
        time.sleep(random.Random(number).random() / 10)
        process.kill()
        process.communicate(timeout=60)
        if out.exists():
            assert verify_output(out).ok
            continue
        (aside,) = folder.glob(f".out{number}.*.partial/replaced")  # killed between the two renames: not lost
        assert verify_output(aside).ok


def test_sigkill_leaves_no_torn_folder(tmp_path: Path) -> None:
    kill_often(tmp_path, 3)


@pytest.mark.slow
def test_sigkill_at_fifty_moments_leaves_no_torn_folder(tmp_path: Path) -> None:
    kill_often(tmp_path, 50)
