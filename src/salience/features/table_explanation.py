"""Explain a black box on a user's table, and measure it there: the work behind `salience explain table`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.feature_selection import f_classif

from salience.errors import DataError, InputError
from salience.features.blackbox_surrogate.explainer import Explanation, HighDimExplainer
from salience.features.blackbox_surrogate.rules import Rule, measured
from salience.io.whole import column_of, is_text, numbers_of, whole_table, words_of
from salience.measure import paired_difference

BLACK_BOXES = ("forest", "boosting", "attention", "autoencoder")
_RANDOM = 10  # draws of random columns
_LEVELS = 30  # of a text column
_CLASSES = 50


@dataclass(frozen=True)
class Encoded:
    """A table as numbers.

    Attributes
    ----------
    rows : (n, M) float
    names : list of str
        ``column`` or ``column=level``.
    labels : (n,) str
    notes : list of str
        What was left out or filled in.
    """

    rows: Float[np.ndarray, "n columns"]
    names: list[str]
    labels: np.ndarray
    notes: list[str]


@dataclass(frozen=True)
class Gain:
    """Share of held-out rows on which the surrogate agrees with the black box, against other columns."""

    against: str
    chosen: float
    other: float
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class TableExplanation:
    """What `explain_table` found; figures are of held-out rows."""

    explainer: HighDimExplainer
    classes: list[str]
    black_box: str
    train_rows: int
    test_rows: int
    agreement: float
    r2: float
    accuracy_black_box: float
    accuracy_surrogate: float
    commonest: float
    gains: list[Gain]
    rules: list[tuple[Rule, Rule]]
    examples: list[tuple[int, Explanation]]
    flips: float
    notes: list[str] = field(default_factory=list)

    @property
    def better(self) -> bool:
        """Whether the surrogate beats one on random columns, its whole interval."""
        return self.gains[0].low > 0

    @property
    def verdict(self) -> str:
        """One sentence with the figures."""
        gain = self.gains[0]
        label = "a better surrogate than on random columns" if self.better else "no better than random columns here"
        return (
            f"{label}: on {self.test_rows:,} held-out rows it agrees with the black box on {100 * gain.chosen:.1f} %, "
            f"one on as many random columns on {100 * gain.other:.1f} % (difference {100 * gain.difference:+.1f} "
            f"points, 95 % interval {100 * gain.low:+.1f} to {100 * gain.high:+.1f})"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        explainer = self.explainer
        return {
            "verdict": self.verdict, "better": self.better, "agreement": self.agreement, "r2": self.r2,
            "accuracy_black_box": self.accuracy_black_box, "accuracy_surrogate": self.accuracy_surrogate,
            "accuracy_commonest_class": self.commonest, "counterfactuals_that_flip": self.flips,
            "against": [vars(gain) for gain in self.gains], "classes": self.classes,
            "columns": [explainer.names_[c] for c in explainer.columns_],
            "rules": [rule.text(self.classes) for _, rule in self.rules], "notes": self.notes,
        }  # fmt: skip


def encode(data: Any, label: str, ignore: Sequence[str] = ()) -> Encoded:
    """Read a table and turn it into numbers: text into a column per level, missing numbers into the median.

    Raises
    ------
    InputError, DataError
        A column does not exist, nothing is left, or the label has one class or too many.
    """
    table = whole_table(data)
    for name in ignore:
        column_of(table, name, "ignored column")
    words = words_of(table, label, "label column")
    known = np.array([word is not None for word in words])
    notes = [f"{int((~known).sum())} rows without a label were left out"] if not known.all() else []
    parts: list[np.ndarray] = []
    names: list[str] = []
    for name in table.column_names:
        if name == label or name in ignore:
            continue
        if is_text(table[name]):
            values = words_of(table, name)[known]
            levels = sorted({value for value in values if value is not None})
            if len(levels) > _LEVELS:
                notes.append(f"column {name!r} was left out: {len(levels):,} different texts")
                continue
            parts += [(values == level).astype(np.float64) for level in levels]
            names += [f"{name}={level}" for level in levels]
            continue
        numbers = numbers_of(table, name)[known]
        bad = ~np.isfinite(numbers)
        if bad.all():
            notes.append(f"column {name!r} was left out: it holds no number")
            continue
        if bad.any():
            notes.append(f"column {name!r}: {int(bad.sum())} missing values became the median")
            numbers = np.where(bad, np.median(numbers[~bad]), numbers)
        parts.append(numbers)
        names.append(name)
    if not parts:
        raise DataError("no column is left to explain by")
    kinds = len(set(words[known]))
    if not 2 <= kinds <= _CLASSES:
        raise DataError(f"label {label!r} has {kinds:,} different values; 2 to {_CLASSES} classes are needed")
    return Encoded(np.column_stack(parts), names, words[known].astype(str), notes)


def explain_table(
    data: Any, label: str, *, ignore: Sequence[str] = (), black_box: str = "forest", k: int | str = "auto",
    max_depth: int = 6, min_support: float = 0.01, test: float = 0.3, examples: int = 5, random_state: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> TableExplanation:  # fmt: skip
    """Train a black box on part of a table, explain it there, and measure the explanation on the rest.

    Parameters
    ----------
    data : table
        See `salience.io.whole.whole_table`.
    label : str
    ignore : list of str
        Columns not to use, such as identifiers.
    black_box : {"forest", "boosting", "attention", "autoencoder"}
    k, max_depth
        See `HighDimExplainer`.
    min_support : float
        Of the rules told.
    test : float
        Share of the rows that is held out.
    examples : int
        Held-out rows to explain one by one.
    random_state : int
    progress : callable, optional
        ``progress(stage, done, total)``.
    """
    if black_box not in BLACK_BOXES:
        raise InputError(f"black_box must be one of {', '.join(BLACK_BOXES)}, not {black_box!r}")
    if not 0 < test < 1:
        raise InputError(f"test must lie between 0 and 1, not {test}")
    tell = progress or (lambda stage, done, total: None)
    tell("reading", 0, 1)
    table = encode(data, label, ignore)
    n = len(table.rows)
    rng = np.random.default_rng(random_state)
    order = rng.permutation(n)
    held, train = order[: int(test * n)], order[int(test * n) :]
    if len(held) < 20 or len(train) < 40:
        raise DataError(f"{n} rows are too few to train on one part and measure on the other")
    tell(f"training the black box ({black_box})", 0, 1)
    model = _black_box(black_box, random_state).fit(table.rows[train], table.labels[train])
    classes = [str(name) for name in model.classes_]
    if len(classes) < 2:
        raise DataError("the rows to train on hold one class only")
    explainer = HighDimExplainer(black_box=model, k=k, max_depth=max_depth, random_state=random_state)
    explainer.fit(table.rows[train], names=table.names, progress=progress)
    tell("measuring on held-out rows", 0, 1)
    test_rows, truth = table.rows[held], table.labels[held]
    answers = explainer.answers(test_rows)
    mimicked = explainer.predict(test_rows)
    found = explainer.fidelity(test_rows)
    explained = [(int(held[at]), explainer.explain(test_rows[at])) for at in range(min(max(examples, 30), len(held)))]
    kept = [rule for rule in explainer.rules_ if rule.support >= min_support]
    again = [(rule, measured(rule, test_rows, answers)) for rule in kept]
    flips = [bool(e.counterfactuals) and e.counterfactuals[0].flips for _, e in explained]
    commonest = max(set(table.labels[train]), key=list(table.labels[train]).count)
    return TableExplanation(
        explainer, classes, black_box, len(train), len(held), found["agreement"], found["r2"],
        float((model.classes_[answers] == truth).mean()), float((model.classes_[mimicked] == truth).mean()),
        float((truth == commonest).mean()),
        _gains(explainer, test_rows, answers, table.rows[train], table.labels[train], rng),
        sorted(again, key=lambda pair: -pair[1].support), explained[:examples], float(np.mean(flips)), table.notes,
    )  # fmt: skip


def _gains(explainer: HighDimExplainer, test_rows, answers, train_rows, train_labels, rng) -> list[Gain]:
    """The surrogate against one on random columns (mean over draws) and on those with the largest F statistic."""
    k, columns = len(explainer.columns_), test_rows.shape[1]
    right = (explainer.predict(test_rows) == answers).astype(float)

    def agrees(chosen: np.ndarray) -> np.ndarray:
        return (explainer.with_columns(chosen).predict(test_rows) == answers).astype(float)

    with np.errstate(all="ignore"):
        statistic = np.nan_to_num(f_classif(train_rows, train_labels)[0], nan=-1.0)
    random = np.mean([agrees(rng.choice(columns, k, replace=False)) for _ in range(_RANDOM)], axis=0)
    others = {"random columns": random, "columns by F statistic": agrees(np.argsort(-statistic, kind="stable")[:k])}
    gains = []
    for name, other in others.items():
        pair = paired_difference(right, other, random_state=rng)
        gains.append(Gain(name, float(right.mean()), float(other.mean()), pair.mean, pair.low, pair.high))
    return gains


def _black_box(name: str, seed: int) -> Any:
    if name == "forest":
        return RandomForestClassifier(200, random_state=seed)
    if name == "boosting":
        return HistGradientBoostingClassifier(random_state=seed)
    from salience.features.blackbox_surrogate.networks import CAEClassifier, SANClassifier

    return SANClassifier(random_state=seed) if name == "attention" else CAEClassifier(random_state=seed)
