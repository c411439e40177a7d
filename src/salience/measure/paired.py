"""Is A better than B, and by how much? Means with bootstrap intervals, and a permutation test for pairs.

The interval is the expanded percentile bootstrap of the mean: the plain percentile interval is too narrow for
few values, by the factor ``sqrt((n - 1) / n)`` and by normal instead of t quantiles; taking the quantile
``Phi(-sqrt(n / (n - 1)) t_{n-1, 1 - alpha/2})`` instead of ``alpha / 2`` makes up for both.

Source: Hesterberg, "What Teachers Should Know About the Bootstrap", The American Statistician 2015 (arXiv
1411.5279), section on the expanded percentile interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike

from salience.errors import InputError
from salience.measure._checks import at_least, finite, same_shape

_CELLS = 4_000_000  # resampled values held at once: 32 MB


class Interval(NamedTuple):
    """A mean with its confidence interval, of `n` values."""

    mean: float
    low: float
    high: float
    n: int


class PairedDifference(NamedTuple):
    """The mean of ``a - b`` with its confidence interval, a two-sided p-value, and the number of pairs."""

    mean: float
    low: float
    high: float
    p_value: float
    n: int


def bootstrap_interval(
    values: ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    random_state: int | np.random.Generator,
) -> Interval:
    """Mean of independent measurements with a bootstrap confidence interval (see the module's text).

    Parameters
    ----------
    values : array (n,)
        One measurement per independent unit (image, document, seed).
    confidence : float in (0, 1)
        Probability that intervals made in this way cover the true mean.
    resamples : int
        Bootstrap draws.
    random_state : int or numpy Generator
        Seed of the draws; the same seed and values give the same interval.

    Returns
    -------
    Interval
        With one value nothing is known of the spread: the interval is ``-inf..inf``. When all values are
        equal it collapses to that value, since the values show no spread. It never leaves the range of the
        values, so below about 5 of them it is too narrow whatever `confidence` says.

    Raises
    ------
    InputError
        NaN, an empty array, or an option out of range.
    """
    return _interval(finite("values", values, 1), confidence, resamples, np.random.default_rng(random_state))


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    random_state: int | np.random.Generator,
) -> PairedDifference:
    """Mean difference ``a - b`` of paired measurements, with a bootstrap interval and a sign-flip p-value.

    If A and B were no different, each difference might as well have had the other sign. The p-value is the
    share of sign patterns whose mean is at least as far from 0 as the one seen: over all ``2^n`` patterns
    when these are at most `resamples`, else ``(1 + hits) / (1 + resamples)`` over random ones.

    Parameters
    ----------
    a, b : array (n,)
        Measurements of the same n units under A and under B, in the same order.
    confidence : float in (0, 1)
        Probability that intervals made in this way cover the true mean difference.
    resamples : int
        Bootstrap draws, and sign patterns at most.
    random_state : int or numpy Generator
        Seed of the draws.

    Returns
    -------
    PairedDifference
        With one pair the interval is ``-inf..inf`` and the p-value 1. With equal differences throughout, the
        interval collapses to that difference; the p-value, never below ``2 / 2^n``, then says how far n pairs
        can be trusted. With no difference anywhere it is 1.

    Raises
    ------
    InputError
        NaN, empty or unequal arrays, or an option out of range.

    Notes
    -----
    Sign flips: Fisher, "The Design of Experiments", 1935, section 21.
    """
    first, second = finite("a", a, 1), finite("b", b, 1)
    same_shape("a", first, "b", second)
    differences = first - second
    rng = np.random.default_rng(random_state)
    mean, low, high, n = _interval(differences, confidence, resamples, rng)
    return PairedDifference(mean, low, high, _sign_flip_p_value(differences, resamples, rng), n)


def difference_over_draws(
    a: ArrayLike, draws: Sequence[ArrayLike], *, random_state: int | np.random.Generator
) -> PairedDifference:
    """Mean difference between A and a random baseline, of which several draws were measured on the same units.

    The interval over units is widened by how far one more draw may lie from the mean of n, ``t s sqrt(1 + 1/n)`` with
    s the standard deviation of the draws' means: units alone would call one random draw in six better than others.

    Parameters
    ----------
    a : array (n,)
        Measurements of n units under A.
    draws : sequence of arrays (n,)
        Measurements of the same units under every draw; a single one stands for a baseline that is not random.
    random_state : int or numpy Generator

    Returns
    -------
    PairedDifference
        With a 95 % interval. The p-value is that of the units alone.
    """
    found = paired_difference(a, np.mean([finite("draws", draw, 1) for draw in draws], axis=0),
                              random_state=random_state)  # fmt: skip
    if len(draws) == 1:
        return found
    spread = float(np.std([np.mean(draw) for draw in draws], ddof=1))
    reach = float(scipy.stats.t.ppf(0.975, len(draws) - 1)) * spread * math.sqrt(1 + 1 / len(draws))
    low, high = (found.mean + side * math.hypot(end - found.mean, reach)
                 for side, end in ((-1, found.low), (1, found.high)))  # fmt: skip
    return found._replace(low=low, high=high)


def _interval(values: np.ndarray, confidence: float, resamples: int, rng: np.random.Generator) -> Interval:
    if not 0 < confidence < 1:
        raise InputError(f"confidence must lie between 0 and 1; got {confidence!r}")
    at_least("resamples", resamples, 100)
    n, mean = values.size, float(values.mean())
    if n == 1:
        return Interval(mean, -math.inf, math.inf, n)
    if np.ptp(values) == 0:
        return Interval(float(values[0]), float(values[0]), float(values[0]), n)
    drawn = [values[rng.integers(n, size=(rows, n))].mean(axis=1) for rows in _parts(resamples, n)]
    reach = math.sqrt(n / (n - 1)) * scipy.stats.t.ppf((1 + confidence) / 2, n - 1)
    tail = scipy.stats.norm.cdf(-reach)
    low, high = np.quantile(np.concatenate(drawn), [tail, 1 - tail])
    return Interval(mean, float(low), float(high), n)


def _sign_flip_p_value(differences: np.ndarray, resamples: int, rng: np.random.Generator) -> float:
    n = differences.size
    seen = abs(differences.mean()) - 1e-12 * np.abs(differences).max()  # rounding must not hide a tie
    if n < 63 and 2**n <= resamples:
        patterns = np.arange(2**n)[:, None] >> np.arange(n) & 1
        return float(np.mean(np.abs((1 - 2 * patterns) @ differences / n) >= seen))
    hits = 0
    for rows in _parts(resamples, n):
        signs = 1 - 2 * rng.integers(2, size=(rows, n), dtype=np.int8)
        hits += int((np.abs(signs @ differences / n) >= seen).sum())
    return (1 + hits) / (1 + resamples)


def _parts(total: int, width: int) -> Iterator[int]:
    """Cut `total` rows into parts of at most `_CELLS` cells."""
    rows = max(1, _CELLS // width)
    for start in range(0, total, rows):
        yield min(rows, total - start)
