"""Score the columns of one batch after another, and take the median over batches."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt

from salience.features.outrank.columns import combine
from salience.features.outrank.mutual_info import (
    Target,
    class_sums,
    count_terms,
    entropy,
    entropy_of,
    target_of,
    value_sums,
)

_TOGETHER = 32  # combinations whose codes are laid out at once


class BatchScores:
    """Scores of columns against a target, of pairs, and of combinations, batch by batch.

    Parameters
    ----------
    columns : int
        Number of columns besides the target; the first `scored` of them take part in pairs and combinations, the
        others are controls.
    order : int
        Number of columns in a combination; 1 makes none.
    all_pairs : bool
    budget : int
        Pairs, and combinations, scored in a batch at most. Where there are more, those scored least often come first.
    shifts : int
        See `ca_mutual_info`.
    pool : ThreadPoolExecutor, optional
        Changes nothing but the time.

    Attributes
    ----------
    batches, rows : int
        Batches scored, and their rows.
    """

    def __init__(
        self, columns: int, scored: int, *, order: int = 1, all_pairs: bool = False, budget: int = 1 << 15,
        shifts: int = 1, pool: ThreadPoolExecutor | None = None,
    ) -> None:  # fmt: skip
        self._columns, self._shifts, self._pool = columns, shifts, pool
        self._pair_turns = Turns(scored, 2, budget) if all_pairs else None
        self._combination_turns = Turns(scored, order, budget) if order > 1 else None
        self._singles: list[Float[np.ndarray, "3 columns"]] = []  # score, plain mutual information, entropy
        self._target_entropies: list[float] = []
        self._pairs: dict[tuple[int, ...], list[float]] = defaultdict(list)
        self._combinations: dict[tuple[int, ...], list[float]] = defaultdict(list)
        self.batches = self.rows = 0

    def add(
        self, codes: UInt[np.ndarray, "columns n"], cardinalities: Int[np.ndarray, " columns"],
        y: UInt[np.ndarray, " n"], classes: int,
    ) -> None:  # fmt: skip
        """Score a batch: codes of all columns, what each stays below, and those of the target."""
        n = codes.shape[1]
        terms, target = count_terms(n), target_of(y, classes, self._shifts)
        self._add_singles(codes, cardinalities, target, terms)
        if self._pair_turns is not None:
            self._add_pairs(codes, cardinalities, terms)
        if self._combination_turns is not None:
            self._add_combinations(codes, cardinalities, target, terms)
        self.batches += 1
        self.rows += n

    def singles(self) -> Float[np.ndarray, "batches 3 columns"]:
        """Corrected score, plain mutual information and entropy of every column in every batch."""
        return np.stack(self._singles)

    def target_entropy(self) -> float:
        """Median entropy of the target."""
        return float(np.median(self._target_entropies))

    def pairs(self) -> dict[tuple[int, ...], tuple[float, int]]:
        """Median score of each pair (a, b), a before b, which is ``H(a~|b) - H(a|b)``, and of how many batches."""
        return _medians(self._pairs)

    def combinations(self) -> dict[tuple[int, ...], tuple[float, int]]:
        """Median score of each combination against the target, and of how many batches."""
        return _medians(self._combinations)

    def exist(self) -> tuple[int, int]:
        """How many pairs and combinations there are."""
        turns = (self._pair_turns, self._combination_turns)
        return tuple(0 if each is None else each.total for each in turns)  # type: ignore[return-value]

    def _add_singles(self, codes, cardinalities, target: Target, terms) -> None:
        n, which = codes.shape[1], np.arange(len(codes))
        parts = np.array_split(which, min(len(which), 8))

        def part(which: np.ndarray) -> np.ndarray:
            sums = class_sums(codes, which, cardinalities, target, terms)
            own = entropy_of(value_sums(codes, which, cardinalities, terms), n)
            return np.stack([(sums[:, 0] - sums[:, 1:].mean(axis=1)) / n, own - entropy_of(sums[:, 0], n), own])

        of_target = entropy(np.diff(target.bounds))
        found = np.concatenate(list(self._map(part, parts)), axis=1)
        found[1] += of_target  # I = H(f) + H(y) - H(f, y)
        self._target_entropies.append(of_target)
        self._singles.append(found)

    def _add_pairs(self, codes, cardinalities, terms) -> None:
        n = codes.shape[1]
        given: dict[int, list[int]] = defaultdict(list)
        for a, b in self._pair_turns.next():  # type: ignore[union-attr]
            given[b].append(a)

        def score(b: int) -> np.ndarray:
            condition = target_of(codes[b], int(cardinalities[b]), self._shifts)
            sums = class_sums(codes, np.array(given[b]), cardinalities, condition, terms)
            return (sums[:, 0] - sums[:, 1:].mean(axis=1)) / n

        for b, scores in zip(given, self._map(score, list(given))):
            for a, value in zip(given[b], scores.tolist()):
                self._pairs[a, b].append(value)

    def _add_combinations(self, codes, cardinalities, target: Target, terms) -> None:
        n = codes.shape[1]
        members = self._combination_turns.next()  # type: ignore[union-attr]

        def score(part: Sequence[tuple[int, ...]]) -> np.ndarray:
            joint, below = np.empty((len(part), n), np.uint32), np.empty(len(part), np.int64)
            for at, (first, *others) in enumerate(part):
                joint[at], below[at] = codes[first], cardinalities[first]
                for other in others:
                    joint[at], below[at] = combine(joint[at], int(below[at]), codes[other], int(cardinalities[other]))
            sums = class_sums(joint, np.arange(len(part)), below, target, terms)
            return (sums[:, 0] - sums[:, 1:].mean(axis=1)) / n

        parts = [members[at : at + _TOGETHER] for at in range(0, len(members), _TOGETHER)]
        for part, scores in zip(parts, self._map(score, parts)):
            for combination, value in zip(part, scores.tolist()):
                self._combinations[combination].append(value)

    def _map(self, fn: Callable[[Any], Any], parts: Sequence[Any]) -> Iterator[Any]:
        return map(fn, parts) if self._pool is None else self._pool.map(fn, parts)


class Turns:
    """Subsets of `size` of `count` columns, at most `budget` at a time, those taken least often first.

    Taking turns in a fixed order is the same as sorting by how often each was taken, and needs no list of them all.
    """

    def __init__(self, count: int, size: int, budget: int) -> None:
        self.total = math.comb(count, size)
        self._count, self._size, self._budget = count, size, budget
        self._left = itertools.combinations(range(count), size)

    def next(self) -> list[tuple[int, ...]]:
        """The subsets whose turn it is."""
        taken = list(itertools.islice(self._left, min(self._budget, self.total)))
        missing = min(self._budget, self.total) - len(taken)
        if missing:
            self._left = itertools.combinations(range(self._count), self._size)
            taken += itertools.islice(self._left, missing)
        return taken


def _medians(found: dict[tuple[int, ...], list[float]]) -> dict[tuple[int, ...], tuple[float, int]]:
    return {subset: (float(np.median(values)), len(values)) for subset, values in sorted(found.items())}
