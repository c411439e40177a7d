"""Does a map point at the object? Pointing, weakly supervised localisation, energy inside the object."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.ndimage import find_objects
from scipy.ndimage import label as components
from torch import Tensor

from salience.errors import InputError
from salience.features.map_measures import unit_range

THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20))


class Pointing(NamedTuple):
    """Whether each map's highest point lies in the box, and which maps are flat (a miss, whatever its argmax)."""

    hits: Bool[np.ndarray, " n"]
    flat: Bool[np.ndarray, " n"]


def pointing(
    maps: Float[Tensor, "n height width"], boxes: Int[Tensor, "n 4"] | np.ndarray, margin: int = 0
) -> Pointing:
    """Whether the largest value lies inside the object's box.

    `PointingGame` averages over classes and takes masks and a round tolerance; this counts each image and takes
    boxes, as the study does.

    Parameters
    ----------
    maps : Tensor (n, height, width)
    boxes : (n, 4)
        ``x0, y0, x1, y1`` in pixels, the end excluded.
    margin : int
        Pixels by which a box is widened.

    Raises
    ------
    InputError
        A box that is empty or not within the image, or shapes that do not fit.
    """
    values, found = _checked(maps, boxes)
    flat = values.reshape(len(values), -1)
    y, x = np.divmod(flat.argmax(1), values.shape[2])
    x0, y0, x1, y1 = found.T
    inside = (x >= x0 - margin) & (x < x1 + margin) & (y >= y0 - margin) & (y < y1 + margin)
    level = np.ptp(flat, axis=1) == 0
    return Pointing(inside & ~level, level)


def localised(
    maps: Float[Tensor, "n height width"], boxes: Int[Tensor, "n 4"] | np.ndarray, threshold: float
) -> Bool[np.ndarray, " n"]:
    """Weakly supervised localisation: the box around the map's largest bright part, against the object's.

    The map, stretched to 0..1, is cut at `threshold`; of the largest connected part the tightest box is taken; it
    counts when ``intersection / union > 0.5``.

    Parameters
    ----------
    maps, boxes
        As in `pointing`.
    threshold : float in 0..1
        See `best_threshold`.

    Raises
    ------
    InputError
        As in `pointing`.
    """
    values, found = _checked(maps, boxes)
    bright = unit_range(torch.from_numpy(values)).numpy() >= threshold
    right = np.zeros(len(values), dtype=bool)
    for i, (one, box, value) in enumerate(zip(bright, found, values)):
        if np.ptp(value) == 0:
            continue
        parts, _ = components(one)
        largest = int(np.bincount(parts.ravel())[1:].argmax()) + 1
        rows, columns = find_objects(parts)[largest - 1]
        right[i] = _overlap((columns.start, rows.start, columns.stop, rows.stop), tuple(box.tolist())) > 0.5
    return right


def best_threshold(maps: Float[Tensor, "n height width"], boxes: Int[Tensor, "n 4"] | np.ndarray) -> float:
    """The threshold of a grid that localises most; look for it on images that are not judged."""
    return max(THRESHOLDS, key=lambda threshold: localised(maps, boxes, threshold).mean())


def energy_inside(
    maps: Float[Tensor, "n height width"], masks: Bool[Tensor, "n height width"]
) -> Float[np.ndarray, " n"]:
    """Share of a map's sum of absolute values that lies on a mask; NaN for a map of zeros."""
    values, inside = maps.detach().abs().double().cpu(), masks.cpu()
    if values.shape != inside.shape or inside.dtype != torch.bool:
        raise InputError(f"masks: must be bool {tuple(values.shape)}; got {inside.dtype} {tuple(inside.shape)}")
    total = values.sum((1, 2))
    return torch.where(total > 0, (values * inside).sum((1, 2)) / total, torch.nan).numpy()


def _checked(maps: Tensor, boxes: Tensor | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values, found = maps.detach().double().cpu().numpy(), np.asarray(boxes)
    if values.ndim != 3 or found.shape != (len(values), 4):
        raise InputError(
            f"boxes: have shape {found.shape}; (n, 4) for n maps is needed, which have shape {values.shape}"
        )
    if not np.isfinite(values).all():
        raise InputError("maps: hold NaN or infinity")
    height, width = values.shape[1:]
    x0, y0, x1, y1 = found.T
    wrong = ~((x0 >= 0) & (y0 >= 0) & (x0 < x1) & (y0 < y1) & (x1 <= width) & (y1 <= height))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise InputError(
            f"boxes: number {row}, {found[row].tolist()}, is empty or outside of the image of {width} x {height} "
            "pixels; give x0, y0, x1, y1 with the end excluded, and leave out images without a box"
        )
    return values, found


def _overlap(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0, wide) * max(0, high)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)
