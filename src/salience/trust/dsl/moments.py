"""The moments of design-based supervised learning: solve them, and say how far the solution may be off.

A row has gold values where it was labelled and predictions everywhere. With ``m = x (y - mu(x'b))`` from either,

    m_i = m_i^pred + (R_i / pi_i) (m_i^gold - m_i^pred),      sum_i m_i(b) = 0

has the mean of the gold moment whatever the predictions are, since ``E[R_i] = pi_i`` by design. Predictions may stand
in for the outcome, for regressors, or for both. With

    J = 1/n [X^gold' diag(r w^gold) X^gold + X^pred' diag((1 - r) w^pred) X^pred],      r = R / pi, w = mu'
    M = M_1 + M_23,     M_1 = 1/n sum_i r_i^2 d_i d_i',     d = m^gold - m^pred,
    M_23 = 1/n sum_i [p_i p_i' + r_i (p_i d_i' + d_i p_i')],     p = m^pred

the variance of b is ``J^-1 M J^-T / n``; only M_1 shrinks when more rows are labelled, which is what tells how many
labels a narrower interval takes. With clusters, rows are summed within them first.

Source: Egami, Hinck, Stewart, Wei, NeurIPS 2023 (arXiv 2306.04746), section 3, and the authors' package `dsl`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import scipy.sparse
from jaxtyping import Float, Int
from scipy.special import expit

from salience.errors import DataError

Model = Literal["lm", "logit"]
_STEPS = 100
_CERTAIN = 15.0  # |x'b| beyond this is a fitted probability of 0 or 1


@dataclass(frozen=True)
class Design:
    """What the moments need: outcome and regressors by gold label and by prediction, and ``R / pi``.

    Gold values of rows that were not labelled are not looked at; they may be anything finite.

    Attributes
    ----------
    y_gold, y_pred : (n,) float
    x_gold, x_pred : (n, p) array or sparse array
    ratio : (n,) float
        ``R / pi``: 0 where there is no gold label.
    """

    y_gold: Float[np.ndarray, " n"]
    x_gold: Float[np.ndarray, "n p"] | scipy.sparse.csr_array
    y_pred: Float[np.ndarray, " n"]
    x_pred: Float[np.ndarray, "n p"] | scipy.sparse.csr_array
    ratio: Float[np.ndarray, " n"]

    def predicted_only(self) -> Design:
        """The same with predictions taken at their word: what a regression on predictions sees."""
        return Design(self.y_pred, self.x_pred, self.y_pred, self.x_pred, np.zeros_like(self.ratio))

    def gold_only(self) -> Design:
        """The same with labelled rows alone, weighted by ``1 / pi``."""
        return Design(self.y_gold, self.x_gold, np.zeros_like(self.y_pred), self.x_pred * 0.0, self.ratio)


@dataclass(frozen=True)
class Solution:
    """A root of the moments with the parts of its variance.

    Attributes
    ----------
    coef : (p,) float
    bread : (p, p) float
        Inverse of J.
    main_1, main_23 : (p, p) float
        The part of the meat that more labels shrink, and the rest.
    n : int
        Rows.
    """

    coef: Float[np.ndarray, " p"]
    bread: Float[np.ndarray, "p p"]
    main_1: Float[np.ndarray, "p p"]
    main_23: Float[np.ndarray, "p p"]
    n: int

    def vcov(self, more: float = 1.0) -> Float[np.ndarray, "p p"]:
        """Covariance of the coefficients, with `more` times as many labels as there are."""
        return self.bread @ (self.main_1 / more + self.main_23) @ self.bread.T / self.n


def solve(design: Design, model: Model, cluster: Int[np.ndarray, " n"] | None = None) -> Solution:
    """Find the root of the moments by Newton's method, and its sandwich variance.

    Parameters
    ----------
    design : Design
    model : {"lm", "logit"}
        ``mu`` is the identity or the logistic function.
    cluster : (n,) int, optional
        Rows of one cluster are not independent; codes from 0 on.

    Raises
    ------
    DataError
        Regressors are linearly dependent, or a logistic model has no finite solution (separation).
    """
    scale = np.maximum(_spread(design.x_pred), _spread(design.x_gold))
    scale[scale == 0] = 1.0
    inverse = scipy.sparse.diags_array(1 / scale)
    scaled = replace(design, x_gold=design.x_gold @ inverse, x_pred=design.x_pred @ inverse)
    coef = _newton(scaled, model)  # columns of one size: the steps are well conditioned, and the root is the same
    gold, pred = _moments(scaled, model, coef)
    n = len(design.ratio)
    difference = _rows(design.ratio, gold - pred)
    if cluster is not None:
        member = scipy.sparse.csr_array((np.ones(n), (cluster, np.arange(n))), shape=(int(cluster.max()) + 1, n))
        pred, difference = member @ pred, member @ difference
    cross = _dense(pred.T @ difference)
    outer = np.outer(scale, scale)
    return Solution(
        coef / scale,
        _inverse(_jacobian(scaled, model, coef)) / outer,
        _dense(difference.T @ difference) / n * outer,
        (_dense(pred.T @ pred) + cross + cross.T) / n * outer,
        n,
    )


def _newton(design: Design, model: Model) -> Float[np.ndarray, " p"]:
    coef = np.zeros(design.x_pred.shape[1])
    value = _mean_moment(design, model, coef)
    tiny, converged = 1e-13 * max(float(np.abs(value).max()), 1.0), False
    for _ in range(_STEPS):
        if model == "logit" and _separated(design, coef):
            break
        step = _inverse(_jacobian(design, model, coef)) @ value
        moved = value
        for halving in range(40):
            moved = _mean_moment(design, model, coef + step / 2**halving)
            if np.linalg.norm(moved) < np.linalg.norm(value) or np.abs(moved).max() < tiny:
                break
        coef, value = coef + step / 2**halving, moved
        if model == "lm" or np.abs(step).max() < 1e-10 * max(1.0, np.abs(coef).max()):
            converged = True
            break
    if not converged:
        raise DataError(
            "the logistic model has no finite solution: the labels are (almost) perfectly separated by the regressors; "
            "use fewer regressors, more labels, or the model 'lm'"
        )
    return coef


def _separated(design: Design, coef: np.ndarray) -> bool:
    """Whether most fitted probabilities are 0 or 1 to rounding."""
    labelled = design.ratio > 0
    index = design.x_gold @ coef if labelled.any() else design.x_pred @ coef
    return bool(np.mean(np.abs(index[labelled] if labelled.any() else index) > _CERTAIN) > 0.5)


def _moments(design: Design, model: Model, coef: np.ndarray):
    """Row moments from gold values (rows without a label: not to be used) and from predictions."""
    mean = expit if model == "logit" else np.asarray
    labelled = design.ratio > 0
    left = np.where(labelled, design.y_gold - mean(design.x_gold @ coef), 0.0)
    return _rows(left, design.x_gold), _rows(design.y_pred - mean(design.x_pred @ coef), design.x_pred)


def _mean_moment(design: Design, model: Model, coef: np.ndarray) -> Float[np.ndarray, " p"]:
    gold, pred = _moments(design, model, coef)
    return (gold.T @ design.ratio + pred.T @ (1 - design.ratio)) / len(design.ratio)


def _jacobian(design: Design, model: Model, coef: np.ndarray) -> Float[np.ndarray, "p p"]:
    """Minus the derivative of the mean moment."""

    def slope(x) -> np.ndarray:
        if model == "lm":
            return np.ones(x.shape[0])
        chance = expit(x @ coef)
        return chance * (1 - chance)

    gold, pred, r = design.x_gold, design.x_pred, design.ratio
    total = gold.T @ _rows(r * slope(gold), gold) + pred.T @ _rows((1 - r) * slope(pred), pred)
    return _dense(total) / len(r)


def _inverse(matrix: Float[np.ndarray, "p p"]) -> Float[np.ndarray, "p p"]:
    size = np.sqrt(np.abs(np.diag(matrix)))
    try:
        if not (np.isfinite(matrix).all() and (size > 0).all()):
            raise np.linalg.LinAlgError
        correlation = matrix / np.outer(size, size)
        inverse = np.linalg.inv(correlation)
        if np.linalg.norm(correlation, 1) * np.linalg.norm(inverse, 1) > 1e12:
            raise np.linalg.LinAlgError
    except np.linalg.LinAlgError:
        raise DataError(
            "the moments cannot be solved: regressors are linearly dependent (a constant column, a copy, or one dummy "
            "too many), or the logistic model is perfectly separated"
        ) from None
    return inverse / np.outer(size, size)


def _rows(weights: np.ndarray, matrix):
    """Each row of a matrix, dense or sparse, times a number."""
    return scipy.sparse.diags_array(weights) @ matrix


def _dense(matrix) -> np.ndarray:
    return matrix.toarray() if scipy.sparse.issparse(matrix) else np.asarray(matrix)


def _spread(matrix) -> Float[np.ndarray, " p"]:
    """Root mean square of each column."""
    squares = matrix.power(2) if scipy.sparse.issparse(matrix) else np.square(matrix)
    return np.sqrt(np.asarray(squares.mean(axis=0)).ravel())
