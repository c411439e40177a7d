"""Real tables widened with columns that mean nothing: which of a thousand columns are the real ones?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from sklearn.datasets import load_breast_cancer, load_digits

from salience.errors import InputError, nearest

_LOADERS = {"breast_cancer": load_breast_cancer, "digits": load_digits}


@dataclass(frozen=True)
class Wide:
    """A wide table in two parts.

    Attributes
    ----------
    train_x, test_x : (n, columns) float
    train_y, test_y : (n,) int
    real : (columns,) bool
        Columns of the data set; the others are noise or copies of real ones with their rows shuffled.
    """

    train_x: Float[np.ndarray, "n columns"]
    train_y: Int[np.ndarray, " n"]
    test_x: Float[np.ndarray, "m columns"]
    test_y: Int[np.ndarray, " m"]
    real: Bool[np.ndarray, " columns"]


def wide(name: str, seed: int, columns: int = 1000, test: float = 0.3) -> Wide:
    """A data set of scikit-learn with as many columns as wanted, rows and columns in random order.

    Half of the added columns are noise (normal); half are real columns with their rows shuffled, scaled at random,
    every other one through tanh: alone they look like the real ones.
    """
    if name not in _LOADERS:
        raise InputError(f"name {name!r} is no table here; {nearest(name, _LOADERS)}")
    data, rng = _LOADERS[name](), np.random.default_rng(seed)
    real = data.data[:, np.ptp(data.data, axis=0) > 0]
    real = (real - real.mean(axis=0)) / real.std(axis=0)
    added = columns - real.shape[1]
    if added < 0:
        raise InputError(f"columns must be at least {real.shape[1]}, those of {name}; got {columns}")
    n = len(real)
    copies = np.stack([rng.permutation(real[:, rng.integers(real.shape[1])]) for _ in range(added // 2)], axis=1)
    copies[:, ::2] = np.tanh(copies[:, ::2])
    copies *= rng.uniform(0.5, 2.0, copies.shape[1])
    everything = np.hstack([real, copies, rng.normal(size=(n, added - added // 2))])
    places, rows = rng.permutation(columns), rng.permutation(n)
    cut = int(n * (1 - test))
    table, label = everything[rows][:, places], data.target[rows]
    return Wide(table[:cut], label[:cut], table[cut:], label[cut:], (np.arange(columns) < real.shape[1])[places])
