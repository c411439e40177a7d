"""How good a ranking is: recall, precision, hit and NDCG at k, reciprocal and filtered ranks, correlations.

Ties. Items with equal scores stand in no order, so each measure at k is its expectation over all orders of
the tied items: a constant score earns exactly what chance earns, and the order of columns changes nothing.
Measures come per row, so that means and paired intervals can be taken afterwards.
"""

from __future__ import annotations

import numpy as np
import scipy.stats
from jaxtyping import Float
from numpy.typing import ArrayLike

from salience.errors import InputError
from salience.measure._checks import at_least, finite, same_shape, truths


def recall_at_k(scores: ArrayLike, relevant: ArrayLike, k: int) -> Float[np.ndarray, " n"]:
    """Share of the relevant items that stand among the k best: ``|relevant and in top k| / |relevant|``.

    Parameters
    ----------
    scores : array (n, items)
        Higher = ranked earlier.
    relevant : boolean array (n, items)
        The items that ought to be found, at least one per row.
    k : int
        Length of the list that is looked at, 1..items.

    Returns
    -------
    array (n,)
        In 0..1.

    Raises
    ------
    InputError
        NaN, shapes that do not fit, a row without a relevant item, or k out of range.
    """
    values, wanted = _checked(scores, relevant, k)
    return (_share_in_top(values, k) * wanted).sum(axis=1) / wanted.sum(axis=1)


def precision_at_k(scores: ArrayLike, relevant: ArrayLike, k: int) -> Float[np.ndarray, " n"]:
    """Share of the k best items that are relevant: ``|relevant and in top k| / k``.

    Parameters, errors and shape of the result as in `recall_at_k`.
    """
    values, wanted = _checked(scores, relevant, k)
    return (_share_in_top(values, k) * wanted).sum(axis=1) / k


def hit_at_k(scores: ArrayLike, relevant: ArrayLike, k: int) -> Float[np.ndarray, " n"]:
    """1 where at least one relevant item stands among the k best, else 0 (with ties: the probability of it).

    Parameters, errors and shape of the result as in `recall_at_k`.
    """
    values, wanted = _checked(scores, relevant, k)
    above, tied, hits = _first_relevant_group(values, wanted)
    drawn = np.clip(k - above, 0, tied)  # how many of the tied items make it into the top k
    return 1.0 - scipy.stats.hypergeom.pmf(0, tied, hits, drawn)


def reciprocal_rank(scores: ArrayLike, relevant: ArrayLike) -> Float[np.ndarray, " n"]:
    """``1 / rank`` of the best-ranked relevant item; the mean over rows is the MRR.

    Parameters, errors and shape of the result as in `recall_at_k`, without k.
    """
    values, wanted = _checked(scores, relevant, 1)
    above, tied, hits = _first_relevant_group(values, wanted)
    result = 1.0 / (above + 1)
    for row in np.flatnonzero(tied > hits):  # only here does chance decide which tied item is first
        place = np.arange(tied[row] + 1)
        still_waiting = scipy.stats.hypergeom.pmf(0, tied[row], hits[row], place)  # P(none in `place` draws)
        first_here = still_waiting[:-1] - still_waiting[1:]
        result[row] = (first_here / (above[row] + place[1:])).sum()
    return result


def ndcg_at_k(scores: ArrayLike, gains: ArrayLike, k: int) -> Float[np.ndarray, " n"]:
    """Normalised discounted cumulative gain: ``sum_{r<=k} gain_r / log2(r + 1)`` over its best value.

    Parameters
    ----------
    scores : array (n, items)
        Higher = ranked earlier.
    gains : array (n, items)
        Relevance of each item, not negative, some above 0 in each row; booleans are fine. Gains enter as they
        are; pass ``2**gains - 1`` for the exponential form.
    k : int
        Length of the list that is looked at, 1..items.

    Returns
    -------
    array (n,)
        In 0..1.

    Raises
    ------
    InputError
        NaN, shapes that do not fit, negative gains, a row without gain, or k out of range.

    Notes
    -----
    Source: Järvelin and Kekäläinen, "Cumulated gain-based evaluation of IR techniques", TOIS 2002; ties as in
    McSherry and Najork, "Computing Information Retrieval Performance Measures Efficiently in the Presence of
    Tied Scores", ECIR 2008.
    """
    values, gain = finite("scores", scores, 2), finite("gains", gains, 2)
    same_shape("scores", values, "gains", gain)
    _check_k(k, values.shape[1])
    if (gain < 0).any():
        raise InputError(f"gains must not be negative; the smallest is {gain.min()}")
    _each_row_has_some("gains", gain > 0)
    discount = 1.0 / np.log2(np.arange(2, values.shape[1] + 2))
    discount[k:] = 0.0
    total = np.concatenate([[0.0], np.cumsum(discount)])
    first, last = _tie_bounds(values)
    expected = (total[last] - total[first - 1]) / (last - first + 1)  # mean discount of the tied places
    ideal = -np.sort(-gain, axis=1) @ discount
    return (gain * expected).sum(axis=1) / ideal


