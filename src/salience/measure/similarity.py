"""How alike two representations or two distributions are."""

from __future__ import annotations

import numpy as np
import scipy.special
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.spatial.distance import cdist, pdist

from salience.errors import InputError
from salience.measure._checks import finite
from salience.measure.ranking import spearman


def linear_cka(a: ArrayLike, b: ArrayLike) -> float:
    """Linear centred kernel alignment: ``|A^T B|_F^2 / (|A^T A|_F |B^T B|_F)``, columns of A and B centred.

    It does not change when either side is rotated or multiplied by a number.

    Parameters
    ----------
    a, b : array (n, p), array (n, q)
        Two representations of the same n samples.

    Returns
    -------
    float
        In 0..1; 1 for equal representations up to rotation and scale.

    Raises
    ------
    InputError
        NaN, different numbers of samples, or a representation that is the same for all samples.

    Notes
    -----
    Source: Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019, section 3.
    """
    first, second = _representations(a, b)
    for name, values in (("a", first), ("b", second)):
        if not np.ptp(values, axis=0).any():
            raise InputError(f"{name} is the same for all {len(values)} samples: CKA is undefined")
    first, second = first - first.mean(axis=0), second - second.mean(axis=0)
    if max(first.shape[1], second.shape[1]) > len(first):  # n x n matrices are the smaller ones
        gram_a, gram_b = first @ first.T, second @ second.T
        return float((gram_a * gram_b).sum() / (np.linalg.norm(gram_a) * np.linalg.norm(gram_b)))
    across = np.linalg.norm(first.T @ second) ** 2
    return float(across / (np.linalg.norm(first.T @ first) * np.linalg.norm(second.T @ second)))


def rsa(a: ArrayLike, b: ArrayLike, metric: str = "euclidean") -> float:
    """Representational similarity analysis: Spearman correlation of the pairwise distances in two spaces.

    Parameters
    ----------
    a, b : array (n, p), array (n, q)
        Two representations of the same n samples, n >= 3.
    metric : str
        A distance of `scipy.spatial.distance.pdist`, such as "euclidean", "correlation" or "cosine".

    Returns
    -------
    float
        In -1..1.

    Raises
    ------
    InputError
        NaN, different numbers of samples, fewer than three samples, an unknown `metric`, or distances that
        are undefined or all equal.

    Notes
    -----
    Source: Kriegeskorte, Mur and Bandettini, "Representational similarity analysis", Frontiers in Systems
    Neuroscience 2008.
    """
    first, second = _representations(a, b)
    if len(first) < 3:
        raise InputError(f"a and b must hold at least 3 samples, to have distances to compare; got {len(first)}")
    try:
        distances = [pdist(first, metric), pdist(second, metric)]
    except ValueError as error:
        raise InputError(f"metric must be a distance of scipy's pdist; got {metric!r}: {error}") from error
    for name, values in zip("ab", distances):
        if not np.isfinite(values).all():
            raise InputError(f"{name} has rows whose {metric} distance is undefined (zero or constant rows)")
    return spearman(*distances)


def cosine(a: ArrayLike, b: ArrayLike) -> Float[np.ndarray, "*batch"] | float:
    """Cosine of the angle between vectors, ``a . b / (|a| |b|)``, along the last axis.

    Parameters
    ----------
    a, b : array (..., d)
        Vectors; leading axes are broadcast.

    Returns
    -------
    array (...)
        In -1..1.

    Raises
    ------
    InputError
        NaN, shapes that do not fit, or a zero vector.
    """
    first, second = finite("a", a), finite("b", b)
    _broadcastable(first, second)
    return np.clip((_unit_length("a", first) * _unit_length("b", second)).sum(axis=-1), -1.0, 1.0)


def kl_divergence(p: ArrayLike, q: ArrayLike, *, epsilon: float) -> Float[np.ndarray, "*batch"] | float:
    """Kullback-Leibler divergence in nats: ``sum_j p_j (log p_j - log(q_j + epsilon))`` over ``p_j > 0``.

    Parameters
    ----------
    p, q : array (..., d)
        Distributions along the last axis: not negative, sum 1; leading axes are broadcast.
    epsilon : float
        Added to q and not renormalised, as in DSIR's estimator (1e-8 there); 0 gives the exact divergence,
        which is infinite where q is 0 and p is not.

    Returns
    -------
    array (...)
        Not negative for ``epsilon=0``; otherwise at least ``-log(1 + d * epsilon)``.

    Raises
    ------
    InputError
        NaN, shapes that do not fit, values that are no distribution, or a negative `epsilon`.
    """
    first, second = _distribution("p", p), _distribution("q", q)
    _broadcastable(first, second)
    if not (np.isfinite(epsilon) and epsilon >= 0):
        raise InputError(f"epsilon must be at least 0; got {epsilon!r}")
    return scipy.special.rel_entr(first, second + epsilon).sum(axis=-1)


