"""The steps of a round: which score tells most, how the budget is shared out, which rows are drawn, which pruned."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from salience.data.kmq.clustering import check_embeddings
from salience.errors import DataError, InputError

BINS, LIMIT, CUT = 50, 4.0, 0.05
_ROWS = 1024  # of the similarity matrix held at once


def score_entropy(scores: ArrayLike, bins: int = BINS, lim: float = LIMIT) -> float:
    r"""How well a score tells the rows of a cluster apart: the entropy of its histogram, in bits.

        H = -sum_b p_b log2 p_b,      p_b the share of z = (s - mean) / sd in bin b of [-lim, lim]

    Values beyond the limits count in the outer bins.

    Parameters
    ----------
    scores : (n,) float
        NaN where missing: left out.
    bins : int
    lim : float

    Returns
    -------
    float
        In 0..log2(bins); 0 for a score that is the same everywhere, or missing.

    Raises
    ------
    InputError, DataError

    Notes
    -----
    Source: arXiv 2410.10636, entropy-based choice of the scoring function. The authors' code lays its bins at 4 times
    the deviation *before* standardising, so that they miss or cover everything; here the limits are those of z.
    """
    values = _scores(scores)
    if bins < 2 or not lim > 0:
        raise InputError(f"bins must be at least 2 and lim above 0, not {bins} and {lim}")
    values = values[~np.isnan(values)]
    if not len(values) or np.ptp(values) <= 1e-12 * np.abs(values).max():
        return 0.0
    z = np.clip((values - values.mean()) / values.std(), -lim, lim)
    counts = np.histogram(z, bins, (-lim, lim))[0]
    p = counts[counts > 0] / len(values)
    return float(-(p * np.log2(p)).sum()) + 0.0


def choose_score(scores: Mapping[str, Float[np.ndarray, " n"]]) -> tuple[str | None, dict[str, float]]:
    """The score of largest entropy among the rows of one cluster, and the entropy of each.

    Returns
    -------
    name : str or None
        The first of equal ones; None where no score tells any two rows apart.
    entropies : dict of str to float
        NaN for a score that more than half of the rows lack: it takes no part.
    """
    found = {}
    for name, values in scores.items():
        missing = float(np.isnan(values).mean()) if len(values) else 1.0
        found[name] = float("nan") if missing > 0.5 else score_entropy(values)
    best = max(found, key=lambda name: -1.0 if np.isnan(found[name]) else found[name], default=None)
    return (best if best is not None and found[best] > 0 else None), found


def balanced_budget(sizes: ArrayLike, total: int) -> Int[np.ndarray, " k"]:
    """Equal shares of a budget; what small clusters cannot take goes to the larger ones.

        b_j = min(n_j, ceil(rest / clusters left)),      clusters in the order of increasing size

    Parameters
    ----------
    sizes : (k,) int
        Rows of each cluster.
    total : int
        Rows to give out.

    Returns
    -------
    (k,) int64
        Sums to ``min(total, sizes.sum())``.

    Raises
    ------
    InputError
        Sizes or total are no whole numbers of at least 0.

    Notes
    -----
    Source: arXiv 2410.10636 and the authors' code, which gives out more than the total by rounding up.
    """
    given = np.asarray(sizes)
    if given.ndim != 1 or given.dtype.kind not in "iu" or (given < 0).any():
        raise InputError(f"sizes must be whole numbers of at least 0, not {sizes!r}")
    left = _count("total", total, 0)
    budget = np.zeros(len(given), np.int64)
    for place, cluster in enumerate(np.argsort(given, kind="stable")):
        budget[cluster] = min(int(given[cluster]), -(-left // (len(given) - place)))
        left -= int(budget[cluster])
    return budget


def ccs_sample(
    scores: ArrayLike, k: int, *, bins: int = BINS, cut: float = CUT, generator: np.random.Generator
) -> Int[np.ndarray, " m"]:
    """Draw rows that cover the range of a score: coverage-centric sampling.

    The lowest and highest twentieth are left out, the rest of the range is cut into bins of equal width. From the
    highest bin to the lowest each gives ``ceil(rest / bins left)`` rows, drawn uniformly, or all it has.

    Parameters
    ----------
    scores : (n,) float
        NaN where missing.
    k : int
        Rows to draw; all if there are no more.
    bins : int
    cut : float
        Share left out at either end, below 0.5.
    generator : numpy Generator

    Returns
    -------
    (min(k, n),) int64
        In ascending order.

    Raises
    ------
    InputError, DataError

    Notes
    -----
    Source: Zheng and others, "Coverage-centric Coreset Selection" (arXiv 2210.15809), as the authors of Adapt-infinity
    use it. Two additions so that exactly k rows are drawn: what the last bins cannot give is spread over all bins
    again, and where the range within the limits is used up, rows beyond them (and then those without a score) follow.
    """
    values, k = _scores(scores), _count("k", k, 0)
    if bins < 1 or not 0 <= cut < 0.5:
        raise InputError(f"bins must be at least 1 and cut in [0, 0.5), not {bins} and {cut}")
    if k >= len(values):
        return np.arange(len(values))
    order = generator.permutation(len(values))
    known = np.sort(values[~np.isnan(values)])
    chosen = np.zeros(len(values), dtype=bool)
    inside = np.zeros(len(values), dtype=bool)
    if len(known):
        low, high = known[int(len(known) * cut)], known[min(int(len(known) * (1 - cut)), len(known) - 1)]
        inside = (values >= low) & (values <= high)
        width = (high - low) / bins
        place = np.zeros(len(values), np.int64)
        if width > 0:
            place[inside] = np.minimum((high - values[inside]) / width, bins - 1).astype(np.int64)
        while chosen.sum() < k and (inside & ~chosen).any():
            _one_pass(chosen, order, place, inside & ~chosen, k - int(chosen.sum()), bins)
    for more in (~inside & ~np.isnan(values), np.isnan(values)):
        spare = order[(more & ~chosen)[order]]
        chosen[spare[: k - int(chosen.sum())]] = True
    return np.flatnonzero(chosen)


def prune_redundant(embeddings: ArrayLike, labels: ArrayLike, keep_total: int) -> Int[np.ndarray, " m"]:
    """Rows to keep so that large, repetitive clusters lose most: within a cluster, those least like any earlier row.

        M_i = max_{j < i, same cluster} cos(e_i, e_j)

    Parameters
    ----------
    embeddings : (n, d) float
    labels : (n,) int
        Cluster of every row, from 0.
    keep_total : int
        Shared out over the clusters by `balanced_budget`.

    Returns
    -------
    (min(keep_total, n),) int64
        In ascending order.

    Raises
    ------
    InputError, DataError

    Notes
    -----
    Source: arXiv 2410.10636, permanent pruning; SemDeDup (arXiv 2303.09540) as in the authors' code. The order of the
    rows counts: of two that are alike the earlier one stays.
    """
    keep = _count("keep_total", keep_total, 0)
    clusters = np.asarray(labels)
    closest = earlier_similarity(embeddings, clusters)
    budget = balanced_budget(np.bincount(clusters), keep)
    order = np.lexsort((np.arange(len(clusters)), closest, clusters))
    first = np.searchsorted(clusters[order], clusters[order])  # where the cluster of each begins
    place = np.arange(len(order)) - first
    return np.sort(order[place < budget[clusters[order]]])


def earlier_similarity(embeddings: ArrayLike, labels: ArrayLike) -> Float[np.ndarray, " n"]:
    """Largest cosine of every row to an earlier row of its cluster; 0 at least, and for the first."""
    rows = check_embeddings(embeddings)
    clusters = np.asarray(labels)
    if clusters.shape != (len(rows),) or clusters.dtype.kind not in "iu" or (clusters < 0).any():
        raise InputError(f"labels must be a cluster number for each of {len(rows)} rows")
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows / np.where(lengths > 0, lengths, 1.0)
    found = np.zeros(len(rows))
    for cluster in np.unique(clusters):
        members = np.flatnonzero(clusters == cluster)
        mine = rows[members]
        for start in range(0, len(mine), _ROWS):
            stop = min(start + _ROWS, len(mine))
            similar = np.tril(mine[start:stop] @ mine[:stop].T, start - 1)  # 0 from the row itself on
            found[members[start:stop]] = similar.max(axis=1)
    return np.maximum(found, 0.0)


def _one_pass(chosen: np.ndarray, order: np.ndarray, place: np.ndarray, free: np.ndarray, left: int, bins: int) -> None:
    """Mark rows bin by bin, in random order within a bin."""
    for number in range(bins):
        if not left:
            return
        candidates = order[(free & (place == number))[order]]
        taken = candidates[: -(-left // (bins - number))]
        chosen[taken] = True
        left -= len(taken)


def _scores(values: ArrayLike) -> Float[np.ndarray, " n"]:
    try:
        found = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise DataError("scores must be numbers") from None
    if found.ndim != 1:
        raise InputError(f"scores must have one dimension, not shape {found.shape}")
    if np.isinf(found).any():
        raise DataError(f"score of row {int(np.argmax(np.isinf(found)))} is infinite; NaN stands for a missing one")
    return found


def _count(name: str, value: int, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise InputError(f"{name} must be a whole number of at least {least}, not {value!r}")
    return int(value)
