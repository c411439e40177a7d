"""Maps that know nothing of the model: what an explanation has to beat."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, pad

from salience.errors import InputError


def random_smooth_maps(
    count: int, size: tuple[int, int], *, generator: torch.Generator, cells: int = 7
) -> Float[Tensor, "count height width"]:
    """Noise of `cells` x `cells` values, enlarged bicubically: blobs as smooth as maps of a late layer.

    Pixel noise would be too weak an opponent: scattered pixels destroy or restore a picture less than blobs do.

    Parameters
    ----------
    count : int
    size : (height, width)
    generator : torch.Generator
        On the CPU.
    cells : int
        Values along a side; 7 is what a network of 32-fold stride gives for a picture of 224 pixels.

    Raises
    ------
    InputError
        `count` or `cells` is below 1.
    """
    if count < 1 or cells < 1:
        raise InputError(f"count and cells: got {count!r} and {cells!r}; both must be at least 1")
    noise = torch.randn((count, 1, cells, cells), generator=generator)
    return interpolate(noise, size, mode="bicubic", align_corners=False)[:, 0]


def centre_maps(inputs: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n height width"]:
    """A Gaussian hill in the middle of the picture, a quarter of its side wide."""
    rows, columns = (
        torch.exp(-((torch.linspace(-1, 1, side) if side > 1 else torch.zeros(1)) ** 2) * 2)
        for side in inputs.shape[2:]
    )
    return torch.outer(rows, columns).expand(len(inputs), *inputs.shape[2:])


def edge_maps(inputs: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n height width"]:
    """Strength of the Sobel gradient, summed over the channels: a map of the picture alone."""
    kernel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
    kernels = torch.stack([kernel, kernel.T])[:, None].to(inputs)
    flat = inputs.flatten(0, 1)[:, None]
    padded = pad(flat, (1, 1, 1, 1), mode="replicate")
    strength = conv2d(padded, kernels).square().sum(1).sqrt()
    return strength.unflatten(0, inputs.shape[:2]).sum(1)
