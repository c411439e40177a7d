"""How a budget is shared out over clusters, and how rows are drawn within them."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from salience.errors import InputError


def cluster_quotas(
    budget: int, weights: Float[np.ndarray, " k"], capacity: Int[np.ndarray, " k"]
) -> Int[np.ndarray, " k"]:
    """Whole numbers that add up to the budget, proportional to the weights, none above its capacity.

        b_j = min(c_j, B w_j / sum w),   what a full cluster cannot take going to the others by weight

    rounded by largest remainders, ties to the earlier cluster. Once every cluster with a weight is full, the rest is
    shared out by what is left in the others.

    Parameters
    ----------
    budget : int
        At most ``capacity.sum()`` is given out.
    weights : (k,) float
        Non-negative and finite; a cluster of weight 0 gets nothing while others have room.
    capacity : (k,) int
        Rows left in each cluster.

    Returns
    -------
    (k,) int64
    """
    capacity = np.asarray(capacity, dtype=np.int64)
    budget = min(int(budget), int(capacity.sum()))
    weights = np.where(capacity > 0, weights, 0.0)
    weights = np.where(weights > 1e-12 * weights.max(initial=0.0), weights, 0.0)
    reachable = int(capacity[weights > 0].sum())
    if reachable < budget:
        given = np.where(weights > 0, capacity, 0)
        return given + cluster_quotas(budget - reachable, (capacity - given).astype(np.float64), capacity - given)
    share = np.zeros(len(capacity))
    full = np.zeros(len(capacity), dtype=bool)
    while True:  # every turn fills a cluster or ends
        open_ = (weights > 0) & ~full
        rest = budget - capacity[full].sum()
        share = np.where(open_, rest * (weights / weights[open_].sum()), 0.0) if open_.any() else share * 0
        over = open_ & (share >= capacity)
        if not over.any():
            break
        full |= over
    share[full] = capacity[full]
    given = np.floor(share + 1e-9).astype(np.int64)
    remainder = np.where(given < capacity, share - given, -1.0)
    first = np.argsort(-remainder, kind="stable")[: budget - int(given.sum())]
    given[first] += 1
    return given


def take_first(
    keys: Float[np.ndarray, " n"], labels: Int[np.ndarray, " n"], quotas: Int[np.ndarray, " k"]
) -> Int[np.ndarray, " b"]:
    """The rows with the largest keys of each cluster, ``quotas[j]`` of cluster j, in ascending order.

    A key of -inf is never taken. Ties go to the earlier row.
    """
    order = np.lexsort((np.arange(len(keys)), -keys, labels))
    sizes = np.bincount(labels, minlength=len(quotas))
    place = np.arange(len(keys)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # rank within the cluster
    kept = order[(place < quotas[labels[order]]) & (keys[order] > -np.inf)]
    return np.sort(kept)


def class_quotas(sizes: Int[np.ndarray, " k"], budget: int, least: int = 2) -> Int[np.ndarray, " k"]:
    """Budget per class in proportion to its size, but at least `least` rows of each (all, where it has fewer).

    What small classes get beyond their share is taken from the class with the most rows to spare, one by one.

    Raises
    ------
    InputError
        The budget is too small for that.
    """
    sizes = np.asarray(sizes, dtype=np.int64)
    floor = np.minimum(sizes, least)
    if budget < floor.sum():
        raise InputError(
            f"a budget of {budget} rows is too small for {least} of each of {len(sizes)} classes: {int(floor.sum())} "
            "are needed at least"
        )
    given = np.maximum(cluster_quotas(budget, sizes.astype(np.float64), sizes), floor)
    while given.sum() > min(budget, sizes.sum()):
        given[np.argmax(given - floor)] -= 1
    return given
