"""What a reproduction hands in, and the verdict computed from it.

A script states figures, bars and controls. It never states a verdict: `judge` and `judge_all` derive it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Literal, get_args

from salience.errors import InputError, nearest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Level = Literal["mechanism", "claim", "paper"]
Kind = Literal["random", "fake"]


@dataclass(frozen=True)
class Bar:
    """A limit that one figure of a run must meet; with several limits, it must meet each.

    Parameters
    ----------
    figure : str
        Name of the figure that is judged.
    at_least, at_most : float, optional
        The figure must be ``>= at_least`` and ``<= at_most``.
    above : str, optional
        Name of another figure of the same run (a baseline) that the figure must exceed.
    once : bool
        The figure is a mean or a p-value over replicates (`Run.replicate_seeds`), which are drawn from the
        master seed: judged at that seed only.

    Raises
    ------
    InputError
        If there is no limit, a limit is not a finite number, or the figure is compared with itself.
    """

    figure: str
    at_least: float | None = None
    at_most: float | None = None
    above: str | None = None
    once: bool = False

    def __post_init__(self) -> None:
        for name in ("at_least", "at_most"):
            if getattr(self, name) is None:
                continue
            limit = _number(getattr(self, name), f"{name} of the bar on {self.figure!r}")
            if not math.isfinite(limit):
                raise InputError(f"{name} of the bar on {self.figure!r} is {limit}; give a finite number")
            object.__setattr__(self, name, limit)
        if self.at_least is None and self.at_most is None and self.above is None:
            raise InputError(f"the bar on {self.figure!r} has no limit: give at_least, at_most or above")
        if self.above == self.figure:
            raise InputError(f"the bar on {self.figure!r} compares the figure with itself: name a baseline in 'above'")

    def holds(self, figures: Mapping[str, float]) -> bool:
        """Whether `figures` meet the bar; a figure or baseline that is missing or not finite never does."""
        value = figures.get(self.figure, math.nan)
        baseline = value - 1 if self.above is None else figures.get(self.above, math.nan)
        if not (math.isfinite(value) and math.isfinite(baseline)):
            return False
        low = -math.inf if self.at_least is None else self.at_least
        high = math.inf if self.at_most is None else self.at_most
        return low <= value <= high and (self.above is None or value > baseline)

    def __str__(self) -> str:
        limits = [
            f">= {self.at_least:g}" if self.at_least is not None else "",
            f"<= {self.at_most:g}" if self.at_most is not None else "",
            f"> {self.above}" if self.above is not None else "",
        ]
        return f"{self.figure} {' and '.join(filter(None, limits))}{' (once)' if self.once else ''}"


@dataclass(frozen=True)
class Control:
    """The same figures measured for something that must miss the bars.

    Parameters
    ----------
    name : str
        What was measured in the method's place, such as ``"lexical overlap"``.
    kind : {"random", "fake"}
        Random scores of the right shape, or the cheap thing that a lazy implementation would do.
    figures : dict of str to float
        The control's values of the outcome's figures. It misses only through what was measured for it.
    """

    name: str
    kind: Kind
    figures: dict[str, float]

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise InputError(f"control {self.name!r} has kind {self.kind!r}; allowed: 'random', 'fake'")
        object.__setattr__(self, "figures", _numbers(self.figures, f"control {self.name!r}"))

    def passes(self, bars: Sequence[Bar], figures: Mapping[str, float]) -> bool:
        """Whether the control meets all `bars` that it was measured for; it must not.

        A baseline that it did not measure is the method's own. A figure that is NaN was not measured, so it
        is no miss either. With no bar on any of its figures (all are judged at another seed) it is not asked.
        """
        asked = [bar for bar in bars if bar.figure in self.figures or bar.above in self.figures]
        measured = {name: value for name, value in self.figures.items() if math.isfinite(value)}
        judged = [bar for bar in asked if bar.figure in measured or bar.above in measured]
        return bool(asked) and all(bar.holds({**figures, **measured}) for bar in judged)


@dataclass(frozen=True)
class NoControl:
    """Stands for a control that cannot exist, and says why."""

    reason: str

    def __post_init__(self) -> None:
        if not self.reason.strip():
            raise InputError("NoControl needs a reason: say why no such control is possible")


@dataclass(frozen=True)
class Outcome:
    """What one run of a reproduction measured.

    Parameters
    ----------
    claim : str
        The sentence that the bars test.
    level : {"mechanism", "claim", "paper"}
        The effect on a desk-size stand-in, the paper's comparison on modest real data, or the paper's own
        setting.
    figures : dict of str to float
        Everything measured: the method's figures and its baselines, side by side. NaN where undefined.
    bars : sequence of Bar
        The limits that decide, on names in `figures`; at least one.
    controls : sequence of Control or NoControl
        At least one random and one fake control, or a `NoControl` for what is not possible.
    intervals : dict of str to (float, float), optional
        Interval of a figure: ``(low, high)``.
    pictures : dict of str to matplotlib Figure, optional
        What one should look at, by caption.
    notes : sequence of str, optional
        What a reader must know to judge the figures, such as a substitute for the headline's setting.

    Raises
    ------
    InputError
        If a name or value breaks one of these rules.
    """

    claim: str
    level: Level
    figures: dict[str, float]
    bars: Sequence[Bar]
    controls: Sequence[Control | NoControl]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    pictures: dict[str, Figure] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.level not in get_args(Level):
            raise InputError(f"level is {self.level!r}; allowed: {', '.join(map(repr, get_args(Level)))}")
        if not self.claim.strip():
            raise InputError("claim is empty: say in one sentence what the bars test")
        object.__setattr__(self, "figures", _numbers(self.figures, "the outcome"))
        for name in ("bars", "controls", "notes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.bars:
            raise InputError("the outcome has no bars: nothing could be judged")
        for bar in self.bars:
            self._known(bar.figure, f"the bar '{bar}'")
            if bar.above is not None:
                self._known(bar.above, f"the bar '{bar}'")
        object.__setattr__(self, "intervals", {n: self._interval(n, *pair) for n, pair in self.intervals.items()})
        self._check_controls()

    def _interval(self, name: str, low: float, high: float) -> tuple[float, float]:
        self._known(name, "an interval")
        ends = _numbers({"low": low, "high": high}, f"the interval of {name!r}")
        if ends["low"] > ends["high"]:
            raise InputError(f"the interval of {name!r} is ({low}, {high}); give (low, high)")
        return ends["low"], ends["high"]

    def _known(self, name: str, where: str) -> None:
        if name not in self.figures:
            raise InputError(f"{where} names no figure of the outcome: {name!r}; {nearest(name, self.figures)}")

    def _check_controls(self) -> None:
        controls = [control for control in self.controls if isinstance(control, Control)]
        judged = {name for bar in self.bars for name in (bar.figure, bar.above)}
        for control in controls:
            for name in control.figures:
                self._known(name, f"control {control.name!r}")
            if not judged & set(control.figures):
                raise InputError(f"control {control.name!r} measures none of the figures that the bars judge")
        missing = [kind for kind in get_args(Kind) if kind not in {control.kind for control in controls}]
        if missing and len(controls) == len(self.controls):
            kinds = " or ".join(map(repr, missing))
            raise InputError(f"no control of kind {kinds}: measure one, or give NoControl(reason)")


@dataclass(frozen=True)
class Verdict:
    """What figures show; `reasons` name each missed bar, passed control and crash (empty when shown)."""

    shown: bool
    reasons: tuple[str, ...] = ()


def judge(outcome: Outcome, master: bool, smoke: bool = False) -> Verdict:
    """Judge one seed: every bar must hold and every control must miss at least one bar.

    Parameters
    ----------
    outcome : Outcome
    master : bool
        Whether this is the master seed, where the `once` bars are judged too.
    smoke : bool
        A smoke run is too small for its bars to mean anything: only the controls are judged.
    """
    bars = [bar for bar in outcome.bars if master or not bar.once]
    missed = [] if smoke else [f"missed: {bar}" for bar in bars if not bar.holds(outcome.figures)]
    passed = [
        f"the {control.kind} control '{control.name}' meets every bar"
        for control in outcome.controls
        if isinstance(control, Control) and control.passes(bars, outcome.figures)
    ]
    return Verdict(not missed and not passed, (*missed, *passed))


def judge_all(outcomes: Mapping[int, Outcome | None], master: int, smoke: bool = False) -> Verdict:
    """Judge a run over seeds: shown when each seed is, and all seeds were judged by the same bars.

    Parameters
    ----------
    outcomes : dict of int to Outcome or None
        By seed; None for a run that failed.
    master : int
        The seed at which the `once` bars are judged.
    smoke : bool
        See `judge`.
    """
    reasons = [] if master in outcomes else [f"seed {master}: not run, and it is the master seed"]
    for seed, outcome in outcomes.items():
        if outcome is None:
            reasons.append(f"seed {seed}: the run failed")
        else:
            reasons += [f"seed {seed}: {reason}" for reason in judge(outcome, seed == master, smoke).reasons]
    measured = [outcome for outcome in outcomes.values() if outcome is not None]
    if len({(outcome.level, outcome.claim, tuple(outcome.bars)) for outcome in measured}) > 1:
        reasons.append("the seeds differ in claim, level or bars")
    return Verdict(not reasons, tuple(reasons))


def _numbers(figures: Mapping[str, float], owner: str) -> dict[str, float]:
    numbers = {name: _number(value, f"figure {name!r} of {owner}") for name, value in figures.items()}
    for name, value in numbers.items():
        if math.isinf(value):
            raise InputError(f"figure {name!r} of {owner} is infinite; give a finite number, or NaN where undefined")
    return numbers


def _number(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputError(f"{what} is {value!r} ({type(value).__name__}); give a float")
    return float(value)
