"""Random views of images: strong ones for contrast, weak ones for the classifier."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import affine_grid, conv2d, grid_sample, pad

from salience.errors import InputError

GREY = (0.299, 0.587, 0.114)


def strong_view(
    x: Float[Tensor, "n channels height width"], generator: torch.Generator, *, flip: bool = True,
    smallest: float = 0.2, jitter: float = 0.4,
) -> Float[Tensor, "n channels height width"]:  # fmt: skip
    """A random view as in SimCLR: resized crop, mirror image, jittered colours, grey, blur.

    Parameters
    ----------
    x : (n, channels, height, width) Tensor
        Of any scale: brightness moves by a share of each image's standard deviation.
    generator : torch.Generator
        On the CPU.
    flip : bool
        Mirror half of the images; not where left and right tell classes apart, as in digits.
    smallest : float
        In (0, 1]: smallest share of the area that a crop keeps; its sides vary by up to 4 : 3.
    jitter : float
        In [0, 1): largest change of brightness, contrast and (with three channels) saturation.

    Notes
    -----
    Probabilities are SimCLR's: 0.8 jitter, 0.2 grey, 0.5 blur. Hue stays; the blur is 3 x 3 [both ours].
    """
    _check(x)
    if not 0 < smallest <= 1 or not 0 <= jitter < 1:
        raise InputError(f"smallest, jitter: got {smallest!r}, {jitter!r}; numbers in (0, 1] and [0, 1) are needed")
    n = len(x)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(n, generator=generator) * (high - low) + low

    area, ratio = uniform(smallest, 1.0), uniform(-0.2877, 0.2877).exp()  # 3/4 to 4/3
    height, width = (area / ratio).sqrt().clamp(max=1), (area * ratio).sqrt().clamp(max=1)
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0) if flip else torch.ones(n)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = width * mirror, height
    theta[:, 0, 2], theta[:, 1, 2] = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)
    grid = affine_grid(theta.to(x), list(x.shape), align_corners=False)
    view = grid_sample(x, grid, padding_mode="border", align_corners=False)

    def chosen(share: float, changed: Tensor) -> Tensor:
        return torch.where((uniform(0, 1) < share).to(x.device)[:, None, None, None], changed, view)

    deviation, middle = view.std((1, 2, 3), keepdim=True), view.mean((1, 2, 3), keepdim=True)
    bright, contrast, colour = (uniform(-jitter, jitter).to(x)[:, None, None, None] for _ in range(3))
    jittered = (view - middle) * (1 + contrast) + middle + bright * deviation
    jittered = jittered + colour * (jittered - _grey(jittered))
    view = chosen(0.8, jittered)
    if x.shape[1] == 3:
        view = chosen(0.2, _grey(view).expand_as(view))
    kernel = torch.tensor([1.0, 2.0, 1.0])
    kernel = (kernel[:, None] * kernel / 16).to(x).expand(x.shape[1], 1, 3, 3)
    return chosen(0.5, conv2d(pad(view, (1, 1, 1, 1), mode="replicate"), kernel, groups=x.shape[1]))


def weak_view(
    x: Float[Tensor, "n channels height width"], generator: torch.Generator, *, flip: bool = True, shift: float = 0.125
) -> Float[Tensor, "n channels height width"]:
    """Shift each image by a few pixels (a padded random crop), and mirror half of them.

    Parameters
    ----------
    x, generator, flip
        As of `strong_view`.
    shift : float
        Largest shift as a share of the sides: 4 of 32 pixels, 1 of 8.
    """
    _check(x)
    n, _, height, width = x.shape
    by = [max(0, round(shift * side)) for side in (height, width)]
    dy, dx = (torch.randint(2 * most + 1, (n,), generator=generator) for most in by)
    mirror = torch.rand(n, generator=generator) < 0.5
    columns = torch.arange(width).expand(n, width)
    columns = torch.where(mirror[:, None] & torch.tensor(flip), width - 1 - columns, columns) + dx[:, None]
    lines = torch.arange(height) + dy[:, None]
    padded = pad(x, (by[1], by[1], by[0], by[0]), mode="replicate")
    rows = torch.arange(n)[:, None, None]
    return padded.permute(0, 2, 3, 1)[rows, lines[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _grey(x: Tensor) -> Tensor:
    if x.shape[1] != 3:
        return x
    return (x * torch.tensor(GREY).to(x)[:, None, None]).sum(1, keepdim=True)


def _check(x: Tensor) -> None:
    if x.ndim != 4 or not x.is_floating_point():
        raise InputError(f"x: {x.dtype} of shape {tuple(x.shape)}; floats (n, channels, height, width) are needed")
