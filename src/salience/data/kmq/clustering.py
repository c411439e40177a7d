"""k-means that gives the same clusters whatever the number of threads, and the choice of their number."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.metrics import silhouette_score
from sklearn.utils import check_random_state
from threadpoolctl import threadpool_limits

from salience.errors import DataError, InputError

_LLOYD_ROWS = 20_000  # up to so many rows all of them are clustered until nothing moves
_PER_CENTRE = 64  # above, centres are fitted on so many rows each, as faiss does (there 256)
_CHUNK = 8192
_PRODUCTS = 2**25  # of rows and centres held at once


def choose_k(
    embeddings: ArrayLike, candidates: Sequence[int], sample: int = 10_000, *, n_init: int = 5, random_state: Any = 0
) -> dict[int, float]:
    """Silhouette of k-means at each number of clusters, on a sample: the larger, the better the clusters stand apart.

    Parameters
    ----------
    embeddings : (n, d) float
    candidates : sequence of int
        Each at least 2 and below the number of rows in the sample.
    sample : int
        Rows drawn at random, as the silhouette compares all pairs.
    n_init : int
    random_state : int, RandomState or None

    Returns
    -------
    dict of int to float
        In -1..1; NaN where all rows fall into one cluster.

    Raises
    ------
    InputError
        A candidate is out of range.
    """
    rows = check_embeddings(embeddings)
    rng = check_random_state(random_state)
    if len(rows) > sample:
        rows = rows[np.sort(rng.choice(len(rows), sample, replace=False))]
    found = {}
    for k in candidates:
        if not 2 <= k < len(rows):
            raise InputError(f"candidates must lie in 2..{len(rows) - 1}, not {k}")
        _, labels = cluster_rows(rows, int(k), n_init, 300, int(rng.randint(2**31 - 1)))
        several = 2 <= len(np.unique(labels)) < len(rows)
        with threadpool_limits(1):
            found[int(k)] = float(silhouette_score(rows, labels)) if several else float("nan")
    return found


def nearest_distances(rows: Float[np.ndarray, "n d"], centres: Float[np.ndarray, "m d"]) -> Float[np.ndarray, " n"]:
    """Euclidean distance of every row to the nearest centre."""
    return distances_to(rows, centres, _assign(rows, centres))


def cluster_rows(
    rows: Float[np.ndarray, "n d"], k: int, n_init: int, max_iter: int, seed: int
) -> tuple[Float[np.ndarray, "k d"], Int[np.ndarray, " n"]]:
    """Centres and labels. On one thread: partial sums of several are added in any order, which moves ties."""
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer distinct rows than clusters: some stay empty, which is dealt with
        if len(rows) <= _LLOYD_ROWS:
            model = KMeans(k, n_init=n_init, max_iter=max_iter, random_state=seed).fit(rows)
            return model.cluster_centers_, model.labels_.astype(np.int64)
        train = rows
        if len(rows) > _PER_CENTRE * k:
            drawn = np.random.default_rng(seed).choice(len(rows), max(_PER_CENTRE * k, _LLOYD_ROWS), replace=False)
            train = rows[np.sort(drawn)]
        model = MiniBatchKMeans(k, n_init=n_init, max_iter=max_iter, random_state=seed, compute_labels=False).fit(train)
        return model.cluster_centers_, _assign(rows, model.cluster_centers_)


def _assign(rows: Float[np.ndarray, "n d"], centres: Float[np.ndarray, "k d"]) -> Int[np.ndarray, " n"]:
    """Nearest centre of every row: the largest ``x . c - |c|^2 / 2``, with the origin among the centres."""
    origin = centres.mean(axis=0, dtype=np.float64)
    centres, origin = (centres - origin).astype(rows.dtype), origin.astype(rows.dtype)
    half = (centres**2).sum(axis=1) / 2
    labels = np.empty(len(rows), np.int64)
    step = max(1, min(_CHUNK, _PRODUCTS // len(centres)))
    with threadpool_limits(1):
        for start in range(0, len(rows), step):
            near = (rows[start : start + step] - origin) @ centres.T
            near -= half
            labels[start : start + step] = near.argmax(axis=1)
    return labels


def distances_to(
    rows: Float[np.ndarray, "n d"], centres: Float[np.ndarray, "k d"], labels: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """Euclidean distance of every row to the centre of its cluster."""
    found = np.empty(len(rows))
    for start in range(0, len(rows), _CHUNK):
        part = slice(start, start + _CHUNK)
        found[part] = np.linalg.norm(rows[part].astype(np.float64) - centres[labels[part]], axis=1)
    return found


def check_embeddings(values: ArrayLike) -> Float[np.ndarray, "n d"]:
    """A finite matrix of float32 (where it came as that) or float64, or an error that says what is wrong."""
    try:
        rows = np.asarray(values)
        rows = rows if rows.dtype in (np.float32, np.float64) else rows.astype(np.float64)
    except (TypeError, ValueError):
        raise DataError("embeddings must be numbers") from None
    if rows.ndim != 2 or not rows.shape[1]:
        raise InputError(f"embeddings must be a matrix of rows and dimensions, not of shape {rows.shape}")
    if not len(rows):
        raise DataError("embeddings hold no row")
    bad = ~np.isfinite(rows.sum(axis=1, dtype=np.float64))  # a sum costs no copy of the matrix
    if bad.any() and not np.isfinite(rows[bad]).all():
        raise DataError(f"embedding of row {int(np.argmax(bad))} is not finite ({int(bad.sum())} of {len(rows)} rows)")
    return rows
