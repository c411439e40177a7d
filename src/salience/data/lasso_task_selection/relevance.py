"""How much each source task matters to the target: sparse (L1) and least-norm (L2) relevance."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.optimize import linprog
from sklearn.linear_model import Lasso, lars_path

from salience.data.lasso_task_selection.checks import finite, prices
from salience.errors import InputError

NORMS = ("l1", "l2")
_RANK = 1e-9  # singular values below this share of the largest count as zero


class TaskRelevance(NamedTuple):
    """How a target task is made of source tasks.

    Attributes
    ----------
    nu : (T,) float
        Weight of every source in the combination; what matters is its size.
    residual : float
        ``||W nu - w||_2``, what the sources leave unexplained; as large as `w` itself where no source matters.
    lam : float
        Penalty of the Lasso, 0 for an exact solution.
    """

    nu: Float[np.ndarray, " T"]
    residual: float
    lam: float


def task_relevance(
    heads: ArrayLike, target: ArrayLike, *, norm: str = "l1", lam: float = 0.0, noise: float | None = None,
    costs: ArrayLike | None = None,
) -> TaskRelevance:  # fmt: skip
    """Explain the head of a target task by those of source tasks, with as few sources as can be.

    With heads ``W = [w_1 .. w_T]`` in one learned representation and the target's head ``w``,

        nu^1 = argmin ||nu||_1  s.t.  W nu = w                 (lam = 0: a linear program)
        nu^  = argmin 0.5 ||W nu - w||_2^2 + lam ||nu||_1      (lam > 0: the Lasso)
        nu^2 = argmin ||nu||_2  s.t.  W nu = w                 (norm = "l2": ``pinv(W) w``)

    The linear program gives a vertex: at most k sources. Where `target` lies outside the span of the heads, its
    projection is explained and the rest is told as the residual.

    Parameters
    ----------
    heads : (k, T) float
        One column per source task, estimated in the same representation and for labels with the same noise: a task
        whose labels were multiplied by 10 has a head 10 times as long.
    target : (k,) float
        Head of the target task.
    norm : {"l1", "l2"}
        The paper's relevance, or that of its predecessor, which spreads over all sources.
    lam : float
        Penalty. There is no intercept, and columns are not standardised.
    noise : float, optional
        In place of `lam`: the error to expect of `target` (its Euclidean norm). The largest penalty is taken whose
        residual does not exceed it, so that the target's noise is not explained.
    costs : (T,) float, optional
        Price of one sample of each task: ``sqrt(c_t) nu(t)`` takes the place of ``nu(t)`` in the norm.

    Returns
    -------
    TaskRelevance

    Raises
    ------
    InputError
        Shapes do not fit, a value is not finite, a cost is not positive, or options contradict each other.

    Notes
    -----
    Source: Wang, Chen, Jamieson, Du, "Improved Active Multi-Task Representation Learning via Lasso", ICML 2023 (arXiv
    2306.02556); nu^2 by Chen, Jamieson, Du, ICML 2022 (arXiv 2202.00911). Reconstructed: how the penalty follows from
    the noise. Among several solutions (two equal tasks) the vertex that the solver ends at is given.
    """
    W, w = finite("heads", heads, 2), finite("target", target, 1)
    if W.shape[0] != len(w) or not W.size:
        raise InputError(f"heads have shape {W.shape} and target {w.shape}; (k, T) and (k,) are needed")
    if norm not in NORMS:
        raise InputError(f"norm must be 'l1' or 'l2', not {norm!r}")
    if not (lam >= 0 and math.isfinite(lam)) or (noise is not None and not (noise >= 0 and math.isfinite(noise))):
        raise InputError(f"lam and noise must be finite and not negative; got {lam!r} and {noise!r}")
    if (norm == "l2" and (lam or noise is not None)) or (lam and noise is not None):
        raise InputError("give lam or noise, not both; neither goes with norm='l2'")
    roots = np.sqrt(prices("costs", costs, W.shape[1]))
    size = float(np.abs(W / roots).max()) or 1.0  # in these units solvers' tolerances fit heads of any size
    length = float(np.linalg.norm(w)) or 1.0
    columns, goal = W / roots / size, w / length
    if norm == "l2":
        scaled = np.linalg.pinv(columns, rcond=_RANK) @ goal
    elif noise is not None:
        scaled, lam = _within(columns, goal, noise / length)
        lam *= size * length
    elif lam:
        scaled = _lasso(columns, goal, lam / (size * length))
    else:
        scaled = _basis_pursuit(columns, goal)
    nu = scaled * length / size / roots
    return TaskRelevance(nu, float(np.linalg.norm(W @ nu - w)), float(lam))


def _basis_pursuit(columns: Float[np.ndarray, "k T"], goal: Float[np.ndarray, " k"]) -> Float[np.ndarray, " T"]:
    """``argmin ||nu||_1`` such that ``columns nu`` is the projection of `goal` onto the columns' span."""
    left, sizes, _ = np.linalg.svd(columns, full_matrices=False)
    basis = left[:, sizes > _RANK * sizes[0]]  # equations in a basis of the span never contradict each other
    if not basis.shape[1]:
        return np.zeros(columns.shape[1])
    equations = basis.T @ columns
    found = linprog(
        np.ones(2 * columns.shape[1]), A_eq=np.hstack([equations, -equations]), b_eq=basis.T @ goal, method="highs-ds"
    )  # the simplex method ends at a vertex
    if found.x is None:
        raise InputError(f"heads: the linear program could not be solved: {found.message}")
    return found.x[: columns.shape[1]] - found.x[columns.shape[1] :]


def _lasso(columns: Float[np.ndarray, "k T"], goal: Float[np.ndarray, " k"], lam: float) -> Float[np.ndarray, " T"]:
    solver = Lasso(alpha=lam / len(goal), fit_intercept=False, tol=1e-12, max_iter=200_000)  # its loss is a mean over k
    return solver.fit(columns, goal).coef_


def _within(
    columns: Float[np.ndarray, "k T"], goal: Float[np.ndarray, " k"], noise: float
) -> tuple[Float[np.ndarray, " T"], float]:
    """The Lasso solution of largest penalty whose residual is at most `noise`, and its penalty.

    Solutions are linear in the penalty between the knots of the path, so the residual's square is a quadratic there.
    """
    alphas, _, path = lars_path(columns, goal, method="lasso")
    residuals = goal[:, None] - columns @ path
    sizes = np.linalg.norm(residuals, axis=0)
    if noise >= sizes[0]:
        return path[:, 0], float(alphas[0]) * len(goal)
    if noise <= sizes[-1]:
        return _basis_pursuit(columns, goal), 0.0
    after = int(np.argmax(sizes <= noise))
    start, step = residuals[:, after - 1], residuals[:, after] - residuals[:, after - 1]
    a, b, c = step @ step, start @ step, start @ start - noise**2
    share = float(np.clip((-b - math.sqrt(max(b * b - a * c, 0.0))) / a, 0.0, 1.0))
    nu = (1 - share) * path[:, after - 1] + share * path[:, after]
    return nu, float((1 - share) * alphas[after - 1] + share * alphas[after]) * len(goal)
