"""Users' sequences of items: histories and what follows them, splits whose interests shift, and the usual measures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

from salience.errors import InputError


class Found(NamedTuple):
    """Recall, NDCG and hits of lists of recommendations, each the mean over users, in 0..1."""

    recall: float
    ndcg: float
    hit: float


def recall_ndcg_hit(recommended: ArrayLike | Tensor, truth: Sequence[Iterable[int]], k: int) -> Found:
    """What the first k recommendations of each user find of the true items.

        recall = |found| / |truth|,   ndcg = sum_{found} 1 / log2(rank + 1) / sum_{r=1}^{|found|} 1 / log2(r + 1)

    and hit is whether anything was found.

    Parameters
    ----------
    recommended : (n, N) int array
        Best first, N >= k, none twice in a row.
    truth : n iterables of int
        The items of each user, at least one; repeats count once.
    k : int

    Raises
    ------
    InputError
        Another number of users, a user without items, k beyond N, or an item recommended twice.

    Notes
    -----
    ComiRec's convention (its master branch): NDCG is over the best order of *what was found*, and 0 where nothing was.
    `salience.measure.ranking.ndcg_at_k` has the usual one, over the best list there could be.
    """
    lists = np.asarray(recommended)
    if lists.ndim != 2 or not 1 <= k <= lists.shape[1] or len(lists) != len(truth) or not len(lists):
        raise InputError(
            f"recommended: shape {lists.shape} for {len(truth)} users and k = {k}; (users, at least k) is needed"
        )
    gains = 1 / np.log2(np.arange(2, k + 2))
    rows = np.zeros((len(lists), 3))
    for row, (items, true) in enumerate(zip(lists[:, :k], truth)):
        wanted = set(map(int, true))
        if not wanted:
            raise InputError(f"truth: user {row} has no items; leave such users out")
        if len(set(items.tolist())) < k:
            raise InputError(f"recommended: an item stands twice in the list of user {row}")
        found = np.isin(items, list(wanted))
        count = int(found.sum())
        if count:
            rows[row] = count / len(wanted), gains[found].sum() / gains[:count].sum(), 1
    return Found(*map(float, rows.mean(axis=0)))


def pad_histories(sequences: Iterable[Sequence[int]], length: int) -> Int[Tensor, "n length"]:
    """The last `length` items of each sequence, padded with 0 behind."""
    recent = [list(sequence)[-length:] for sequence in sequences]
    return torch.tensor([items + [0] * (length - len(items)) for items in recent], dtype=torch.int64)


def history_and_truth(
    sequences: Sequence[Sequence[int]], length: int, share: float = 0.8
) -> tuple[Int[Tensor, "n length"], list[list[int]]]:
    """Of each test user, the first `share` of the items as history, and the others to be found.

    Raises
    ------
    InputError
        No sequences, a sequence too short to leave an item on both sides, or a share outside (0, 1).
    """
    if not 0 < share < 1:
        raise InputError(f"share: got {share!r}; it must lie between 0 and 1")
    cuts = [int(len(sequence) * share) for sequence in sequences]
    if not cuts or min(cuts) < 1:
        short = next((row for row, cut in enumerate(cuts) if cut < 1), None)
        raise InputError(
            "sequences: there are none"
            if short is None
            else f"sequences: number {short} has {len(sequences[short])} items; its first {share:.0%} would be none"
        )
    histories = pad_histories([sequence[:cut] for sequence, cut in zip(sequences, cuts)], length)
    return histories, [list(sequence[cut:]) for sequence, cut in zip(sequences, cuts)]


def ood_sequences(
    sequences: Sequence[Sequence[int]], categories: Mapping[int, int] | Sequence[int], test_share: float = 0.2
) -> tuple[list[int], list[int]]:
    """Split sequences so that interests go together differently in the test part than in the training part.

    Categories that stand in one sequence are interests that go together. A pair's lift is its pointwise mutual
    information over the sequences, ``log p(a, b) / (p(a) p(b))``; the sequences whose pairs have the lowest mean lift
    (0 for those of one category) are for testing.

    Parameters
    ----------
    sequences : n sequences of int
    categories : mapping or sequence
        Category of each item.
    test_share : float
        In (0, 1).

    Returns
    -------
    (train, test) : lists of int
        Numbers of the sequences, rising.

    Raises
    ------
    InputError
        Fewer than two sequences, an empty one, an item without a category, or a share outside (0, 1).
    """
    if len(sequences) < 2 or not 0 < test_share < 1:
        raise InputError(
            f"sequences, test_share: got {len(sequences)} and {test_share!r}; at least 2, and a share between 0 and 1, "
            "are needed"
        )
    held = []
    for row, sequence in enumerate(sequences):
        try:
            held.append({int(categories[int(item)]) for item in sequence})
        except (KeyError, IndexError) as error:
            raise InputError(f"categories: an item of sequence {row} has none: {error}") from error
        if not held[-1]:
            raise InputError(f"sequences: number {row} is empty")
    names = sorted(set().union(*held))
    place = {name: at for at, name in enumerate(names)}
    has = np.zeros((len(held), len(names)))
    for row, own in enumerate(held):
        has[row, [place[name] for name in own]] = 1
    together: Float[np.ndarray, "c c"] = has.T @ has / len(held)
    alone = np.diag(together)
    with np.errstate(divide="ignore"):
        lift = np.log(together / np.outer(alone, alone))
    fit = [
        float(np.mean([lift[place[a], place[b]] for a, b in combinations(sorted(own), 2)])) if len(own) > 1 else 0.0
        for own in held
    ]
    order = np.argsort(fit, kind="stable")
    count = min(max(1, round(test_share * len(held))), len(held) - 1)
    return sorted(order[count:].tolist()), sorted(order[:count].tolist())
