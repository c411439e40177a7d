"""`HighDimExplainer`: the columns that a black box uses, and a small model on them that mimics it.

    fidelity = share of held-out rows on which surrogate and black box agree
    R2 = 1 - sum (p_s - p)^2 / sum (p - mean p)^2        over predicted probabilities of all classes

The surrogate learns the black box's answers, never the labels, on the k most important columns. Source: Karim et al.,
DSAA 2023 (arXiv 2208.13405); parts on rules, counterfactuals and measures follow a digest of it, not its text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from sklearn.base import BaseEstimator
from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier
from sklearn.tree import DecisionTreeClassifier
from sklearn.utils.validation import check_is_fitted

from salience.errors import DataError, InputError
from salience.features.blackbox_surrogate.probe import Importance, checked_rows, probabilities, probe_importance
from salience.features.blackbox_surrogate.rules import Counterfactual, Rule, measured, moved, rules_of

SURROGATES = ("tree", "rf", "gb")
_HELD = 0.25  # of the rows, to choose k on
_LEAVES = 8  # other leaves that a counterfactual is looked for in
_CHANGES = 30  # columns that one may change


@dataclass(frozen=True)
class Explanation:
    """Why the black box answers as it does for one row.

    Attributes
    ----------
    answer : int
        Column of the probabilities that is largest.
    rule : Rule or None
        The surrogate's rule that fires, if it is a tree.
    agrees : bool
        Whether the surrogate gives the same answer: if not, the rule does not explain this row.
    attributions : dict of str to float
        For each of the k columns, how much of the answer's probability is lost when its value comes from other rows.
    counterfactuals : list of Counterfactual
        Of the nearest leaves of other classes: fewest changes first, then smallest, whatever the black box says of
        them. The first one is what a measure of counterfactuals judges.
    extended : Counterfactual or None
        Where the first one does not flip the black box: the same with further columns changed until it does. It is
        searched by asking the black box, so it says nothing of the surrogate.
    """

    answer: int
    rule: Rule | None
    agrees: bool
    attributions: dict[str, float]
    counterfactuals: list[Counterfactual]
    extended: Counterfactual | None


class HighDimExplainer(BaseEstimator):
    """Rank the columns of a wide table by their use to a black box, and mimic it by a small model on the best of them.

    Parameters
    ----------
    black_box : callable or fitted classifier
        With `predict_proba` or `predict`, or a function from rows to probabilities, or to class numbers from 0.
    k : int or "auto"
        Columns of the surrogate. "auto": the fewest whose fidelity on a quarter of the rows is within one standard
        error of the best.
    surrogate : {"tree", "rf", "gb"}
        Decision tree, random forest, gradient boosting; rules and counterfactuals need the tree.
    max_depth : int
    methods : sequence of str
        Probes of `probe_importance` whose ranks are averaged. Attention is left out by default: its network holds more
        weights than a small table can train.
    probe_rows : int
        Rows that the black box is probed with, at most: half of them in equal parts from every class that it answers,
        the others at random.
    repeats : int
        Shuffles per column.
    random_state : int

    Attributes
    ----------
    importance_ : Importance
    order_ : (M,) int
        Columns, most important first.
    columns_ : (k,) int
        Those of the surrogate.
    surrogate_ : fitted classifier
    ks_, fidelities_ : list
        Tried numbers of columns and the fidelity of each ("auto").
    rules_ : list of Rule
        Of the tree, counted on the rows of `fit`.
    names_ : list of str
    n_classes_ : int
        Classes that the black box tells apart, as far as `fit` has seen.
    """

    def __init__(
        self, *, black_box: Any = None, k: int | str = "auto", surrogate: str = "tree", max_depth: int = 6,
        methods: Sequence[str] = ("permutation", "sensitivity"), probe_rows: int = 200, repeats: int = 2,
        random_state: int = 0,
    ) -> None:  # fmt: skip
        self.black_box = black_box
        self.k = k
        self.surrogate = surrogate
        self.max_depth = max_depth
        self.methods = methods
        self.probe_rows = probe_rows
        self.repeats = repeats
        self.random_state = random_state

    def fit(
        self, X: Any, y: Any = None, *, names: Sequence[str] | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> HighDimExplainer:  # fmt: skip
        """Probe the black box with rows of a table, and train the surrogate on its answers.

        Parameters
        ----------
        X : (n, M) array or DataFrame
            Finite numbers, of rows that the black box was not trained on: to its training rows a forest repeats their
            labels, and a surrogate would learn the labels.
        y : ignored
            The surrogate learns what the black box says.
        names : list of str, optional
            Of the columns; those of a DataFrame by default.
        progress : callable, optional
            ``progress(stage, done, total)``.

        Raises
        ------
        InputError
            A parameter is out of range, such as k above the number of columns.
        DataError
            Missing values, text, or a black box that answers one class only.
        """
        given = getattr(X, "columns", None)
        rows = checked_rows(X)
        n, columns = rows.shape  # noqa: RUF059
        self._check(columns)
        self.names_ = [str(name) for name in (names if names is not None else given if given is not None else [])]
        self.names_ = self.names_ or [f"x{i}" for i in range(columns)]
        if len(self.names_) != columns:
            raise InputError(f"names has {len(self.names_)} entries; X has {columns} columns")
        rng = np.random.default_rng(self.random_state)
        self.rows_ = rows
        self.n_classes_ = 2
        chances = self._chances(rows)
        self.n_classes_ = chances.shape[1]
        answers = chances.argmax(axis=1)
        if len(np.unique(answers)) < 2:
            raise DataError("the black box answers one class for every row: fidelity would mean nothing")
        some = _of_every_class(answers, self.probe_rows, rng)
        self.importance_: Importance = probe_importance(
            self._chances, rows[some], methods=tuple(self.methods), repeats=self.repeats,
            random_state=self.random_state, progress=progress,
        )  # fmt: skip
        self.order_ = self.importance_.order()
        self.ks_: list[int] = []
        self.fidelities_: list[float] = []
        k = self._elbow(rows, answers, rng) if self.k == "auto" else int(self.k)
        self.columns_: Int[np.ndarray, " k"] = self.order_[:k]
        self.answers_ = answers
        self._learn(answers)
        return self

    def answers(self, X: Any) -> Int[np.ndarray, " n"]:
        """Column of the largest probability of the black box for each row."""
        check_is_fitted(self)
        return self._chances(self._rows(X)).argmax(axis=1)

    def predict(self, X: Any) -> Int[np.ndarray, " n"]:
        """What the surrogate says: a column of the black box's probabilities for each row."""
        check_is_fitted(self)
        return self.surrogate_.predict(self._rows(X)[:, self.columns_])

    def fidelity(self, X: Any) -> dict[str, float]:
        """How well the surrogate mimics the black box on rows that it was not trained on.

        Returns
        -------
        dict
            "agreement" and "r2" (see the module's text).

        Raises
        ------
        DataError
            The black box answers one class for all of these rows.
        """
        check_is_fitted(self)
        return fidelity_of(self.surrogate_, self.columns_, self._rows(X), self._chances)

    def with_columns(
        self, columns: Sequence[int] | np.ndarray, targets: Int[np.ndarray, " n"] | None = None
    ) -> HighDimExplainer:  # fmt: skip
        """The same explainer with a surrogate on other columns, to compare with.

        Parameters
        ----------
        columns : (k,) int
        targets : (n,) int, optional
            What the surrogate learns on the rows of `fit`; the black box's answers by default.
        """
        check_is_fitted(self)
        other = copy(self)
        other.columns_ = np.asarray(columns)
        other._learn(self.answers_ if targets is None else targets)
        return other

    def rules(
        self, min_support: float = 0.01, min_confidence: float = 0.0, X: Any = None
    ) -> list[Rule]:  # fmt: skip
        """The tree's rules with at least this support and confidence, counted on training rows or on rows `X`."""
        check_is_fitted(self)
        if self.surrogate != "tree":
            raise InputError(f"rules need surrogate='tree', not {self.surrogate!r}")
        again = self.rules_
        if X is not None:
            rows = self._rows(X)
            answers = self.answers(rows)
            again = [measured(rule, rows, answers) for rule in self.rules_]
        kept = [rule for rule in again if rule.support >= min_support and rule.confidence >= min_confidence]
        return sorted(kept, key=lambda rule: (-rule.support, rule.leaf))

    def explain(self, x: Any, draws: int = 50) -> Explanation:
        """Explain the black box's answer to one row (M,)."""
        check_is_fitted(self)
        row = self._rows(np.asarray(x, dtype=np.float64).reshape(1, -1))
        before = self._chances(row)[0]
        answer = int(before.argmax())
        rule, others, further = None, [], None
        if self.surrogate == "tree":
            rule = next(item for item in self.rules_ if item.covers(row)[0])
            others = self._counterfactuals(row[0], answer)
            further = self._extended(others[0], row[0], answer) if others and not others[0].flips else None
        agrees = bool(self.predict(row)[0] == answer)
        why = self._attributions(row[0], before[answer], answer, draws)
        return Explanation(answer, rule, agrees, why, others, further)

    def _counterfactuals(self, x: np.ndarray, answer: int) -> list[Counterfactual]:
        spread = self.rows_.std(axis=0)
        tried = []
        for rule in self.rules_:
            if rule.label != answer and rule.support > 0:
                changes, row, size = moved(rule, x, self.rows_, spread)
                if changes:
                    tried.append((len(changes), size, rule.leaf, rule, changes, row))
        tried.sort(key=lambda item: item[:3])
        if not tried:
            return []
        said = self.answers(np.stack([item[-1] for item in tried[:_LEAVES]]))
        return [
            Counterfactual(rule, changes, row, size, int(now), bool(now != answer))
            for (_, size, _, rule, changes, row), now in zip(tried, said)
        ]

    def _extended(self, nearest: Counterfactual, x: np.ndarray, answer: int) -> Counterfactual | None:
        """The nearest one with more columns changed, most important first, until the black box flips; or nothing.

        They are set to the median of the rows to which the black box gives the label wanted.
        """
        there = self.rows_[self.answers_ == nearest.rule.label]
        if not len(there):
            return None
        wanted, spread = np.median(there, axis=0), self.rows_.std(axis=0)
        more = [int(c) for c in self.order_ if self.names_[c] not in nearest.changes and wanted[c] != x[c]]
        more = more[: _CHANGES - len(nearest.changes)]
        if not more:
            return None
        steps = np.tile(nearest.row, (len(more), 1))
        for step, column in enumerate(more):
            steps[step:, column] = wanted[column]
        said = self.answers(steps)
        if not (said != answer).any():
            return None
        last = int(np.argmax(said != answer))
        added = {self.names_[c]: (float(x[c]), float(wanted[c])) for c in more[: last + 1]}
        size = float((np.abs(steps[last] - x) / np.where(spread > 0, spread, 1.0)).sum())
        return Counterfactual(nearest.rule, nearest.changes | added, steps[last], size, int(said[last]), True)

    def _attributions(self, x: np.ndarray, chance: float, answer: int, draws: int) -> dict[str, float]:
        rng = np.random.default_rng(self.random_state)
        others = self.rows_[rng.integers(len(self.rows_), size=draws)]
        changed = np.tile(x, (len(self.columns_) * draws, 1))
        for at, column in enumerate(self.columns_):
            changed[at * draws : (at + 1) * draws, column] = others[:, column]
        after = self._chances(changed)[:, answer].reshape(len(self.columns_), draws).mean(axis=1)
        return {self.names_[column]: float(chance - value) for column, value in zip(self.columns_, after)}

    def _elbow(self, rows: np.ndarray, answers: np.ndarray, rng: np.random.Generator) -> int:
        order = rng.permutation(len(rows))
        cut = max(1, int(_HELD * len(rows)))
        held, train = order[:cut], order[cut:]
        most = min(rows.shape[1], 60)
        self.ks_ = sorted({k for k in (1, 2, 3, 5, 8, 12, 16, 20, 30, 40, 60) if k <= most})
        for k in self.ks_:
            columns = self.order_[:k]
            model = self._mimic(rows[train], answers[train], columns)
            self.fidelities_.append(float((model.predict(rows[held][:, columns]) == answers[held]).mean()))
        best = max(self.fidelities_)
        error = np.sqrt(max(best * (1 - best), 1.0 / len(held)) / len(held))
        return next(k for k, value in zip(self.ks_, self.fidelities_) if value >= best - error)

    def _mimic(self, rows: np.ndarray, answers: np.ndarray, columns: np.ndarray) -> Any:
        kinds = {
            "tree": lambda: DecisionTreeClassifier(max_depth=self.max_depth, random_state=self.random_state),
            "rf": lambda: RandomForestClassifier(100, max_depth=self.max_depth, random_state=self.random_state),
            "gb": lambda: GradientBoostingClassifier(max_depth=self.max_depth, random_state=self.random_state),
        }
        return kinds[self.surrogate]().fit(rows[:, columns], answers)

    def _learn(self, targets: np.ndarray) -> None:
        self.surrogate_ = self._mimic(self.rows_, targets, self.columns_)
        self.rules_ = (
            rules_of(self.surrogate_, self.columns_, self.names_, self.rows_, self.answers_)
            if self.surrogate == "tree" else []
        )  # fmt: skip

    def _chances(self, rows: np.ndarray) -> Float[np.ndarray, "n classes"]:
        """Probabilities of the black box, as wide as in `fit` at least."""
        return probabilities(self._predict, rows, self.n_classes_)

    def _predict(self, rows: np.ndarray) -> np.ndarray:
        box = self.black_box
        if hasattr(box, "predict_proba"):
            return box.predict_proba(rows)
        if not hasattr(box, "predict"):
            return box(rows)
        labels = np.asarray(box.predict(rows))
        return np.searchsorted(box.classes_, labels) if hasattr(box, "classes_") else labels

    def _rows(self, X: Any) -> Float[np.ndarray, "n features"]:
        rows = checked_rows(X)
        if rows.shape[1] != len(self.names_):
            raise InputError(f"X has {rows.shape[1]} columns; the explainer was fitted on {len(self.names_)}")
        return rows

    def _check(self, columns: int) -> None:
        if not (callable(self.black_box) or hasattr(self.black_box, "predict_proba")
                or hasattr(self.black_box, "predict")):  # fmt: skip
            raise InputError(
                f"black_box is a {type(self.black_box).__name__}; give a fitted classifier with predict_proba or "
                "predict, or a function from rows to probabilities"
            )
        if self.k != "auto" and (
            isinstance(self.k, bool) or not isinstance(self.k, int | np.integer) or not 1 <= self.k <= columns
        ):
            raise InputError(f"k must be 'auto' or a whole number from 1 to the {columns} columns, not {self.k!r}")
        if self.surrogate not in SURROGATES:
            raise InputError(f"surrogate must be one of {', '.join(SURROGATES)}, not {self.surrogate!r}")
        for name, least in (("max_depth", 1), ("probe_rows", 10), ("repeats", 1), ("random_state", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
                raise InputError(f"{name} must be a whole number of at least {least}, not {value!r}")


def _of_every_class(answers: Int[np.ndarray, " n"], count: int, rng: np.random.Generator) -> Int[np.ndarray, " m"]:
    """Some rows, half of them in equal parts from every class that is answered: a rare one is not passed over."""
    order, kinds = rng.permutation(len(answers)), np.unique(answers)
    share = max(1, count // (2 * len(kinds)))
    first = np.concatenate([order[answers[order] == kind][:share] for kind in kinds])
    rest = order[~np.isin(order, first)]
    return np.sort(np.concatenate([first, rest[: max(0, count - len(first))]]))


def fidelity_of(surrogate: Any, columns: np.ndarray, rows: np.ndarray, predict: Callable) -> dict[str, float]:
    """Agreement and R2 of a surrogate on some columns with a black box, on rows it was not trained on."""
    wanted = probabilities(predict, rows)
    answers = wanted.argmax(axis=1)
    if len(np.unique(answers)) < 2:
        raise DataError("the black box answers one class for all of these rows: fidelity would mean nothing")
    width = max(wanted.shape[1], int(max(surrogate.classes_)) + 1)
    wanted = np.pad(wanted, ((0, 0), (0, width - wanted.shape[1])))
    given = np.zeros_like(wanted)
    given[:, surrogate.classes_] = surrogate.predict_proba(rows[:, columns])
    left = ((given - wanted) ** 2).sum()
    return {
        "agreement": float((given.argmax(axis=1) == answers).mean()),
        "r2": float(1 - left / ((wanted - wanted.mean(axis=0)) ** 2).sum()),
    }
