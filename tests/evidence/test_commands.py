"""`salience reproduce` and `salience papers`, through the entry point with its exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from salience.cli import main
from salience.evidence import reproduce, store


def salience(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["salience", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


@pytest.fixture
def run(house: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def run(*arguments: str) -> tuple[int, str]:
        code = salience(*arguments, monkeypatch=monkeypatch)
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


def test_reproduce_prints_figures_bars_controls_and_the_verdict(run, tmp_path: Path) -> None:
    code, said = run("reproduce", "toy-pass", "--out", str(tmp_path / "out"))
    assert code == 0
    assert "seed 11" in said and "seed 13" in said and ">= 0.5 and > random" in said
    assert "shuffled" in said and "verdict: shown (mechanism)" in said and "[bold]" in said
    assert (tmp_path / "out" / "toy-pass.html").exists()


def test_reproduce_exits_1_on_a_missed_bar_or_a_crash_and_says_why(run) -> None:
    code, said = run("reproduce", "toy-miss", "toy-crash", "--seed", "11", "--seed", "12")
    assert code == 1
    assert "no (seed 12)" in said and "verdict: not shown" in said and "RuntimeError: boom" in said
    assert run("reproduce", "toy-miss", "--seed", "12", "--scale", "smoke")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["toy-plan"], 4, "toy-plan is planned"),
        (["toy-lack"], 4, "no reproduction yet"),
        (["toy-pas"], 2, "'toy-pass'"),
        ([], 2, "--all"),
        (["--all", "toy-pass"], 2, "--all"),
        (["toy-pass", "--scale", "huge"], 2, "huge"),
        (["toy-pass", "--seed", "x"], 2, "--seed"),
        (["toy-pass", "--data", "absent"], 3, "absent"),
        (["toy-pass", "--budget", "0"], 4, "budget"),
    ],
)
def test_reproduce_exit_codes(run, arguments: list[str], code: int, said: str) -> None:
    got, printed = run("reproduce", *arguments)
    assert (got, said in printed) == (code, True), printed


def test_reproduce_json_is_clean_though_the_script_prints(
    house: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # capfd: the script's own output arrives at the file descriptors
    assert salience("reproduce", "toy-print", "toy-plan", "--seed", "11", "--json", monkeypatch=monkeypatch) == 0
    printed = capfd.readouterr()
    assert "{not json" in printed.err
    data = json.loads(printed.out)
    assert data["papers"]["toy-print"]["verdict"] == "shown (mechanism)"
    assert data["papers"]["toy-print"]["outcome"]["seeds"]["11"]["figures"]["gain"] == 0.9
    assert list(data["skipped"]) == ["toy-plan"]


def test_stale_runs_only_what_changed(house: Path, run) -> None:
    reproduce(["toy-pass"], out=store.OUTCOMES)
    code, said = run("reproduce", "toy-pass", "--stale")
    assert code == 4 and "no outcome is stale" in said
    (house / "data" / "toy.py").write_text("LIMIT = 4\n")
    assert run("reproduce", "toy-pass", "--stale")[0] == 0


def test_papers_list_and_its_filters(house: Path, run, monkeypatch: pytest.MonkeyPatch) -> None:
    reproduce(["toy-pass"], out=store.OUTCOMES)
    reproduce(["toy-miss"], [12])
    code, said = run("papers", "list")
    rows = {line.split()[1]: line for line in said.splitlines()[1:]}
    assert code == 0 and len(rows) == 11
    assert "shown (mechanism)" in rows["toy-pass"] and "planned" in rows["toy-plan"]
    assert "implemented" in rows["toy-miss"] and "not shown" in rows["toy-miss"]  # ours, and the user's own
    monkeypatch.setenv("COLUMNS", "70")  # what a narrow terminal lacks is taken from the title
    assert {line.split()[1] for line in run("papers", "list")[1].splitlines()[1:]} == set(rows)
    _, said = run("papers", "list", "--state", "shown", "--json")
    assert [row["slug"] for row in json.loads(said)] == ["toy-pass"]
    _, said = run("papers", "list", "toy misss", "--unit", "sample", "--json")
    assert [row["slug"] for row in json.loads(said)] == ["toy-miss"]
    assert run("papers", "list", "zebra")[0] == 4
    assert run("papers", "list", "--state", "perhaps")[0] == 2
    assert run("papers", "list", "--unit", "samples")[0] == 2


def test_papers_show(house: Path, run) -> None:
    reproduce(["toy-miss"], out=store.OUTCOMES)
    reproduce(["toy-miss"], [11])
    code, said = run("papers", "show", "toy-miss")
    assert code == 0
    for part in (
        "the toy is better than random",
        "from salience.data import Toy",
        "salience select toy",
        "salience reproduce toy-miss",
        "state: not shown",
        "seed 12: missed: gain",
        "your run: shown (mechanism)",
    ):
        assert part in said
    data = json.loads(run("papers", "show", "toy-miss", "--json")[1])
    assert data["state"]["name"] == "not shown" and data["room"] == "data"
    assert list(data["your_outcomes"]["seeds"]) == ["11"] and list(data["outcomes"]["seeds"]) == [
        "11",
        "12",
        "13",
    ]
    assert run("papers", "show", "toy")[0] == 2
