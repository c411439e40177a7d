"""Three of the desiderata of explanations as numbers, and the perturbation that stability is measured under."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import affine_grid, conv2d, grid_sample, pad

from salience.errors import DataError, InputError

Theta = Float[Tensor, "m k"] | Float[np.ndarray, "m k"]
_GREY = (0.299, 0.587, 0.114)


def desiderata(
    theta_train: Theta, pred_train: Any, theta_test: Theta, pred_test: Any, theta_aug: Theta
) -> dict[str, float]:
    """Faithfulness, stability and sparsity of explanations that are one vector an image.

        faithfulness   accuracy on test images of a logistic regression  theta -> class that the model predicts
        stability      mean |theta - theta'| / |theta|,  theta' of the perturbed image; the lower, the better
        sparsity       share of entries below 0.1 / k, once vectors sum to 1

    Parameters
    ----------
    theta_train, theta_test, theta_aug : Tensor or array (m, k)
        Not negative: of the images that the regression learns from, of test images, and of the same test images
        perturbed.
    pred_train, pred_test : integers (m,)
        Classes that the *model* predicts, not labels.

    Returns
    -------
    dict
        ``faithfulness``, ``stability`` and ``sparsity``.

    Raises
    ------
    InputError
        Shapes that do not fit.
    DataError
        Vectors that are negative or not finite, a test vector of zeros, or only one class predicted.

    Notes
    -----
    Source: section 2 and Tables 1 and 2 of arXiv 2406.12649. The others of its five desiderata are no measurements:
    whether an explanation has several levels, and k itself.
    """
    found = per_image(theta_train, pred_train, theta_test, pred_test, theta_aug)
    return {name: float(values.mean()) for name, values in found.items()}


def per_image(
    theta_train: Theta, pred_train: Any, theta_test: Theta, pred_test: Any, theta_aug: Theta
) -> dict[str, Float[np.ndarray, " m"]]:
    """The measures of `desiderata` of each test image, to compare methods pair by pair."""
    train, test, aug = (_vectors(*pair) for pair in (
        ("theta_train", theta_train), ("theta_test", theta_test), ("theta_aug", theta_aug)))  # fmt: skip
    classes = [np.asarray(torch.as_tensor(p).cpu()).ravel() for p in (pred_train, pred_test)]
    if train.shape[1] != test.shape[1] or test.shape != aug.shape or [*map(len, classes)] != [len(train), len(test)]:
        raise InputError(f"theta_train, theta_test and theta_aug: got {train.shape}, {test.shape} and {aug.shape} for "
                         f"{len(classes[0])} and {len(classes[1])} predictions; they must fit")  # fmt: skip
    if len(np.unique(classes[0])) < 2:
        raise DataError(f"pred_train: the model predicts class {classes[0][0]} throughout, there is nothing to tell")
    size = np.linalg.norm(test, axis=1)
    if not size.all():
        raise DataError(f"theta_test: image {int(np.flatnonzero(size == 0)[0])} holds no concept at all")
    regression = LogisticRegression(max_iter=2000).fit(train, classes[0])
    return {
        "faithfulness": (regression.predict(test) == classes[1]).astype(np.float64),
        "stability": np.linalg.norm(test - aug, axis=1) / size,
        "sparsity": (test / test.sum(1, keepdims=True) < 0.1 / test.shape[1]).mean(1),
    }


def _vectors(name: str, value: Any) -> Float[np.ndarray, "m k"]:
    array = np.asarray(torch.as_tensor(value).cpu(), dtype=np.float64)
    if array.ndim != 2 or 0 in array.shape:
        raise InputError(f"{name}: must be a matrix (m, k); got {array.shape}")
    if not np.isfinite(array).all() or array.min() < 0:
        raise DataError(f"{name}: holds values that are negative or not finite")
    return array


def perturb(
    images: Float[Tensor, "m channel height width"],
    *,
    random_state: int = 0,
    flip: float = 0.5,
    crop: tuple[float, float] = (0.08, 1.0),
    jitter: float = 1.0,
    grey: float = 0.2,
    blur: bool = True,
    first_row: int = 0,
) -> Float[Tensor, "m channel height width"]:
    """Perturbed twins of images, as contrastive learning makes them.

    In this order: a mirrored image; a crop enlarged to the image's size; with probability 0.8 brightness, contrast and
    saturation by up to 50 % and hue by up to a tenth of the circle; no colour; a Gaussian blur whose deviation is 0.1
    to 2 pixels for each 224 of the shorter side.

    Parameters
    ----------
    images : Tensor (m, 3 or 1, height, width)
        In colour or grey, from 0 to 1, not normalised.
    random_state : int
        What happens to an image follows from this number and its row.
    flip, grey : float
        Probabilities of mirroring and of losing colour.
    crop : (float, float)
        Least and largest share of the area.
    jitter : float
        Strength of the colour jitter; 1 is as above, 0 none.
    blur : bool
    first_row : int
        Row of the first image, of data that come in parts.

    Returns
    -------
    Tensor
        Of the shape of `images`.

    Raises
    ------
    InputError
        Images that do not lie between 0 and 1, or an option out of range.

    Notes
    -----
    Source: Chen, Kornblith, Norouzi and Hinton, "A Simple Framework for Contrastive Learning of Visual
    Representations", ICML 2020, appendix A; section 2 of arXiv 2406.12649 for its use.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
        raise InputError(f"images: must be floats (m, 3 or 1, height, width); got {images.dtype} {tuple(images.shape)}")
    if len(images) and not (float(images.min()) >= 0 and float(images.max()) <= 1):
        raise InputError("images: colours must lie between 0 and 1; perturb before normalising")
    if not 0 < crop[0] <= crop[1] <= 1 or not 0 <= jitter <= 1 or not 0 <= flip <= 1 or not 0 <= grey <= 1:
        raise InputError(f"crop, jitter, flip and grey: got {crop}, {jitter}, {flip} and {grey}; they are shares of 1")
    twins = []
    for row, image in enumerate(images.expand(-1, 3, -1, -1), first_row):
        rng = np.random.default_rng([random_state, row])
        twin = _crop(image, rng, flip, crop)
        if rng.random() < 0.8:
            twin = _jitter(twin, rng, jitter)
        if rng.random() < grey:
            twin = _grey(twin).expand(3, -1, -1)
        twins.append(_blur(twin, rng.uniform(0.1, 2.0) * min(image.shape[1:]) / 224) if blur else twin)
    return torch.stack(twins)[:, : images.shape[1]] if twins else images


