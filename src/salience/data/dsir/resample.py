"""Resampling without replacement in one pass: Gumbel top-k with draws keyed by record.

    key(x) = log w(x) + G(x),  G ~ Gumbel(0, 1);   the k largest keys are a sample without replacement in which
    every next document is drawn with probability proportional to w

(sequential sampling; Efraimidis & Spirakis 2006, Xie et al. 2023 section 3). G is a function of (seed, file, row), and
every unit keeps its k largest keys only, so any number of workers draws the same documents with O(k) memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from salience.errors import InputError


class Chosen(NamedTuple):
    """Documents chosen from a corpus, in the order of its units and rows.

    Attributes
    ----------
    units : (chosen,) int64
        Index into ``corpus.units``.
    rows : (chosen,) int64
        Identity within the file.
    values : (chosen,) float64
        The score that decided, without noise.
    target : (chosen,) int64
        Index of the target each was chosen for.
    """

    units: Int[np.ndarray, " chosen"]
    rows: Int[np.ndarray, " chosen"]
    values: Float[np.ndarray, " chosen"]
    target: Int[np.ndarray, " chosen"]


class TopK:
    """The k largest keys seen so far, with whose they are; ties go to the earlier file and row.

    Merging is associative and commutative; offering the same unit twice is the caller's error.
    """

    def __init__(self, k: int) -> None:
        self.k = k
        self._parts: list[tuple[np.ndarray, ...]] = []
        self._held = 0

    def offer(
        self, keys: Float[np.ndarray, " n"], values: Float[np.ndarray, " n"], unit: int, rows: Int[np.ndarray, " n"]
    ) -> None:
        """Offer documents of one unit."""
        if self.k and len(keys):
            self._add((keys, values, np.full(len(keys), unit, np.int64), rows))

    def merge(self, other: TopK) -> None:
        """Take over what another one holds."""
        for part in other._parts:
            self._add(part)

    def _add(self, part: tuple[np.ndarray, ...]) -> None:
        self._parts.append(part)
        self._held += len(part[0])
        if self._held > max(2 * self.k, 1 << 14):
            self._trim()

    def _trim(self) -> None:
        merged = tuple(np.concatenate(columns) for columns in zip(*self._parts))
        keys, _, units, rows = merged
        best = np.lexsort((rows, units, -keys))[: self.k]
        self._parts, self._held = [tuple(column[best] for column in merged)], len(best)

    def best(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Keys, values, units and rows of the k best, best first."""
        if not self._parts:
            empty = np.empty(0, np.int64)
            return np.empty(0), np.empty(0), empty, empty
        self._trim()
        return self._parts[0]  # type: ignore[return-value]


def quotas(k: int, proportions: Sequence[float]) -> list[int]:
    """Split k over targets: ``int(k * share)`` each, the remainder to the last.

    >>> quotas(10, [0.25, 0.75])
    [2, 8]
    """
    shares = np.asarray(proportions, dtype=float)
    if (shares < 0).any() or not np.isfinite(shares).all() or shares.sum() <= 0:
        raise InputError(f"target proportions must be non-negative and not all zero, not {list(proportions)}")
    counts = [int(k * share) for share in shares / shares.sum()]
    counts[-1] += k - sum(counts)
    return counts


def take(heaps: Sequence[TopK], counts: Sequence[int]) -> Chosen:
    """Choose ``counts[t]`` documents for every target in turn, never one twice.

    Parameters
    ----------
    heaps : sequence of TopK
        One per target; each must hold at least the sum of all counts, or all that is eligible.
    counts : sequence of int
    """
    taken: set[tuple[int, int]] = set()
    picked: list[tuple[np.ndarray, ...]] = []
    for target, (heap, count) in enumerate(zip(heaps, counts)):
        _, values, units, rows = heap.best()
        if taken:
            free = np.array([pair not in taken for pair in zip(units.tolist(), rows.tolist())], dtype=bool)
            values, units, rows = values[free], units[free], rows[free]
        values, units, rows = values[:count], units[:count], rows[:count]
        if len(heaps) > 1:
            taken.update(zip(units.tolist(), rows.tolist()))
        picked.append((units, rows, values, np.full(len(units), target, np.int64)))
    units, rows, values, targets = (np.concatenate(columns) for columns in zip(*picked))
    order = np.lexsort((rows, units))
    return Chosen(units[order], rows[order], values[order], targets[order])


def gumbel_topk(
    logits: Float[np.ndarray, " n"],
    k: int,
    *,
    generator: np.random.Generator,
    mask: Bool[np.ndarray, " n"] | None = None,
) -> Int[np.ndarray, " k"]:
    """Draw k of n items without replacement with probability proportional to ``exp(logits)``.

    Parameters
    ----------
    logits : (n,) float
        Log-weights; finite.
    k : int
    generator : numpy Generator
    mask : (n,) bool, optional
        Items that may be drawn; all by default.

    Returns
    -------
    (k,) int64
        Indices in ascending order.

    Raises
    ------
    InputError
        `k` is not in 1..number of eligible items, or a logit is not finite.
    """
    logits = np.asarray(logits, dtype=np.float64)
    eligible = np.arange(len(logits)) if mask is None else np.flatnonzero(mask)
    check_count(k, len(eligible))
    if not np.isfinite(logits[eligible]).all():
        raise InputError("logits must be finite; leave items out through `mask`")
    keys = logits[eligible] + generator.gumbel(size=len(eligible))
    return np.sort(eligible[np.argsort(-keys, kind="stable")[:k]])


def check_count(k: int, eligible: int, hint: str = "") -> None:
    """Refuse to choose none, or more than there is."""
    if k < 1:
        raise InputError(f"count must be at least 1, not {k}")
    if k > eligible:
        raise InputError(f"count {k} is more than the {eligible} eligible documents{hint}")
