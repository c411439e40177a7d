"""Recover each class's Gaussian from noisily labelled, long-tailed representations."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from numpy.typing import ArrayLike
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import LocalOutlierFactor, NearestNeighbors

from salience.errors import DataError, InputError
from salience.scores import Scores

LIMIT = 1.5  # a larger LOF is an outlier where no noise rate is known


@dataclass(frozen=True)
class ClassGaussians:
    """A Gaussian for each class, and which rows it was estimated from.

    Attributes
    ----------
    classes : (K,) labels
        Sorted.
    mean : (K, m) float64
    cov : (K, m, m) float64
    count : (K,) int64
        Rows that bear the label, outliers included.
    inlier : (n,) bool
        Rows whose label is believed.
    lof : (n,) float64
        Local outlier factor of each row among those of its label: about 1 inside, larger outside.
    contamination : (K,) float64
        Share of rows taken for outliers; NaN where ``LOF > 1.5`` decided.
    tail : (K,) bool
        Classes that borrowed from head classes (`calibrate_tail`).
    """

    classes: Shaped[np.ndarray, " classes"]
    mean: Float[np.ndarray, "classes dim"]
    cov: Float[np.ndarray, "classes dim dim"]
    count: Int[np.ndarray, " classes"]
    inlier: Bool[np.ndarray, " n"]
    lof: Float[np.ndarray, " n"]
    contamination: Float[np.ndarray, " classes"]
    tail: Bool[np.ndarray, " classes"]

    def sample(
        self, per_class: int | None = None, *, random_state: Any = 0
    ) -> tuple[Float[np.ndarray, "s dim"], Shaped[np.ndarray, " s"]]:
        """Draw points ``z ~ N(mean_k, cov_k)`` with label k: the virtual points that a classifier trains on, too.

        Parameters
        ----------
        per_class : int, optional
            Points of each class. By default so many that real and drawn rows together are twice the largest class in
            every class: it ends balanced, and every class is drawn from [R].
        random_state : int or numpy.random.Generator

        Raises
        ------
        InputError
            `per_class` below 1, or a covariance that is not finite.

        Notes
        -----
        Directions of negative variance (a matrix that is no covariance) are given none.
        """
        if per_class is None:
            draws = 2 * self.count.max() - self.count
        elif isinstance(per_class, bool) or not isinstance(per_class, int | np.integer) or per_class < 1:
            raise InputError(f"per_class: got {per_class!r}; a whole number of at least 1 is needed")
        else:
            draws = np.full(len(self.classes), per_class)
        bad = ~np.isfinite(self.cov).all(axis=(1, 2))
        if bad.any():
            raise InputError(f"cov: of class {self.classes[bad].tolist()[0]!r} is not finite")
        variance, axes = np.linalg.eigh(self.cov)
        root = axes * np.sqrt(np.clip(variance, 0, None))[:, None]  # root root' = cov
        rng = np.random.default_rng(random_state)
        points = [
            mean + rng.standard_normal((count, len(mean))) @ half.T for mean, half, count in zip(self.mean, root, draws)
        ]
        return np.concatenate(points), np.repeat(self.classes, draws)


def robust_gaussians(
    z: ArrayLike, y: ArrayLike, *, neighbors: int = 20, contamination: float | str = "estimate",
    shrink: float | str = 1e-3,
) -> ClassGaussians:  # fmt: skip
    """Mean and covariance of each class without the rows that lie outside it.

        reach_k(a, b) = max(distance of b to its k-th neighbour, d(a, b))
        lrd(a) = 1 / mean over neighbours b of reach_k(a, b),   LOF(a) = mean over neighbours b of lrd(b) / lrd(a)
        mu_k, Sigma_k = mean and covariance of {z_i : y~_i = k, LOF of i within class k small}

    Parameters
    ----------
    z : (n, m) float
        Representations learnt without labels, so that wrong ones are not built in.
    y : (n,) labels
        Wrong in part.
    neighbors : int
        k of LOF, at most half of a class's distinct rows [R].
    contamination : float, "estimate" or "auto"
        Share of wrong labels, of which LOF can drop at most 0.5; 0 keeps all rows. "estimate": for each class, the
        share of rows that their neighbours of all classes outvote, capped at 0.5. "auto": LOF above 1.5 is an outlier,
        which drops next to nothing where many labels are wrong. (All [R].)
    shrink : float or "ledoit-wolf"
        Share of the mean variance added to the diagonal, since a tail class has fewer rows than dimensions; or the
        estimator of Ledoit and Wolf.

    Returns
    -------
    ClassGaussians

    Raises
    ------
    InputError
        A parameter out of range, or shapes that do not fit.
    DataError
        A value that is not finite, fewer than two classes, or no class with two different rows.

    Warns
    -----
    UserWarning
        A class keeps fewer than two different rows: it has the mean of all its rows, and the mean covariance of the
        other classes.

    Notes
    -----
    Equal rows count once in LOF, whose densities would be infinite otherwise [ours].

    Source: arXiv 2211.10955, section on distributional calibration; Breunig, Kriegel, Ng, Sander, "LOF: Identifying
    Density-Based Local Outliers", SIGMOD 2000.
    """
    _check_parameters(neighbors, contamination, shrink)
    rows, labels = check_rows(z, y)
    classes, index, count = np.unique(labels, return_inverse=True, return_counts=True)
    if len(classes) < 2:
        raise DataError(f"y: there is one class, {classes.tolist()[0]!r}; at least two are needed")
    rates = np.full(len(classes), np.nan)
    if contamination == "estimate":
        rates = np.minimum(0.5, outvoted(rows, index, neighbors))
    elif contamination != "auto":
        rates = np.full(len(classes), float(contamination))
    lof = np.ones(len(rows))
    inlier = np.ones(len(rows), dtype=bool)
    mean = np.zeros((len(classes), rows.shape[1]))
    cov = np.full((len(classes), rows.shape[1], rows.shape[1]), np.nan)
    for k, rate in enumerate(rates):
        own = np.flatnonzero(index == k)
        lof[own] = local_outlier_factors(rows[own], neighbors)
        inlier[own] = lof[own] <= (LIMIT if np.isnan(rate) else np.quantile(lof[own], 1 - rate))
        kept = own[inlier[own]]
        if np.ptp(rows[kept], axis=0).any():
            mean[k], cov[k] = rows[kept].mean(axis=0), _covariance(rows[kept], shrink)
        else:
            mean[k] = rows[own].mean(axis=0)
    return ClassGaussians(
        classes, mean, _lent(cov, count, classes), count, inlier, lof, rates, np.zeros(len(classes), dtype=bool)
    )


def calibrate_tail(
    g: ClassGaussians, *, head: Sequence[Any] | np.ndarray | None = None, q: int = 3, gamma: float = 0.5,
    alpha: float = 0.0, weighting: str = "size-closeness", mean: bool = False, cov: bool = True,
) -> ClassGaussians:  # fmt: skip
    """Let each tail class borrow from the q head classes whose means are nearest.

        w_j proportional to n_j / ||mu_j - mu_k||^2 over the q nearest heads j, of sum 1                      [R]
        mu'_k    = gamma sum_j w_j mu_j    + (1 - gamma) mu_k                                                 [R]
        Sigma'_k = gamma sum_j w_j Sigma_j + (1 - gamma) Sigma_k + alpha 1                    1 is all ones   [R]

    Parameters
    ----------
    g : ClassGaussians
    head : sequence of labels, optional
        Head classes; all others are tail. By default those at least as large as the median class [R]; where all are
        equally large there is no tail, and nothing is changed.
    q : int
        Heads to borrow from, or all if there are fewer.
    gamma : float
        In [0, 1]: how much is borrowed.
    alpha : float
        At least 0, added to every entry of the covariance.
    weighting : {"size-closeness", "equal"}
        "equal" is that of the few-shot calibration which this step goes back to: its mean is ``gamma = q / (q + 1)``,
        its covariance ``gamma = 1, alpha = 0.21``, with q = 2.
    mean, cov : bool
        What is borrowed. The mean pays only where heads are near to the tail class; the covariance is the safe default.

    Returns
    -------
    ClassGaussians
        The heads' are those of `g`.

    Raises
    ------
    InputError
        A parameter out of range, or a head class that is not there.

    Notes
    -----
    Source: arXiv 2211.10955, section on distributional calibration; Yang, Liu, Xu, "Free Lunch for Few-shot Learning:
    Distribution Calibration", ICLR 2021, for the form.
    """
    if isinstance(q, bool) or not isinstance(q, int | np.integer) or q < 1:
        raise InputError(f"q: got {q!r}; a whole number of head classes, at least 1, is needed")
    if not 0 <= gamma <= 1:
        raise InputError(f"gamma: got {gamma!r}; it must lie in [0, 1]")
    if not 0 <= alpha < np.inf:
        raise InputError(f"alpha: got {alpha!r}; it must be at least 0 and finite")
    if weighting not in ("size-closeness", "equal"):
        raise InputError(f"weighting: got {weighting!r}; it must be 'size-closeness' or 'equal'")
    if head is None:
        heads = np.flatnonzero(g.count >= np.median(g.count))
    else:
        unknown = [label for label in head if label not in g.classes]
        if unknown or not len(head):
            raise InputError(f"head: got {list(head)!r}; at least one of the classes {g.classes.tolist()} is needed")
        heads = np.flatnonzero(np.isin(g.classes, head))
    tail = ~np.isin(np.arange(len(g.classes)), heads)
    means, covs = g.mean.copy(), g.cov.copy()
    for k in np.flatnonzero(tail):
        squared = np.square(g.mean[heads] - g.mean[k]).sum(axis=1)
        near = np.argsort(squared, kind="stable")[:q]
        j = heads[near]
        weights = np.ones(len(j))
        if weighting == "size-closeness":
            closest = 1e-12 * squared.max() or 1.0  # a head at the very place would weigh infinitely much
            weights = g.count[j] / np.maximum(squared[near], closest)
        weights = weights / weights.sum()
        if mean:
            means[k] = gamma * weights @ g.mean[j] + (1 - gamma) * g.mean[k]
        if cov:
            covs[k] = gamma * np.tensordot(weights, g.cov[j], 1) + (1 - gamma) * g.cov[k] + alpha
    return replace(g, mean=means, cov=covs, tail=tail)


def label_trust(
    z: ArrayLike, y: ArrayLike, *, ids: Sequence[str | int] | None = None, neighbors: int = 20
) -> Scores:  # fmt: skip
    """How much each row's label is to be trusted: the lowest are the suspects for mislabelled.

        -log LOF of the row among those of its label

    ``scores.weights()`` are in proportion to 1 / LOF, for a loss; ``scores.ids[scores.values.argsort()]`` begins with
    the most suspect. Other methods' `Scores` combine with these by rank.

    Parameters
    ----------
    z, y, neighbors
        As of `robust_gaussians`.
    ids : (n,) sequence, optional
        Row numbers by default.

    Returns
    -------
    Scores
        Of samples, about 0 inside a class and below outside.
    """
    g = robust_gaussians(z, y, neighbors=neighbors, contamination=0.0)
    return Scores(
        -np.log(g.lof), range(len(g.lof)) if ids is None else ids, "sample",
        {"method": "rcal", "neighbors": neighbors},
    )  # fmt: skip


def local_outlier_factors(rows: Float[np.ndarray, "n dim"], neighbors: int) -> Float[np.ndarray, " n"]:
    """LOF of each row; equal rows count once, and of fewer than three different ones all have 1."""
    distinct, index = np.unique(rows, axis=0, return_inverse=True)
    if len(distinct) < 3:
        return np.ones(len(rows))
    finder = LocalOutlierFactor(n_neighbors=min(neighbors, max(1, len(distinct) // 2))).fit(distinct)
    return -finder.negative_outlier_factor_[index.ravel()]


def outvoted(
    rows: Float[np.ndarray, "n dim"], index: Int[np.ndarray, " n"], neighbors: int
) -> Float[np.ndarray, " classes"]:
    """Share of each class's rows whose neighbours, each vote divided by the size of its class, say another one [R]."""
    count = np.bincount(index)
    k = min(neighbors, len(rows) - 1)
    near = NearestNeighbors(n_neighbors=k).fit(rows).kneighbors(return_distance=False)
    votes = np.stack([(index[near] == c).sum(axis=1) / count[c] for c in range(len(count))], axis=1)
    return np.bincount(index, votes.argmax(axis=1) != index) / count