def total_variation(p: ArrayLike, q: ArrayLike) -> Float[np.ndarray, "*batch"] | float:
    """Total variation distance ``sum_j |p_j - q_j| / 2``: the largest difference in any event's probability.

    Parameters
    ----------
    p, q : array (..., d)
        Distributions along the last axis: not negative, sum 1; leading axes are broadcast.

    Returns
    -------
    array (...)
        In 0..1.

    Raises
    ------
    InputError
        NaN, shapes that do not fit, or values that are no distribution.
    """
    first, second = _distribution("p", p), _distribution("q", q)
    _broadcastable(first, second)
    return np.abs(first - second).sum(axis=-1) / 2


def mmd_squared(a: ArrayLike, b: ArrayLike, *, bandwidth: float | None = None) -> float:
    """Unbiased squared maximum mean discrepancy, kernel ``k(x, y) = exp(-|x - y|^2 / (2 bandwidth^2))``.

    ``mean_{i != j} k(a_i, a_j) + mean_{i != j} k(b_i, b_j) - 2 mean_{i, j} k(a_i, b_j)``

    Parameters
    ----------
    a, b : array (n, d), array (m, d)
        Two samples, n, m >= 2.
    bandwidth : float, optional
        By default the median distance among all points of both samples.

    Returns
    -------
    float
        About 0 (either sign) for samples of one distribution.

    Raises
    ------
    InputError
        NaN, different dimensions, fewer than two points, or a bandwidth that is not positive.

    Notes
    -----
    Source: Gretton et al., "A Kernel Two-Sample Test", JMLR 2012, Lemma 6; median heuristic: section 8.
    """
    first, second = finite("a", a, 2), finite("b", b, 2)
    if first.shape[1] != second.shape[1]:
        raise InputError(f"a and b must have the same dimension; got {first.shape[1]} and {second.shape[1]}")
    if len(first) < 2 or len(second) < 2:
        raise InputError(f"a and b must hold at least 2 points each; got {len(first)} and {len(second)}")
    if bandwidth is None:
        bandwidth = float(np.median(pdist(np.concatenate([first, second]))))
    if not (np.isfinite(bandwidth) and bandwidth > 0):
        raise InputError(f"bandwidth must be above 0; got {bandwidth!r} (the default is the median distance)")
    gamma = 1.0 / (2.0 * bandwidth**2)
    within = [np.exp(-gamma * pdist(points, "sqeuclidean")).mean() for points in (first, second)]
    return float(sum(within) - 2.0 * np.exp(-gamma * cdist(first, second, "sqeuclidean")).mean())


def _representations(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    first, second = finite("a", a, 2), finite("b", b, 2)
    if len(first) != len(second):
        raise InputError(f"a and b must describe the same samples; got {len(first)} and {len(second)} rows")
    return first, second


def _broadcastable(first: np.ndarray, second: np.ndarray) -> None:
    try:
        np.broadcast_shapes(first.shape, second.shape)
    except ValueError:
        fits = False
    else:
        fits = first.ndim > 0 and second.ndim > 0 and first.shape[-1] == second.shape[-1]
    if not fits:
        raise InputError(f"both arguments must have shapes (..., d) that fit; got {first.shape}, {second.shape}")


def _unit_length(name: str, vectors: np.ndarray) -> np.ndarray:
    largest = np.abs(vectors).max(axis=-1, keepdims=True)
    if (largest == 0).any():
        raise InputError(f"{name} holds {int((largest == 0).sum())} zero vectors: their cosine is undefined")
    scaled = vectors / largest  # the squares of very short and very long vectors would under- or overflow
    return scaled / np.linalg.norm(scaled, axis=-1, keepdims=True)


def _distribution(name: str, values: ArrayLike) -> np.ndarray:
    array = finite(name, values)
    if (array < 0).any():
        raise InputError(f"{name} must not be negative; the smallest value is {array.min()}")
    gap = np.abs(array.sum(axis=-1) - 1.0).max()
    if gap > 1e-6:
        raise InputError(f"{name} must sum to 1 along the last axis; a sum is off by {gap:.3g}")
    return array
