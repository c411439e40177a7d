from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from salience import papers
from salience.errors import DataError, InputError
from salience.evidence import Evidence, NoControl, Outcome, source_hash, state, store
from salience.evidence.store import SeedRun

Toy = Callable[..., Outcome]
Made = Callable[..., Evidence]


@pytest.fixture
def evidence(house: Path, toy_outcome: Toy) -> Made:
    """Makes the evidence of toy-pass from the outcomes of seeds 11, 12, 13; None is a failed run."""

    def make(*outcomes: Outcome | None, **changed: Any) -> Evidence:
        runs = {
            seed: SeedRun(0.123, outcome, *(() if outcome else ("boom", "Traceback: boom")))
            for seed, outcome in zip(store.JUDGING_SEEDS, outcomes or [toy_outcome()] * 3)
        }
        fresh = source_hash(papers.get("toy-pass"))
        return replace(Evidence("toy-pass", "desk", 11, runs, {"python": "3.11"}, fresh), **changed)

    return make


def test_what_is_written_reads_back(evidence: Made, toy_outcome: Toy, tmp_path: Path) -> None:
    odd = replace(toy_outcome(gain=math.nan), controls=[NoControl("none exists")], intervals={"gain": (math.nan, 1.0)})
    file = store.write(evidence(toy_outcome(), odd, None), tmp_path)
    back = store.read("toy-pass", tmp_path)
    assert back is not None
    assert back.runs[11] == SeedRun(0.12, toy_outcome())
    assert back.runs[12].outcome is not None and math.isnan(back.runs[12].outcome.figures["gain"])
    assert back.runs[12].outcome.controls == (NoControl("none exists"),)
    assert back.runs[13] == SeedRun(0.12, None, "boom", "Traceback: boom")
    assert "NaN" not in file.read_text()
    assert [path.name for path in tmp_path.iterdir() if path.suffix in (".json", ".tmp")] == ["toy-pass.json"]
    store.write(back, tmp_path / "again")
    assert (tmp_path / "again" / "toy-pass.json").read_bytes() == file.read_bytes()


def test_figures_keep_six_digits_and_bars_at_zero_survive(evidence: Made, toy_outcome: Toy, tmp_path: Path) -> None:
    outcome = replace(
        toy_outcome(gain=0.123456789), bars=[store.Bar("gain", at_least=0.0), store.Bar("p", at_most=1 / 3)]
    )
    third = replace(outcome, figures={**outcome.figures, "p": 1 / 3})
    store.write(evidence(third), tmp_path)
    data = json.loads((tmp_path / "toy-pass.json").read_text())
    assert data["seeds"]["11"]["figures"]["gain"] == 0.123457
    assert data["seeds"]["11"]["bars"][0] == {"figure": "gain", "at_least": 0.0}
    back = store.read("toy-pass", tmp_path)
    assert back is not None and back.measured[0].bars[1].holds(back.measured[0].figures)


def test_a_failed_write_leaves_the_old_file(
    evidence: Made, toy_outcome: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = store.write(evidence(), tmp_path)
    before = file.read_bytes()

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(store.os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        store.write(evidence(None, None, None), tmp_path)
    assert file.read_bytes() == before
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"seeds": {"eleven": {}}}'])
def test_a_damaged_file_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "toy-pass.json").write_text(text)
    with pytest.raises(DataError, match=r"toy-pass\.json"):
        store.read("toy-pass", tmp_path)


