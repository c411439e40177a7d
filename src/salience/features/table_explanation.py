"""Explain a black box on a user's table, and measure it there: the work behind `salience explain table`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.feature_selection import f_classif

from salience.errors import DataError, InputError
from salience.features.blackbox_surrogate.explainer import Explanation, HighDimExplainer
from salience.features.blackbox_surrogate.rules import Rule, measured
from salience.io.encoding import encode, labelled
from salience.io.whole import column_of
from salience.measure import difference_over_draws

BLACK_BOXES = ("forest", "boosting", "attention", "autoencoder")
_RANDOM = 10  # draws of random columns
_COUNTED = 30  # rows whose counterfactuals are counted


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
    """What `explain_table` found; figures are of held-out rows.

    `flips` is the share whose nearest counterfactual flips the black box, `flips_searched` that with further columns
    changed until it does; `fresh_rows` are those that black box was explained by.
    """

    explainer: HighDimExplainer
    classes: list[str]
    black_box: str
    train_rows: int
    fresh_rows: int
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
    flips_searched: float
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
            "flips_after_a_search": self.flips_searched,
            "against": [vars(gain) for gain in self.gains], "classes": self.classes,
            "columns": [explainer.names_[c] for c in explainer.columns_],
            "rules": [rule.text(self.classes) for _, rule in self.rules], "notes": self.notes,
        }  # fmt: skip


def explain_table(
    data: Any, label: str, *, ignore: Sequence[str] = (), black_box: str = "forest", k: int | str = "auto",
    max_depth: int = 6, min_support: float = 0.01, test: float = 0.3, examples: int = 5, random_state: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> TableExplanation:  # fmt: skip
    """Train a black box on part of a table, explain it by rows it has not seen, and measure that on the rest.

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
        Share of the rows that is held out; half of the others train the black box, half explain it.
    examples : int
        Held-out rows to explain one by one.
    random_state : int
    progress : callable, optional
        ``progress(stage, done, total)``.
    """
    if black_box not in BLACK_BOXES:
        raise InputError(f"black_box must be one of {', '.join(BLACK_BOXES)}, not {black_box!r}")
    for name, share in (("test", test), ("min_support", min_support)):
        if not 0 <= share < 1 or (name == "test" and not share):
            raise InputError(f"{name} must lie between 0 and 1, not {share}")
    for name, value in (("examples", examples), ("random_state", random_state)):
        if value < 0:
            raise InputError(f"{name} must be 0 or larger, not {value}")
    tell = progress or (lambda stage, done, total: None)
    tell("reading", 0, 1)
    table, labels, notes = labelled(data, label)
    for name in ignore:
        column_of(table, name, "ignored column")
    rng = np.random.default_rng(random_state)
    order = rng.permutation(len(labels))
    cut = int(test * len(labels))
    held, train = order[:cut], order[cut:]
    own, fresh = np.array_split(train, 2)  # the black box's rows, and those that it is explained by
    if min(len(held), len(own), len(fresh)) < 20:
        raise DataError(f"{len(labels)} rows are too few to train on one part, explain by another, measure on a third")
    coded = encode(table, [name for name in table.column_names if name != label and name not in ignore], train)
    rows, notes = coded.rows, notes + coded.notes
    if len(set(labels[own])) < 2:
        raise DataError("the rows to train on hold one class only")
    tell(f"training the black box ({black_box})", 0, 1)
    model = _black_box(black_box, random_state).fit(rows[own], labels[own])
    explainer = HighDimExplainer(black_box=model, k=k, max_depth=max_depth, random_state=random_state)
    explainer.fit(rows[fresh], names=coded.names, progress=progress)
    tell("measuring on held-out rows", 0, 1)
    answers, mimicked = explainer.answers(rows[held]), explainer.predict(rows[held])
    found = explainer.fidelity(rows[held])
    explained = [(int(at), explainer.explain(rows[at])) for at in held[: max(examples, _COUNTED)]]
    kept = [rule for rule in explainer.rules_ if rule.support >= min_support]
    again = [(rule, measured(rule, rows[held], answers)) for rule in kept]
    nearest = [bool(e.counterfactuals) and e.counterfactuals[0].flips for _, e in explained]
    commonest = Counter(labels[train]).most_common(1)[0][0]
    truth = labels[held]
    return TableExplanation(
        explainer, list(map(str, model.classes_)), black_box, len(own), len(fresh), len(held),
        found["agreement"], found["r2"],
        float((model.classes_[answers] == truth).mean()), float((model.classes_[mimicked] == truth).mean()),
        float((truth == commonest).mean()), _gains(explainer, rows[held], answers, rows[train], labels[train], rng),
        sorted(again, key=lambda pair: -pair[1].support), explained[:examples], float(np.mean(nearest)),
        float(np.mean([flips or e.extended is not None for flips, (_, e) in zip(nearest, explained)])), notes,
    )  # fmt: skip


def _gains(explainer: HighDimExplainer, test_rows, answers, train_rows, train_labels, rng) -> list[Gain]:
    """The surrogate against some on random columns, and against one on those with the largest F statistic."""
    k, columns = len(explainer.columns_), test_rows.shape[1]
    right = (explainer.predict(test_rows) == answers).astype(float)

    def agrees(chosen: np.ndarray) -> np.ndarray:
        return (explainer.with_columns(chosen).predict(test_rows) == answers).astype(float)

    with np.errstate(all="ignore"):
        statistic = np.nan_to_num(f_classif(train_rows, train_labels)[0], nan=-1.0)
    others = {
        "random columns": [agrees(rng.choice(columns, k, replace=False)) for _ in range(_RANDOM)],
        "columns by F statistic": [agrees(np.argsort(-statistic, kind="stable")[:k])],
    }
    gains = []
    for name, draws in others.items():
        pair = difference_over_draws(right, draws, random_state=rng)
        gains.append(Gain(name, float(right.mean()), float(np.mean(draws)), pair.mean, pair.low, pair.high))
    return gains


def _black_box(name: str, seed: int) -> Any:
    if name == "forest":
        return RandomForestClassifier(200, random_state=seed)
    if name == "boosting":
        return HistGradientBoostingClassifier(random_state=seed)
    from salience.features.blackbox_surrogate.networks import CAEClassifier, SANClassifier

    return SANClassifier(random_state=seed) if name == "attention" else CAEClassifier(random_state=seed)
