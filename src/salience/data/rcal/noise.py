"""Long-tailed class sizes, wrong labels, and accuracy by class size."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int, Shaped
from numpy.typing import ArrayLike

from salience.errors import DataError, InputError

KINDS = ("joint", "class-prior", "symmetric", "asymmetric")


def long_tail(
    y: ArrayLike, rho: float, *, largest: int | None = None, random_state: Any = 0
) -> Int[np.ndarray, " m"]:  # fmt: skip
    """Choose rows so that class sizes fall exponentially from the largest to the smallest.

        n_k = n_1 rho^(-(k - 1) / (K - 1)),   k = 1..K, the classes in random order

    Parameters
    ----------
    y : (n,) labels
    rho : float
        Imbalance: the largest class over the smallest, at least 1; 10 and 100 in the paper.
    largest : int, optional
        n_1; by default as many as all classes have rows for.
    random_state : int or numpy.random.Generator
        Decides the order of the classes, and the rows of each.

    Returns
    -------
    (m,) int64
        Row numbers, in ascending order.

    Raises
    ------
    InputError
        rho below 1, or a class with fewer rows than it needs.
    DataError
        Fewer than two classes.
    """
    if not 1 <= rho < np.inf:
        raise InputError(f"rho: got {rho!r}; the largest class over the smallest, a number of at least 1, is needed")
    classes, index = _classes(y)
    rng = np.random.default_rng(random_state)
    order = rng.permutation(len(classes))
    shares = rho ** (-np.arange(len(classes)) / (len(classes) - 1))
    there = np.bincount(index)[order]
    most = int(np.floor((there / shares).min() + 1e-9))
    first = most if largest is None else largest
    if not 1 <= first <= most:
        raise InputError(f"largest: got {first!r}; the classes have rows for 1 to {most} at rho = {rho:g}")
    counts = np.maximum(1, np.round(first * shares).astype(int))
    rows = [rng.permutation(np.flatnonzero(index == k))[:count] for k, count in zip(order, counts)]
    return np.sort(np.concatenate(rows))


def flip_labels(
    y: ArrayLike, eta: float, *, kind: Literal["joint", "class-prior", "symmetric", "asymmetric"] = "joint",
    random_state: Any = 0,
) -> Shaped[np.ndarray, " n"]:  # fmt: skip
    """Make labels wrong at random, at rate eta.

    Probability that a row of class k is labelled j, for j other than k:

    ============= ============================ ================================================================
    kind          P(y~ = j | y = k)
    ============= ============================ ================================================================
    joint         ``eta n_j / (n - n_k)``      into other classes by their size; a share eta of every class
    class-prior   ``eta n_j / n``              what the paper's theory assumes; ``eta (1 - n_k / n)`` of class k
    symmetric     ``eta / (K - 1)``            into any other class alike
    asymmetric    ``eta`` for the next class   in sorted order, the first after the last
    ============= ============================ ================================================================

    Parameters
    ----------
    y : (n,) labels
    eta : float
        In [0, 1).
    kind : {"joint", "class-prior", "symmetric", "asymmetric"}
        Which of the first two the paper's experiments take was not visible; "joint" is common in this field [R].
    random_state : int or numpy.random.Generator

    Returns
    -------
    (n,) labels

    Raises
    ------
    InputError
        eta or kind is not one of these.
    DataError
        Fewer than two classes.
    """
    if not 0 <= eta < 1:
        raise InputError(f"eta: got {eta!r}; a share of wrong labels in [0, 1) is needed")
    if kind not in KINDS:
        raise InputError(f"kind: got {kind!r}; it must be one of {', '.join(map(repr, KINDS))}")
    classes, index = _classes(y)
    counts = np.bincount(index)
    rng = np.random.default_rng(random_state)
    into = np.tile(counts if kind in ("joint", "class-prior") else np.ones(len(classes)), (len(classes), 1))
    if kind == "asymmetric":
        into = np.roll(np.eye(len(classes)), 1, axis=1)
    if kind != "class-prior":
        np.fill_diagonal(into, 0)
    steps = np.cumsum(into / into.sum(axis=1, keepdims=True), axis=1)
    flips, draws = rng.random(len(index)) < eta, rng.random(len(index))
    moved = np.minimum((draws[:, None] >= steps[index]).sum(axis=1), len(classes) - 1)
    return classes[np.where(flips, moved, index)]


class ShotAccuracy(NamedTuple):
    """Accuracy on all test rows, and on those of classes with many, medium and few training rows (NaN: no such)."""

    all: float
    many: float
    medium: float
    few: float


def shot_accuracy(
    targets: ArrayLike, predicted: ArrayLike, training_labels: ArrayLike, *, many: int = 100, few: int = 20
) -> ShotAccuracy:  # fmt: skip
    """Accuracy by the size of the class in training: a mean alone hides what the tail lost.

    Parameters
    ----------
    targets, predicted : (n,) labels
        Of test rows.
    training_labels : (m,) labels
        True ones where they are known.
    many, few : int
        Classes with more than `many` training rows are Many, those with fewer than `few` are Few, the rest is Medium.
        100 and 20 are customary.

    Raises
    ------
    InputError
        Lengths differ, or few above many.
    """
    right = np.asarray(targets) == np.asarray(predicted)
    if np.shape(targets) != np.shape(predicted) or right.ndim != 1:
        raise InputError(f"predicted: shape {np.shape(predicted)} for targets of shape {np.shape(targets)}")
    if few > many:
        raise InputError(f"few: got {few!r}; it must not be above many, {many!r}")
    classes, counts = np.unique(np.asarray(training_labels), return_counts=True)
    size = dict(zip(classes.tolist(), counts.tolist()))
    sizes = np.array([size.get(label, 0) for label in np.asarray(targets).tolist()])
    groups = (np.ones(len(right), dtype=bool), sizes > many, (sizes >= few) & (sizes <= many), sizes < few)
    return ShotAccuracy(*(float(right[group].mean()) if group.any() else float("nan") for group in groups))


def _classes(y: ArrayLike) -> tuple[Shaped[np.ndarray, " classes"], Int[np.ndarray, " n"]]:
    labels = np.asarray(y)
    if labels.ndim != 1:
        raise InputError(f"y: shape {labels.shape}; one label per row, (n,), is needed")
    classes, index = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise DataError(f"y: {len(classes)} class in {len(labels)} rows; at least two are needed")
    return classes, index
