"""Digits on photographs: 32 x 32 colour images whose background tells nothing of the class; and the digits alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits, load_sample_images
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import interpolate

SIDE, DIGIT, BRIGHTNESS = 32, (14, 20), 0.5
TRAIN, TEST = 4000, 1000


class World(NamedTuple):
    """Normalised images with labels, for training, tuning and testing."""

    x: Tensor
    y: Tensor
    tune_x: Tensor
    tune_y: Tensor
    test_x: Tensor
    test_y: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]


def plain(seed: int) -> World:
    """Digits as they are, 8 x 8: 60 % for training, and half of the rest each for tuning and for testing."""
    x, y, rest_x, rest_y = _split(seed)
    return _world(x, y, rest_x, rest_y, tune=len(rest_y) // 2)


def pasted(seed: int, count: int = TRAIN) -> World:
    """Digits on photographs, `count` for training; training and test digits are different ones."""
    x, y, rest_x, rest_y = _split(seed)
    photographs = [
        interpolate(torch.from_numpy(one / 255.0).float().permute(2, 0, 1)[None], scale_factor=0.5, mode="bilinear")[0]
        for one in load_sample_images().images
    ]
    train = _composites(photographs, x, y, count, np.random.default_rng([seed, 0]))
    test = _composites(photographs, rest_x, rest_y, min(count, TEST), np.random.default_rng([seed, 1]))
    return _world(*train, *test, tune=0)


def _split(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Digits as ink in 0..1: 60 % with labels, and the rest."""
    data = load_digits()
    ink = (data.images[:, None] / 16).astype(np.float32)
    x, rest_x, y, rest_y = train_test_split(ink, data.target, train_size=0.6, stratify=data.target, random_state=seed)
    return torch.from_numpy(x), torch.from_numpy(y).long(), torch.from_numpy(rest_x), torch.from_numpy(rest_y).long()


def _composites(
    photographs: Sequence[Tensor], digits: Tensor, labels: Tensor, count: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """White digits of a random size at a random place, on crops of the photographs at half their brightness."""
    images, y = torch.empty(count, 3, SIDE, SIDE), torch.empty(count, dtype=torch.long)
    for i in range(count):
        photograph = photographs[int(rng.integers(len(photographs)))]
        top, left = (int(rng.integers(side - SIDE + 1)) for side in photograph.shape[1:])
        which, size = int(rng.integers(len(digits))), int(rng.integers(DIGIT[0], DIGIT[1] + 1))
        row, column = rng.integers(SIDE - size + 1, size=2).tolist()
        ink = interpolate(digits[which : which + 1], (size, size), mode="bilinear")[0]
        images[i] = BRIGHTNESS * photograph[:, top : top + SIDE, left : left + SIDE]
        place = images[i, :, row : row + size, column : column + size]
        place.copy_(place * (1 - ink) + ink)
        y[i] = labels[which]
    return images, y


def _world(x: Tensor, y: Tensor, rest_x: Tensor, rest_y: Tensor, tune: int) -> World:
    mean, std = x.mean((0, 2, 3)), x.std((0, 2, 3))
    x, rest_x = ((part - mean[:, None, None]) / std[:, None, None] for part in (x, rest_x))
    parts = (rest_x[:tune], rest_y[:tune], rest_x[tune:], rest_y[tune:])
    return World(x, y, *parts, tuple(mean.tolist()), tuple(std.tolist()))
