"""Which rows to label by hand, with the probabilities that the estimate needs; and labels of items as units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from salience.errors import DataError, InputError


class LabelingSample(NamedTuple):
    """Rows to label by hand, ascending, and every row's probability of having been among them."""

    rows: Int[np.ndarray, " m"]
    prob: Float[np.ndarray, " n"]


class UnitLabels(NamedTuple):
    """Labels of units made of items: names, mean gold label (NaN without one), mean surrogate, probability."""

    unit: np.ndarray
    gold: Float[np.ndarray, " u"]
    surrogate: Float[np.ndarray, " u"]
    prob: Float[np.ndarray, " u"]


def sample_for_labeling(
    Q: ArrayLike, n: int, *, strata: ArrayLike | None = None, oversample: Mapping[Any, float] | None = None,
    random_state: int = 0,
) -> LabelingSample:  # fmt: skip
    """Draw rows to label by hand, at random within strata.

    Within a stratum of N_h rows, n_h are drawn without replacement: ``pi = n_h / N_h``, with n_h proportional to
    ``oversample_h N_h``, at least 1 and at most N_h.

    Parameters
    ----------
    Q : (rows,)
        The model's labels.
    n : int
        Rows to label.
    strata : (rows,), optional
        One stratum by default; `Q` itself if `oversample` is given without.
    oversample : mapping of stratum to float, optional
        How many times likelier a row of the stratum is drawn; 1 for those that are not named.
    random_state : int

    Returns
    -------
    LabelingSample
        Keep `prob` beside the data: it goes into ``DSL.fit(…, prob=prob)``.

    Raises
    ------
    InputError
        `n` is not between the number of strata and of rows, or `oversample` names no stratum.
    """
    labels = np.asarray(Q)
    total = len(labels)
    if strata is None:
        groups = labels if oversample is not None else np.zeros(total, dtype=np.int64)
    else:
        groups = np.asarray(strata)
    if groups.shape != (total,):
        raise InputError(f"strata must have one value for each of {total} rows, not shape {groups.shape}")
    names, codes, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or not len(names) <= n <= total:
        raise InputError(f"n must be a whole number from {len(names)} (one a stratum) to {total} (all rows), not {n!r}")
    weights = np.ones(len(names))
    for name, weight in (oversample or {}).items():
        at = np.flatnonzero(names == name)
        if not len(at) or not (weight > 0 and np.isfinite(weight)):
            raise InputError(f"oversample[{name!r}] = {weight}: name a stratum of {names.tolist()[:8]}, above 0")
        weights[at] = weight
    counts = _quotas(weights * sizes, sizes, n)
    rng = np.random.default_rng(random_state)
    drawn = [rng.choice(np.flatnonzero(codes == at), count, replace=False) for at, count in enumerate(counts)]
    return LabelingSample(np.sort(np.concatenate(drawn)), (counts / sizes)[codes])


def aggregate_labels(unit: ArrayLike, gold: ArrayLike, surrogate: ArrayLike, prob: ArrayLike) -> UnitLabels:
    """Labels of items as labels of the units that they belong to: posts are labelled, people are analysed.

    The gold label of a unit is the mean of its labelled items, and its probability of having one is
    ``1 - prod(1 - pi_item)``.

    Parameters
    ----------
    unit : (items,)
        Which unit an item belongs to.
    gold : (items,) float
        NaN where there is none.
    surrogate, prob : (items,) float

    Raises
    ------
    InputError
        Lengths differ.
    DataError
        A surrogate is missing, or a probability is not in (0, 1].
    """
    names, codes = np.unique(np.asarray(unit), return_inverse=True)
    columns = [np.asarray(values, dtype=np.float64) for values in (gold, surrogate, prob)]
    if any(column.shape != codes.shape for column in columns):
        raise InputError(
            f"unit, gold, surrogate and prob differ in shape: {[codes.shape, *(c.shape for c in columns)]}"
        )
    truth, guess, chance = columns
    if not np.isfinite(guess).all():
        raise DataError(f"surrogate of item {int(np.argmin(np.isfinite(guess)))} is missing")
    if not ((chance > 0) & (chance <= 1)).all():
        raise DataError(f"prob of item {int(np.argmin((chance > 0) & (chance <= 1)))} is not above 0 and at most 1")
    known = ~np.isnan(truth)
    counts = np.bincount(codes, known, len(names))
    sums = np.bincount(codes, np.where(known, truth, 0.0), len(names))
    with np.errstate(invalid="ignore", divide="ignore"):
        means = sums / counts
        missed = np.exp(np.bincount(codes, np.log1p(-chance), len(names)))
    return UnitLabels(names, means, np.bincount(codes, guess) / np.bincount(codes), 1 - missed)


def _quotas(wanted: np.ndarray, sizes: np.ndarray, n: int) -> Int[np.ndarray, " strata"]:
    """Whole numbers near shares of n, each from 1 to its size, that sum to n."""
    counts = np.ones(len(sizes), dtype=np.int64)
    while counts.sum() < n:  # one at a time to the stratum that lacks most: exact, and n is what a person can label
        lack = np.where(counts < sizes, wanted / wanted.sum() * n - counts, -np.inf)
        counts[np.argmax(lack)] += 1
    return counts
