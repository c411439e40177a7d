"""Outcomes on disk, one JSON file per paper, and the state of a paper that follows from them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from salience.errors import DataError, SalienceError
from salience.evidence.outcome import Bar, Control, NoControl, Outcome, Verdict, judge_all
from salience.evidence.run import Scale
from salience.evidence.sources import source_hash
from salience.io.place import home
from salience.papers import Paper

JUDGING_SEEDS = (11, 12, 13)
OUTCOMES = Path(__file__).parent / "outcomes"

StateName = Literal["planned", "implemented", "shown (mechanism)", "shown (claim)", "reproduced", "not shown", "stale"]
STATES: tuple[StateName, ...] = get_args(StateName)
_SHOWN: dict[str, StateName] = {
    "mechanism": "shown (mechanism)",
    "claim": "shown (claim)",
    "paper": "reproduced",
}


@dataclass(frozen=True)
class SeedRun:
    """One seed: its outcome, or what stopped it.

    Parameters
    ----------
    minutes : float
        Wall time.
    outcome : Outcome, optional
        None when the run failed.
    error, traceback : str, optional
        One sentence on the failure, and where it happened.
    """

    minutes: float
    outcome: Outcome | None = None
    error: str | None = None
    traceback: str | None = None


@dataclass(frozen=True)
class Evidence:
    """What was measured for one paper.

    Parameters
    ----------
    slug : str
    scale : {"smoke", "desk", "full"}
    master : int
        The seed at which bars with ``once=True`` are judged.
    runs : dict of int to SeedRun
        By seed.
    versions : dict of str to str
        Python and the packages that were loaded.
    source_hash : str
        See `salience.evidence.source_hash`.
    own_data : bool
        Whether the runs read the user's data instead of the script's stand-in.
    """

    slug: str
    scale: Scale
    master: int
    runs: dict[int, SeedRun]
    versions: dict[str, str] = field(default_factory=dict)
    source_hash: str = ""
    own_data: bool = False

    @property
    def measured(self) -> list[Outcome]:
        """The outcomes of the seeds that did not fail."""
        return [run.outcome for run in self.runs.values() if run.outcome is not None]

    @property
    def verdict(self) -> Verdict:
        """Computed from the figures of all seeds, each time it is asked for."""
        outcomes = {seed: run.outcome for seed, run in self.runs.items()}
        return judge_all(outcomes, self.master, smoke=self.scale == "smoke")

    @property
    def label(self) -> str:
        """The verdict in the words that papers are listed with; a smoke run only passes or fails."""
        shown = self.verdict.shown
        if self.scale == "smoke":
            return "smoke passed (no bar judged)" if shown else "smoke failed"
        return _SHOWN[self.measured[0].level] if shown else "not shown"


@dataclass(frozen=True)
class State:
    """Where a paper stands.

    Parameters
    ----------
    name : str
        One of `STATES`.
    was : str, optional
        For ``"stale"``: the verdict before the sources changed.
    reasons : tuple of str
        Why it is not shown.
    """

    name: StateName
    was: str | None = None
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} (was: {self.was})" if self.was else self.name


def state(paper: Paper, folder: Path | None = None, seeds: Sequence[int] = JUDGING_SEEDS) -> State:
    """Where `paper` stands by the outcomes in `folder`, ours by default, which must cover all `seeds`.

    Raises
    ------
    DataError
        If the outcome file is damaged.
    """
    if not paper.entry:
        return State("planned")
    evidence = read(paper.slug, folder or OUTCOMES)
    if evidence is None or evidence.scale == "smoke":
        return State("implemented")
    missing = tuple(f"seed {seed}: not run" for seed in seeds if seed not in evidence.runs)
    verdict = evidence.verdict
    shown = verdict.shown and not missing
    name = _SHOWN[evidence.measured[0].level] if shown else "not shown"
    reasons = verdict.reasons + missing
    if evidence.source_hash != source_hash(paper):
        return State("stale", was=name, reasons=reasons)
    return State(name, reasons=reasons)


def own_outcomes() -> Path:
    """The folder with the outcomes of the user's own runs."""
    return home() / "outcomes"


def read(slug: str, folder: Path) -> Evidence | None:
    """The outcomes of a paper in `folder`; None if there are none.

    Raises
    ------
    DataError
        If the file is damaged.
    """
    file = folder / f"{slug}.json"
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error}); delete it and run 'salience reproduce {slug}'") from None
    try:
        runs = {int(seed): _run_from(run, data["claim"], data["level"]) for seed, run in data["seeds"].items()}
        kept = {name: data[name] for name in ("slug", "scale", "master", "versions", "source_hash", "own_data")}
        return Evidence(runs=runs, **kept)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = error if isinstance(error, SalienceError) else repr(error)
        raise DataError(
            f"{file}: not an outcome file ({what}); delete it and run 'salience reproduce {slug}'"
        ) from None


def write(evidence: Evidence, folder: Path) -> Path:
    """Write ``folder/slug.json``; the file is absent, old or complete at any moment."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{evidence.slug}.json"
    partial = folder / f".{evidence.slug}.{os.getpid()}.tmp"
    try:
        partial.write_text(json.dumps(as_data(evidence), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
    return file


def as_data(evidence: Evidence) -> dict[str, Any]:
    """What the JSON file holds: the keys in one order, NaN as null, six significant digits."""
    first = evidence.measured[0] if evidence.measured else None
    data = {
        "slug": evidence.slug,
        "claim": first and first.claim,
        "level": first and first.level,
        "scale": evidence.scale,
        "master": evidence.master,
        "own_data": evidence.own_data,
        "source_hash": evidence.source_hash,
        "versions": evidence.versions,
        "seeds": {str(seed): _run_data(run) for seed, run in evidence.runs.items()},
    }
    return _plain(data)


def _run_data(run: SeedRun) -> dict[str, Any]:
    minutes = round(run.minutes, 2)
    if run.outcome is None:
        return {"minutes": minutes, "error": run.error, "traceback": run.traceback}
    return {
        "minutes": minutes,
        "figures": run.outcome.figures,
        "intervals": run.outcome.intervals,
        "bars": [
            {name: value for name, value in asdict(bar).items() if value is not None and value is not False}
            for bar in run.outcome.bars
        ],
        "controls": [asdict(control) for control in run.outcome.controls],
        "notes": run.outcome.notes,
    }


def _run_from(data: dict[str, Any], claim: str, level: Any) -> SeedRun:
    if "error" in data:
        return SeedRun(data["minutes"], None, data["error"], data["traceback"])
    controls = [
        NoControl(**control)
        if "reason" in control
        else Control(control["name"], control["kind"], _figures(control["figures"]))
        for control in data["controls"]
    ]
    outcome = Outcome(
        claim,
        level,
        _figures(data["figures"]),
        [Bar(**bar) for bar in data["bars"]],
        controls,
        intervals={name: (_figure(low), _figure(high)) for name, (low, high) in data["intervals"].items()},
        notes=data["notes"],
    )
    return SeedRun(data["minutes"], outcome)


def _figures(data: dict[str, float | None]) -> dict[str, float]:
    return {name: _figure(value) for name, value in data.items()}


def _figure(value: float | None) -> float:
    return math.nan if value is None else value


def _plain(value: Any) -> Any:
    # bars are rounded like figures: a figure that meets a bar exactly must still meet it when read back
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.6g}")
    return value
