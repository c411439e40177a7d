"""What to buy of every task with a given budget, once its relevance is known."""

from __future__ import annotations

import math
import warnings

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from salience.data.lasso_task_selection.checks import counts, finite, prices
from salience.errors import InputError


def allocate_samples(
    nu: ArrayLike, budget: float, *, floor: ArrayLike = 0, power: float = 1.0, costs: ArrayLike | None = None,
    opening: ArrayLike | None = None, top: int | None = None, pools: ArrayLike | None = None,
) -> Int[np.ndarray, " T"]:  # fmt: skip
    """Share a budget among tasks by their relevance.

    The error that sampling leaves is ``sum_t nu(t)^2 / n_t``. Under ``sum_t c_t n_t <= N`` it is least for

        n_t proportional to |nu(t)| / sqrt(c_t),        with the value (sum_t sqrt(c_t) |nu(t)|)^2 / N

    which is why the best ``nu`` is the one of least L1 norm. Tasks below their floor get the floor, tasks above their
    pool the pool, and the others share the rest in the same proportion. Where the pools of all relevant tasks are used
    up, the rest goes in equal parts to the others, and a warning says so. If `nu` is 0 throughout, all are taken as
    equally relevant and a warning says so.

    Parameters
    ----------
    nu : (T,) float
        Relevance; its sign does not matter.
    budget : float
        Samples in all, or money where there are prices.
    floor : int or (T,) int
        Samples that every task gets at least. Without it, a task that was missed once is never seen again.
    power : float
        Samples go by ``|nu|^power / sqrt(c)``: 1 for L1, 2 for the predecessor's L2 rule, 0 for equal parts.
    costs : (T,) float, optional
        Price of one sample of each task, 1 by default.
    opening : float or (T,) float, optional
        Price of taking any sample at all of a task ("saltus" cost). Tasks of relevance 0 are then not opened.
    top : int, optional
        Take samples of at most so many tasks, those of largest ``|nu|`` (k-task selection). Others get nothing.
    pools : (T,) int, optional
        Samples that there are of each task.

    Returns
    -------
    (T,) int64
        They sum to the budget exactly; with prices, what is left buys no further sample of a task that is taken.

    Raises
    ------
    InputError
        The budget does not cover the floors (and the opening prices) or exceeds what pools hold, or a value is not
        usable.

    Notes
    -----
    Source: arXiv 2306.02556; the classes of costs are reconstructed from memory of the paper.

    Examples
    --------
    >>> allocate_samples([0.6, -0.2, 0.0], 100, floor=4).tolist()
    [72, 24, 4]
    """
    weights = np.abs(finite("nu", nu, 1))
    tasks = len(weights)
    price = prices("costs", costs, tasks)
    opens = np.zeros(tasks) if opening is None else prices("opening", opening, tasks, least_zero=True)
    whole = costs is None and opening is None
    if not (math.isfinite(budget) and budget >= 0) or (whole and budget != int(budget)):
        raise InputError(f"budget must be a whole number of samples (or an amount of money), not {budget!r}")
    if not (math.isfinite(power) and power >= 0):
        raise InputError(f"power must be 0 or larger, not {power!r}")
    if top is not None and (isinstance(top, bool) or not 1 <= top <= tasks):
        raise InputError(f"top must be a whole number in 1..{tasks}, not {top!r}")
    if not weights.any():
        warnings.warn("no source task is relevant: all are taken as equally relevant", stacklevel=2)
        weights = np.ones(tasks)
    chosen = np.ones(tasks, dtype=bool)
    if top is not None or opening is not None:
        first = np.argsort(-weights, kind="stable")[:top]
        chosen = np.isin(np.arange(tasks), first) & (weights > 0)
    high = np.full(tasks, np.inf) if pools is None else counts("pools", pools, tasks).astype(np.float64)
    high[~chosen] = 0
    low = np.minimum(counts("floor", floor, tasks), high)
    money = budget - float(opens[chosen].sum())
    if price @ low > money * (1 + 1e-12):
        raise InputError(f"budget of {budget:g} does not cover the floor, which takes {budget - money + price @ low:g}")
    if price[chosen] @ high[chosen] < money * (1 - 1e-12):
        most = budget - money + price[chosen] @ high[chosen]
        raise InputError(
            f"budget of {budget:g} is more than the pools of the {chosen.sum()} tasks that are taken hold: {most:g}"
        )
    shares = np.where(chosen, np.where(weights > 0, weights, 1.0 if power == 0 else 0.0) ** power, 0.0) / np.sqrt(price)
    amounts = _fill(shares, low, high, price, money)
    if price @ amounts < money * (1 - 1e-12):  # the relevant pools are used up
        warnings.warn(f"the relevant tasks have no more rows: {money - price @ amounts:g} of the budget of {budget:g} "
                      "go to tasks of relevance 0, in equal parts", stacklevel=2)  # fmt: skip
        shares = np.where(chosen & (shares == 0), 1.0, 0.0)
        amounts = _fill(shares, amounts, high, price, money)
    return _rounded(amounts, np.where(shares > 0, high, amounts), price, money)


def _fill(
    shares: Float[np.ndarray, " T"], low: Float[np.ndarray, " T"], high: Float[np.ndarray, " T"],
    price: Float[np.ndarray, " T"], money: float,
) -> Float[np.ndarray, " T"]:  # fmt: skip
    """``clip(scale * shares, low, high)`` with the scale that spends the money, or all that `high` allows."""

    def amounts(scale: float) -> np.ndarray:
        return np.where(shares > 0, np.clip(scale * shares, low, high), low)

    positive = shares[shares > 0]
    if not len(positive):
        return low
    least, most = 0.0, (money / price.min() + low.max() + 1) / positive.min()
    for _ in range(200):  # the amount spent grows with the scale
        middle = (least + most) / 2
        least, most = (middle, most) if price @ amounts(middle) <= money else (least, middle)
    return amounts(least)


def _rounded(
    amounts: Float[np.ndarray, " T"], high: Float[np.ndarray, " T"], price: Float[np.ndarray, " T"], money: float
) -> Int[np.ndarray, " T"]:
    """Whole numbers below the amounts, and the money that is left spent by largest remainder."""
    whole = np.floor(amounts + 1e-9)
    left = money - float(price @ whole)
    order = np.argsort(whole - amounts, kind="stable")
    bought = True
    while bought:
        bought = False
        for task in order:
            if whole[task] < high[task] and price[task] <= left * (1 + 1e-12) + 1e-9:
                whole[task] += 1
                left -= price[task]
                bought = True
    return whole.astype(np.int64)
