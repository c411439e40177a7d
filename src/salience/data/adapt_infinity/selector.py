"""`AdaptSelector`: one round of choosing and pruning whenever a data set arrives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from salience.data.adapt_infinity.choosing import balanced_budget, ccs_sample, choose_score, prune_redundant
from salience.data.kmq.clustering import cluster_rows
from salience.errors import DataError, InputError, NothingToDo


@dataclass(frozen=True)
class Signals:
    """What a round needs to know of its samples, all from the current model.

    Parameters
    ----------
    vectors : (n, d) float
        Gradient vectors (`salience.data.gradient_features`), for the clusters. Made unit length.
    scores : dict of str to (n,) float
        NaN where missing. Empty: rows are drawn uniformly inside clusters.
    embeddings : (n, e) float, optional
        For redundancy; the vectors by default.
    """

    vectors: Float[np.ndarray, "n d"]
    scores: Mapping[str, Float[np.ndarray, " n"]]
    embeddings: Float[np.ndarray, "n e"] | None = None


@dataclass(frozen=True)
class ClusterChoice:
    """What was done in one pseudo-skill cluster: rows in it, drawn and kept, the score that was taken and why."""

    size: int
    chosen: int
    kept: int
    scorer: str | None
    entropies: dict[str, float]


@dataclass(frozen=True)
class StreamStep:
    """One round.

    Attributes
    ----------
    chosen : (b,) object
        Samples to train on, in the order of the pool.
    pool : (m,) object
        Samples kept for later rounds; those pruned never return.
    pruned, dropped : (.,) object
        Samples that left the pool as redundant, and as they had no finite vector or no score at all.
    labels : (n,) int
        Cluster of every sample that took part; -1 for dropped ones. In the order of `seen`.
    seen : (n,) object
        Samples of the round: the pool before, then the new ones.
    clusters : list of ClusterChoice
    """

    chosen: np.ndarray
    pool: np.ndarray
    pruned: np.ndarray
    dropped: np.ndarray
    seen: np.ndarray
    labels: Int[np.ndarray, " n"]
    clusters: list[ClusterChoice]


class AdaptSelector:
    r"""Choose training data round by round from data sets that arrive one after another: Adapt-infinity.

    At every round, with the pool P = what was kept of earlier data sets + the new one, measured by the current model:

    1. k-means cuts the gradient vectors into k pseudo-skill clusters;
    2. in each cluster the score with the histogram of largest entropy is taken (`choose_score`);
    3. the budget is shared out equally over the clusters, small ones are taken whole (`balanced_budget`);
    4. rows are drawn so that they cover the range of that score, without outliers (`ccs_sample`);
    5. if the pool is larger than its limit, the most redundant rows of each cluster leave for good
       (`prune_redundant`).

    LITE-Adapt-infinity is `pool_limit` = `budget`, with vectors of a cheap pass (`gradient_features`, "mezo").

    Parameters
    ----------
    n_clusters : int
        k; the authors' code has 10.
    budget : int
        Rows to choose at every round.
    pool_limit : int, optional
        Rows to keep for later rounds; no limit by default.
    random_state : int

    Attributes
    ----------
    pool : (m,) object
        Samples in the pool.
    rounds : int

    Raises
    ------
    InputError
        A parameter is not usable.

    Notes
    -----
    Source: Maharana, Yoon, Chen, Bansal, "Adapt-infinity: Scalable Lifelong Multimodal Instruction Tuning via Dynamic
    Data Selection", ICLR 2025 (arXiv 2410.10636); steps 1 to 4 as in the authors' published selection script, with the
    departures that each function notes. Clusters are those of kMQ: all rows up to 20,000, mini-batches above (the
    script: mini-batches always).
    """

    def __init__(
        self, *, n_clusters: int = 10, budget: int = 25_000, pool_limit: int | None = None, random_state: int = 0
    ) -> None:
        for name, value, least in (
            ("n_clusters", n_clusters, 1), ("budget", budget, 1), ("pool_limit", pool_limit, 1),
            ("random_state", random_state, 0),
        ):  # fmt: skip
            if value is None and name == "pool_limit":
                continue
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
                raise InputError(f"{name} must be a whole number of at least {least}, not {value!r}")
        self.n_clusters, self.budget, self.pool_limit = n_clusters, budget, pool_limit
        self.random_state = random_state
        self.pool = np.empty(0, dtype=object)
        self.rounds = 0
        self._known: set[Any] = set()

    def start(self, pool: Sequence[Any] | np.ndarray) -> None:
        """Take over a pool that an earlier run has kept, before the first round."""
        if self.rounds or len(self.pool):
            raise InputError("a pool can be taken over before the first round only")
        self.pool = _ids(pool)
        self._known.update(self.pool)

    def step(self, new: Sequence[Any] | np.ndarray, measure: Callable[[np.ndarray], Signals]) -> StreamStep:
        """One round.

        Parameters
        ----------
        new : sequence of ids
            Names or numbers of the samples that have arrived; none may ever have come before.
        measure : callable
            Takes ids (those of the pool first) and returns the `Signals` of these samples under the current model.

        Returns
        -------
        StreamStep

        Raises
        ------
        InputError
            An id that came before; signals whose lengths do not fit.
        DataError
            A score is infinite, or no sample of the round has a finite vector.
        NothingToDo
            Neither new samples nor a pool.
        """
        fresh = _ids(new)
        twice = [one for one in fresh if one in self._known] or ([] if len(set(fresh)) == len(fresh) else list(fresh))
        if twice:
            raise InputError(f"sample {twice[0]!r} came before: every sample arrives once")
        seen = np.concatenate([self.pool, fresh])
        if not len(seen):
            raise NothingToDo("there are no samples: nothing has arrived, and the pool is empty")
        signals = _checked(measure(seen), len(seen))
        usable = np.isfinite(signals.vectors).all(axis=1)
        if signals.scores:
            usable &= ~np.all([np.isnan(values) for values in signals.scores.values()], axis=0)
        if signals.embeddings is not None:
            usable &= np.isfinite(signals.embeddings).all(axis=1)
        if not usable.any():
            raise DataError(f"none of {len(seen)} samples has a finite vector and a score")
        rows = np.flatnonzero(usable)
        labels = np.full(len(seen), -1)
        labels[rows] = self._cluster(signals.vectors[rows])
        chosen, choices = self._choose(labels, signals)
        kept = rows
        if self.pool_limit is not None and len(rows) > self.pool_limit:
            embeddings = signals.vectors if signals.embeddings is None else signals.embeddings
            kept = rows[prune_redundant(embeddings[rows], labels[rows], self.pool_limit)]
        remain = np.bincount(labels[kept], minlength=len(choices))
        clusters = [ClusterChoice(*choice[:2], int(left), *choice[2:]) for choice, left in zip(choices, remain)]
        self._known.update(fresh)
        self.pool = seen[kept]
        self.rounds += 1
        pruned = np.setdiff1d(rows, kept)
        return StreamStep(seen[chosen], seen[kept], seen[pruned], seen[~usable], seen, labels, clusters)

    def _cluster(self, vectors: Float[np.ndarray, "n d"]) -> Int[np.ndarray, " n"]:
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit = vectors / np.where(lengths > 0, lengths, 1.0)
        return cluster_rows(unit, min(self.n_clusters, len(unit)), 3, 300, self._seed(0))[1]

    def _choose(
        self, labels: Int[np.ndarray, " n"], signals: Signals
    ) -> tuple[Int[np.ndarray, " b"], list[tuple[int, int, str | None, dict[str, float]]]]:
        """Rows to train on, and per cluster its size, rows drawn, score and entropies."""
        sizes = np.bincount(labels[labels >= 0], minlength=1)
        budget = balanced_budget(sizes, self.budget)
        chosen, told = [], []
        for cluster, (size, share) in enumerate(zip(sizes, budget)):
            members = np.flatnonzero(labels == cluster)
            name, entropies = choose_score({name: values[members] for name, values in signals.scores.items()})
            values = np.zeros(len(members)) if name is None else signals.scores[name][members]
            generator = np.random.default_rng([self._seed(1), cluster])
            chosen.append(members[ccs_sample(values, int(share), generator=generator)])
            told.append((int(size), int(share), name, entropies))
        return np.sort(np.concatenate(chosen)), told

    def _seed(self, use: int) -> int:
        return int(np.random.SeedSequence([self.random_state, self.rounds, use]).generate_state(1)[0] >> 1)


def _ids(new: Sequence[Any] | np.ndarray) -> np.ndarray:
    found = np.empty(len(new), dtype=object)
    found[:] = list(new)
    return found


def _checked(signals: Signals, n: int) -> Signals:
    """The signals as arrays, or an error that says what does not fit."""
    vectors = _matrix("vectors", signals.vectors, n)
    embeddings = None if signals.embeddings is None else _matrix("embeddings", signals.embeddings, n)
    scores = {}
    for name, values in signals.scores.items():
        try:
            scores[name] = np.asarray(values, dtype=np.float64)
        except (TypeError, ValueError):
            raise DataError(f"score {name!r} must be numbers") from None
        if scores[name].shape != (n,):
            raise InputError(f"score {name!r} must have one value for each of {n} samples, not shape "
                             f"{scores[name].shape}")  # fmt: skip
        if np.isinf(scores[name]).any():
            raise DataError(f"score {name!r} of sample {int(np.argmax(np.isinf(scores[name])))} is infinite; NaN "
                            "stands for a missing one")  # fmt: skip
    return Signals(vectors, scores, embeddings)


def _matrix(name: str, values: ArrayLike, n: int) -> Float[np.ndarray, "n d"]:
    try:
        found = np.asarray(values)
        found = found if found.dtype in (np.float32, np.float64) else found.astype(np.float64)
    except (TypeError, ValueError):
        raise DataError(f"{name} must be numbers") from None
    if found.ndim != 2 or len(found) != n or not found.shape[1]:
        raise InputError(f"{name} must be a matrix with a row for each of {n} samples, not of shape {found.shape}")
    return found
