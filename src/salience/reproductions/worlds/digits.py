"""Handwritten digits: scikit-learn's 1,797 real 8 x 8 images, split by seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

TRAIN_SHARE = 0.7


@dataclass(frozen=True)
class Split:
    """A data set in a training and a test part; rows of `x` and `y` belong together."""

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


def split(seed: int) -> Split:
    """Digits as float32 (n, 1, 8, 8), 70 % training and 30 % test stratified by class, labels int64 0..9.

    Pixels are standardised by the one mean and the one standard deviation of the training part, so that no
    pixel is blown up and the test part is not looked at.
    """
    parts = ink(seed)
    mean, deviation = parts.train_x.mean(dtype=np.float64), parts.train_x.std(dtype=np.float64)
    train_x, test_x = (((x - mean) / deviation).astype(np.float32)[:, None] for x in (parts.train_x, parts.test_x))
    return Split(train_x, parts.train_y, test_x, parts.test_y)


def ink(seed: int) -> Split:
    """The same split as raw ink: float32 (n, 8, 8), 0 for paper and 1 for the darkest stroke."""
    data = load_digits()
    images: Float[np.ndarray, "n 8 8"] = (data.images / 16).astype(np.float32)
    labels: Int[np.ndarray, " n"] = data.target.astype(np.int64)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, train_size=TRAIN_SHARE, stratify=labels, random_state=seed
    )
    return Split(train_x, train_y, test_x, test_y)
