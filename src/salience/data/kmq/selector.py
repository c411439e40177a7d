"""`KMQSelector`: k-means, a budget per cluster, and draws by quality inside the clusters."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from salience.data.kmq.clustering import check_embeddings, choose_k, cluster_rows, distances_to, nearest_distances
from salience.data.kmq.quotas import cluster_quotas, take_first
from salience.errors import DataError, InputError

ALLOCATIONS = ("proportional", "equal")
WITHIN = ("quality", "random", "closest", "median")
CANDIDATES = (8, 16, 32, 64, 128, 256, 512)


class KMQSelector(BaseEstimator):
    r"""Choose rows that cover every cluster of a pool and are of high quality inside each: kMQ.

        b_j = B |D_j| / n,      p(i) = exp(q_i / T) / sum_{l in D_j} exp(q_l / T)

    k-means cuts the pool D into clusters D_j; the budget B is shared out in proportion to their sizes, to exactly B;
    inside a cluster rows are drawn without replacement, each next one with probability proportional to its weight.

    Parameters
    ----------
    n_clusters : int or "silhouette"
        k, well below the budget; the paper chooses it by the silhouette before any training (`choose_k`).
    allocation : {"proportional", "equal"}
        "proportional" is the paper's; the authors' code gives every cluster the same.
    within : {"quality", "random", "closest", "median"}
        "quality" is kMQ; the others are what the paper compares with: uniform draws (kM-random), the rows nearest to
        the centre (kM-closest), those nearest to the cluster's median distance from it (in the code only).
    temperature : float
        T; the smaller, the more quality decides. The scale of the paper's scores is 1 to 6.
    n_init, max_iter : int
        Restarts of k-means, and its iterations.
    random_state : int, RandomState or None

    Attributes
    ----------
    labels_ : (n,) int
        Cluster of every row. Above 20,000 rows the centres are fitted in mini-batches on 64 rows a
        centre, or 20,000 if that is more.
    cluster_centers_ : (k, d) float
    silhouettes_ : dict of int to float
        Silhouette of every candidate k; empty where k was given.
    seed_ : int
        Decides the draws: of one fitted selector the same rows come first at any budget of a cluster.

    Notes
    -----
    Source: Yu, Chen, Ahmadian, Fadaee, "Diversify and Conquer: Diversity-Centric Data Selection with Iterative
    Refinement" (arXiv 2409.11378), section 2.2. Two departures, both as in the authors' code: draws are without
    replacement (the text says with), and quality enters by its exponential. Unlike in the code, the budget follows the
    cluster's size and is spent in full.
    """

    def __init__(
        self, *, n_clusters: int | str = 512, allocation: str = "proportional", within: str = "quality",
        temperature: float = 1.0, n_init: int = 5, max_iter: int = 300, random_state: Any = 0,
    ) -> None:  # fmt: skip
        self.n_clusters = n_clusters
        self.allocation = allocation
        self.within = within
        self.temperature = temperature
        self.n_init = n_init
        self.max_iter = max_iter
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: object = None) -> KMQSelector:
        """Cluster the pool.

        Parameters
        ----------
        X : (n, d) float
            Embeddings, of prompt and completion together where the rows are instructions.
        y : ignored

        Raises
        ------
        InputError
            A parameter is not usable; more clusters than rows.
        DataError
            A value is not finite, or there is no row.
        """
        self._check()
        rows = check_embeddings(X)
        self.seed_ = int(check_random_state(self.random_state).randint(2**31 - 1))
        self.silhouettes_: dict[int, float] = {}
        k = self.n_clusters
        if isinstance(k, str):
            usable = [c for c in CANDIDATES if c <= len(rows) // 4] or [min(2, len(rows))]
            if usable[-1] >= 2 and len(usable) > 1:
                self.silhouettes_ = choose_k(rows, usable, n_init=self.n_init, random_state=self.seed_)
            k = max(self.silhouettes_, key=self.silhouettes_.__getitem__) if self.silhouettes_ else usable[0]
        if k > len(rows):
            raise InputError(f"n_clusters is {k}, more than the {len(rows)} rows")
        self.cluster_centers_, self.labels_ = cluster_rows(rows, k, self.n_init, self.max_iter, self.seed_)
        self.n_features_in_ = rows.shape[1]
        if self.within in ("closest", "median"):
            self.distances_ = distances_to(rows, self.cluster_centers_, self.labels_)
        return self

    def select(
        self, budget: int, quality: ArrayLike | None = None, weights: ArrayLike | None = None,
        exclude: ArrayLike | None = None,
    ) -> Int[np.ndarray, " b"]:  # fmt: skip
        """Choose rows.

        Parameters
        ----------
        budget : int
            Rows to choose; with as many or more than there are, all are returned.
        quality : (n,) float, optional
            The larger, the likelier; missing values (NaN) count as the mean. Without it draws are uniform.
        weights : (k,) float, optional
            Share of the budget of each cluster, in place of `allocation`.
        exclude : (m,) int, optional
            Rows that may not be chosen, such as those chosen before.

        Returns
        -------
        (min(budget, rows left),) int64
            In ascending order.

        Raises
        ------
        InputError
            A budget below 1, lengths that do not fit, a weight below 0.
        """
        check_is_fitted(self)
        n, k = len(self.labels_), len(self.cluster_centers_)
        if isinstance(budget, bool) or not isinstance(budget, int | np.integer) or budget < 1:
            raise InputError(f"budget must be a whole number of at least 1, not {budget!r}")
        free = np.ones(n, dtype=bool)
        free[_indices("exclude", exclude, n)] = False
        if budget >= free.sum():
            return np.flatnonzero(free)
        if k > budget and weights is None:
            warnings.warn(f"{k} clusters for a budget of {budget}: most clusters get no row; lower n_clusters",
                          stacklevel=2)  # fmt: skip
        left = np.bincount(self.labels_[free], minlength=k)
        keys = np.where(free, self._keys(quality), -np.inf)
        return take_first(keys, self.labels_, cluster_quotas(int(budget), self._shares(weights), left))

    def log_weights(
        self, quality: ArrayLike | None = None, weights: ArrayLike | None = None
    ) -> Float[np.ndarray, " n"]:
        """Logarithm of the probability of being the next row drawn, ``log w_j + log p(i)``, for `Scores`.

        Drawing by these numbers from the whole pool is kMQ without the exact share of each cluster.
        """
        check_is_fitted(self)
        shares = self._shares(weights)
        sizes = np.bincount(self.labels_, minlength=len(shares))
        shares = np.where(sizes > 0, shares, 0.0)
        logits = self._logits(quality)
        highest = np.full(len(shares), -np.inf)
        np.maximum.at(highest, self.labels_, logits)
        sums = np.bincount(self.labels_, np.exp(logits - highest[self.labels_]), minlength=len(shares))
        with np.errstate(divide="ignore"):
            cluster = np.log(shares / shares.sum())
        found = cluster[self.labels_] + logits - highest[self.labels_] - np.log(sums[self.labels_])
        return np.maximum(found, -1e6)  # a cluster of weight 0: never before any other, and a finite number

    def cluster_weights(self) -> Float[np.ndarray, " k"]:
        """Weight of every cluster by `allocation`: its size, or 1 (0 for an empty one)."""
        check_is_fitted(self)
        sizes = np.bincount(self.labels_, minlength=len(self.cluster_centers_)).astype(np.float64)
        return sizes if self.allocation == "proportional" else (sizes > 0).astype(np.float64)

    def _shares(self, weights: ArrayLike | None) -> Float[np.ndarray, " k"]:
        k = len(self.cluster_centers_)
        if weights is None:
            return self.cluster_weights()
        given = np.asarray(weights, dtype=np.float64)
        if given.shape != (k,) or not np.isfinite(given).all() or (given < 0).any() or not given.any():
            raise InputError(f"weights must be {k} finite numbers of at least 0, not all 0")
        return given

    def _logits(self, quality: ArrayLike | None) -> Float[np.ndarray, " n"]:
        """Logarithm of the weight inside a cluster, up to a constant; equal for all where quality says nothing."""
        if quality is None or self.within != "quality":
            return np.zeros(len(self.labels_))
        return check_quality(quality, len(self.labels_)) / self.temperature

    def _keys(self, quality: ArrayLike | None) -> Float[np.ndarray, " n"]:
        """What decides inside a cluster: Gumbel noise on log-weights (a draw), or minus a distance."""
        if self.within == "closest":
            return -self.distances_
        if self.within == "median":
            middle = np.zeros(len(self.cluster_centers_))
            for cluster in np.unique(self.labels_):
                middle[cluster] = np.median(self.distances_[self.labels_ == cluster])
            return -np.abs(self.distances_ - middle[self.labels_])
        # The largest of log p + Gumbel noise are a draw without replacement; as every row keeps its noise, draws that
        # leave out earlier ones go on with the same sequence.
        return self._logits(quality) + np.random.default_rng(self.seed_).gumbel(size=len(self.labels_))

    def _check(self) -> None:
        k = self.n_clusters
        if k != "silhouette" and (isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1):
            raise InputError(f"n_clusters must be a whole number of at least 1 or 'silhouette', not {k!r}")
        for name, value, allowed in (("allocation", self.allocation, ALLOCATIONS), ("within", self.within, WITHIN)):
            if value not in allowed:
                raise InputError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
        for name, number in (("n_init", self.n_init), ("max_iter", self.max_iter)):
            if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < 1:
                raise InputError(f"{name} must be a whole number of at least 1, not {number!r}")
        if not isinstance(self.temperature, int | float) or not 0 < self.temperature < np.inf:
            raise InputError(f"temperature must be positive and finite, not {self.temperature!r}")


def selection_report(
    embeddings: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], chosen: ArrayLike, *,
    quality: ArrayLike | None = None, other: ArrayLike | None = None,
) -> dict[str, float]:  # fmt: skip
    """How diverse and how good a selection is.

    Parameters
    ----------
    embeddings : (n, d) float
    labels : (n,) int
        Clusters of the pool, such as `KMQSelector.labels_`.
    chosen : (b,) int
        Chosen rows.
    quality : (n,) float, optional
    other : (m,) int, optional
        Another selection, to tell the overlap.

    Returns
    -------
    dict of str to float
        "clusters hit": share of clusters with a chosen row; "distance to the nearest chosen": mean over the pool;
        "mean quality" and "clusters of low quality": share of clusters whose mean quality, scaled to 0..1 over the
        pool, is below 0.3; "overlap": shared rows over rows of either (Jaccard).
    """
    rows = check_embeddings(embeddings)
    picked = _indices("chosen", chosen, len(rows))
    if not len(picked):
        raise InputError("chosen holds no row")
    clusters = np.unique(labels)
    found = {
        "clusters hit": len(np.unique(labels[picked])) / len(clusters),
        "distance to the nearest chosen": float(nearest_distances(rows, rows[picked]).mean()),
    }
    if quality is not None:
        values = check_quality(quality, len(rows))
        span = np.ptp(values)
        scaled = (values - values.min()) / span if span else np.full(len(rows), 0.5)
        means = [scaled[labels == label].mean() for label in clusters]
        found |= {"mean quality": float(values[picked].mean()),
                  "clusters of low quality": float(np.mean(np.array(means) < 0.3))}  # fmt: skip
    if other is not None:
        both = _indices("other", other, len(rows))
        found["overlap"] = len(np.intersect1d(picked, both)) / len(np.union1d(picked, both))
    return found


def check_quality(quality: ArrayLike, n: int) -> Float[np.ndarray, " n"]:
    """Finite quality per row: NaN becomes the mean of what is known, or 0 where nothing is."""
    try:
        values = np.array(quality, dtype=np.float64)
    except (TypeError, ValueError):
        raise DataError("quality must be numbers") from None
    if values.shape != (n,):
        raise InputError(f"quality must have one value for each of {n} rows, not shape {values.shape}")
    missing = np.isnan(values)
    if np.isinf(values).any():
        raise DataError(f"quality of row {int(np.argmax(np.isinf(values)))} is infinite")
    if missing.any():
        warnings.warn(f"quality of {int(missing.sum())} rows is missing; they count as the mean", stacklevel=3)
        values[missing] = values[~missing].mean() if not missing.all() else 0.0
    return values


def _indices(name: str, values: ArrayLike | None, n: int) -> Int[np.ndarray, " m"]:
    found = np.unique(np.asarray([] if values is None else values))
    if len(found) and (found.dtype.kind not in "iu" or found[0] < 0 or found[-1] >= n):
        raise InputError(f"{name} must be row numbers in 0..{n - 1}")
    return found.astype(np.int64)
