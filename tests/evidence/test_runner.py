from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from salience import papers
from salience.errors import DataError, InputError, NothingToDo
from salience.evidence import reproduce, runner, source_hash, store


def test_outcome_and_page_are_kept_where_the_user_says(house: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = reproduce(["toy-pass"], out=out)
    evidence = result.done["toy-pass"]
    assert evidence.verdict.shown and evidence.label == "shown (mechanism)"
    assert list(evidence.runs) == [11, 12, 13]
    assert evidence == store.read("toy-pass", out)
    assert evidence.source_hash == source_hash(papers.get("toy-pass"))
    assert {"python", "numpy", "salience"} <= set(evidence.versions)
    page = (out / "toy-pass.html").read_text()
    assert page.index("shown (mechanism)") < page.index("Figures") < page.index("Controls")
    assert "what one sees (seed 11)" in page and "what one sees (seed 12)" not in page
    assert "that passs [bold]" in page
    assert sorted(path.name for path in out.iterdir()) == ["toy-pass.html", "toy-pass.json"]


def test_the_same_seeds_give_the_same_figures(house: Path, tmp_path: Path) -> None:
    one, two = (reproduce(["toy-pass"], [3], out=tmp_path / name).done["toy-pass"] for name in "ab")
    assert one.measured[0].figures == two.measured[0].figures


def test_what_fails_fails_alone(house: Path, tmp_path: Path) -> None:
    slugs = [f"toy-{name}" for name in ("pass", "miss", "crash", "exit", "die", "print", "extra", "wrong")]
    seen = []
    result = reproduce(slugs, [11, 12], jobs=2, out=tmp_path, on_done=lambda evidence: seen.append(evidence.slug))
    assert sorted(seen) == sorted(slugs)
    shown = {slug: evidence.verdict.shown for slug, evidence in result.done.items()}
    assert shown == {slug: slug in ("toy-pass", "toy-print") for slug in slugs}

    crash = result.done["toy-crash"].runs[11]
    assert crash.error == "RuntimeError: boom"
    assert crash.traceback is not None and "toy_crash.py" in crash.traceback and 'File "/' not in crash.traceback
    assert "SystemExit" in (result.done["toy-exit"].runs[12].error or "")
    assert "must return an Outcome" in (result.done["toy-wrong"].runs[11].error or "")
    die = result.done["toy-die"].runs
    assert (
        die[11].outcome is not None and die[12].error == "the process ended with exit code 7 before this seed was done"
    )
    assert "seed 12: missed: gain >= 0.5 and > random" in result.done["toy-miss"].verdict.reasons
    assert "boom" in (tmp_path / "toy-crash.html").read_text()
    assert "exit code 7" in (tmp_path / "toy-die.html").read_text()
    assert all((tmp_path / f"{slug}.json").exists() for slug in slugs)


def test_the_process_of_a_reproduction_starts_wherever_the_user_is(tmp_path: Path) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('a file of the user was imported')\n")
    child = [*runner._CHILD, "--help"]
    environment = {**os.environ, "PYTHONPATH": str(Path(store.__file__).parents[2])}
    assert subprocess.run(child, cwd=tmp_path, env=environment, capture_output=True).returncode == 0


def test_a_missing_extra_is_said_without_a_traceback(house: Path, tmp_path: Path) -> None:
    script = house / "reproductions" / "toy_extra.py"
    script.write_text("raise ModuleNotFoundError('No module named openai', name='openai')\n")
    run = reproduce(["toy-extra"], [11], out=tmp_path).done["toy-extra"].runs[11]
    assert run.error == "toy-extra needs the package 'openai', which is not installed: pip install 'salience[llm]'"
    assert run.traceback is None


def test_planned_papers_are_named_and_do_not_stop_the_others(house: Path, tmp_path: Path) -> None:
    result = reproduce(["toy-plan", "toy-lack", "toy-pass"], [11], out=tmp_path)
    assert list(result.done) == ["toy-pass"]
    assert "planned" in result.skipped["toy-plan"] and "no reproduction" in result.skipped["toy-lack"]
    with pytest.raises(NothingToDo, match="toy-plan is planned"):
        reproduce(["toy-plan"], out=tmp_path)
    with pytest.raises(NothingToDo):
        reproduce([], out=tmp_path)


def test_the_cheapest_run_first_and_the_budget_names_what_it_skips(house: Path, tmp_path: Path) -> None:
    order: list[str] = []
    result = reproduce(
        ["toy-print", "toy-miss", "toy-pass"],  # declared 6, 2 and 1 minutes a seed
        [11, 12],
        budget=10,
        out=tmp_path,
        on_done=lambda evidence: order.append(evidence.slug),
    )
    assert order == ["toy-pass", "toy-miss"]
    assert "12 minutes" in result.skipped["toy-print"]


def test_our_folder_gets_outcomes_without_pages_and_no_smoke_runs(house: Path) -> None:
    reproduce(["toy-pass"], [11], out=store.OUTCOMES)
    assert [path.name for path in store.OUTCOMES.iterdir()] == ["toy-pass.json"]
    with pytest.raises(InputError, match="smoke"):
        reproduce(["toy-pass"], scale="smoke", out=store.OUTCOMES)


def test_a_smoke_run_judges_no_bar(house: Path, tmp_path: Path) -> None:
    evidence = reproduce(["toy-miss"], [12], "smoke", out=tmp_path).done["toy-miss"]
    assert evidence.verdict.shown and evidence.label == "smoke passed (no bar judged)"
    assert reproduce(["toy-crash"], [12], "smoke", out=tmp_path).done["toy-crash"].label == "smoke failed"


def test_bad_parameters_are_refused_before_anything_runs(house: Path, tmp_path: Path) -> None:
    for wrong in ({"seeds": []}, {"seeds": [-1]}, {"jobs": 0}, {"slugs": ["toy-pas"]}):
        with pytest.raises(InputError):
            reproduce(**{"slugs": ["toy-pass"], "out": tmp_path, **wrong})  # type: ignore[arg-type]
    with pytest.raises(DataError, match="not a folder"):
        reproduce(["toy-pass"], data=tmp_path / "absent", out=tmp_path)
    assert not list(tmp_path.glob("*.json"))


def test_an_interrupt_stops_the_children(house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = tmp_path / "started"
    monkeypatch.setenv("TOY_STARTED", str(started))

    def interrupt() -> None:
        while not (started.exists() and started.read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            reproduce(["toy-wait"], [11], out=tmp_path / "out")
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
    assert not (tmp_path / "out").exists()
