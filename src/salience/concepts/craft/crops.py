"""Crops of images, at the size of the whole image, read when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from salience.errors import InputError, NothingToDo


def pixels_of(images: Any, i: int) -> Float[Tensor, "channel height width"]:
    """Image `i` of a tensor, or of a data set whose items are images or (image, label)."""
    item = images[i]
    return item[0] if isinstance(item, tuple | list) else item


class Crops(Dataset):
    """Square windows of images, enlarged to the images' size (bilinear, as in the authors' code).

    Parameters
    ----------
    images : Tensor (n, channel, height, width) or Dataset
        A data set's items are images or (image, label), all of one size.
    boxes : integer array (m, 3)
        Number of the image, top row and left column of each crop.
    patch_size : int
        Side of a window, in pixels.

    Attributes
    ----------
    boxes, patch_size
    """

    def __init__(self, images: Any, boxes: Int[np.ndarray, "m 3"], patch_size: int) -> None:
        self.images, self.boxes, self.patch_size = images, boxes, patch_size
        self._held: tuple[int, Tensor] | None = None  # the image read last: its crops come one after the other

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, i: int) -> Float[Tensor, "channel height width"]:
        image, top, left = map(int, self.boxes[i])
        if self._held is None or self._held[0] != image:
            self._held = image, pixels_of(self.images, image)
        pixels, side = self._held[1], self.patch_size
        window = pixels[None, :, top : top + side, left : left + side]
        return interpolate(window, size=pixels.shape[1:], mode="bilinear", align_corners=False)[0]

    def take(self, chosen: Sequence[int] | Int[np.ndarray, " m"]) -> Crops:
        """Some of the crops, in the order of `chosen`."""
        return Crops(self.images, self.boxes[np.asarray(chosen, dtype=np.int64)], self.patch_size)


def make_crops(
    images: Any,
    *,
    patch_size: int | None = None,
    stride: int | None = None,
    kind: str = "grid",
    per_image: int = 10,
    random_state: int = 0,
) -> Crops:
    """Cut every image: on a regular grid, or at random places.

    Parameters
    ----------
    images : Tensor (n, channel, height, width) or Dataset
    patch_size : int, optional
        Side in pixels; by default 64 per 224 pixels of the image's shorter side, as in the paper, but at least 16, or
        half of an image that is smaller than 32: fewer pixels, enlarged, are nothing that a network knows.
    stride : int, optional
        Of the grid; by default 0.8 of the patch, rounded down.
    kind : {"grid", "random"}
        The grid of the authors' code, or the paper's random places.
    per_image : int
        Crops of an image at random places.
    random_state : int
        Of the places; those of an image do not depend on other images.

    Raises
    ------
    InputError
        A patch larger than the images, or an option out of range.
    NothingToDo
        There are no images.
    """
    if not len(images):
        raise NothingToDo("images: there are none to cut crops from")
    first = pixels_of(images, 0)
    if first.ndim != 3:
        raise InputError(f"images: must have shape (channel, height, width) each; got {tuple(first.shape)}")
    height, width = first.shape[1:]
    shorter = min(height, width)
    side = max(round(shorter * 64 / 224), min(16, -(-shorter // 2))) if patch_size is None else patch_size
    if not 1 <= side <= shorter:
        raise InputError(f"patch_size: {side} does not fit into images of {height} x {width} pixels")
    step = max(1, int(0.8 * side)) if stride is None else stride
    if step < 1 or per_image < 1:
        raise InputError(f"stride and per_image: got {step} and {per_image}; they must be at least 1")
    if kind not in ("grid", "random"):
        raise InputError(f"crops: got {kind!r}; it must be 'grid' or 'random'")
    tops, lefts = np.arange(0, height - side + 1, step), np.arange(0, width - side + 1, step)
    grid = np.stack(np.meshgrid(tops, lefts, indexing="ij"), -1).reshape(-1, 2)
    boxes = []
    for i in range(len(images)):
        places = grid
        if kind == "random":
            rng = np.random.default_rng([random_state, i])
            places = rng.integers(0, [height - side + 1, width - side + 1], size=(per_image, 2))
        boxes.append(np.column_stack([np.full(len(places), i), places]))
    return Crops(images, np.concatenate(boxes), side)


def stacked(images: Any, chosen: Sequence[int] | Int[np.ndarray, " m"]) -> Float[Tensor, "m channel height width"]:
    """Some images as one tensor."""
    return torch.stack([pixels_of(images, int(i)) for i in chosen])
