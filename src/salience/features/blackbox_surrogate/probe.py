"""Which columns does a black box use? Attention, permutation and sensitivity, and their mean rank.

permutation: how much the mean log probability of the true class drops when a column is shuffled. sensitivity: how far
the predictions move when its value comes from another row,

    s_j = mean over rows and draws of 1/2 sum_c |P(c | x) - P(c | x with column j of another row)|

so that no labels are needed. Both come from one pass, by the shuffles of scikit-learn's `permutation_importance`.
attention: how a self-attention network trained on the black box's answers weighs the columns.

Source: Karim et al., DSAA 2023 (arXiv 2208.13405), section on probing and perturbing; the mean rank is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import rankdata

from salience.errors import DataError, InputError

if TYPE_CHECKING:
    import pandas as pd

PROBES = ("permutation", "sensitivity", "attention")
_ROWS, _CELLS = 8192, 16_000_000  # of one call of the black box
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
    flips: np.ndarray | None = None
    if "permutation" in methods or "sensitivity" in methods:
        truth = _truth(answers if y is None else y, before)
        drop, moved, flips = _shuffled(predict_proba, rows, before, truth, repeats, random_state, tell)
        scores = {name: values for name, values in (("permutation", drop), ("sensitivity", moved)) if name in methods}
    if "attention" in methods:
        tell("attention", 0, rows.shape[1])
        scores["attention"] = _attention(rows, answers, attention, random_state)
    rank = np.mean([rankdata(-values) for values in scores.values()], axis=0)
    return Importance(scores, rank, flips)


def comprehensiveness(
    predict_proba: Predict, X: Float[np.ndarray, "n features"], features: Sequence[int] | np.ndarray,
    background: Float[np.ndarray, "m features"],
) -> Float[np.ndarray, " n"]:  # fmt: skip
    """``P(c | x) - P(c | x without the features)`` of each row, c its predicted class: large if they matter.

    "Without" puts the mean of `background` in their place (ERASER: DeYoung et al., ACL 2020).
    """
    return _erased(predict_proba, X, features, background, keep=False)


def sufficiency(
    predict_proba: Predict, X: Float[np.ndarray, "n features"], features: Sequence[int] | np.ndarray,
    background: Float[np.ndarray, "m features"],
) -> Float[np.ndarray, " n"]:  # fmt: skip
    """``P(c | x) - P(c | only the features)`` of each row, c its predicted class: near 0 if they are enough."""
    return _erased(predict_proba, X, features, background, keep=True)


def probabilities(predict_proba: Predict, rows: np.ndarray, classes: int = 2) -> Float[np.ndarray, "n classes"]:
    """What a black box says of rows, as probabilities of at least so many classes; of class numbers, ones and zeros."""
    found = np.asarray(predict_proba(rows))
    if found.ndim == 1 and found.dtype.kind in "iub" and len(found) == len(rows):
        if found.min() < 0:
            raise InputError(f"the black box returned class number {found.min()}; they count from 0")
        return (found[:, None] == np.arange(max(int(found.max()) + 1, classes))).astype(np.float64)
    if found.ndim != 2 or len(found) != len(rows):
        raise InputError(
            f"the black box returned shape {found.shape} for {len(rows)} rows; probabilities (rows, classes) are "
            "needed, or class numbers (rows,)"
        )
    return np.pad(found.astype(np.float64), ((0, 0), (0, max(0, classes - found.shape[1]))))


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


def _truth(y: Any, before: np.ndarray) -> Int[np.ndarray, " n"]:
    truth, classes = np.asarray(y), before.shape[1]
    if truth.shape != (len(before),) or truth.dtype.kind not in "iu" or truth.min() < 0 or truth.max() >= classes:
        raise InputError(f"y must name a column of the probabilities, 0 to {classes - 1}, for each row")
    return truth


def _shuffled(
    predict_proba: Predict, rows: np.ndarray, before: np.ndarray, truth: np.ndarray, repeats: int, seed: int,
    tell: Callable[[str, int, int], None],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Drop of the score, movement of the predictions and share of flips for each column."""
    n, columns = rows.shape
    drop, moved, flips = np.zeros(columns), np.zeros(columns), np.zeros(columns)
    orders = _orders(n, repeats, seed)
    at_once = max(1, min(_ROWS // n, _CELLS // (n * columns)))
    live = np.flatnonzero(np.ptp(rows, axis=0) > 0)  # a constant column moves nothing
    for start in range(0, len(live), at_once):
        block = live[start : start + at_once]
        for order in orders:
            changed = np.tile(rows, (len(block), 1))
            for place, column in enumerate(block):
                changed[place * n : (place + 1) * n, column] = rows[order, column]
            after = _same_width(probabilities(predict_proba, changed), before).reshape(len(block), n, -1)
            drop[block] += (_score(before, truth) - _score(after, truth)).mean(axis=1) / repeats
            moved[block] += 0.5 * np.abs(after - before).sum(axis=2).mean(axis=1) / repeats
            flips[block] += (after.argmax(axis=2) != before.argmax(axis=1)).mean(axis=1) / repeats
        tell("shuffling columns", start + len(block), len(live))
    return drop, moved, flips


def _orders(n: int, repeats: int, seed: int) -> list[np.ndarray]:
    """The shuffles of scikit-learn's `permutation_importance`: the same for every column."""
    rng = np.random.RandomState(np.random.RandomState(seed).randint(np.iinfo(np.int32).max + 1))
    shuffled, order, found = np.arange(n), np.arange(n), []
    for _ in range(repeats):
        rng.shuffle(shuffled)
        order = order[shuffled]  # each shuffle is of the column as the last one left it
        found.append(order)
    return found


def _score(chances: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Log probability of each row's true class."""
    return np.log(np.clip(chances[..., np.arange(len(truth)), truth], 1e-6, 1.0))


def _same_width(after: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Class numbers may lack the largest class, or show one that was not there before."""
    width = before.shape[1]
    return np.pad(after, ((0, 0), (0, max(0, width - after.shape[1]))))[:, :width]


def _erased(
    predict_proba: Predict, X: Any, features: Sequence[int] | np.ndarray, background: Any, keep: bool
) -> np.ndarray:
    rows, others = checked_rows(X), checked_rows(background)
    chosen = np.zeros(rows.shape[1], dtype=bool)
    chosen[np.asarray(features, dtype=np.int64)] = True
    before = probabilities(predict_proba, rows)
    answer = before.argmax(axis=1)
    changed = np.where(chosen != keep, others.mean(axis=0), rows)
    after = probabilities(predict_proba, changed)
    after = _same_width(after, before)
    each = np.arange(len(rows))
    return before[each, answer] - after[each, answer]
