"""A decision tree as rules that can be checked, and what would have to change for another decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class Condition:
    """``low < feature <= high``; an end is infinite where the rule has no bound there.

    Attributes
    ----------
    feature : int
        Column of the table.
    name : str
    low, high : float
    binary : bool
        Whether the column holds 0 and 1 alone. Of a column called ``column=level`` 1 is then told as that level.
    """

    feature: int
    name: str
    low: float
    high: float
    binary: bool = False

    def holds(self, X: Float[np.ndarray, "n features"]) -> Bool[np.ndarray, " n"]:
        """Rows that meet it: rounded to float32 and compared in float64, as scikit-learn's trees do."""
        values = X[:, self.feature].astype(np.float32).astype(np.float64)
        return (values > self.low) & (values <= self.high)

    def __str__(self) -> str:
        if self.binary:
            column, level = self.name.split("=", 1) if "=" in self.name else (self.name, "1")
            return f"{column} {'=' if self.low >= 0 else '!='} {level}"
        digits = 4
        while (
            digits < 17
            and np.isfinite([self.low, self.high]).all()
            and f"{self.low:.{digits}g}" == f"{self.high:.{digits}g}"
        ):
            digits += 1  # until the ends can be told apart
        low, high = f"{self.low:.{digits}g}", f"{self.high:.{digits}g}"
        if np.isinf(self.low):
            return f"{self.name} <= {high}"
        if np.isinf(self.high):
            return f"{self.name} > {low}"
        return f"{low} < {self.name} <= {high}"


@dataclass(frozen=True)
class Rule:
    """IF all conditions hold THEN the black box is expected to answer `label`.

    Attributes
    ----------
    conditions : tuple of Condition
        One per feature: bounds on the same feature are merged.
    label : int
        Column of the black box's probabilities.
    support, confidence : float
        Share of rows that meet the conditions, and share of those to which the black box gives this label, on the rows
        that the rule was made or last measured on.
    leaf : int
    """

    conditions: tuple[Condition, ...]
    label: int
    support: float
    confidence: float
    leaf: int

    def covers(self, X: Float[np.ndarray, "n features"]) -> Bool[np.ndarray, " n"]:
        """Rows that meet all conditions."""
        met = np.ones(len(X), dtype=bool)
        for condition in self.conditions:
            met &= condition.holds(X)
        return met

    def text(self, classes: Sequence[Any] | None = None) -> str:
        """The rule in words."""
        label = self.label if classes is None else classes[self.label]
        told = " AND ".join(map(str, self.conditions)) or "always"
        return f"IF {told} THEN {label}  (support {self.support:.1%}, confidence {self.confidence:.1%})"


def rules_of(
    tree: Any, columns: Int[np.ndarray, " k"], names: Sequence[str], X: Float[np.ndarray, "n features"],
    answers: Int[np.ndarray, " n"],
) -> list[Rule]:  # fmt: skip
    """One rule per leaf of a fitted tree on some columns of a table, the best supported first.

    Parameters
    ----------
    tree : DecisionTreeClassifier
        Fitted on ``X[:, columns]`` to class numbers.
    columns, names
        Which columns of the table, and what all of its columns are called.
    X, answers
        Rows, and what the black box answers to them: support and confidence are counted there.
    """
    nodes = tree.tree_
    binary = ((X == 0) | (X == 1)).all(0)
    found: list[Rule] = []

    def walk(node: int, bounds: dict[int, tuple[float, float]]) -> None:
        if nodes.children_left[node] == -1:
            conditions = tuple(
                Condition(int(columns[at]), str(names[columns[at]]), low, high, bool(binary[columns[at]]))
                for at, (low, high) in bounds.items()
            )
            label = int(tree.classes_[np.argmax(nodes.value[node][0])])
            found.append(measured(Rule(conditions, label, 0.0, 0.0, node), X, answers))
            return
        at, threshold = int(nodes.feature[node]), float(nodes.threshold[node])
        low, high = bounds.get(at, (-np.inf, np.inf))
        walk(int(nodes.children_left[node]), {**bounds, at: (low, min(high, threshold))})
        walk(int(nodes.children_right[node]), {**bounds, at: (max(low, threshold), high)})

    walk(0, {})
    return sorted(found, key=lambda rule: (-rule.support, rule.leaf))


def measured(rule: Rule, X: Float[np.ndarray, "n features"], answers: Int[np.ndarray, " n"]) -> Rule:
    """The same rule with its support and confidence counted on other rows; confidence 0 where it covers none."""
    covered = rule.covers(X)
    right = float((answers[covered] == rule.label).mean()) if covered.any() else 0.0
    return Rule(rule.conditions, rule.label, float(covered.mean()), right, rule.leaf)


@dataclass(frozen=True)
class Counterfactual:
    """Another rule that a row would meet after few changes.

    Attributes
    ----------
    rule : Rule
    changes : dict of str to (float, float)
        Feature to its value now and the value that it would need.
    row : (M,) float
        The changed row.
    size : float
        Sum of the changes in standard deviations.
    answer : int
        What the black box says of the changed row.
    flips : bool
        Whether that is another class than before.
    """

    rule: Rule
    changes: dict[str, tuple[float, float]]
    row: Float[np.ndarray, " features"]
    size: float
    answer: int
    flips: bool


def moved(
    rule: Rule, x: Float[np.ndarray, " features"], X: Float[np.ndarray, "n features"], spread: np.ndarray
) -> tuple[dict[str, tuple[float, float]], Float[np.ndarray, " features"], float]:
    """A row changed where a rule's conditions fail: to the median of the rows that meet the rule.

    The boundary itself would be the smaller change, but no black box is sure there.
    """
    row, changes, size = x.copy(), {}, 0.0
    inside = X[rule.covers(X)]
    for condition in rule.conditions:
        if condition.holds(x[None])[0]:
            continue
        column = condition.feature
        value = float(np.median(inside[:, column])) if len(inside) else _nearest(condition, spread[column])
        changes[condition.name] = (float(x[column]), value)
        size += abs(value - x[column]) / (spread[column] or 1.0)
        row[column] = value
    return changes, row, float(size)


def _nearest(condition: Condition, spread: float) -> float:
    """Just inside the bounds."""
    if np.isinf(condition.low):
        return condition.high - 0.1 * spread
    if np.isinf(condition.high):
        return condition.low + 0.1 * spread
    return (condition.low + condition.high) / 2
