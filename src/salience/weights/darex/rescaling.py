"""By what to divide the entries of a delta that were kept: the bound on the error, its best q, and the search."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from salience.errors import InputError
from salience.weights.darex.deltas import check_rates

_Q_STEP = 0.001
_PATIENCE = 3


class Search(NamedTuple):
    """The best point of a search, its score, and every (point, score) that was tried, in order."""

    best: float
    score: float
    trials: list[tuple[float, float]]


def deviation_bound(
    c: Float[Tensor, "out in"], p: float, q: float | None = None, *, gamma: float = 0.05
) -> Float[Tensor, " out"]:
    """How far the output of each unit can move when a delta is pruned, with probability at least 1 - gamma.

    With ``c_ij = D_ij x_j``, ``S1 = sum_j c_ij``, ``S2 = sum_j c_ij^2`` and ``h_i = S1 - (1/q) sum_j m_ij c_ij``:

        |h_i| <= |(1 - (1-p)/q) S1| + eta Phi(p) S2 / (4 q^2) + ln(2/gamma) / eta,
        Phi(p) = (1 - 2p) / ln((1-p) / p)

    for every eta > 0; the best eta gives ``sqrt(Phi(p) S2 ln(2/gamma)) / q`` for the last two terms.

    Parameters
    ----------
    c : Tensor (out, in)
        Delta times mean input, entry by entry.
    p : float in [0, 1)
    q : float, optional
        `1 - p` by default.
    gamma : float in (0, 1)

    References
    ----------
    Deng et al., theorem 3.1 (a Kearns-Saul bound).
    """
    q = check_rates(p, q)
    s1, s2 = c.double().sum(1), c.double().square().sum(1)
    bias = (1 - (1 - p) / q) * s1
    return bias.abs() + (phi(p) * s2 * math.log(2 / _probability(gamma))).sqrt() / q


def analytic_q(
    c: Float[Tensor, "out in"], p: float, eta: float, *, gamma: float = 0.05, stop: float = 0.8
) -> Float[Tensor, " out"]:
    """The divisor of each output unit that balances bias against spread at a given eta.

        q_i = argmin_q | eta (1 - (1-p)/q) S1 + eta^2 Phi(p) S2 / (4 q^2) + ln(2/gamma) |

    over q from 1 - p to 0.999 in steps of 0.001 (at p of 0.001 and less there is only 1 - p). The
    layer's q is the mean of its rows.

    Parameters
    ----------
    c : Tensor (out, in)
        Delta times mean input, signed; the delta of the bias is one more column.
    p : float in [0, 1)
    eta : float > 0
        Chosen on data (`search`).
    gamma : float in (0, 1)
    stop : float
        Share of rows that have passed their best, at which the search ends: a guard against outlier features.

    Raises
    ------
    InputError
        `eta` is not positive, or a rate is out of range.

    References
    ----------
    Deng et al., section 4.1 and appendix; `utils/analyticalq.py` of the authors' code.
    """
    check_rates(p, None)
    if not (math.isfinite(eta) and eta > 0):
        raise InputError(f"eta: got {eta!r}; it must be positive")
    s1, s2 = c.double().sum(1), c.double().square().sum(1)
    constant, spread = math.log(2 / _probability(gamma)), phi(p)
    points = np.arange(1 - p, 0.999, _Q_STEP)
    grid = torch.from_numpy(points if len(points) else np.array([1 - p])).to(s1.device)[:, None]
    value = (eta * (1 - (1 - p) / grid) * s1 + eta**2 * spread * s2 / (4 * grid**2) + constant).abs()
    lowest = value.cummin(0).values
    passed = (value[1:] >= lowest[:-1]).int().cummax(0).values.bool()  # a row has passed its best
    ended = (passed.double().mean(1) >= stop).nonzero()[:1, 0]
    seen = value[: int(ended) + 2] if len(ended) else value
    last = len(seen) - 1 - seen.flip(0).argmin(0)  # of equal values the larger q
    chosen = grid[last, 0]
    return chosen


def search(objective: Callable[[float], float], low: float, high: float, step: float) -> Search:
    """Maximise `objective` on a coarse grid, then on one ten times as fine around the best point.

    Either grid ends after more than 3 points in a row without gain.

    Parameters
    ----------
    objective : callable
    low, high : float
        Ends of the coarse grid, `low` included.
    step : float
        Of the coarse grid.

    References
    ----------
    `find_optimal_param` of the authors' code.
    """
    if not (low <= high and step > 0):
        raise InputError(f"low, high and step: got {low}, {high}, {step}; low <= high and step > 0 are needed")
    trials: list[tuple[float, float]] = []
    fine = step / 10

    def walk(points: np.ndarray) -> None:
        best, waited = -math.inf, 0
        for point in points[points <= high + 1e-9]:
            score = objective(float(point))
            trials.append((float(point), score))
            best, waited = (score, 0) if score >= best else (best, waited + 1)
            if waited > _PATIENCE:
                return

    walk(np.arange(low, high + step / 2, step))
    middle = max(trials, key=lambda trial: trial[1])[0]
    walk(np.arange(max(low + fine, middle - step + fine), middle + step - fine / 2, fine))
    return Search(*max(trials, key=lambda trial: trial[1]), trials)


def phi(p: float) -> float:
    """``(1 - 2p) / ln((1-p) / p)``, which is 1/2 at p = 1/2 and 0 at p = 0."""
    if p == 0:
        return 0.0
    if abs(p - 0.5) < 1e-6:
        return 0.5
    return (1 - 2 * p) / math.log((1 - p) / p)


def _probability(gamma: float) -> float:
    if not 0 < gamma < 1:
        raise InputError(f"gamma: got {gamma!r}; it must lie between 0 and 1")
    return gamma
