"""Makers of sets with known best subsets: the tasks of the papers, from points, images, registries and values.

Source: the data loaders of the published code of EquiVSet.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from sklearn.datasets import make_moons

from salience.data.inset.selector import SubsetExamples
from salience.errors import InputError, NothingToDo


def two_moons_sets(count: int, *, n: int = 100, size: int = 10, random_state: int = 0) -> SubsetExamples:
    """Sets of points of one moon, a random one of two, with `size` points of the other, which are the best subset.

    Parameters
    ----------
    count : int
        Sets.
    n, size : int
        Points of a set, and of its best subset.
    random_state : int

    Raises
    ------
    InputError
        Sizes that do not fit.
    """
    _check_sizes(count, n, size)
    rng = np.random.default_rng(random_state)

    def draw() -> tuple[np.ndarray, np.ndarray]:
        points, moon = make_moons(2 * n, noise=0.1, random_state=int(rng.integers(2**31)))
        points = 2 * points + np.array([-1.0, -0.2])
        background = rng.integers(2)
        return points[moon == background], points[moon != background]

    return _swapped([draw() for _ in range(count)], size, rng)


def gaussian_sets(count: int, *, n: int = 100, size: int = 10, random_state: int = 0) -> SubsetExamples:
    """The same with two Gaussian blobs around ``+-(1, 1) / sqrt 2``, of standard deviation 0.5.

    Parameters and errors as of `two_moons_sets`.
    """
    _check_sizes(count, n, size)
    rng = np.random.default_rng(random_state)

    def draw() -> tuple[np.ndarray, np.ndarray]:
        center = np.full(2, np.sqrt(0.5)) * (1 if rng.integers(2) else -1)
        return center + rng.normal(0, 0.5, (n, 2)), -center + rng.normal(0, 0.5, (size, 2))

    return _swapped([draw() for _ in range(count)], size, rng)


def anomaly_sets(
    images: ArrayLike,
    labels: ArrayLike,
    count: int,
    *,
    n: int = 8,
    sizes: tuple[int, int] = (2, 3),
    shared: int = 2,
    random_state: int = 0,
) -> SubsetExamples:
    """Sets of images that share attributes, with a few that have none of them: the best subset.

    Parameters
    ----------
    images : (images, …) array
        Or features of them.
    labels : (images, attributes) bits, or (images,) int
        Classes count as one attribute each, and `shared` is 1.
    count : int
        Sets.
    n : int
        Images of a set.
    sizes : (int, int)
        Fewest and most anomalies; each number is as likely.
    shared : int
        Attributes that the normal images share, drawn among those of a random image.
    random_state : int

    Raises
    ------
    InputError
        Sizes that do not fit.
    NothingToDo
        No set of that kind was found in 1000 tries.
    """
    x, found = np.asarray(images), np.asarray(labels)
    low, high = sizes
    _check_sizes(count, n, high)
    if found.ndim == 1:
        found, shared = found[:, None] == np.unique(found), 1
    if not 1 <= low <= high or len(found) != len(x) or shared < 1:
        raise InputError(
            f"images, labels, sizes, shared: got {len(x)} images, {len(found)} labels, {sizes} and {shared}; as many "
            "labels as images, sizes in order and at least 1 shared attribute are needed"
        )
    rng = np.random.default_rng(random_state)
    bits = found.astype(bool)
    rows, chosen = np.empty((count, n), dtype=np.int64), np.zeros((count, n), dtype=bool)
    done, tries = 0, 0
    while done < count:
        tries += 1
        if tries > 1000 * (done + 1):
            raise NothingToDo(f"labels: no {n} images that share {shared} attributes, and {high} without, were found")
        attributes = np.flatnonzero(bits[rng.integers(len(bits))])
        if len(attributes) < shared:
            continue
        of_these = bits[:, rng.choice(attributes, shared, replace=False)]
        normal, other = np.flatnonzero(of_these.all(1)), np.flatnonzero(~of_these.any(1))
        size = int(rng.integers(low, high + 1))
        if len(normal) < n or len(other) < size:
            continue
        rows[done] = rng.choice(normal, n, replace=False)
        where = rng.choice(n, size, replace=False)
        rows[done, where] = rng.choice(other, size, replace=False)
        chosen[done, where] = True
        done += 1
    return SubsetExamples(torch.from_numpy(x[rows]), torch.from_numpy(chosen))


def registry_sets(
    features: ArrayLike, registries: Sequence[ArrayLike], *, n: int = 30, random_state: int = 0
) -> SubsetExamples:
    """What people put on a list together, among the items that are least like it.

    Registries of 3 to ``n - 1`` items are used, others left out; each is filled up to n with the items whose cosine
    similarity to the registry's mean is smallest.

    Parameters
    ----------
    features : (items, d) array
        The paper has 768 numbers per product.
    registries : sequence of (k,) int arrays
        Rows of `features`.
    n : int
        Items of a set.
    random_state : int
        Of the places that the registry's items get.

    Raises
    ------
    InputError
        A row that is none, or too few items to fill a set.
    NothingToDo
        No registry has 3 to ``n - 1`` items.
    """
    x, rng = np.asarray(features), np.random.default_rng(random_state)
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    sets, chosen = [], []
    for at, registry in enumerate(registries):
        items = np.unique(np.asarray(registry, dtype=np.int64))
        if len(items) and not 0 <= items.min() <= items.max() < len(x):
            raise InputError(f"registries: registry {at} names item {items.max()}; there are items 0 to {len(x) - 1}")
        if not 2 < len(items) < n:
            continue
        if len(x) < n:
            raise InputError(f"features: {len(x)} items cannot fill a set of {n}")
        others = np.setdiff1d(np.arange(len(x)), items)
        likeness = unit[others] @ x[items].mean(0)
        fill = others[np.argsort(likeness, kind="stable")[: n - len(items)]]
        order = rng.permutation(n)
        sets.append(np.concatenate([items, fill])[order])
        chosen.append(order < len(items))
    if not sets:
        raise NothingToDo(f"registries: none of {len(registries)} has 3 to {n - 1} items")
    return SubsetExamples(torch.from_numpy(x[np.stack(sets)]), torch.from_numpy(np.stack(chosen)))


def top_value_sets(
    features: ArrayLike, values: ArrayLike, count: int, *, n: int = 30, size: int = 5, random_state: int = 0
) -> SubsetExamples:
    """Random sets, of which the best subset are the `size` elements of highest value: compound selection by activity.

    The papers have sets of 30 and best subsets of 5 for PDBBind, 300 and 15 for BindingDB.

    Parameters
    ----------
    features : (items, …) array
    values : (items,) array
        Activity, for compounds.
    count : int
        Sets.
    n, size : int
        Elements of a set, and of its best subset.
    random_state : int

    Raises
    ------
    InputError
        Sizes that do not fit.
    """
    _check_sizes(count, n, size)
    x, y = np.asarray(features), np.asarray(values)
    if y.shape != x.shape[:1] or len(x) < n:
        raise InputError(f"features and values: {len(x)} items, values of shape {y.shape}; at least {n} of each needed")
    rng = np.random.default_rng(random_state)
    rows = np.stack([rng.permutation(len(x))[:n] for _ in range(count)])
    chosen = np.zeros(rows.shape, dtype=bool)
    np.put_along_axis(chosen, np.argsort(-y[rows], axis=1, kind="stable")[:, :size], True, axis=1)
    return SubsetExamples(torch.from_numpy(x[rows]), torch.from_numpy(chosen))


def _swapped(
    drawn: list[tuple[Float[np.ndarray, "m d"], Float[np.ndarray, "k d"]]], size: int, rng: np.random.Generator
) -> SubsetExamples:
    """Backgrounds in which `size` points at random places are replaced by others."""
    sets: Float[np.ndarray, "sets n d"] = np.stack([background for background, _ in drawn])
    places: Int[np.ndarray, "sets size"] = np.stack([rng.permutation(sets.shape[1])[:size] for _ in drawn])
    chosen = np.zeros(sets.shape[:2], dtype=bool)
    np.put_along_axis(chosen, places, True, axis=1)
    for row, (_, others) in enumerate(drawn):
        sets[row, places[row]] = others[:size]
    return SubsetExamples(torch.from_numpy(sets.astype(np.float32)), torch.from_numpy(chosen))


def _check_sizes(count: int, n: int, size: int) -> None:
    if count < 1 or not 1 <= size <= n:
        raise InputError(
            f"count, n, size: got {count}, {n}, {size}; at least 1, and no best subset larger than its set"
        )
