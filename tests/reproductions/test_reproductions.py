"""Every reproduction runs at smoke scale: the plumbing works, and its controls miss."""

from __future__ import annotations

from pathlib import Path

import pytest

from salience import evidence, papers
from salience.evidence.runner import unready
from salience.evidence.sources import script_of

READY = [slug for slug, paper in papers.load().items() if unready(paper) is None]


def test_every_method_that_is_there_has_a_reproduction() -> None:
    lacking = [p.slug for p in papers.load().values() if p.entry and not script_of(p.slug).exists()]
    assert READY and not lacking


@pytest.mark.parametrize("slug", READY)
def test_it_runs_at_smoke_scale_and_its_controls_miss(slug: str, tmp_path: Path) -> None:
    done = evidence.reproduce([slug], seeds=[0], scale="smoke", out=tmp_path).done[slug]
    run = done.runs[0]
    assert run.outcome is not None, f"{run.error}\n{run.traceback}"
    assert done.verdict.shown, done.verdict.reasons
    assert (tmp_path / f"{slug}.html").stat().st_size > 1000  # its pictures can be drawn
    # That a control misses must rest on something measured, at the very seed where all bars are judged.
    for control in run.outcome.controls:
        if isinstance(control, evidence.Control):
            assert not control.passes(run.outcome.bars, run.outcome.figures)
            judged = {name for bar in run.outcome.bars for name in (bar.figure, bar.above)}
            assert any(value == value for name, value in control.figures.items() if name in judged), control.name


@pytest.mark.parametrize("slug", READY)
def test_the_shipped_outcome_is_of_this_claim(slug: str) -> None:
    from salience.evidence import store

    shipped = store.read(slug, store.OUTCOMES)
    if shipped is None:
        pytest.skip(f"no outcome of {slug} is shipped yet")
    assert shipped.scale == "desk" and not shipped.own_data
    assert shipped.runs and set(shipped.runs) <= set(evidence.JUDGING_SEEDS)
    assert shipped.master == evidence.JUDGING_SEEDS[0]
    if shipped.verdict.shown:  # what is not run yet is a reason for "not shown"
        assert set(shipped.runs) == set(evidence.JUDGING_SEEDS)
    assert {outcome.claim for outcome in shipped.measured} == {papers.get(slug).claim}
