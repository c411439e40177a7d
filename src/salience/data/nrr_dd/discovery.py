"""Stage 1, critical-based initial data discovery: real patches with much evidence and little confidence."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import interpolate, log_softmax, pad

from salience.data.nrr_dd.activation import BATCH, check_classes, check_images, class_activation_map
from salience.errors import InputError
from salience.model.at import logits_of, training_mode
from salience.model.batches import map_batches

Order = Literal["low", "high", "random"]


def discover_patches(
    model: nn.Module,
    images: Any,
    labels: Int[Tensor, " n"],
    ipc: int,
    factor: int = 1,
    *,
    crops: int = 5,
    top: int | None = 1,
    pool: int = 300,
    scale: tuple[float, float] | None = None,
    order: Order = "low",
    drop_wrong: bool = False,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "m channel height width"], Int[Tensor, " m"]]:
    """Images made of the real patches that show a class but leave the teacher least sure of it.

    Of each image, `crops` square crops are drawn around places where its class activation map is high; the `top` ones
    by CAM ratio stay, and of these the one of lowest confidence:

        ratio = mean CAM inside the crop / mean CAM of the image,    confidence = softmax(T(padded patch))_y

    Within each class ``ipc * factor**2`` images of lowest confidence are kept, and ``factor**2`` patches at a time are
    tiled into one image.

    Parameters
    ----------
    model : torch.nn.Module
        The teacher.
    images : (n, channel, height, width) Tensor, or a sequence or Dataset of images
        Normalised as the teacher takes them; a Dataset may give (image, …).
    labels : (n,) int Tensor
        As the teacher counts its classes.
    ipc : int
        Images per class to make.
    factor : int
        An image is a mosaic of factor x factor patches; 1 for small images.
    crops : int
        Crops of an image.
    top : int, optional
        Crops of an image that its CAM ratio lets through. None looks at no map: crops are drawn uniformly and all stay,
        as in RDED.
    pool : int
        Images of a class to choose from, drawn at random if there are more.
    scale : (float, float), optional
        Smallest and largest share of the area that a crop covers. By default crops are at least as large as a tile,
        (1 / factor^2, 1): whole images where factor is 1. RDED takes (0.08, 1).
    order : {"low", "high", "random"}
        Lowest confidence first as in the paper, highest first as in RDED, or at random.
    drop_wrong : bool
        Leave out patches of which the teacher says another class, where enough are left.
    generator : torch.Generator
        Draws pool and crops.

    Returns
    -------
    x : (classes x ipc, channel, height, width) Tensor
        The first image of every class, then the second, and so on.
    y : (classes x ipc,) Tensor

    Raises
    ------
    InputError
        An option out of range, or labels that the teacher has no logit for.

    Warns
    -----
    UserWarning
        A class has fewer images than patches are needed, so that some are repeated.

    Notes
    -----
    Source: section 3.2. The ratio and the drawing of crops around high places are proposals of ours; crops, padding,
    choice and tiling follow RDED's published code (nearest-neighbour where factor does not divide the size).
    """
    _check(ipc, factor, crops, top, pool, order)
    scale = (1 / factor**2, 1.0) if scale is None else scale
    if not 0 < scale[0] <= scale[1] <= 1:
        raise InputError(f"scale: got {scale!r}; it must be two shares of the area, the smaller first")
    labels = torch.as_tensor(labels)
    made, classes = [], labels.unique().tolist()
    for label in classes:
        rows = (labels == label).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=generator)[:pool]]
        x = take(images, rows)
        y = torch.full((len(x),), label, device=x.device)
        check_images(x, y)
        if min(x.shape[2:]) < factor:
            raise InputError(f"factor: {factor} patches do not fit into images of {x.shape[2]} x {x.shape[3]} pixels")
        cam = None if top is None else class_activation_map(model, x, y)
        patches, ratio = crop(x, cam, crops, scale, factor, generator)
        logs, right = confidence(model, patches, y, (x.shape[2], x.shape[3]))
        chosen = choose(
            logs, right, ratio, ipc * factor**2, top=top, order=order, drop_wrong=drop_wrong, generator=generator
        )
        made.append(mosaic(patches[chosen[:, 0], chosen[:, 1]], ipc, factor, (x.shape[2], x.shape[3])))
    x = torch.stack(made, 1).flatten(0, 1)
    return x, torch.tensor(classes, device=x.device).repeat(ipc)


def crop(
    x: Float[Tensor, "n channel height width"],
    cam: Float[Tensor, "n 1 height width"] | None,
    crops: int,
    scale: tuple[float, float],
    factor: int,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "n crops channel h w"], Float[Tensor, "n crops"]]:
    """Square crops of each image, brought to 1/factor of its size, with their CAM ratios (1 without a map)."""
    n, _, height, width = x.shape
    size = (height // factor, width // factor)
    share = torch.rand(n, crops, generator=generator) * (scale[1] - scale[0]) + scale[0]
    spot = torch.rand(n, crops, 2, generator=generator)
    if cam is not None:  # a pixel drawn with a chance in proportion to the map becomes the centre
        chances = cam.flatten(1).cpu().double() + 1e-6
        pixel = torch.multinomial(chances, crops, replacement=True, generator=generator)
        spot = torch.stack([pixel // width / height, pixel % width / width], 2)
    patches, ratios = [], []
    for i in range(n):
        for k in range(crops):
            h, w = (max(1, round(side * float(share[i, k]) ** 0.5)) for side in (height, width))
            if cam is None:
                top, left = int(float(spot[i, k, 0]) * (height - h + 1)), int(float(spot[i, k, 1]) * (width - w + 1))
            else:
                top, left = (
                    min(max(round(float(at) * side - cut / 2), 0), side - cut)
                    for at, side, cut in zip(spot[i, k], (height, width), (h, w), strict=True)
                )
            part = x[i : i + 1, :, top : top + h, left : left + w]
            patches.append(part if (h, w) == size else interpolate(part, size, mode="bilinear", antialias=True))
            inside = 1.0 if cam is None else float(cam[i, :, top : top + h, left : left + w].mean())
            ratios.append(inside / (1.0 if cam is None else max(float(cam[i].mean()), 1e-12)))
    return torch.cat(patches).unflatten(0, (n, crops)), torch.tensor(ratios).view(n, crops)


def confidence(
    model: nn.Module,
    patches: Float[Tensor, "n crops channel h w"],
    y: Int[Tensor, " n"],
    size: tuple[int, int],
) -> tuple[Float[Tensor, "n crops"], Bool[Tensor, "n crops"]]:
    """Log-probability of the class for each patch, padded with zeros to the image's size, and whether it is the top."""
    n, crops = patches.shape[:2]
    high, wide = size[0] - patches.shape[3], size[1] - patches.shape[4]
    around = (wide // 2, wide - wide // 2, high // 2, high - high // 2)
    flat, classes = patches.flatten(0, 1), y.repeat_interleave(crops)

    def of(rows: range) -> tuple[Tensor, Tensor]:
        logits = logits_of(model(pad(flat[rows.start : rows.stop], around)))
        own = classes[rows.start : rows.stop]
        check_classes(own, logits)
        return log_softmax(logits.float(), 1).gather(1, own[:, None])[:, 0], logits.argmax(1) == own

    with training_mode(model, False), torch.no_grad():
        logs, right = map_batches(of, range(len(flat)), batch_size=BATCH)
    return logs.view(n, crops), right.view(n, crops)


def choose(
    logs: Float[Tensor, "n crops"],
    right: Bool[Tensor, "n crops"],
    ratio: Float[Tensor, "n crops"],
    count: int,
    *,
    top: int | None = None,
    order: Order = "low",
    drop_wrong: bool = False,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "count 2"]:
    """Image and crop of each patch to keep: one per image, in the order of confidence."""
    if order == "random":
        cost = torch.rand(logs.shape, generator=generator)
    else:
        cost = logs if order == "low" else -logs
    if drop_wrong:
        cost = cost + 1e6 * ~right  # behind all others, for where too few are right
    if top is not None and top < ratio.shape[1]:
        cost = cost.masked_fill(ratio.argsort(dim=1, descending=True, stable=True).argsort(dim=1) >= top, torch.inf)
    best = cost.argmin(1)
    images = cost.gather(1, best[:, None])[:, 0].argsort(dim=0, stable=True)
    if len(images) < count:
        warnings.warn(f"{len(images)} images of a class for {count} patches: some are repeated", stacklevel=3)
        images = images.repeat(-(-count // len(images)))
    images = images[:count]
    return torch.stack([images, best[images]], 1)


def mosaic(
    patches: Float[Tensor, "m channel h w"], ipc: int, factor: int, size: tuple[int, int]
) -> Float[Tensor, "ipc channel height width"]:
    """Images of factor x factor tiles; image i is made of the patches i, ipc + i, 2 ipc + i and so on, in rows."""
    rows: list[Tensor] = []
    heights, widths = ([side // factor + (at < side % factor) for at in range(factor)] for side in size)
    tiles = iter(patches.split(ipc))
    for height in heights:
        row = [interpolate(next(tiles), (height, width)) for width in widths]
        rows.append(torch.cat(row, 3))
    return torch.cat(rows, 2)


def take(images: Any, rows: Int[Tensor, " k"]) -> Float[Tensor, "k channel height width"]:
    """Some of the images, of a tensor or of anything that can be indexed."""
    if isinstance(images, Tensor):
        return images[rows]
    items = [images[i] for i in rows.tolist()]
    return torch.stack([item[0] if isinstance(item, tuple | list) else item for item in items])


def _check(ipc: int, factor: int, crops: int, top: int | None, pool: int, order: str) -> None:
    for name, value in (("ipc", ipc), ("factor", factor), ("crops", crops), ("pool", pool)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name}: got {value!r}; it must be a whole number of at least 1")
    if top is not None and not 1 <= top <= crops:
        raise InputError(f"top: got {top!r}; it must lie between 1 and the number of crops, {crops}")
    if order not in ("low", "high", "random"):
        raise InputError(f"order: got {order!r}; it must be 'low', 'high' or 'random'")
