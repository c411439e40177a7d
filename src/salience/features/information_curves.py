"""Softmax and accuracy information curves: how fast does the answer come back with the information?

The image is first known at 1 % of its pixels and interpolated in between, then also at the most important
ones. The curve is the model's score over the information in the picture, measured by its size in lossless
WebP; both axes run from the blurred picture (0) to the whole one (1).

Source: Kapishnikov et al., "XRAI: Better Attributions Through Regions", 2019 (arXiv 1906.02825), in the
variant of the authors' package: the score never falls along the curve, and 1,000 points are taken.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.integrate import trapezoid
from scipy.interpolate import LinearNDInterpolator
from scipy.spatial import QhullError
from torch import Tensor

from salience.model.batches import map_batches

THRESHOLDS = (0.005, 0.01, 0.03, 0.08, 0.10, 0.21, 0.34, 0.5, 0.75)  # as in BEE's reference code
POINTS = 1000


def information_scores(
    score: Callable[[Tensor, Tensor], Tensor],
    inputs: Float[Tensor, "n channels height width"],
    maps: Float[Tensor, "n height width"],
    *,
    generator: torch.Generator,
    fraction: float = 0.01,
    min_score: float = 0.5,
    batch_size: int = 64,
) -> Float[np.ndarray, " n"]:
    """Area under the information curve of each map.

    Parameters
    ----------
    score : callable
        ``score(images, rows)`` gives one score per image: the probability (SIC), or 1 where the class is
        predicted (AIC).
    inputs : Tensor (n, channels, height, width)
    maps : Tensor (n, height, width)
    generator : torch.Generator
        Draws the pixels known from the start, the same for equal images in a row.
    fraction : float
        Share of the pixels known from the start; the corners always are.
    min_score : float
        An image with a lower score is skipped.
    batch_size : int

    Returns
    -------
    array (n,), float64
        In 0..1; NaN where the curve is not defined: a score below `min_score`, or a blurred picture with no
        lower score or no less information than the whole one.
    """
    n, _, height, width = inputs.shape
    results = np.full(n, np.nan)
    start: np.ndarray | None = None
    for row in range(n):
        if start is None or not torch.equal(inputs[row], inputs[row - 1]):
            start = _random_mask(height, width, fraction, generator)
        image, importance = inputs[row].double().cpu().numpy(), maps[row].double().cpu().numpy()
        masks = [start] + [start | (importance >= np.quantile(importance, 1 - share)) for share in THRESHOLDS]
        low, high = image.min(), image.max()
        levels = np.rint((image - low) / max(high - low, 1e-12) * 255)  # the 256 levels of a picture file
        pictures = [*(_interpolated(levels, mask) for mask in masks), levels]
        images = torch.from_numpy(np.stack(pictures) / 255 * (high - low) + low).to(inputs)
        rows = torch.full((len(images),), row)
        scores = map_batches(lambda i: score(images[i.to(images.device)], rows[i]), torch.arange(len(images)),  # noqa: B023
                             batch_size=batch_size).numpy()  # fmt: skip
        results[row] = _area(np.array([_bytes(picture) for picture in pictures]), scores, min_score)
    return results


def _area(sizes: np.ndarray, scores: np.ndarray, min_score: float) -> float:
    """Area of the curve; the blurred picture comes first and the whole one last."""
    size, gain = sizes[-1] - sizes[0], scores[-1] - scores[0]
    if scores[-1] < min_score or gain <= 0 or size <= 0:
        return float("nan")
    x = np.clip((sizes[1:-1] - sizes[0]) / size, 0, 1)
    y = np.maximum.accumulate(np.clip((scores[1:-1] - scores[0]) / gain, 0, 1))
    x, y = np.append(x, [0.0, 1.0]), np.append(y, [0.0, 1.0])
    rising = np.argsort(x, kind="stable")  # at equal sizes the two ends come last
    grid = np.linspace(0, 1, POINTS, endpoint=False)
    heights = np.append(np.interp(grid, x[rising], y[rising]), 1.0)
    return float(trapezoid(heights, np.append(grid, 1.0)))


def _interpolated(levels: np.ndarray, known: Bool[np.ndarray, "height width"]) -> np.ndarray:
    """Linear between the known pixels, the mean colour outside of them, in whole levels."""
    height, width = known.shape
    known = known.copy()
    known[[0, 0, height - 1, height - 1], [0, width - 1, 0, width - 1]] = True
    if known.all():
        return levels
    result, mean = levels.copy(), levels.mean(axis=(1, 2))
    try:
        between = LinearNDInterpolator(np.argwhere(known), levels[:, known].T)(np.argwhere(~known)).T
    except QhullError:  # a picture one pixel wide
        between = np.full((len(levels), (~known).sum()), np.nan)
    result[:, ~known] = np.where(np.isnan(between), mean[:, None], between)
    return np.rint(result.astype(np.float32)).astype(np.float64)  # ties fall as in the authors' package


def _random_mask(height: int, width: int, fraction: float, generator: torch.Generator) -> np.ndarray:
    chosen = torch.randperm(height * width, generator=generator)[: int(height * width * fraction)]
    mask = np.zeros(height * width, dtype=bool)
    mask[chosen.numpy()] = True
    return mask.reshape(height, width)


def _bytes(levels: Float[np.ndarray, "channels height width"]) -> int:
    """Size of the picture in lossless WebP; channels beyond three stand side by side."""
    from PIL import Image

    pixels = levels.astype(np.uint8)
    picture = pixels.transpose(1, 2, 0) if len(pixels) == 3 else np.concatenate(list(pixels), axis=1)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="webp", lossless=True, quality=100)
    return buffer.tell()
