"""The five families of baselines of BEE: where the path to the activations of an image begins.

All act on activations (draws, channels, height, width) behind a layer, not on the image, and are drawn anew for
every map. [C] marks what the reference code does, [D] where we decided otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from salience.errors import InputError

# a (channels, height, width), number of draws, generator on the CPU, bank (images, channels, height, width)
Family = Callable[[Tensor, int, torch.Generator, Tensor | None], Tensor]

_BETAS = np.linspace(1e-4, 0.02, 500)  # forward diffusion up to t = 500 [C]
ALPHA_BAR = float(np.prod(1 - _BETAS))  # 0.0066: almost all noise
BLUR_SIGMAS = (3, 50)  # of an image of 224 pixels [C]


def normal(
    a: Float[Tensor, "channels height width"], draws: int, generator: torch.Generator, bank: Tensor | None = None
) -> Float[Tensor, "draws channels height width"]:
    """Diffused activations, stretched to the range of their channel.

    ``b = sqrt(ab) a + sqrt(1 - ab) eps`` with eps ~ N(0, 1) and ``ab = prod(1 - beta)``. [D]: the code multiplies
    eps by ``1 - ab`` and divides by the maximum instead of mapping onto [min, max] of the channel.
    """
    return _diffused(a, torch.randn((draws, *a.shape), generator=generator))


def uniform(
    a: Float[Tensor, "channels height width"], draws: int, generator: torch.Generator, bank: Tensor | None = None
) -> Float[Tensor, "draws channels height width"]:
    """The same as `normal`, with eps ~ U(0, 1)."""
    return _diffused(a, torch.rand((draws, *a.shape), generator=generator))


def blur(
    a: Float[Tensor, "channels height width"], draws: int, generator: torch.Generator, bank: Tensor | None = None
) -> Float[Tensor, "draws channels height width"]:
    """The activations under a Gaussian blur of random width.

    sigma is a whole number from 3 to 50 pixels of a 224-pixel image [C], scaled to the map [D]. At the border the
    kernel is cut and weighs 1 again, so that a flat channel stays flat [D].
    """
    sigmas = torch.randint(BLUR_SIGMAS[0], BLUR_SIGMAS[1] + 1, (draws,), generator=generator).double() / 224
    rows, columns = (_smoothing(size, sigmas * size).to(a) for size in a.shape[1:])
    return torch.einsum("dij,cjk,dlk->dcil", rows, a, columns)


def constant(
    a: Float[Tensor, "channels height width"], draws: int, generator: torch.Generator, bank: Tensor | None = None
) -> Float[Tensor, "draws channels height width"]:
    """One value per channel, uniform between the channel's minimum and maximum.

    [D]: the code takes minimum and maximum along one axis only.
    """
    share = torch.rand((draws, len(a), 1, 1), generator=generator).to(a)
    low, high = a.amin((1, 2), keepdim=True), a.amax((1, 2), keepdim=True)
    return (low + share * (high - low)).expand(draws, *a.shape)


def train(
    a: Float[Tensor, "channels height width"], draws: int, generator: torch.Generator, bank: Tensor | None = None
) -> Float[Tensor, "draws channels height width"]:
    """The activations of training images drawn at random."""
    if bank is None or len(bank) == 0:
        raise InputError("families: 'train' draws from activations of training images; fit first, or leave it out")
    return bank[torch.randint(len(bank), (draws,), generator=generator)].to(a)


baseline_families: dict[str, Family] = {
    "normal": normal, "uniform": uniform, "blur": blur, "const": constant, "train": train,
}  # fmt: skip


def _diffused(a: Tensor, noise: Tensor) -> Tensor:
    b = ALPHA_BAR**0.5 * a + (1 - ALPHA_BAR) ** 0.5 * noise.to(a)
    low, high = a.amin((1, 2), keepdim=True), a.amax((1, 2), keepdim=True)
    least, most = b.amin((2, 3), keepdim=True), b.amax((2, 3), keepdim=True)
    span = torch.where(most > least, most - least, 1.0)  # a map of one pixel
    return low + (b - least) / span * (high - low)


def _smoothing(size: int, sigmas: Float[Tensor, " draws"]) -> Float[Tensor, "draws size size"]:
    """Matrices that blur a line of `size` pixels."""
    pixel = torch.arange(size, dtype=torch.float64)
    weights = torch.exp(-((pixel[:, None] - pixel) ** 2) / (2 * sigmas[:, None, None] ** 2))
    return weights / weights.sum(2, keepdim=True)
