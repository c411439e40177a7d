"""Which columns does a black box use? Attention, permutation and sensitivity, and their mean rank.

permutation: how much the score drops when a column is shuffled. sensitivity: how far the predictions move,

    s_j = mean over rows and draws of 1/2 sum_c |P(c | x) - P(c | x with column j of another row)|

so that no labels are needed. attention: how a self-attention network trained on the black box's answers weighs the
columns. Source: Karim et al., DSAA 2023 (arXiv 2208.13405), section on probing and perturbing; the mean rank is ours.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import rankdata

from salience.errors import DataError, InputError

if TYPE_CHECKING:
    import pandas as pd

PROBES = ("attention", "permutation", "sensitivity")
Predict = Callable[[Float[np.ndarray, "n features"]], np.ndarray]


class Importance(NamedTuple):
    """What each probe says of every column, and their mean rank.

    Attributes
    ----------
    scores : dict of str to (M,) float
        By probe; larger means more important.
    rank : (M,) float
        Mean over probes of the rank from 1 (most important); equal scores share their mean rank.
    flips : (M,) float or None
        Share of rows whose predicted class changes when the column is replaced (of "sensitivity").
    """

    scores: dict[str, np.ndarray]
    rank: Float[np.ndarray, " features"]
    flips: np.ndarray | None

    def order(self) -> Int[np.ndarray, " features"]:
        """Columns, most important first."""
        return np.argsort(self.rank, kind="stable")

    def frame(self, names: Sequence[str] | None = None) -> pd.DataFrame:
        """As a table, most important first: feature, a column per probe, rank."""
        import pandas as pd

        names = [f"x{i}" for i in range(len(self.rank))] if names is None else list(names)
        table = pd.DataFrame({"feature": names, **self.scores, "rank": self.rank})
        return table.iloc[self.order()].reset_index(drop=True)


def probe_importance(
    predict_proba: Predict, X: Float[np.ndarray, "n features"], *, y: np.ndarray | None = None,
    methods: Sequence[str] = PROBES, repeats: int = 5, attention: np.ndarray | None = None, random_state: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Importance:  # fmt: skip
    """Probe a black box with rows of a table.

    Parameters
    ----------
    predict_proba : callable
        Rows (n, M) to probabilities (n, C), or to predicted classes (n,), of which flips are counted then.
    X : (n, M) float
        Rows to probe with, finite.
    y : (n,) int, optional
        True classes as columns of the probabilities, for "permutation"; by default the black box's own answers.
    methods : sequence of {"attention", "permutation", "sensitivity"}
    repeats : int
        Draws per column.
    attention : (M,) float, optional
        Attention that is there already; otherwise a `SANClassifier` is trained on the black box's answers.
    random_state : int
    progress : callable, optional
        ``progress(probe, columns done, columns)``.

    Raises
    ------
    InputError
        A probe is unknown, or `repeats` is below 1.
    DataError
        Rows with missing values, or a black box that answers the same class everywhere.
    """
    unknown = [name for name in methods if name not in PROBES]
    if unknown or not methods:
        raise InputError(f"methods {list(methods)!r}: choose from {', '.join(PROBES)}")
    if isinstance(repeats, bool) or not isinstance(repeats, int | np.integer) or repeats < 1:
        raise InputError(f"repeats must be a whole number of at least 1, not {repeats!r}")
    rows = checked_rows(X)
    before = probabilities(predict_proba, rows)
    answers = before.argmax(axis=1)
    if len(np.unique(answers)) < 2:
        raise DataError("the black box answers one class for every row: there is nothing to explain")
    tell = progress or (lambda probe, done, total: None)
    scores: dict[str, np.ndarray] = {}
    flips = None
    for name in methods:
        if name == "attention":
            scores[name] = _attention(rows, answers, attention, random_state)
        elif name == "permutation":
            truth = answers if y is None else np.asarray(y)
            scores[name] = _permutation(predict_proba, rows, truth, before.shape[1], repeats, random_state)
        else:
            scores[name], flips = _sensitivity(predict_proba, rows, before, repeats, random_state, tell)
        tell(name, rows.shape[1], rows.shape[1])
    rank = np.mean([rankdata(-values) for values in scores.values()], axis=0)
    return Importance(scores, rank, flips)


def comprehensiveness(
    predict_proba: Predict, X: Float[np.ndarray, "n features"], features: Sequence[int],
    background: Float[np.ndarray, "m features"],
) -> Float[np.ndarray, " n"]:  # fmt: skip
    """``P(c | x) - P(c | x without the features)`` of each row, c its predicted class: large if they matter.

    "Without" puts the mean of `background` in their place (ERASER: DeYoung et al., ACL 2020).
    """
    return _erased(predict_proba, X, features, background, keep=False)


def sufficiency(
    predict_proba: Predict, X: Float[np.ndarray, "n features"], features: Sequence[int],
    background: Float[np.ndarray, "m features"],
) -> Float[np.ndarray, " n"]:  # fmt: skip
    """``P(c | x) - P(c | only the features)`` of each row, c its predicted class: near 0 if they are enough."""
    return _erased(predict_proba, X, features, background, keep=True)


def probabilities(predict_proba: Predict, rows: np.ndarray) -> Float[np.ndarray, "n classes"]:
    """What a black box says of rows, as probabilities; of predicted classes, ones and zeros."""
    found = np.asarray(predict_proba(rows))
    if found.ndim == 1 and found.dtype.kind in "iu" and len(found) == len(rows):
        return (found[:, None] == np.arange(max(int(found.max()) + 1, 2))).astype(np.float64)
    if found.ndim != 2 or len(found) != len(rows):
        raise InputError(
            f"the black box returned shape {found.shape} for {len(rows)} rows; probabilities (rows, classes) are needed, "
            "or class numbers (rows,)"
        )
    return found.astype(np.float64)


def checked_rows(X: Any) -> Float[np.ndarray, "n features"]:
    """Rows as float64, finite."""
    try:
        rows = np.asarray(X, dtype=np.float64)
    except (TypeError, ValueError):
        raise DataError("X holds text: encode it as numbers first, and keep the names of the columns") from None
    if rows.ndim != 2 or not rows.size:
        raise InputError(f"X must have rows and columns, not shape {rows.shape}")
    bad = ~np.isfinite(rows)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise DataError(f"X has {int(bad.sum())} missing or infinite values, first in row {row}, column {column}")
    return rows


def _attention(rows: np.ndarray, answers: np.ndarray, given: np.ndarray | None, seed: int) -> np.ndarray:
    if given is not None:
        values = np.asarray(given, dtype=np.float64)
        if values.shape != (rows.shape[1],):
            raise InputError(f"attention has shape {values.shape}; X has {rows.shape[1]} columns")
        return values
    from salience.features.blackbox_surrogate.networks import SANClassifier

    return SANClassifier(random_state=seed).fit(rows, answers).attention_


class _Answering:
    """A black box in the shape that scikit-learn's permutation importance asks for."""

    def __init__(self, predict_proba: Predict) -> None:
        self._predict_proba = predict_proba

    def fit(self, X: Any, y: Any = None) -> _Answering:
        return self

    def predict(self, X: np.ndarray) -> np.ndarray:
        return probabilities(self._predict_proba, X)


