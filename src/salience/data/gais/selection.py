"""From confidence and attention to scores, and from scores to rows of every class."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from salience.data.gais.hashing import hash_codes
from salience.data.kmq.quotas import take_first

IMPORTANCE = ("attention+confidence", "attention", "confidence")


def importance_scores(
    attention: Float[np.ndarray, " n"], confidence: Float[np.ndarray, " n"], y: Int[np.ndarray, " n"], of: str
) -> Float[np.ndarray, " n"]:
    """Importance of every row: ``s = z(A) + z(confidence)``, z within the class, or one of the two.

    Parameters
    ----------
    attention, confidence : (n,) float
    y : (n,) int
        Class codes.
    of : {"attention+confidence", "attention", "confidence"}

    Returns
    -------
    (n,) float64
        0 throughout a class whose rows are all alike.

    Notes
    -----
    The sum is reconstructed. Confidence alone is the score of the predecessor (arXiv 2412.19201).
    """
    parts = {"attention": attention, "confidence": confidence}
    return np.sum([_z_within(parts[name], y) for name in of.split("+")], axis=0)


def reduced_sizes(sizes: Int[np.ndarray, " k"], reduction: float, n_min: int) -> Int[np.ndarray, " k"]:
    """Rows to keep of each class: ``max(n_min, round((1 - reduction) n_c))``, or all where there are fewer."""
    return np.minimum(sizes, np.maximum(n_min, np.rint((1 - reduction) * sizes).astype(np.int64)))


def choose(
    scores: Float[np.ndarray, " n"], y: Int[np.ndarray, " n"], quotas: Int[np.ndarray, " k"], *,
    x: Float[np.ndarray, "n d"] | None = None, seed: int = 0,
) -> Int[np.ndarray, " b"]:  # fmt: skip
    """The rows with the best scores of every class; with `x`, in turns over buckets of alike rows.

    With coverage, the rows of a class are hashed by random hyperplanes through their mean into about twice as many
    buckets as there are rows to keep. Each turn takes the best row left of every bucket, large buckets first.

    Parameters
    ----------
    scores : (n,) float
    y : (n,) int
        Class codes.
    quotas : (k,) int
        Rows to keep of each class.
    x : (n, d) float, optional
        Standardised rows, for coverage.
    seed : int
        Of the hyperplanes.

    Returns
    -------
    (b,) int64
        Ascending. Ties go to the earlier row.

    Notes
    -----
    Coverage is ours: the best scores of a class alone are often much the same row.
    """
    if x is None:
        return take_first(scores, y, quotas)
    keys = np.empty(len(scores))
    for code, quota in enumerate(quotas):
        rows = np.flatnonzero(y == code)
        keys[rows] = -_turns(scores[rows], _buckets(x[rows], int(quota), np.random.default_rng([seed, code])))
    return take_first(keys, y, quotas)


def _buckets(x: Float[np.ndarray, "n d"], quota: int, rng: np.random.Generator) -> Int[np.ndarray, " n"]:
    bits = min(16, int(np.ceil(np.log2(max(2, quota)))) + 1)
    return np.unique(hash_codes(x, n_tables=1, bits=bits, rng=rng)[:, 0], return_inverse=True)[1]


def _turns(scores: Float[np.ndarray, " n"], buckets: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Place of every row in the order of turns: rank in its bucket, then size of the bucket."""
    sizes = np.bincount(buckets)
    order = np.lexsort((np.arange(len(scores)), -scores, buckets))
    rank = np.empty(len(scores), np.int64)
    rank[order] = np.arange(len(scores)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    place = np.empty(len(scores))
    place[np.lexsort((buckets, -sizes[buckets], rank))] = np.arange(len(scores))
    return place


def _z_within(values: Float[np.ndarray, " n"], y: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Standardised within each class, by what is known there; 0 for NaN and where a class does not vary."""
    known = np.isfinite(values)
    count = np.maximum(np.bincount(y[known], minlength=y.max() + 1), 1)

    def mean(parts: Float[np.ndarray, " m"]) -> Float[np.ndarray, " n"]:
        return (np.bincount(y[known], parts, minlength=len(count)) / count)[y]

    away = np.where(known, values - mean(values[known]), 0.0)
    spread = np.sqrt(mean(away[known] ** 2))
    return np.divide(away, spread, out=np.zeros(len(values)), where=spread > 1e-12)
