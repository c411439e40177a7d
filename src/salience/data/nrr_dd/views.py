"""What a student sees of the distilled images: shuffled, cropped, flipped and mixed, the same again from a seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, one_hot

from salience.errors import InputError


class View(NamedTuple):
    """One view of every image: mixed pixels, the image's own class, and how much of which class is in it.

    `partner` is the class mixed in and `share` what is left of the image's own, lambda.
    """

    x: Float[Tensor, "n channel height width"]
    y: Int[Tensor, " n"]
    partner: Int[Tensor, " n"]
    share: Float[Tensor, " n"]

    def mixed(self, classes: int) -> Float[Tensor, "n classes"]:
        """The mixed one-hot label, ``y_aug = lambda y + (1 - lambda) y_partner``."""
        own, other = one_hot(self.y, classes), one_hot(self.partner, classes)
        return self.share[:, None] * own + (1 - self.share[:, None]) * other


@dataclass(frozen=True)
class Views:
    """How views are made; nothing but the seed of each is stored.

    Parameters
    ----------
    seeds : tuple of int
        One for each view. Training longer than there are views begins with the first again.
    tiles : int
        Strips of a mosaic, tiles a side, are shuffled; 1 for whole images.
    crop : float in (0, 1]
        Crops cover at least this share of the area; 1 does not crop. RDED takes 1/factor.
    flip : bool
        Mirror half of the images.
    mix : {"cutmix", "mixup"}
        Put a box of another image in, or fade over to it; the share is drawn uniformly, Beta(1, 1).

    Raises
    ------
    InputError
        No seed, or an option out of range.

    Notes
    -----
    Source: stage 3 of the paper; shuffling, crops, flips and mixing as in RDED's published code, except that the box is
    drawn for each image instead of once for a batch, and the share counts what is left after the box is cut to the
    image.
    """

    seeds: tuple[int, ...]
    tiles: int = 1
    crop: float = 1.0
    flip: bool = True
    mix: Literal["cutmix", "mixup"] = "cutmix"

    def __post_init__(self) -> None:
        if not self.seeds or self.tiles < 1 or not 0 < self.crop <= 1 or self.mix not in ("cutmix", "mixup"):
            raise InputError(
                f"views: got {len(self.seeds)} seeds, tiles {self.tiles!r}, crop {self.crop!r}, mix {self.mix!r}; at "
                "least one seed, at least one tile, a share in 0..1, and 'cutmix' or 'mixup' are needed"
            )

    def __len__(self) -> int:
        return len(self.seeds)

    def view(self, x: Float[Tensor, "n channel height width"], y: Int[Tensor, " n"], number: int) -> View:
        """View `number` of the images; the same images and seed give the same pixels."""
        generator = torch.Generator().manual_seed(self.seeds[number % len(self.seeds)])
        if self.tiles > 1:
            x = _shuffled(x, self.tiles, generator)
        if self.crop < 1:
            x = _crops(x, self.crop, generator)
        if self.flip:
            mirrored = torch.rand(len(x), generator=generator).to(x.device) < 0.5
            x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
        other = torch.randperm(len(x), generator=generator).to(x.device)
        share = torch.rand(len(x), generator=generator).to(x.device)
        if self.mix == "mixup":
            weight = share[:, None, None, None].to(x.dtype)
            return View(weight * x + (1 - weight) * x[other], y, y[other], share)
        box = _boxes(share, x.shape[2:], generator)
        share = 1 - box.flatten(1).float().mean(1)
        return View(torch.where(box[:, None], x[other], x), y, y[other], share)


def draw_seeds(count: int, generator: torch.Generator) -> tuple[int, ...]:
    """Seeds for as many views."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(f"views: got {count!r}; it must be a whole number of at least 1")
    return tuple(torch.randint(2**62, (count,), generator=generator).tolist())


def _shuffled(x: Tensor, tiles: int, generator: torch.Generator) -> Tensor:
    """Strips of columns in another order, then strips of rows; the last strip takes what is left over."""
    for axis in (3, 2):
        side = x.shape[axis]
        strip = (torch.arange(side) // max(1, side // tiles)).clamp(max=tiles - 1)
        rank = torch.rand(len(x), tiles, generator=generator)
        order = rank[:, strip].argsort(dim=1, stable=True).to(x.device)
        index = order[:, None, None, :] if axis == 3 else order[:, None, :, None]
        x = x.gather(axis, index.expand_as(x))
    return x


def _crops(x: Tensor, least: float, generator: torch.Generator) -> Tensor:
    """A crop of a share of the area between `least` and 1, sides 3:4 to 4:3, brought back to the size."""
    draws = torch.rand(4, len(x), generator=generator)
    area, ratio = least + (1 - least) * draws[0], (4 / 3) ** (2 * draws[1] - 1)
    wide, high = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    theta = torch.zeros(len(x), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = wide, high
    theta[:, 0, 2], theta[:, 1, 2] = (1 - wide) * (2 * draws[2] - 1), (1 - high) * (2 * draws[3] - 1)
    grid = affine_grid(theta.to(x), list(x.shape), align_corners=False)
    return grid_sample(x, grid, padding_mode="border", align_corners=False)


def _boxes(share: Tensor, size: torch.Size, generator: torch.Generator) -> Tensor:
    """True inside a box of about 1 - share of the area around a place drawn uniformly, cut to the image."""
    inside = torch.ones(len(share), 1, 1, dtype=torch.bool, device=share.device)
    for axis, side in enumerate(size):
        cut = ((1 - share).sqrt() * side).long()
        centre = (torch.rand(len(share), generator=generator).to(share.device) * side).long()
        at = torch.arange(side, device=share.device)
        within = (at >= (centre - cut // 2)[:, None]) & (at < (centre + cut // 2)[:, None])
        inside = inside & (within[:, :, None] if axis == 0 else within[:, None, :])
    return inside
