"""Cross-fit predictions of the gold labels, solve the moments, repeat over splits, and combine.

One split cuts the rows (or the clusters) at random into K folds; for each fold a learner is trained on the labelled
rows outside it and predicts the gold labels of all rows in it. Over S splits the estimate is the median, and its
covariance the elementwise median of ``V_s + (b_s - b)(b_s - b)'``: luck of the split is part of the interval.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.stats
from jaxtyping import Bool, Float, Int

from salience.errors import DataError, InputError
from salience.trust.dsl.moments import Design, Model, Solution, solve

if TYPE_CHECKING:
    import pandas as pd

FEW, PER_COEFFICIENT = 30, 10  # labels below which the intervals are not to be relied on
METHODS = {
    "DSL": "predictions corrected by the gold labels",
    "GSO": "gold labels only, weighted by 1 / probability",
    "SO": "surrogates only, taken as if they were gold",
    "SL": "cross-fitted predictions, taken as if they were gold (plug-in)",
}
# Outcome and regressors from a table of the variables that need prediction, (n, variables).
Build = Callable[[Float[np.ndarray, "n v"]], tuple[np.ndarray, Any]]


@dataclass(frozen=True)
class Rows:
    """The data of one estimation, checked: gold labels, surrogates, features, and the sampling design.

    Attributes
    ----------
    gold : (n, v) float
        Variables that needed prediction; NaN where there is no label.
    surrogate : (n, v) float
        A stand-in for each of them, on every row.
    features : (n, f) float
        What the learner predicts them from.
    prob : (n,) float
        Probability of being labelled, by design.
    cluster : (n,) int or None
    """

    gold: Float[np.ndarray, "n v"]
    surrogate: Float[np.ndarray, "n v"]
    features: Float[np.ndarray, "n f"]
    prob: Float[np.ndarray, " n"]
    cluster: Int[np.ndarray, " n"] | None = None

    @property
    def labelled(self) -> Bool[np.ndarray, " n"]:
        """Rows with all their gold labels."""
        return ~np.isnan(self.gold).any(axis=1)


@dataclass(frozen=True)
class DSLResult:
    """Coefficients with intervals, the three estimators beside them, and what more labels would give.

    Attributes
    ----------
    names : tuple of str, length p
    coef, se : (p,) float
    vcov : (p, p) float
    n, n_labeled, n_dropped : int
        Rows used, those with gold labels, and those left out for missing values.
    others : dict of str to (coef, se)
        By the short names in `METHODS`: "GSO", "SO", "SL".
    error : float
        Root mean square error of the cross-fitted predictions on labelled rows they were not trained on (first
        variable).
    notes : tuple of str
        What a reader must know, such as too few labels.
    """

    names: tuple[str, ...]
    coef: Float[np.ndarray, " p"]
    se: Float[np.ndarray, " p"]
    vcov: Float[np.ndarray, "p p"]
    n: int
    n_labeled: int
    n_dropped: int
    others: dict[str, tuple[np.ndarray, np.ndarray]]
    error: float
    notes: tuple[str, ...] = ()
    solutions: list[Solution] = field(default_factory=list, repr=False)

    def conf_int(self, alpha: float = 0.05, method: str = "DSL") -> Float[np.ndarray, "p 2"]:
        """Normal confidence intervals with coverage ``1 - alpha``."""
        if not 0 < alpha < 1:
            raise InputError(f"alpha must lie between 0 and 1, not {alpha}")
        coef, se = self.estimate(method)
        reach = scipy.stats.norm.ppf(1 - alpha / 2) * se
        return np.stack([coef - reach, coef + reach], axis=1)

    def estimate(self, method: str = "DSL") -> tuple[np.ndarray, np.ndarray]:
        """Coefficients and standard errors of one of `METHODS`."""
        if method not in METHODS:
            raise InputError(f"method {method!r} is none of {', '.join(METHODS)}")
        return (self.coef, self.se) if method == "DSL" else self.others[method]

    def rows(self, alpha: float = 0.05) -> list[dict[str, Any]]:
        """One record per method and coefficient: method, name, coef, se, low, high, two-sided p_value."""
        found = []
        for method in METHODS:
            coef, se = self.estimate(method)
            span = self.conf_int(alpha, method)
            p_values = 2 * scipy.stats.norm.sf(np.abs(coef / np.where(se > 0, se, np.nan)))
            for at, name in enumerate(self.names):
                found.append({
                    "method": method, "name": name, "coef": float(coef[at]), "se": float(se[at]),
                    "low": float(span[at, 0]), "high": float(span[at, 1]), "p_value": float(p_values[at]),
                })  # fmt: skip
        return found

    def summary(self, alpha: float = 0.05) -> pd.DataFrame:
        """The coefficients as a table: coef, se, low, high, and a two-sided p_value (the R package's is one-sided)."""
        return self.compare(alpha).query("method == 'DSL'").drop(columns="method").set_index("name")

    def compare(self, alpha: float = 0.05) -> pd.DataFrame:
        """All four estimators side by side: method, name, coef, se, low, high, p_value."""
        import pandas as pd

        return pd.DataFrame(self.rows(alpha))

    def power_se(self, n_labels: Sequence[float] | np.ndarray) -> Float[np.ndarray, "m p"]:
        """Standard errors to expect with so many gold labels.

        ``V' = J^-1 (M_1 / q + M_23) J^-T / n`` with ``q = n' / n_labeled``, the median over splits. Where the estimate
        of a variance turns negative, the last one that did not shrinks by the square root of the number of labels.
        """
        planned = np.asarray(n_labels, dtype=np.float64)
        if planned.ndim != 1 or not len(planned) or not (planned > 0).all():
            raise InputError(f"n_labels must be numbers of labels above 0, not {n_labels!r}")
        order = np.argsort(planned)
        with np.errstate(invalid="ignore"):
            each = np.array([[self._errors(s, q / self.n_labeled) for s in self.solutions] for q in planned[order]])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # all splits negative: filled below
            errors = np.nanmedian(each, axis=1)
        last, at = self.se.copy(), np.full(len(self.names), float(self.n_labeled))
        for row, number in zip(errors, planned[order]):
            bad = np.isnan(row)
            row[bad] = last[bad] * np.sqrt(at[bad] / number)
            last[~bad], at[~bad] = row[~bad], number
        result = np.empty_like(errors)
        result[order] = errors
        return result

    def power(self, n_labels: Sequence[float] | None = None) -> pd.DataFrame:
        """`power_se` as a table with a row per number of labels; 1.1 to 2 times the present number by default."""
        import pandas as pd

        numbers = np.linspace(1.1, 2.0, 10) * self.n_labeled if n_labels is None else n_labels
        return pd.DataFrame(self.power_se(numbers), index=pd.Index(numbers, name="n_labels"), columns=list(self.names))

    def labels_for(self, factor: float = 0.5) -> list[int | None]:
        """How many gold labels in all would make each interval `factor` as wide; None where even all rows would not.

        The number at which `power_se` falls to `factor` times what it gives for the present number.
        """
        if not 0 < factor < 1:
            raise InputError(f"factor must lie between 0 and 1, not {factor}")
        now = self.power_se([self.n_labeled])[0]
        found: list[int | None] = []
        for at, size in enumerate(now):
            low, high = self.n_labeled, self.n
            if self.power_se([high])[0, at] > factor * size:
                found.append(None)
                continue
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if self.power_se([middle])[0, at] <= factor * size else (middle, high)
            found.append(high)
        return found

    def _errors(self, solution: Solution, more: float) -> np.ndarray:
        return np.sqrt(np.diag(solution.vcov(more))[: len(self.names)])


def estimate(
    rows: Rows, build: Build, names: Sequence[str], model: Model, learner: Any, folds: int, splits: int, rescale: bool,
    random_state: int, n_dropped: int = 0,
) -> DSLResult:  # fmt: skip
    """Estimate the coefficients of ``build(variables)``, of which the first ``len(names)`` are reported."""
    labelled, notes = rows.labelled, []
    count, n, keep = int(labelled.sum()), len(labelled), len(names)
    if count < FEW or count < PER_COEFFICIENT * keep:
        least = max(FEW, PER_COEFFICIENT * keep)
        notes.append(
            f"only {count} gold labels for {keep} coefficients: intervals need at least {least} to be relied on"
        )
        warnings.warn(notes[-1], stacklevel=4)
    prob = rows.prob * (count / n / rows.prob.mean()) if rescale else rows.prob
    ratio = np.where(labelled, 1 / prob, 0.0)
    if isinstance(learner, str):
        splits = 1  # nothing is trained: all splits are the same
    if labelled.all():
        splits, notes = 1, [*notes, "every row has gold labels: this is the plain regression"]
    found, errors = [], []
    plug_in: list[Design] = []
    for split in range(splits):
        guess = _cross_fit(rows, learner, folds, np.random.default_rng([random_state, split]))
        gold = np.where(labelled[:, None], rows.gold, guess)
        design = Design(*build(gold), *build(guess), ratio)
        found.append(solve(design, model, rows.cluster))
        plug_in.append(design.predicted_only())
        errors.append(np.sqrt(np.mean((rows.gold - guess)[labelled, 0] ** 2)))
    surrogate = np.where(labelled[:, None], rows.gold, rows.surrogate)
    raw = Design(*build(surrogate), *build(rows.surrogate), ratio)
    coef, vcov = _combine(found, keep)
    others = {"GSO": [raw.gold_only()], "SO": [raw.predicted_only()], "SL": plug_in}
    alone = {}
    for name, designs in others.items():
        try:
            alone[name] = _combine([solve(part, model, rows.cluster) for part in designs], keep)
        except DataError as error:
            notes.append(f"{METHODS[name].split(',')[0]} ({name}): {error}")
            alone[name] = np.full(keep, np.nan), np.full((keep, keep), np.nan)
    return DSLResult(
        tuple(names), coef, np.sqrt(np.diag(vcov)), vcov, n, count, n_dropped,
        {name: (alone[name][0], np.sqrt(np.diag(alone[name][1]))) for name in METHODS if name != "DSL"},
        float(np.mean(errors)), tuple(notes), found,
    )  # fmt: skip


def _cross_fit(rows: Rows, learner: Any, folds: int, rng: np.random.Generator) -> Float[np.ndarray, "n v"]:
    """Predictions of every row by learners that saw neither it nor its cluster."""
    from sklearn.base import clone

    if isinstance(learner, str):  # "identity"
        return rows.surrogate
    labelled = rows.labelled
    if labelled.all():
        return rows.gold
    unit = np.arange(len(labelled)) if rows.cluster is None else rows.cluster
    units = rng.permutation(int(unit.max()) + 1)
    if len(units) < folds:
        raise InputError(f"folds is {folds}, but there are only {len(units)} clusters to cut into folds")
    fold_of = np.empty(len(units), dtype=np.int64)
    for fold, part in enumerate(np.array_split(units, folds)):
        fold_of[part] = fold
    guess = np.empty_like(rows.surrogate)
    for fold in range(folds):
        inside = fold_of[unit] == fold
        train = labelled & ~inside
        if not train.any():
            raise DataError(f"no gold label is left outside fold {fold + 1} of {folds}; label more rows")
        for variable in range(rows.gold.shape[1]):
            model = clone(learner)
            if "random_state" in model.get_params():
                model.set_params(random_state=int(rng.integers(2**31)))
            guess[inside, variable] = _predict(model, rows, train, inside, variable, f"fold {fold + 1} of {folds}")
    return guess


def _predict(model: Any, rows: Rows, train, inside, variable: int, fold: str) -> Float[np.ndarray, " m"]:
    target = rows.gold[train, variable]
    if not hasattr(model, "predict_proba"):
        return np.asarray(model.fit(rows.features[train], target).predict(rows.features[inside]), dtype=np.float64)
    known = rows.gold[rows.labelled, variable]
    if not np.isin(known, (0.0, 1.0)).all():
        raise InputError("learner is a classifier, but the gold labels are not 0 and 1; give a regressor")
    if len(np.unique(target)) < 2:
        raise DataError(
            f"all gold labels outside {fold} are {target[0]:g}: a classifier needs both; use fewer folds or label more"
        )
    return model.fit(rows.features[train], target).predict_proba(rows.features[inside])[:, 1]


def _combine(solutions: Sequence[Solution], keep: int) -> tuple[np.ndarray, np.ndarray]:
    """Median over splits, with the spread between them in the covariance."""
    coefs = np.array([solution.coef[:keep] for solution in solutions])
    middle = np.median(coefs, axis=0)
    off = coefs - middle
    each = [s.vcov()[:keep, :keep] + np.outer(d, d) for s, d in zip(solutions, off)]
    return middle, _positive(np.median(each, axis=0))


def _positive(matrix: Float[np.ndarray, "p p"]) -> Float[np.ndarray, "p p"]:
    """A symmetric matrix, made positive definite with its diagonal kept where it is not."""
    matrix = (matrix + matrix.T) / 2
    values, vectors = np.linalg.eigh(matrix)
    if values[0] > 0 or not (np.diag(matrix) > 0).all():
        return matrix
    clipped = vectors @ np.diag(np.maximum(values, 1e-10 * values[-1])) @ vectors.T
    scale = np.sqrt(np.diag(matrix) / np.diag(clipped))
    return clipped * np.outer(scale, scale)