def target_ranks(
    scores: ArrayLike,
    targets: ArrayLike,
    known: ArrayLike | None = None,
    *,
    ties: str = "mean",
) -> Float[np.ndarray, " n"]:
    """Rank of one target per row among all candidates, other known answers left out ("filtered").

    ``rank = 1 + |{others with a higher score}| + |{others with an equal score}| / 2``; with ``ties="worst"``
    all the equal ones count. ``np.mean(1 / ranks)`` is the MRR, ``np.mean(ranks <= k)`` hits@k.

    Parameters
    ----------
    scores : array (n, items)
        Score of every candidate, higher = ranked earlier.
    targets : integer array (n,)
        Column of the right answer.
    known : boolean array (n, items), optional
        Candidates that are right as well, from any split; they do not compete with the target.
    ties : {"mean", "worst"}
        "mean" is the expected rank under random order, "worst" assumes that every tied candidate comes first.

    Returns
    -------
    array (n,)
        From 1 on, halves are possible.

    Raises
    ------
    InputError
        NaN, shapes that do not fit, or a target outside the columns.

    Notes
    -----
    Filtering: Bordes et al., "Translating Embeddings for Modeling Multi-relational Data", NeurIPS 2013,
    section 4.1. Ties: Berrendorf et al., "On the Ambiguity of Rank-Based Evaluation of Entity Alignment or
    Link Prediction Methods" (arXiv 2002.06914), where "mean" is called realistic.
    """
    values = finite("scores", scores, 2)
    column = np.asarray(targets)
    n, items = values.shape
    if column.shape != (n,) or not np.issubdtype(column.dtype, np.integer):
        raise InputError(
            f"targets must be whole numbers of shape ({n},); got shape {column.shape}, dtype {column.dtype}"
        )
    if (column < 0).any() or (column >= items).any():
        raise InputError(f"targets must lie in 0..{items - 1}; got {column.min()}..{column.max()}")
    if ties not in ("mean", "worst"):
        raise InputError(f"ties must be 'mean' or 'worst'; got {ties!r}")
    competes = np.ones(values.shape, dtype=bool) if known is None else ~truths("known", known, values.shape)
    competes[np.arange(n), column] = False
    own = values[np.arange(n), column][:, None]
    higher = (competes & (values > own)).sum(axis=1)
    equal = (competes & (values == own)).sum(axis=1)
    return 1.0 + higher + (equal if ties == "worst" else equal / 2)


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's rank correlation: Pearson's correlation of the ranks, ties at their mean rank.

    Parameters
    ----------
    a, b : array (n,)
        Paired values, n >= 2.

    Returns
    -------
    float
        In -1..1.

    Raises
    ------
    InputError
        NaN, unequal lengths, fewer than two values, or a constant array (the correlation is undefined).
    """
    return float(scipy.stats.spearmanr(*_pairs(a, b)).statistic)


def kendall(a: ArrayLike, b: ArrayLike) -> float:
    """Kendall's tau-b: agreeing minus disagreeing pairs over ``sqrt(pairs untied in a * pairs untied in b)``.

    Parameters, result and errors as in `spearman`.
    """
    return float(scipy.stats.kendalltau(*_pairs(a, b)).statistic)


def _pairs(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    first, second = finite("a", a, 1), finite("b", b, 1)
    same_shape("a", first, "b", second)
    for name, values in (("a", first), ("b", second)):
        if np.ptp(values) == 0:
            raise InputError(f"{name} is constant ({values.size} values): a rank correlation is undefined")
    return first, second


def _checked(scores: ArrayLike, relevant: ArrayLike, k: int) -> tuple[np.ndarray, np.ndarray]:
    values = finite("scores", scores, 2)
    wanted = truths("relevant", relevant, values.shape)
    _check_k(k, values.shape[1])
    _each_row_has_some("relevant", wanted)
    return values, wanted


def _check_k(k: int, items: int) -> None:
    at_least("k", k, 1)
    if k > items:
        raise InputError(f"k must be at most the number of items, {items}; got {k}")


def _each_row_has_some(name: str, wanted: np.ndarray) -> None:
    empty = ~wanted.any(axis=1)
    if empty.any():
        raise InputError(
            f"{name} must mark at least one item in each row; {int(empty.sum())} rows have none, first "
            f"row {int(np.argmax(empty))}: leave such rows out"
        )


def _tie_bounds(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last place (from 1) that each item can take, given the items with the same score."""
    first = scipy.stats.rankdata(-values, method="min", axis=1).astype(np.int64)
    last = scipy.stats.rankdata(-values, method="max", axis=1).astype(np.int64)
    return first, last


def _share_in_top(values: np.ndarray, k: int) -> np.ndarray:
    """Probability that each item stands among the k best."""
    first, last = _tie_bounds(values)
    return np.clip((k - first + 1) / (last - first + 1), 0.0, 1.0)


def _first_relevant_group(values: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the tied group with the best relevant item: items above it, items in it, relevant items in it."""
    best = np.where(wanted, values, -np.inf).max(axis=1, keepdims=True)
    return (values > best).sum(axis=1), (values == best).sum(axis=1), ((values == best) & wanted).sum(axis=1)
