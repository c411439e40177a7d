"""A folder as output: absent, old or complete."""

from __future__ import annotations

import json

import pytest

from salience.errors import InputError
from salience.io import OutputFolder


def write(path, text: str, **options) -> None:
    with OutputFolder(path, **options) as folder:
        folder.file("deep/a.txt").write_text(text)
        folder.commit({"command": "test"})


def test_it_appears_complete(tmp_path):
    with OutputFolder(tmp_path / "out") as folder:
        folder.file("deep/a.txt").write_text("one")
        assert not (tmp_path / "out").exists()
        manifest = folder.commit({"command": "test"})
    assert (tmp_path / "out" / "deep" / "a.txt").read_text() == "one"
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest
    assert manifest["files"]["deep/a.txt"]["bytes"] == 3
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), OutputFolder(tmp_path / "out") as folder:
        folder.file("a.txt").write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_ours_is_replaced_when_told(tmp_path):
    write(tmp_path / "out", "one")
    with pytest.raises(InputError, match="--overwrite"):
        write(tmp_path / "out", "two")
    write(tmp_path / "out", "two", overwrite=True)
    assert (tmp_path / "out" / "deep" / "a.txt").read_text() == "two"
    with pytest.raises(RuntimeError), OutputFolder(tmp_path / "out", overwrite=True) as folder:
        folder.file("b.txt").write_text("half")
        raise RuntimeError
    assert (tmp_path / "out" / "deep" / "a.txt").read_text() == "two"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_other_folders_are_never_replaced(tmp_path):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", "one")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("precious")
    (tmp_path / "photos" / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match="did not write"):
        write(tmp_path / "photos", "one", overwrite=True)
    assert (tmp_path / "photos" / "a.jpg").exists()
    with pytest.raises(InputError, match="no folder"):
        write(tmp_path / "photos" / "a.jpg", "one", overwrite=True)
    with pytest.raises(InputError, match="does not exist"):
        write(tmp_path / "nowhere" / "out", "one")
