"""The figures, bars and controls of an `Evidence` as rows of text, for the terminal and the report page."""

from __future__ import annotations

import math

from salience.evidence.outcome import Bar, Control, NoControl, Outcome
from salience.evidence.store import Evidence


def figure_table(evidence: Evidence) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: each figure at each seed with its interval, its bar, and whether the bar holds."""
    first = evidence.measured[0] if evidence.measured else None
    bars = first.bars if first else ()
    rows = []
    for name in dict.fromkeys(name for outcome in evidence.measured for name in outcome.figures):
        limits = [bar for bar in bars if bar.figure == name]
        rows.append(
            [
                name,
                *(_cell(run.outcome, name) for run in evidence.runs.values()),
                "; ".join(str(bar).removeprefix(f"{name} ") for bar in limits),
                "; ".join(_holds(bar, evidence) for bar in limits),
            ]
        )
    return ["figure", *_seed_columns(evidence), "bar", "holds"], rows


def control_table(evidence: Evidence) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: the figures of each control at each seed, and whether it misses as it must."""
    rows = []
    controls = [c for outcome in evidence.measured for c in outcome.controls if isinstance(c, Control)]
    for name, kind in dict.fromkeys((control.name, control.kind) for control in controls):
        same = {seed: _control(run.outcome, name) for seed, run in evidence.runs.items()}
        figures = dict.fromkeys(figure for control in same.values() if control for figure in control.figures)
        for index, figure in enumerate(figures):
            values = (_number(control.figures.get(figure)) if control else "-" for control in same.values())
            heads = [name, kind, _misses(name, evidence)] if index == 0 else ["", "", ""]
            rows.append([heads[0], heads[1], figure, *values, heads[2]])
    return ["control", "kind", "figure", *_seed_columns(evidence), "misses"], rows


def remarks(evidence: Evidence) -> list[str]:
    """The notes of the script and its reasons for a missing control, each once."""
    said = [
        *(note for outcome in evidence.measured for note in outcome.notes),
        *(f"No control: {c.reason}" for o in evidence.measured for c in o.controls if isinstance(c, NoControl)),
    ]
    return list(dict.fromkeys(said))


def _seed_columns(evidence: Evidence) -> list[str]:
    return [f"seed {seed}" for seed in evidence.runs]


def _cell(outcome: Outcome | None, name: str) -> str:
    if outcome is None:
        return "failed"
    value = _number(outcome.figures.get(name))
    if name not in outcome.intervals:
        return value
    low, high = outcome.intervals[name]
    return f"{value} [{_number(low)}, {_number(high)}]"


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4g}"


def _holds(bar: Bar, evidence: Evidence) -> str:
    if evidence.scale == "smoke":
        return "not judged"
    judged = {seed: run.outcome for seed, run in evidence.runs.items() if not bar.once or seed == evidence.master}
    return _yes_or_no([seed for seed, outcome in judged.items() if not (outcome and bar.holds(outcome.figures))])


def _misses(name: str, evidence: Evidence) -> str:
    passed = []
    for seed, run in evidence.runs.items():
        control = _control(run.outcome, name)
        if run.outcome is not None and control is not None:
            bars = [bar for bar in run.outcome.bars if not bar.once or seed == evidence.master]
            passed += [seed] if control.passes(bars, run.outcome.figures) else []
    return _yes_or_no(passed)


def _control(outcome: Outcome | None, name: str) -> Control | None:
    controls = outcome.controls if outcome else ()
    return next((c for c in controls if isinstance(c, Control) and c.name == name), None)


def _yes_or_no(against: list[int]) -> str:
    return f"no (seed {', '.join(map(str, against))})" if against else "yes"