def _permutation(
    predict_proba: Predict, rows: np.ndarray, truth: np.ndarray, classes: int, repeats: int, seed: int
) -> np.ndarray:
    from sklearn.inspection import permutation_importance

    def likelihood(model: _Answering, X: np.ndarray, y: np.ndarray) -> float:
        chance = np.clip(model.predict(X)[np.arange(len(y)), y], 1e-6, 1.0)
        return float(np.log(chance).mean())

    if truth.shape != (len(rows),) or truth.dtype.kind not in "iu" or truth.min() < 0 or truth.max() >= classes:
        raise InputError(f"y must name a column of the probabilities, 0 to {classes - 1}, for each row")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        found = permutation_importance(
            _Answering(predict_proba), rows, truth, scoring=likelihood, n_repeats=repeats, random_state=seed
        )
    return found.importances_mean


def _sensitivity(
    predict_proba: Predict, rows: np.ndarray, before: np.ndarray, repeats: int, seed: int,
    tell: Callable[[str, int, int], None],
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    columns = rows.shape[1]
    moved, flips = np.zeros(columns), np.zeros(columns)
    answers, changed = before.argmax(axis=1), rows.copy()
    for column, draws in enumerate(_draws(len(rows), columns, repeats, seed)):
        if np.ptp(rows[:, column]) == 0:
            continue  # a constant column moves nothing
        for order in draws:
            changed[:, column] = rows[order, column]
            after = probabilities(predict_proba, changed)
            if after.shape[1] < before.shape[1]:  # class numbers whose largest no longer occurs
                after = np.pad(after, ((0, 0), (0, before.shape[1] - after.shape[1])))
            width = before.shape[1]
            moved[column] += 0.5 * np.abs(after[:, :width] - before).sum(axis=1).mean() / repeats
            flips[column] += (after.argmax(axis=1) != answers).mean() / repeats
        changed[:, column] = rows[:, column]
        tell("sensitivity", column + 1, columns)
    return moved, flips


def _draws(rows: int, columns: int, repeats: int, seed: int) -> Iterator[np.ndarray]:
    """For each column, other rows to take its values from: the same for a column whatever the others are."""
    for column in range(columns):
        yield np.random.default_rng([seed, column]).integers(rows, size=(repeats, rows))


def _erased(predict_proba: Predict, X: Any, features: Sequence[int], background: Any, keep: bool) -> np.ndarray:
    rows, others = checked_rows(X), checked_rows(background)
    chosen = np.zeros(rows.shape[1], dtype=bool)
    chosen[np.asarray(features, dtype=np.int64)] = True
    before = probabilities(predict_proba, rows)
    answer = before.argmax(axis=1)
    changed = np.where(chosen != keep, others.mean(axis=0), rows)
    after = probabilities(predict_proba, changed)
    if after.shape[1] < before.shape[1]:
        after = np.pad(after, ((0, 0), (0, before.shape[1] - after.shape[1])))
    each = np.arange(len(rows))
    return before[each, answer] - after[each, answer]
