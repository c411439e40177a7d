"""Deletion and insertion curves over any unit: pixels, tokens, concepts, features.

Units are removed (deletion) or restored (insertion) from the most to the least important, and a model's
score is followed. For a good ranking the deletion curve falls early (small area) and the insertion curve
rises early (large area).

Source: Petsiuk, Das and Saenko, "RISE: Randomized Input Sampling for Explanation of Black-box Models", 2018,
section 4.2 (arXiv 1806.07421).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from scipy.integrate import trapezoid

from salience.errors import InputError
from salience.measure._checks import at_least, finite

ScoreFn = Callable[[Bool[np.ndarray, "batch units"], Int[np.ndarray, " batch"]], ArrayLike]


class Curve(NamedTuple):
    """A deletion or insertion curve per sample.

    Attributes
    ----------
    changed : array (steps + 1,)
        Share of the units that are removed (deletion) or restored (insertion), from 0 to 1.
    scores : array (n, steps + 1)
        The score at each share.
    area : array (n,)
        Trapezoid area under `scores` over `changed`: the mean height of the curve.
    """

    changed: Float[np.ndarray, " points"]
    scores: Float[np.ndarray, "n points"]
    area: Float[np.ndarray, " n"]


def curve(
    score_fn: ScoreFn,
    order: ArrayLike,
    steps: int | None = None,
    *,
    mode: str = "deletion",
    batch_size: int = 256,
) -> Curve:
    """Follow a score while units are removed or restored in a given order.

    With ``c_s = round(s * units / steps)`` units changed after step s, the area is
    ``sum_s (c_{s+1} - c_s) / units * (score_s + score_{s+1}) / 2``.

    Parameters
    ----------
    score_fn : callable
        ``score_fn(keep, rows)`` gives one score per row of `keep`: `keep` is boolean (batch, units), True
        where a unit stays, and `rows` (batch,) tells the sample that each mask belongs to. It sees exactly
        ``n * (steps + 1)`` masks, in ``ceil(n * (steps + 1) / batch_size)`` calls, sample after sample.
    order : integer array (n, units)
        Per sample the units from the most to the least important, each exactly once;
        ``np.argsort(-importance, axis=1, kind="stable")`` makes it of importances.
    steps : int, optional
        Steps of (nearly) equal size from 0 to all units; by default one unit a step.
    mode : {"deletion", "insertion"}
        Deletion begins with everything kept, insertion with nothing.
    batch_size : int
        Masks per call of `score_fn`.

    Returns
    -------
    Curve

    Raises
    ------
    InputError
        `order` is no ranking of all units, an option is out of range, or `score_fn` returns scores that are
        not finite or not one per mask.
    """
    ranking = _rankings(order)
    n, units = ranking.shape
    steps = units if steps is None else steps
    at_least("steps", steps, 1)
    at_least("batch_size", batch_size, 1)
    if steps > units:
        raise InputError(f"steps must be at most the number of units, {units}; got {steps}")
    if mode not in ("deletion", "insertion"):
        raise InputError(f"mode must be 'deletion' or 'insertion'; got {mode!r}")

    counts = np.rint(np.linspace(0, units, steps + 1)).astype(np.int64)
    position = np.argsort(ranking, axis=1)  # the place of each unit in its sample's ranking
    scores = np.empty(n * (steps + 1))
    for start in range(0, scores.size, batch_size):
        rows, step = np.divmod(np.arange(start, min(start + batch_size, scores.size)), steps + 1)
        changed = position[rows] < counts[step][:, None]
        keep = ~changed if mode == "deletion" else changed
        batch = finite("score_fn's result", score_fn(keep, rows))
        if batch.shape != rows.shape:
            raise InputError(f"score_fn must return one score per mask, {rows.shape}; got {batch.shape}")
        scores[start : start + len(rows)] = batch
    scores = scores.reshape(n, steps + 1)
    share = counts / units
    return Curve(share, scores, trapezoid(scores, share, axis=1))


def _rankings(order: ArrayLike) -> Int[np.ndarray, "n units"]:
    ranking = np.asarray(order)
    if ranking.ndim != 2 or ranking.size == 0 or not np.issubdtype(ranking.dtype, np.integer):
        raise InputError(
            f"order must be a whole-number array of shape (n, units); got shape {ranking.shape}, dtype {ranking.dtype}"
        )
    wrong = (np.sort(ranking, axis=1) != np.arange(ranking.shape[1])).any(axis=1)
    if wrong.any():
        raise InputError(
            f"order must hold each unit 0..{ranking.shape[1] - 1} exactly once per row; "
            f"row {int(np.argmax(wrong))} does not"
        )
    return ranking