def test_states_follow_from_the_outcomes(evidence: Made, toy_outcome: Toy, tmp_path: Path) -> None:
    paper = papers.get("toy-pass")

    def stored(made: Evidence) -> store.State:
        store.write(made, tmp_path)
        return state(paper, tmp_path)

    assert state(papers.get("toy-plan"), tmp_path).name == "planned"
    assert state(paper, tmp_path).name == "implemented"
    assert stored(evidence()).name == "shown (mechanism)"
    assert stored(evidence(*[toy_outcome(level="claim")] * 3)).name == "shown (claim)"
    assert stored(evidence(*[toy_outcome(level="paper")] * 3)).name == "reproduced"
    assert stored(evidence(toy_outcome(), toy_outcome(gain=0.1), toy_outcome())).name == "not shown"
    assert stored(evidence(toy_outcome(), None, toy_outcome())).reasons == ("seed 12: the run failed",)
    assert stored(evidence(*[toy_outcome(fake=0.9)] * 3)).name == "not shown"
    assert stored(evidence(None, None, None)).name == "not shown"
    assert stored(evidence(scale="smoke")).name == "implemented"
    assert stored(evidence(toy_outcome())).reasons == ("seed 12: not run", "seed 13: not run")
    assert state(paper, tmp_path, seeds=()).name == "shown (mechanism)"
    stale = stored(evidence(toy_outcome(), None, toy_outcome(), source_hash="old"))
    assert (stale.name, str(stale)) == ("stale", "stale (was: not shown)")


METHOD = '''"""What it is."""
LIMIT = 3


class Toy:
    """A toy."""

    def fit(self, x=None):
        """Fit."""
        return x, f"{LIMIT}"
'''


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("A toy.", "Another docstring.", True),
        ('"""Fit."""\n        ', "", True),
        ("LIMIT = 3", "LIMIT   =   3  # a comment", True),
        ("LIMIT = 3", "LIMIT = 4", False),
        ("LIMIT = 3", "LIMIT = 3.0", False),
        ("LIMIT = 3", "LIMIT = True", False),
        ("x=None", "x=0", False),
        ("return x", "return -x", False),
        ("{LIMIT}", "{LIMIT}!", False),
        ("class Toy:", "class Toy(list):", False),
    ],
)
def test_hash_follows_the_program_only(house: Path, old: str, new: str, same: bool) -> None:
    file = house / "data" / "toy.py"
    file.write_text(METHOD)
    before = source_hash(papers.get("toy-pass"))
    assert old in METHOD
    file.write_text(METHOD.replace(old, new))
    assert (source_hash(papers.get("toy-pass")) == before) is same


def test_hash_covers_the_reproduction_and_a_whole_method_folder(house: Path) -> None:
    paper = papers.get("toy-pass")
    hashes = [source_hash(paper)]
    script = house / "reproductions" / "toy_pass.py"
    script.write_text(script.read_text() + "\nMORE = 1\n")
    hashes.append(source_hash(paper))
    folder = house / "data" / "toy"
    folder.mkdir()
    (house / "data" / "toy.py").rename(folder / "__init__.py")
    hashes.append(source_hash(paper))
    (folder / "weights.py").write_text("ONE = 1\n")
    hashes.append(source_hash(paper))
    (folder / "weights.py").write_text("ONE = 2\n")
    hashes.append(source_hash(paper))
    script.unlink()
    hashes.append(source_hash(paper))
    assert len(set(hashes)) == len(hashes)


def test_hash_names_an_entry_that_is_not_there(house: Path) -> None:
    paper = papers.get("toy-pass")
    with pytest.raises(InputError, match=r"salience\.data:Tog"):
        source_hash(replace(paper, entry=("salience.data:Tog",)))
    (house / "data" / "toy.py").write_text("def broken(:\n")
    with pytest.raises(DataError, match=r"toy\.py, line 1"):
        source_hash(paper)
    (house / "data" / "toy.py").unlink()
    with pytest.raises(DataError, match="neither"):
        source_hash(paper)


def test_hash_does_not_import_the_method(house: Path) -> None:
    (house / "data" / "toy.py").write_text("raise SystemExit('imported')\n")
    assert len(source_hash(papers.get("toy-pass"))) == 64


def test_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SALIENCE_HOME", str(tmp_path / "own"))
    assert store.home() == tmp_path / "own"
    monkeypatch.delenv("SALIENCE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store.home() == tmp_path / "salience"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store.home() == tmp_path / ".cache" / "salience"
