"""What selections of rows are measured against: greedy covers and filters on embeddings."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from salience.data.kmq.clustering import check_embeddings
from salience.data.kmq.selector import KMQSelector, check_quality
from salience.errors import InputError

_MEDOIDS = 1000  # clusters at most: with more rows to choose, each gives its nearest few


def kmeans_medoids(embeddings: ArrayLike, count: int, *, random_state: int = 0) -> Int[np.ndarray, " count"]:
    """Rows nearest to the centres of k-means with one cluster a row (1,000 clusters at most, then several of each).

    Parameters
    ----------
    embeddings : (n, d) float
    count : int
    random_state : int

    Returns
    -------
    (count,) int64
        Ascending.
    """
    rows = check_embeddings(embeddings)
    _check(count, len(rows))
    selector = KMQSelector(n_clusters=min(count, _MEDOIDS), allocation="equal", within="closest", n_init=1,
                           random_state=random_state)  # fmt: skip
    return selector.fit(rows).select(count)


def k_center_greedy(embeddings: ArrayLike, count: int, *, random_state: int = 0) -> Int[np.ndarray, " count"]:
    """Farthest-point traversal (k-center): at most twice the radius of the best choice of as many rows.

    Parameters
    ----------
    embeddings : (n, d) float
    count : int
    random_state : int
        Of the first row.

    Returns
    -------
    (count,) int64
        In the order they were chosen.

    Notes
    -----
    Source: Gonzalez 1985; Sener and Savarese 2018 (arXiv 1708.00489).
    """
    rows = check_embeddings(embeddings).astype(np.float64)
    _check(count, len(rows))
    chosen = [int(np.random.default_rng(random_state).integers(len(rows)))]
    nearest = np.linalg.norm(rows - rows[chosen[0]], axis=1)
    nearest[chosen[0]] = -1.0  # copies of a chosen row have distance 0 and still come after it
    while len(chosen) < count:
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, np.linalg.norm(rows - rows[chosen[-1]], axis=1))
        nearest[chosen] = -1.0
    return np.array(chosen)


def qdit(
    embeddings: ArrayLike, quality: ArrayLike, count: int, *, alpha: float = 0.5
) -> Int[np.ndarray, " count"]:  # fmt: skip
    """Greedy quality and diversity (QDIT): each time the row with the largest gain.

        (1 - alpha) sum_v max_{a in A} cos(v, a) + alpha q,      over all rows v of the pool

    Parameters
    ----------
    embeddings : (n, d) float
        n x n similarities are held: for pools of some thousand rows.
    quality : (n,) float
    count : int
    alpha : float
        In 0..1; 1 is quality alone.

    Returns
    -------
    (count,) int64
        In the order they were chosen.

    Notes
    -----
    Source: Bukharin and Zhao 2023 (arXiv 2311.14736), as the authors of kMQ compute it.
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha must lie in 0..1, not {alpha}")
    rows = _unit(check_embeddings(embeddings))
    _check(count, len(rows))
    values = check_quality(quality, len(rows))
    similar = rows @ rows.T
    covered = np.full(len(rows), -1.0)  # the smallest cosine
    chosen: list[int] = []
    for _ in range(count):
        gain = (1 - alpha) * np.maximum(similar - covered, 0).sum(axis=1) + alpha * values
        gain[chosen] = -np.inf
        chosen.append(int(gain.argmax()))
        covered = np.maximum(covered, similar[chosen[-1]])
    return np.array(chosen)


def deita_filter(
    embeddings: ArrayLike, score: ArrayLike, count: int, *, threshold: float = 0.9
) -> Int[np.ndarray, " count"]:
    """Best score first, leaving out what is too like a row already kept (Deita).

    Parameters
    ----------
    embeddings : (n, d) float
    score : (n,) float
        Complexity times quality, in the paper.
    count : int
    threshold : float
        Largest cosine to a kept row (reconstructed: 0.9 is from memory).

    Returns
    -------
    (at most count,) int64
        In the order they were kept; fewer than `count` where the rest is too like them.

    Notes
    -----
    Source: Liu et al. 2024 (arXiv 2312.15685), section 3.
    """
    rows = _unit(check_embeddings(embeddings))
    _check(count, len(rows))
    kept: list[int] = []
    for at in np.argsort(-check_quality(score, len(rows)), kind="stable"):
        if not kept or (rows[kept] @ rows[at]).max() < threshold:
            kept.append(int(at))
        if len(kept) == count:
            break
    return np.array(kept)


def _unit(rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1.0)


def _check(count: int, n: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int | np.integer) or not 1 <= count <= n:
        raise InputError(f"count must be a whole number in 1..{n}, not {count!r}")
