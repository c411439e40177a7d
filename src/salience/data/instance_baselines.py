"""What instance selection with labels is measured against: random, condensed, edited, and DROP3.

All but `stratified_random` choose how many rows they keep. They compare all pairs of rows, so they are for tables of
some ten thousand rows.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from sklearn.neighbors import NearestNeighbors

from salience.data.gais.selection import reduced_sizes
from salience.data.kmq.clustering import check_embeddings
from salience.data.kmq.quotas import take_first
from salience.errors import InputError


def stratified_random(
    y: ArrayLike, *, reduction: float = 0.96, n_min: int = 2, random_state: int = 0
) -> Int[np.ndarray, " b"]:
    """Random rows of every class: ``max(n_min, round((1 - reduction) n_c))`` of each.

    Parameters
    ----------
    y : (n,)
    reduction : float
    n_min, random_state : int

    Returns
    -------
    (b,) int64
        Ascending.
    """
    codes = np.unique(y, return_inverse=True)[1]
    keys = np.random.default_rng(random_state).random(len(codes))
    return take_first(keys, codes, reduced_sizes(np.bincount(codes), reduction, n_min))


def condensed_neighbours(X: ArrayLike, y: ArrayLike, *, random_state: int = 0) -> Int[np.ndarray, " b"]:
    """Condensed nearest neighbour: add every row that 1-NN on the rows so far gets wrong, until none is wrong.

    Parameters
    ----------
    X, y : (n, d), (n,)
    random_state : int
        Of the order of rows; the first row of each class starts.

    Returns
    -------
    (b,) int64
        Ascending; 1-NN on them is right on all of X.

    Notes
    -----
    Source: Hart, "The Condensed Nearest Neighbor Rule", IEEE Transactions on Information Theory 14 (1968).
    """
    rows, codes = _checked(X, y)
    order = np.random.default_rng(random_state).permutation(len(codes))
    kept = [int(order[np.argmax(codes[order] == code)]) for code in np.unique(codes)]
    nearest, label = np.full(len(codes), np.inf), np.zeros(len(codes), codes.dtype)

    def add(row: int) -> None:
        away = ((rows - rows[row]) ** 2).sum(axis=1)
        closer = away < nearest
        nearest[closer], label[closer] = away[closer], codes[row]

    for row in kept:
        add(row)
    while True:
        wrong = order[label[order] != codes[order]]
        wrong = wrong[~np.isin(wrong, kept)]  # a copy of a kept row with another label stays wrong
        if not len(wrong):
            return np.sort(kept)
        for row in wrong:
            if label[row] != codes[row]:
                kept.append(int(row))
                add(row)


def edited_neighbours(X: ArrayLike, y: ArrayLike, *, k: int = 3) -> Int[np.ndarray, " b"]:
    """Edited nearest neighbour: leave out the rows that most of their k nearest others contradict.

    Parameters
    ----------
    X, y : (n, d), (n,)
    k : int
        Odd numbers leave fewer ties, which count as contradiction.

    Returns
    -------
    (b,) int64
        Ascending.

    Notes
    -----
    Source: Wilson, "Asymptotic Properties of Nearest Neighbor Rules Using Edited Data", IEEE Transactions on Systems,
    Man, and Cybernetics 2 (1972).
    """
    rows, codes = _checked(X, y)
    votes = codes[_others(rows, k)]
    count = (votes[:, :, None] == np.arange(codes.max() + 1)).sum(axis=1)
    own = count[np.arange(len(codes)), codes]
    count[np.arange(len(codes)), codes] = -1
    return np.flatnonzero(own > count.max(axis=1))


def drop3(X: ArrayLike, y: ArrayLike, *, k: int = 3) -> Int[np.ndarray, " b"]:
    """DROP3: after editing, take rows away from the inside out where the rows that lean on them are right without.

    A row goes if at least as many of its associates (rows that have it among their k + 1 nearest) are classified
    rightly by their k nearest without it as with it. Rows far from another class are tried first.

    Parameters
    ----------
    X, y : (n, d), (n,)
    k : int

    Returns
    -------
    (b,) int64
        Ascending.

    Notes
    -----
    Source: Wilson and Martinez, "Reduction Techniques for Instance-Based Learning Algorithms", Machine Learning 38
    (2000), section 4.
    """
    rows, codes = _checked(X, y)
    start = edited_neighbours(rows, codes, k=k)
    rows, codes = rows[start], codes[start]
    n, kept = len(codes), np.ones(len(start), dtype=bool)
    if n <= k + 1:
        return start
    nearby = _by_distance(rows)  # n x n: the baseline is meant for small tables
    lists = [list(near[: k + 1]) for near in nearby]
    reach = np.full(n, k + 1)  # how far down its order each row has looked
    associates: list[set[int]] = [set() for _ in range(n)]
    for row, near in enumerate(lists):
        for other in near:
            associates[other].add(row)
    for row in np.argsort(-_enemy_distance(rows, codes), kind="stable"):
        leaning = sorted(associates[row])
        with_ = sum(_right(lists[a][:k], codes, a) for a in leaning)
        without = sum(_right([b for b in lists[a] if b != row][:k], codes, a) for a in leaning)
        if without < with_ or kept.sum() <= 1:
            continue
        kept[row] = False
        for a in leaning:
            lists[a].remove(row)
            while reach[a] < n - 1 and len(lists[a]) < k + 1:
                other = int(nearby[a, reach[a]])
                reach[a] += 1
                if kept[other]:
                    lists[a].append(other)
                    associates[other].add(a)
    return start[kept]


def _right(near: list[int], codes: Int[np.ndarray, " n"], row: int) -> bool:
    """Whether most of these neighbours have the label of the row; of equal numbers, the nearest one's label counts."""
    counts = np.bincount(codes[near], minlength=1) if near else np.zeros(1, np.int64)
    leading = np.flatnonzero(counts == counts.max()) if near else np.empty(0)
    winner = next((codes[b] for b in near if codes[b] in leading), -1)
    return bool(winner == codes[row])


def _others(rows: Float[np.ndarray, "n d"], k: int) -> Int[np.ndarray, "n k"]:
    """The k nearest other rows of every row."""
    k = min(k, len(rows) - 1)
    return NearestNeighbors(n_neighbors=k).fit(rows).kneighbors(return_distance=False)


def _by_distance(rows: Float[np.ndarray, "n d"]) -> Int[np.ndarray, "n n-1"]:
    return _others(rows, len(rows) - 1)


def _enemy_distance(rows: Float[np.ndarray, "n d"], codes: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Distance of every row to the nearest one of another class; infinite where there is none."""
    found = np.full(len(codes), np.inf)
    for code in np.unique(codes):
        mine: Bool[np.ndarray, " n"] = codes == code
        if not mine.all():
            found[mine] = NearestNeighbors(n_neighbors=1).fit(rows[~mine]).kneighbors(rows[mine])[0][:, 0]
    return found


def _checked(X: ArrayLike, y: ArrayLike) -> tuple[Float[np.ndarray, "n d"], Int[np.ndarray, " n"]]:
    rows = check_embeddings(X).astype(np.float64)
    codes = np.unique(y, return_inverse=True)[1]
    if len(codes) != len(rows):
        raise InputError(f"y has {len(codes)} labels for {len(rows)} rows")
    if len(rows) < 2:
        raise InputError("X must have at least 2 rows")
    return rows, codes
