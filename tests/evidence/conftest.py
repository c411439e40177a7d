"""A toy catalogue with a toy method and reproductions, seen by this process and by the runner's children."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

import salience.data
import salience.reproductions
from salience import papers
from salience.evidence import Bar, Control, Outcome, runner, sources, store

CATALOGUE = """
[toy-{name}]
number = {number}
title = "A toy that {name}s [bold]"
unit = "sample"
acts = ["select"]
takes = "nothing"
gives = "figures"
commands = ["select toy"]
fidelity = "code"
extra = "base"
claim = "the toy is better than random"
minutes = {minutes}
entry = {entry}
"""
NAMES = ["pass", "miss", "crash", "exit", "die", "print", "extra", "wrong", "wait", "plan", "lack"]

HEAD = """
import os
import sys
import time
from pathlib import Path

import numpy as np

from salience.evidence import Bar, Control, NoControl, Outcome, Run


def measure(run, value):
    controls = [Control("shuffled", "random", {"gain": 0.0}), Control("lexical", "fake", {"gain": 0.1})]
    bars = [Bar("gain", at_least=0.5, above="random")]
    return Outcome("gain", "mechanism", {"gain": value, "random": 0.25}, bars, controls,
                   intervals={"gain": (value - 0.1, value + 0.1)}, notes=["a toy"])


def reproduce(run: Run) -> Outcome:
"""
BODIES = {
    "pass": """
        run.step("measures")
        assert not list(run.scratch.iterdir())
        (run.scratch / "file").write_text("x")
        from matplotlib.figure import Figure
        picture = Figure()
        picture.subplots().plot([0, 1])
        outcome = measure(run, 0.5 + run.rng().random() / 2)
        outcome.pictures["what one sees"] = picture
        return outcome
        """,
    "miss": "return measure(run, 0.4 if run.seed == 12 else 0.6)",
    "crash": "raise RuntimeError('boom')",
    "exit": "sys.exit(0)",
    "die": "return measure(run, 0.9) if run.seed == 11 else os._exit(7)",
    "print": """
        print('{not json')
        os.write(1, b'\\xff\\xfe')
        return measure(run, 0.9)
        """,
    "extra": "import openai_that_is_missing",
    "wrong": "return {'gain': 1.0}",
    "wait": "Path(os.environ['TOY_STARTED']).write_text(str(os.getpid())); time.sleep(60)",
}
CHILD = """
import sys
import salience.reproductions
from salience import papers
from salience.evidence.child import main

toys = papers.parse(open({catalogue!r}).read())
papers._shipped = lambda: toys
salience.reproductions.__path__.append({scripts!r})
main()
"""


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the package: a toy method, its reproductions, no outcomes yet."""
    house = tmp_path / "house"
    (house / "data").mkdir(parents=True)
    (house / "data" / "toy.py").write_text('"""A toy."""\n\nLIMIT = 3\n')
    scripts = house / "reproductions"
    scripts.mkdir()
    for name, body in BODIES.items():
        (scripts / f"toy_{name}.py").write_text(HEAD + textwrap.indent(textwrap.dedent(body).strip(), "    ") + "\n")
    catalogue = "".join(
        CATALOGUE.format(
            name=name,
            number=number,
            minutes=number,
            entry="[]" if name == "plan" else '["salience.data:Toy"]',
        )
        for number, name in enumerate(NAMES, 1)
    )
    (house / "papers.toml").write_text(catalogue)
    (house / "child.py").write_text(CHILD.format(catalogue=str(house / "papers.toml"), scripts=str(scripts)))

    toys = papers.parse(catalogue)
    monkeypatch.setattr(papers, "_shipped", lambda: toys)
    monkeypatch.setitem(salience.data._WHERE, "Toy", "toy")
    monkeypatch.setattr(sources, "_ROOT", house)
    monkeypatch.setattr(store, "OUTCOMES", house / "evidence" / "outcomes")
    monkeypatch.setattr(runner, "_CHILD", [sys.executable, str(house / "child.py")])
    monkeypatch.setenv("SALIENCE_HOME", str(tmp_path / "home"))
    return house


def _toy_outcome(
    gain: float = 0.6,
    p_value: float = 0.01,
    control: float = 0.0,
    fake: float = 0.0,
    level: str = "mechanism",
) -> Outcome:
    """An outcome with one bar for every seed and one for the master, shown by default."""
    return Outcome(
        "gain",
        level,  # type: ignore[arg-type]
        {"gain": gain, "random": 0.25, "p": p_value},
        [Bar("gain", at_least=0.5, above="random"), Bar("p", at_most=0.05, once=True)],
        [Control("shuffled", "random", {"gain": control}), Control("lexical", "fake", {"gain": fake})],
        intervals={"gain": (gain - 0.1, gain + 0.1)},
        notes=["a toy"],
    )


@pytest.fixture
def toy_outcome() -> Callable[..., Outcome]:
    return _toy_outcome