def _crop(image: Tensor, rng: np.random.Generator, flip: float, share: tuple[float, float]) -> Tensor:
    """A random part of the image, perhaps mirrored, at the image's size; the whole if ten draws do not fit in it."""
    wide = high = 1.0
    for _ in range(10):
        area, ratio = rng.uniform(*share), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        if max(area * ratio, area / ratio) <= 1:
            wide, high = math.sqrt(area * ratio), math.sqrt(area / ratio)
            break
    x, y = (rng.uniform(-(1 - side), 1 - side) for side in (wide, high))
    sign = -1.0 if rng.random() < flip else 1.0
    matrix = torch.tensor([[sign * wide, 0.0, x], [0.0, high, y]]).to(image)[None]
    grid = affine_grid(matrix, [1, *image.shape], align_corners=False)
    return grid_sample(image[None], grid, padding_mode="border", align_corners=False)[0]


def _jitter(image: Tensor, rng: np.random.Generator, strength: float) -> Tensor:
    """Brightness, contrast, saturation and hue, in a random order."""
    light, contrast, colour = (1 + strength * 0.5 * rng.uniform(-1, 1) for _ in range(3))
    turn = strength * 0.1 * rng.uniform(-1, 1)
    steps = (
        lambda x: x * light,
        lambda x: _grey(x).mean() + (x - _grey(x).mean()) * contrast,
        lambda x: _grey(x) + (x - _grey(x)) * colour,
        lambda x: _turn_hue(x, turn),
    )
    for i in rng.permutation(4):
        image = steps[i](image).clamp(0, 1)
    return image


def _grey(image: Tensor) -> Float[Tensor, "1 height width"]:
    return torch.einsum("c,chw->hw", torch.tensor(_GREY).to(image), image)[None]


def _turn_hue(image: Tensor, turn: float) -> Tensor:
    """Turn the hue (of hue, saturation, value) by a share of the circle."""
    value, least = image.amax(0), image.amin(0)
    chroma = value - least
    r, g, b = image
    safe = chroma.clamp(min=1e-12)
    hue = torch.where(value == r, (g - b) / safe % 6, torch.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4))
    hue = (hue + 6 * turn) % 6
    # Each channel is value minus chroma times a wedge of the hue.
    wedges = [(hue + shift) % 6 for shift in (5, 3, 1)]
    return torch.stack([value - chroma * torch.minimum(w, 4 - w).clamp(0, 1) for w in wedges])


def _blur(image: Tensor, sigma: float) -> Tensor:
    reach = max(1, min(math.ceil(3 * sigma), min(image.shape[1:]) - 1))
    at = torch.arange(-reach, reach + 1).to(image)
    kernel = torch.exp(-(at**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    for weights, edges in ((kernel, (reach, reach, 0, 0)), (kernel.mT, (0, 0, reach, reach))):
        image = conv2d(pad(image[None], edges, mode="reflect"), weights, groups=3)[0]
    return image
