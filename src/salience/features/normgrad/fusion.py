"""One map from several layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from salience.errors import InputError

Map = Float[Tensor, "batch height width"]
FUSIONS = ("product", "mean")
# A position where one layer's map is smallest keeps what the other layers say of it, up to this factor.
_FLOOR = 1e-6
_FLAT = 1e-6  # of the largest value: less variation than this is rounding


def is_flat(maps: Map) -> Bool[Tensor, " batch"]:
    """Which maps are the same everywhere, up to rounding, and so point nowhere."""
    values = maps.flatten(1)
    return values.amax(1) - values.amin(1) <= _FLAT * values.abs().amax(1)


def normalise(maps: Map) -> Map:
    """Each map scaled to 0..1 by its own smallest and largest value; a flat map becomes 0."""
    values = maps.flatten(1)
    low, span = values.amin(1), values.amax(1) - values.amin(1)
    scaled = (maps - low[:, None, None]) / torch.where(span > 0, span, 1)[:, None, None]
    return scaled.masked_fill(is_flat(maps)[:, None, None], 0.0)


def layer_weights(weights: str | Sequence[float], count: int) -> Float[Tensor, " layer"]:
    """Weights of `count` layers, from the first to the last named one, that sum to 1.

    ``"uniform"``: equal; ``"linear"``: 1/L, 2/L, ... 1 before they are scaled; or numbers of your own, such as
    the accuracy of a linear probe at each layer.

    Raises
    ------
    InputError
        An unknown word, or numbers that are not one a layer, negative, or all 0.
    """
    if weights == "uniform":
        own = torch.ones(count, dtype=torch.float64)
    elif weights == "linear":
        own = torch.arange(1, count + 1, dtype=torch.float64) / count
    elif isinstance(weights, str):
        raise InputError(f"weights: got {weights!r}; it must be 'uniform', 'linear', or a number for each layer")
    else:
        own = torch.as_tensor(weights, dtype=torch.float64)
    if own.shape != (count,) or not bool(torch.isfinite(own).all()) or bool((own < 0).any()) or not float(own.sum()):
        raise InputError(f"weights: got {weights!r}; give {count} numbers of at least 0, one for each layer, not all 0")
    return own / own.sum()


def fuse(maps: Sequence[Map], how: str = "product", weights: str | Sequence[float] = "uniform") -> Map:
    """Fuse the maps ``s_l`` of several layers, each scaled to 0..1 per image.

        product:  prod_l s_l^(w_l)        mean:  sum_l w_l s_l        sum_l w_l = 1

    A flat map says nothing and is left out, for that image alone; the weights of the others make up for it.

    Parameters
    ----------
    maps : sequence of Tensor (batch, height, width)
        One for each layer, of one size.
    how : {"product", "mean"}
        Geometric or arithmetic mean.
    weights : {"uniform", "linear"} or sequence of float
        See `layer_weights`.

    Returns
    -------
    Tensor (batch, height, width)
        In 0..1; 0 where all maps are flat.

    Raises
    ------
    InputError
        No map, maps of different shapes, or an unknown option.
    """
    if how not in FUSIONS:
        raise InputError(f"fuse: got {how!r}; it must be 'product' or 'mean'")
    if not maps or len({tuple(one.shape) for one in maps}) > 1:
        raise InputError(f"maps: must be one a layer, of one shape; got {[tuple(one.shape) for one in maps]}")
    shares = layer_weights(weights, len(maps)).to(maps[0])[None] * ~torch.stack([is_flat(one) for one in maps], 1)
    total = shares.sum(1, keepdim=True)
    shares = (shares / torch.where(total > 0, total, 1))[..., None, None]
    scaled = torch.stack([normalise(one) for one in maps], 1)
    if how == "mean":
        return (shares * scaled).sum(1)
    fused = (shares * scaled.clamp(min=_FLOOR).log()).sum(1).exp()
    return torch.where(total[..., None] > 0, fused, 0.0)
