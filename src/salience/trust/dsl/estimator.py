"""`DSL`: regression of a hand-labelled outcome on known columns, with a model's labels to make it sharper."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator
from sklearn.ensemble import RandomForestRegressor

from salience.errors import DataError, InputError
from salience.trust.dsl.estimate import DSLResult, Rows, estimate

if TYPE_CHECKING:
    import pandas as pd

MODELS = ("logit", "lm", "felm")
_LEVELS = 5000  # fixed effects that a dense Jacobian still carries


class DSL(BaseEstimator):
    """Regression coefficients that are right on average even where the model's labels are biased.

    Cross-fitted predictions g of the gold label are corrected where there is one,

        y~_i = g_i + (R_i / pi_i) (y_i - g_i),        sum_i (y~_i - mu(x_i'b)) x_i = 0

    which has the mean of the gold label whatever g is, as long as the labelling probabilities ``pi`` are the ones that
    rows were drawn by. Standard errors are sandwich (HC0), clustered where clusters are given; the whole is repeated
    over random splits (median). No promise of a lower error than plugging g in: the promise is coverage.

    Parameters
    ----------
    model : {"logit", "lm", "felm"}
        Logistic, linear, or linear with fixed effects.
    learner : scikit-learn estimator or "identity", optional
        Predicts the gold label from Q, W and X; a classifier's probability of class 1 is used. A random forest by
        default; "identity" takes the first column of Q as it is and trains nothing.
    folds, splits : int
        Parts of one cross-fit, and how often the data are cut anew.
    fit_intercept : bool
        Add a column of ones (not with "felm").
    rescale : bool
        Scale `prob` to a mean of ``labelled / rows``, as the R package does.
    assume_random : bool
        Say that labelled rows were drawn at random, each with the same probability, where `prob` is not given.
    random_state : int
        Seed of the splits and of the learner.

    Attributes
    ----------
    coef_, se_ : (p,) float
        Intercept first.
    vcov_ : (p, p) float
    result_ : DSLResult
        Intervals, the other estimators, power.

    Notes
    -----
    Source: Egami, Hinck, Stewart, Wei, "Using Imperfect Surrogates for Downstream Inference", NeurIPS 2023
    (arXiv 2306.04746); fixed effects, clusters, repeated splits and power as in the authors' R package `dsl`. The
    default learner there is a generalised random forest.
    """

    def __init__(
        self, *, model: str = "logit", learner: Any = None, folds: int = 5, splits: int = 10,
        fit_intercept: bool = True, rescale: bool = True, assume_random: bool = False, random_state: int = 1234,
    ) -> None:  # fmt: skip
        self.model = model
        self.learner = learner
        self.folds = folds
        self.splits = splits
        self.fit_intercept = fit_intercept
        self.rescale = rescale
        self.assume_random = assume_random
        self.random_state = random_state

    def fit(
        self, X: ArrayLike | None, Y: ArrayLike, Q: ArrayLike, *, W: ArrayLike | None = None,
        labeled: ArrayLike | None = None, prob: ArrayLike | None = None, cluster: ArrayLike | None = None,
        fixed_effects: ArrayLike | None = None,
    ) -> DSL:  # fmt: skip
        """Estimate.

        Parameters
        ----------
        X : (n, p) array or DataFrame, or None
            Regressors, known everywhere. None: the intercept alone (a mean, or a share).
        Y : (n,) float
            Gold labels, NaN where there is none. 0 and 1 for a logistic model or a share.
        Q : (n,) or (n, q) float
            The model's labels or scores; the first column is the stand-in for `Y`.
        W : (n, w) float, optional
            Further columns that help to predict `Y` but are not regressors.
        labeled : (n,) bool, optional
            Rows with gold labels; by default those where `Y` is not NaN.
        prob : (n,) float or float, optional
            Probability of being labelled, by the design of the sample.
        cluster : (n,), optional
            Rows of one cluster are cut into folds together and their errors may be related.
        fixed_effects : (n,) or (n, k), optional
            Groups whose effects are estimated along with "felm".

        Raises
        ------
        InputError
            A parameter is not usable, shapes do not fit, or nothing says how rows were chosen for labelling.
        DataError
            Probabilities outside (0, 1], labels where there should be none or none where there should be, dependent
            regressors, perfect separation.
        """
        self._check()
        gold = _column("Y", Y)
        n = len(gold)
        names, regressors = _matrix("X", X, n)
        _, surrogates = _matrix("Q", Q, n)
        _, others = _matrix("W", W, n)
        if not surrogates.shape[1]:
            raise InputError("Q has no column: give the model's labels, or regress on Y alone")
        codes = None if cluster is None else _codes("cluster", cluster, n)
        groups = _groups(fixed_effects, n)
        if (self.model == "felm") != bool(groups):
            raise InputError("fixed_effects go with model='felm', and 'felm' needs them")
        gold = check_labels(gold[:, None], labeled)[:, 0]
        probabilities = check_prob(prob, ~np.isnan(gold), self.assume_random)
        parts = [regressors, surrogates, others]
        whole = np.all([np.isfinite(part).all(axis=1) for part in parts], axis=0)
        dropped = int((~whole).sum())
        if not whole.any():
            raise DataError("no row has all of its values in X, Q and W")
        regressors, surrogates, others = (part[whole] for part in parts)
        codes = None if codes is None else np.unique(codes[whole], return_inverse=True)[1]
        rows = Rows(
            gold[whole, None],
            surrogates[:, :1],
            np.hstack([surrogates, others, regressors]),
            probabilities[whole],
            codes,
        )
        names, fixed = with_effects(
            names, regressors, [group[whole] for group in groups], self.fit_intercept and self.model != "felm"
        )
        self.result_ = estimate(
            rows, lambda values: (values[:, 0], fixed), names, "logit" if self.model == "logit" else "lm",
            self._learner(), self.folds, self.splits, self.rescale, self.random_state, dropped,
        )  # fmt: skip
        self.coef_, self.se_, self.vcov_ = self.result_.coef, self.result_.se, self.result_.vcov
        return self

    def conf_int(self, alpha: float = 0.05) -> Float[np.ndarray, "p 2"]:
        """Confidence intervals with coverage ``1 - alpha``."""
        return self._fitted().conf_int(alpha)

    def summary(self, alpha: float = 0.05) -> pd.DataFrame:
        """Coefficients, standard errors, intervals, two-sided p-values."""
        return self._fitted().summary(alpha)

    def compare(self, alpha: float = 0.05) -> pd.DataFrame:
        """DSL beside gold labels only (GSO), surrogates only (SO) and plugged-in predictions (SL)."""
        return self._fitted().compare(alpha)

    def power(self, n_labels: list[int] | None = None) -> pd.DataFrame:
        """Standard errors to expect with other numbers of gold labels."""
        return self._fitted().power(n_labels)

    def _fitted(self) -> DSLResult:
        from sklearn.utils.validation import check_is_fitted

        check_is_fitted(self)
        return self.result_

    def _learner(self) -> Any:
        if self.learner is None:
            return RandomForestRegressor(n_estimators=100, min_samples_leaf=5)
        return self.learner

    def _check(self) -> None:
        check_settings(self.model, self.learner, self.folds, self.splits, self.random_state)


def check_settings(model: str, learner: Any, folds: int, splits: int, random_state: int) -> None:
    """Refuse settings that mean nothing."""
    if model not in MODELS:
        raise InputError(f"model must be one of {', '.join(MODELS)}, not {model!r}")
    if isinstance(learner, str) and learner != "identity":
        raise InputError(f"learner must be a scikit-learn estimator or 'identity', not {learner!r}")
    if learner is not None and not isinstance(learner, str) and not hasattr(learner, "fit"):
        raise InputError(f"learner must be a scikit-learn estimator or 'identity', not a {type(learner).__name__}")
    for name, value, least in (("folds", folds, 2), ("splits", splits, 1), ("random_state", random_state, 0)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise InputError(f"{name} must be a whole number of at least {least}, not {value!r}")


def check_labels(gold: Float[np.ndarray, "n v"], labeled: ArrayLike | None) -> Float[np.ndarray, "n v"]:
    """Gold labels, NaN on rows that have not all of them; against a given mask where there is one.

    Raises
    ------
    DataError
        The mask and the labels disagree, or there is no label.
    """
    missing = np.isnan(gold)
    if np.isinf(gold).any():
        raise DataError(f"gold label of row {int(np.argmax(np.isinf(gold).any(axis=1)))} is infinite")
    if labeled is not None:
        mask = np.asarray(labeled)
        if mask.shape != gold.shape[:1] or not np.isin(mask, (0, 1)).all():
            raise InputError(f"labeled must be true or false for each of {len(gold)} rows")
        mask = mask.astype(bool)
        for wrong, what in (
            (mask & missing.any(axis=1), "marked as labelled but has no gold label"),
            (~mask & (~missing).any(axis=1), "not marked as labelled but has a gold label"),
        ):
            if wrong.any():
                raise DataError(f"{int(wrong.sum())} rows, first row {int(np.argmax(wrong))}: {what}")
    if missing.any(axis=1).all():
        raise DataError("no row has gold labels: label a random sample by hand first (see sample_for_labeling)")
    return np.where(missing.any(axis=1)[:, None], np.nan, gold)


def check_prob(prob: ArrayLike | None, labelled: np.ndarray, assume_random: bool) -> Float[np.ndarray, " n"]:
    """Probability of being labelled for each row.

    Raises
    ------
    InputError
        Nothing says how rows were chosen.
    DataError
        A probability is not in (0, 1].
    """
    n = len(labelled)
    if prob is None:
        if not assume_random and not labelled.all():
            raise InputError(
                "how were the rows with gold labels chosen? Give prob (--prob), the probability of being labelled for "
                "each row, or say assume_random=True (--assume-random) if each row had the same chance"
            )
        return np.full(n, labelled.mean())
    try:
        values = np.broadcast_to(np.asarray(prob, dtype=np.float64), (n,)).copy()
    except (TypeError, ValueError):
        raise InputError(f"prob must be a number for each of {n} rows") from None
    bad = np.flatnonzero(~((values > 0) & (values <= 1)))
    if len(bad):
        shown = ", ".join(f"row {at}: {values[at]:g}" for at in bad[:5])
        raise DataError(f"prob must be above 0 and at most 1; {len(bad)} rows are not ({shown})")
    return values


def with_effects(
    names: list[str], regressors: np.ndarray, groups: list[Int[np.ndarray, " n"]], intercept: bool
) -> tuple[list[str], Any]:
    """Names of what is reported, and the design: regressors with an intercept or with a dummy per group."""
    if intercept:
        return ["(intercept)", *names], np.hstack([np.ones((len(regressors), 1)), regressors])
    if not groups:
        if not names:
            raise InputError("there is nothing to estimate: no regressor and no intercept")
        return names, regressors
    if not names:
        raise InputError("model 'felm' needs at least one regressor beside the fixed effects")
    n = len(regressors)
    blocks: list[Any] = [scipy.sparse.csr_array(regressors)]
    for number, group in enumerate(groups):
        levels, codes = np.unique(group, return_inverse=True)
        dummies = scipy.sparse.csr_array((np.ones(n), (np.arange(n), codes)), shape=(n, len(levels)))
        blocks.append(dummies if number == 0 else dummies[:, 1:])  # the first group's effects take the level
    design = scipy.sparse.hstack(blocks, format="csr")
    if design.shape[1] > _LEVELS:
        raise InputError(f"{design.shape[1] - len(names):,} fixed effects are too many; {_LEVELS:,} at most")
    return names, design


def _column(name: str, values: ArrayLike) -> Float[np.ndarray, " n"]:
    array = np.asarray(values)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or not len(array):
        raise InputError(f"{name} must have one value for each row, not shape {array.shape}")
    try:
        return array.astype(np.float64)
    except (TypeError, ValueError):
        raise InputError(
            f"{name} holds {next(v for v in array if isinstance(v, str))!r}: labels must be numbers, NaN where there "
            "is none. Estimate the categories of a multi-class label one at a time, as 1 against 0"
        ) from None


def _matrix(name: str, values: ArrayLike | None, n: int) -> tuple[list[str], Float[np.ndarray, "n p"]]:
    if values is None:
        return [], np.empty((n, 0))
    columns = getattr(values, "columns", None)
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{name} holds text; encode it as numbers first, or use dsl_regression") from None
    array = array[:, None] if array.ndim == 1 else array
    if array.ndim != 2 or len(array) != n:
        raise InputError(f"{name} has shape {array.shape}; Y has {n} rows")
    return list(map(str, columns)) if columns is not None else [f"x{i}" for i in range(array.shape[1])], array


def _groups(values: ArrayLike | None, n: int) -> list[Int[np.ndarray, " n"]]:
    if values is None:
        return []
    array = np.asarray(values)
    array = array[:, None] if array.ndim == 1 else array
    return [_codes("fixed_effects", column, n) for column in array.T]


def _codes(name: str, values: ArrayLike, n: int) -> Int[np.ndarray, " n"]:
    array = np.asarray(values)
    if array.shape != (n,):
        raise InputError(f"{name} has shape {array.shape}; Y has {n} rows")
    if array.dtype.kind == "f" and np.isnan(array).any():
        raise DataError(f"{name} of row {int(np.argmax(np.isnan(array)))} is missing")
    return np.unique(array.astype(str) if array.dtype == object else array, return_inverse=True)[1]
