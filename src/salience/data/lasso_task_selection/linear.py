"""Multi-task representation learning in the linear class: one low-rank representation, one head per task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
from jaxtyping import Float
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from salience.data.lasso_task_selection.checks import finite
from salience.errors import DataError, InputError

Task = tuple[np.ndarray, np.ndarray]  # inputs (n_t, d) and labels (n_t,)


class LinearMTRL(BaseEstimator):
    """A linear representation shared by all source tasks, with a target head on top.

        (B, W) = argmin sum_t ||X_t B w_t - y_t||^2,        w = argmin ||X B w - y||^2 on the target's rows

    with B of shape (d, k). Source tasks alone decide B: the target's labels never move it. Alternating least squares
    from the k leading eigenvectors of ``sum y^2 x x'``.

    Parameters
    ----------
    rank : int
        Width k of the representation.
    fit_intercept : bool
        Each task has a level of its own (inputs and labels are centred within the task).
    scale_labels : bool
        Learn the representation from labels of unit size in every task, for tasks whose labels have different units.
        Heads are those of the labels as they are.
    ridge : float
        Added to the normal equations of B, as a share of their mean diagonal. The default only keeps them solvable;
        inputs with many correlated columns want more, such as 0.01.
    max_iter : int
        Rounds of the two least-squares steps.
    tol : float
        Stop when a round lowers the squared error by less than this share of it.

    Attributes
    ----------
    B_ : (d, k) float
        Orthonormal columns.
    heads_ : (k, T) float
        W, the heads of the source tasks.
    noise_ : (T,) float
        Standard deviation of each task's residuals, k degrees of freedom taken off; NaN for a task of k rows or fewer.
    target_head_, target_noise_ : (k,) float, float
        After `fit_target`: the head, and the deviation of its residuals.
    target_spread_, target_error_ : (k, k) float, float
        R with ``R'R`` the second moment of the target's features, and the expected ``||R (w - w*)||``.
    coef_, intercept_ : (d,) float, float
        After `fit_target`: ``B w`` and the level.

    Notes
    -----
    Source: arXiv 2306.02556 and 2202.00911. Reconstructed: the optimiser (the papers assume an exact minimum), and that
    the intercept is each task's own.
    """

    def __init__(
        self, *, rank: int = 4, fit_intercept: bool = True, scale_labels: bool = False, ridge: float = 1e-10,
        max_iter: int = 100, tol: float = 1e-7,
    ) -> None:  # fmt: skip
        self.rank = rank
        self.fit_intercept = fit_intercept
        self.scale_labels = scale_labels
        self.ridge = ridge
        self.max_iter = max_iter
        self.tol = tol

    def fit(self, tasks: Sequence[tuple[ArrayLike, ArrayLike]], y: Any = None) -> LinearMTRL:
        """Learn the representation and the heads of the source tasks.

        Parameters
        ----------
        tasks : sequence of (inputs (n_t, d), labels (n_t,))
            Source tasks; their numbers of rows may differ. A task without rows has the head 0.

        Raises
        ------
        InputError
            A parameter is not usable, or shapes do not fit.
        DataError
            The tasks together have too few rows for the rank.
        """
        rows = check_tasks(tasks)
        if self.fit_intercept:
            rows = [(inputs - inputs.mean(0), labels - labels.mean()) if len(labels) else (inputs, labels)
                    for inputs, labels in rows]  # fmt: skip
        width, total = rows[0][0].shape[1], sum(len(labels) for _, labels in rows)
        self._check(width)
        if total < self.rank:
            raise DataError(f"the source tasks have {total} rows in all; rank {self.rank} needs as many at least")
        unit = [float(np.sqrt((labels**2).mean())) if len(labels) and self.scale_labels else 1.0 for _, labels in rows]
        self.B_ = self._representation([(inputs, labels / (size or 1.0)) for (inputs, labels), size in zip(rows, unit)])
        found = [head(inputs @ self.B_, labels, self.fit_intercept) for inputs, labels in rows]
        self.heads_ = np.stack([one.weights for one in found], axis=1)
        self.noise_ = np.array([one.noise for one in found])
        return self

    def fit_target(self, X: ArrayLike, y: ArrayLike) -> LinearMTRL:
        """Fit the head of the target task on the representation, which stays as it is.

        Parameters
        ----------
        X : (n, d) float
        y : (n,) float
        """
        check_is_fitted(self, "B_")
        inputs, labels = check_task("target", X, y, len(self.B_))
        found = head(inputs @ self.B_, labels, self.fit_intercept)
        self.target_head_, self.target_noise_, self.target_error_ = found.weights, found.noise, found.error
        self.target_spread_ = found.spread
        self.coef_, self.intercept_ = self.B_ @ found.weights, found.level
        return self

    def predict(self, X: ArrayLike) -> Float[np.ndarray, " n"]:
        """Labels of the target task, (n,)."""
        check_is_fitted(self, "coef_")
        inputs = finite("X", X, 2)
        if inputs.shape[1] != len(self.coef_):
            raise InputError(f"X has {inputs.shape[1]} columns; the source tasks had {len(self.coef_)}")
        return inputs @ self.coef_ + self.intercept_

    def _representation(self, rows: list[Task]) -> Float[np.ndarray, "d k"]:
        """Alternate between heads and representation, both by least squares."""
        grams = np.stack([inputs.T @ inputs for inputs, _ in rows])
        moments = np.stack([inputs.T @ labels for inputs, labels in rows])
        squares = sum(float(labels @ labels) for _, labels in rows)
        B = np.linalg.eigh(sum((inputs.T * labels**2) @ inputs for inputs, labels in rows))[1][:, -self.rank :]
        d, k = B.shape
        before = np.inf
        for _ in range(self.max_iter):
            inner, right = B.T @ grams @ B, moments @ B
            heads = (np.linalg.pinv(inner, rcond=1e-12, hermitian=True) @ right[:, :, None])[:, :, 0]
            error = squares - float((heads * right).sum())  # of the best heads, by the normal equations
            if before - error <= self.tol * error:
                break
            before = error
            outer = heads[:, :, None] * heads[:, None, :]
            normal = np.tensordot(outer, grams, axes=(0, 0)).transpose(0, 2, 1, 3).reshape(k * d, k * d)
            normal[np.diag_indices(k * d)] += self.ridge * np.trace(normal) / (k * d)
            solved = scipy.linalg.solve(normal, (heads.T @ moments).reshape(-1), assume_a="pos")
            B = np.linalg.qr(solved.reshape(k, d).T)[0]
        return B

    def _check(self, width: int) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int | np.integer) or not 1 <= self.rank <= width:
            raise InputError(f"rank must be a whole number in 1..{width} (the number of inputs), not {self.rank!r}")
        for name, value in (("ridge", self.ridge), ("tol", self.tol)):
            if not (np.isfinite(value) and value > 0):
                raise InputError(f"{name} must be a number above 0, not {value!r}")
        if self.max_iter < 1:
            raise InputError(f"max_iter must be at least 1, not {self.max_iter!r}")


class Head(NamedTuple):
    """A least-squares head on features Z.

    Attributes
    ----------
    weights : (k,) float
    level : float
        Constant term.
    noise : float
        Standard deviation of the residuals; NaN where no degree of freedom is left.
    spread : (k, k) float
        R with ``R'R = Z'Z / n`` (Z centred, with an intercept): ``||R v||`` is the size of the predictions ``Z v``.
    error : float
        Expected ``||R (w - w*)||``, which is ``noise sqrt(k / n)``.
    """

    weights: Float[np.ndarray, " k"]
    level: float
    noise: float
    spread: Float[np.ndarray, "k k"]
    error: float


def head(features: Float[np.ndarray, "n k"], labels: Float[np.ndarray, " n"], intercept: bool) -> Head:
    """Least squares of labels on features (the shortest solution where there are several)."""
    n, k = features.shape
    if not n:
        return Head(np.zeros(k), 0.0, math.nan, np.zeros((k, k)), math.nan)
    middle, mean = (features.mean(0), float(labels.mean())) if intercept else (np.zeros(k), 0.0)
    centred = features - middle
    weights = np.linalg.lstsq(centred, labels - mean, rcond=None)[0]
    sizes, axes = np.linalg.eigh(centred.T @ centred / n)
    spread = np.sqrt(np.maximum(sizes, 0.0))[:, None] * axes.T
    free = n - k - int(intercept)
    noise = float(np.linalg.norm(labels - mean - centred @ weights)) / math.sqrt(free) if free > 0 else math.nan
    return Head(weights, mean - float(middle @ weights), noise, spread, noise * math.sqrt(k / n))


def check_tasks(tasks: Sequence[tuple[ArrayLike, ArrayLike]]) -> list[Task]:
    """Tasks as pairs of float64 arrays with equally many columns."""
    pairs = list(tasks)
    if not pairs:
        raise InputError("there is no source task")
    width = np.shape(pairs[0][0])[-1] if np.ndim(pairs[0][0]) == 2 else 0
    return [check_task(f"source task {number}", *pair, width) for number, pair in enumerate(pairs)]


def check_task(name: str, X: ArrayLike, y: ArrayLike, width: int) -> Task:
    """Inputs (n, width) and labels (n,) as float64, or an error that names the task."""
    inputs, labels = np.asarray(X, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if inputs.ndim != 2 or labels.shape != inputs.shape[:1] or inputs.shape[1] != width or not width:
        raise InputError(
            f"{name} has inputs of shape {inputs.shape} and labels of shape {labels.shape}; (n, {width or 'd'}) and "
            "(n,) are needed"
        )
    for what, values in (("inputs", inputs), ("labels", labels)):
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            raise DataError(f"{what} of {name}, row {int(bad[0][0])}: {values[tuple(bad[0])]}; all must be finite")
    return inputs, labels
