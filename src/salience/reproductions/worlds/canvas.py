"""Scenes of two real digits on a canvas, with everything known about them: boxes, masks, parts, captions.

Each scene holds two digits of different classes, at jittered places in two different quadrants of the canvas,
under light Gaussian noise. Where an explanation ought to point is therefore known to the pixel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from salience.errors import InputError
from salience.reproductions.worlds import digits

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RELATIONS = ("left of", "right of", "above", "below")
_SIDE = 8
_INK_FROM = 0.25  # a pixel at least this dark belongs to the stroke


@dataclass(frozen=True)
class Scenes:
    """Scenes of two digits each; axis 1 of all but `images`, `relations` and `captions` is the object.

    Attributes
    ----------
    images : (n, 1, size, size) float32
        Ink from 0 to 1 plus noise.
    labels : (n, 2) int64
        Class of each digit, two different ones.
    boxes : (n, 2, 4) int64
        ``x0, y0, x1, y1`` in pixels, the end excluded: always 8 x 8.
    masks : (n, 2, size, size) bool
        The pixels of each digit's strokes.
    relations : (n,) int64
        Index in `RELATIONS` of what the first digit is to the second.
    captions : tuple of n str
        Such as "a three left of a seven".
    """

    images: Float[np.ndarray, "n 1 size size"]
    labels: Int[np.ndarray, "n 2"]
    boxes: Int[np.ndarray, "n 2 4"]
    masks: Bool[np.ndarray, "n 2 size size"]
    relations: Int[np.ndarray, " n"]
    captions: tuple[str, ...]

    def multi_hot(self) -> Float[np.ndarray, "n 10"]:
        """Targets of a multi-label network: 1 for the two classes in the scene, else 0."""
        targets = np.zeros((len(self.labels), 10), dtype=np.float32)
        np.put_along_axis(targets, self.labels, 1.0, axis=1)
        return targets

    def box_masks(self, margin: int = 0) -> Bool[np.ndarray, "n 2 size size"]:
        """The pixels inside each box, widened by `margin` pixels on all sides (for the pointing game)."""
        x0, y0, x1, y1 = (self.boxes[..., i, None] for i in range(4))
        pixel = np.arange(self.images.shape[-1])
        columns = (pixel >= x0 - margin) & (pixel < x1 + margin)
        rows = (pixel >= y0 - margin) & (pixel < y1 + margin)
        return rows[..., :, None] & columns[..., None, :]

    def part_masks(self) -> Bool[np.ndarray, "n 2 4 size size"]:
        """The strokes of each digit cut in four parts: top left, top right, bottom left, bottom right."""
        x0, y0 = self.boxes[..., 0, None], self.boxes[..., 1, None]
        pixel = np.arange(self.images.shape[-1])
        right, bottom = pixel >= x0 + _SIDE // 2, pixel >= y0 + _SIDE // 2
        quarters = [
            rows[..., :, None] & columns[..., None, :] for rows in (~bottom, bottom) for columns in (~right, right)
        ]
        return np.stack(quarters, axis=2) & self.masks[:, :, None]


def scenes(count: int, seed: int, *, part: str = "train", size: int = 32, noise: float = 0.05) -> Scenes:
    """Draw `count` scenes.

    Parameters
    ----------
    count : int
        Number of scenes.
    seed : int
        Of the digits' split into training and test images, and of the scenes.
    part : {"train", "test"}
        Which digit images are pasted; scenes of the two parts share no digit image.
    size : int
        Side of the canvas in pixels, even, at least 16.
    noise : float
        Standard deviation of the noise on every pixel.

    Raises
    ------
    InputError
        An option is out of range.
    """
    if part not in ("train", "test"):
        raise InputError(f"part must be 'train' or 'test'; got {part!r}")
    if size < 2 * _SIDE or size % 2:
        raise InputError(f"size must be even and at least {2 * _SIDE}; got {size!r}")
    if count < 1 or noise < 0:
        raise InputError(f"count must be at least 1 and noise at least 0; got {count!r} and {noise!r}")
    split = digits.ink(seed)
    inks, classes = (split.train_x, split.train_y) if part == "train" else (split.test_x, split.test_y)
    rng = np.random.default_rng([seed, part == "test"])

    labels = _two_different(rng, count, 10)
    quadrants = _two_different(rng, count, 4)
    glyphs = inks[_images_of(rng, classes, labels)]
    half = size // 2
    x0 = quadrants % 2 * half + rng.integers(0, half - _SIDE + 1, (count, 2))
    y0 = quadrants // 2 * half + rng.integers(0, half - _SIDE + 1, (count, 2))

    layers = np.zeros((count, 2, size, size), dtype=np.float32)
    scene, thing = np.ogrid[:count, :2]
    offset = np.arange(_SIDE)
    rows, columns = (y0[..., None] + offset)[..., :, None], (x0[..., None] + offset)[..., None, :]
    layers[scene[..., None, None], thing[..., None, None], rows, columns] = glyphs
    images = layers.sum(axis=1) + noise * rng.standard_normal((count, size, size), dtype=np.float32)

    relations = _relations(quadrants)
    captions = tuple(
        f"{_named(first)} {RELATIONS[relation]} {_named(second)}"
        for (first, second), relation in zip(labels.tolist(), relations.tolist())
    )
    boxes = np.stack([x0, y0, x0 + _SIDE, y0 + _SIDE], axis=-1)
    return Scenes(images[:, None], labels, boxes, layers >= _INK_FROM, relations, captions)


def _two_different(rng: np.random.Generator, count: int, kinds: int) -> Int[np.ndarray, "count 2"]:
    """Ordered pairs of different numbers below `kinds`, each as likely."""
    first = rng.integers(0, kinds, count)
    return np.stack([first, (first + rng.integers(1, kinds, count)) % kinds], axis=1)


def _images_of(
    rng: np.random.Generator, classes: Int[np.ndarray, " images"], labels: Int[np.ndarray, "n 2"]
) -> Int[np.ndarray, "n 2"]:
    """An image at random for each label."""
    by_class = np.argsort(classes, kind="stable")
    sizes = np.bincount(classes, minlength=10)
    starts = np.cumsum(sizes) - sizes
    return by_class[starts[labels] + (rng.random(labels.shape) * sizes[labels]).astype(np.int64)]


def _relations(quadrants: Int[np.ndarray, "n 2"]) -> Int[np.ndarray, " n"]:
    """Left or right where the digits stand in different halves, else above or below."""
    column, row = quadrants % 2, quadrants // 2
    sideways = np.where(column[:, 0] < column[:, 1], 0, 1)
    upright = np.where(row[:, 0] < row[:, 1], 2, 3)
    return np.where(column[:, 0] != column[:, 1], sideways, upright)


def _named(label: int) -> str:
    return f"{'an' if label == 8 else 'a'} {WORDS[label]}"