def check_rows(z: ArrayLike, y: ArrayLike) -> tuple[Float[np.ndarray, "n dim"], Shaped[np.ndarray, " n"]]:
    """Representations as float64 and labels, or an error that names what is wrong."""
    try:
        rows = np.asarray(z, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"z must be numbers: {error}") from None
    labels = np.asarray(y)
    if rows.ndim != 2 or not rows.size:
        raise InputError(f"z: shape {rows.shape}; representations (n, m) are needed")
    if labels.shape != (len(rows),):
        raise InputError(f"y: shape {labels.shape}; one label for each of {len(rows)} rows is needed")
    bad = ~np.isfinite(rows).all(axis=1)
    if bad.any():
        raise DataError(f"z: row {int(np.argmax(bad))} is not finite ({int(bad.sum())} such rows of {len(rows)})")
    return rows, labels


def _covariance(rows: Float[np.ndarray, "n dim"], shrink: float | str) -> Float[np.ndarray, "dim dim"]:
    if shrink == "ledoit-wolf":
        return LedoitWolf().fit(rows).covariance_
    cov = np.atleast_2d(np.cov(rows.T))
    return cov + float(shrink) * np.trace(cov) / len(cov) * np.eye(len(cov))


def _lent(
    cov: Float[np.ndarray, "classes dim dim"], count: Int[np.ndarray, " classes"], classes: Shaped[np.ndarray, " _"]
) -> Float[np.ndarray, "classes dim dim"]:
    """Fill covariances that could not be estimated with the mean of the others by class size, and say so."""
    lacking = np.isnan(cov[:, 0, 0])
    if lacking.all():
        raise DataError("z: no class has two different rows, so that no covariance can be estimated")
    if lacking.any():
        cov[lacking] = np.average(cov[~lacking], axis=0, weights=count[~lacking])
        warnings.warn(
            f"y: classes {classes[lacking].tolist()} keep fewer than two different rows; they have the mean of all "
            "their rows and the mean covariance of the other classes",
            stacklevel=3,
        )
    return cov


def _check_parameters(neighbors: int, contamination: float | str, shrink: float | str) -> None:
    if isinstance(neighbors, bool) or not isinstance(neighbors, int | np.integer) or neighbors < 1:
        raise InputError(f"neighbors: got {neighbors!r}; a whole number of at least 1 is needed")
    named = contamination in ("auto", "estimate")
    if not named and (not isinstance(contamination, int | float) or not 0 <= contamination <= 0.5):
        raise InputError(
            f"contamination: got {contamination!r}; a share in [0, 0.5], 'estimate' or 'auto' is needed: where more "
            "than half of a class is wrong, outliers are not the wrong ones"
        )
    if shrink != "ledoit-wolf" and (not isinstance(shrink, int | float) or not 0 <= shrink < np.inf):
        raise InputError(f"shrink: got {shrink!r}; a number of at least 0 or 'ledoit-wolf' is needed")
