"""Measures of saliency maps on the model they explain: does it agree that the bright pixels matter?

No measure here needs a label. Each perturbs the image as the map says and follows the probability of the
explained class; `HIGHER_IS_BETTER` says which way is good.

==========  =====================================================================================
insertion   area of the probability while the least important pixels go first: high is good
deletion    area of the probability while the most important pixels go first: low is good
neg, pos    the same two areas of "is the class still predicted?"
pic         1 where the image times its map (from 0 to 1) has a higher probability than the image
adp         share of the probability that is lost there, ``max(0, p - p_masked) / p``
sic, aic    information curves, see `information_scores`
==========  =====================================================================================

Sources: insertion and deletion: Petsiuk et al. 2018 (arXiv 1806.07421); pos and neg: Chefer et al. 2021
(arXiv 2012.09838); pic and adp: Chattopadhay et al. 2018 (arXiv 1710.11063). The grid of shares of BEE (nine
steps of a tenth, the bare image included) is that of its reference code.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.integrate import trapezoid
from torch import Tensor, nn

from salience.errors import InputError, nearest
from salience.features.information_curves import information_scores
from salience.measure.curves import curve
from salience.model.at import logits_of, run, training_mode
from salience.model.batches import map_batches

HIGHER_IS_BETTER = {
    "insertion": True, "deletion": False, "pos": False, "neg": True, "pic": True, "adp": False, "aic": True,
    "sic": True,
}  # fmt: skip


def score_maps(
    model: nn.Module,
    inputs: Float[Tensor, "n channels height width"],
    maps: Float[Tensor, "n height width"],
    targets: Int[Tensor, " n"],
    measure: str = "insertion",
    *,
    steps: int = 10,
    until: float = 1.0,
    fill: float | Tensor = 0.0,
    multi_label: bool = False,
    generator: torch.Generator | None = None,
    internal_batch_size: int = 64,
) -> Float[np.ndarray, " n"]:
    """Score each saliency map by one measure, on the model that it explains.

    For insertion and deletion, with pixels in ascending or descending order of the map, ``p_s`` the
    probability of the target with a share s of them replaced by `fill`::

        score = 1 / until * integral from 0 to `until` of p_s ds        (trapezoid rule)

    Parameters
    ----------
    model : torch.nn.Module
        Returns logits (n, classes), alone or in a `ModelOutput`. Evaluated in evaluation mode without
        gradients, and left as it was.
    inputs : Tensor (n, channels, height, width)
        Images as the model takes them.
    maps : Tensor (n, height, width)
        Importance of each pixel, any scale; must be finite.
    targets : Tensor (n,)
        The explained class of each image.
    measure : str
        One of `HIGHER_IS_BETTER`.
    steps : int
        Steps of equal size from no pixel to all, for the four areas.
    until : float in (0, 1]
        Share of the pixels at which the areas end.
    fill : float or Tensor (channels,)
        What replaces a removed pixel, in the scale of `inputs`.
    multi_label : bool
        The probability is the sigmoid of the class's own logit, and a class counts as predicted from 0.5
        on; else softmax and the largest logit.
    generator : torch.Generator, optional
        Draws the pixels that the information curves begin with; seed 0 when left out.
    internal_batch_size : int
        Images per pass at most; halved when memory runs out.

    Returns
    -------
    array (n,), float64
        NaN only where an information curve is not defined.

    Raises
    ------
    InputError
        Shapes do not fit, a map is not finite, or an option is out of range.
    """
    if measure not in HIGHER_IS_BETTER:
        raise InputError(f"measure: got {measure!r}; {nearest(measure, HIGHER_IS_BETTER)}")
    if not 0 < until <= 1 or round(until * steps) < 1:
        raise InputError(f"until: got {until!r} with {steps} steps; it must lie in (0, 1] and hold one step")
    inputs, maps, targets = check_maps(inputs, maps, targets)
    score = scorer(model, targets, predicted=measure in ("pos", "neg", "aic"), multi_label=multi_label)
    with training_mode(model, False), torch.no_grad():
        if measure in ("pic", "adp"):
            return _masked(score, inputs, maps, measure, internal_batch_size)
        if measure in ("aic", "sic"):
            draws = generator or torch.Generator().manual_seed(0)
            return information_scores(score, inputs, maps, generator=draws, batch_size=internal_batch_size)
        first = _ranked(maps, most_first=measure in ("deletion", "pos"))
        removed = curve(
            _removal(score, inputs, fill, internal_batch_size), first, steps, batch_size=8 * internal_batch_size
        )
    kept = removed.changed <= until + 1e-9
    share = removed.changed[kept]
    return trapezoid(removed.scores[:, kept], share, axis=1) / share[-1]


def perturbation_curve(
    model: nn.Module,
    inputs: Float[Tensor, "n channels height width"],
    maps: Float[Tensor, "n height width"],
    targets: Int[Tensor, " n"],
    mode: str = "insertion",
    *,
    steps: int = 20,
    fill: float | Tensor = 0.0,
    multi_label: bool = False,
    internal_batch_size: int = 64,
) -> tuple[Float[np.ndarray, " points"], Float[np.ndarray, "n points"]]:
    """Follow the probability of the target while pixels come (insertion) or go (deletion), the most important first.

    Parameters
    ----------
    model, inputs, maps, targets, steps, fill, multi_label, internal_batch_size
        As in `score_maps`.
    mode : {"insertion", "deletion"}

    Returns
    -------
    (array (steps + 1,), array (n, steps + 1))
        Share of the pixels that has changed, and the probability there.

    Raises
    ------
    InputError
        As in `score_maps`.
    """
    inputs, maps, targets = check_maps(inputs, maps, targets)
    score = scorer(model, targets, predicted=False, multi_label=multi_label)
    with training_mode(model, False), torch.no_grad():
        followed = curve(
            _removal(score, inputs, fill, internal_batch_size), _ranked(maps, most_first=True), steps, mode=mode,
            batch_size=8 * internal_batch_size,
        )  # fmt: skip
    return followed.changed, followed.scores


def scorer(
    model: nn.Module, targets: Int[Tensor, " n"], *, predicted: bool = False, multi_label: bool = False
) -> Callable[[Tensor, Tensor], Tensor]:
    """``score(images (b, ...), rows (b,)) -> (b,)``: the probability of row's target, or 1 where it is predicted."""

    def score(images: Tensor, rows: Tensor) -> Tensor:
        logits = logits_of(run(model, images)).double()
        if logits.ndim != 2:
            raise InputError(f"model: returned logits of shape {tuple(logits.shape)}; one row of classes is needed")
        wanted = targets[rows].to(logits.device)
        if predicted and not multi_label:
            return (logits.argmax(1) == wanted).double()
        own = logits.sigmoid() if multi_label else logits.softmax(1)
        probability = own.gather(1, wanted[:, None])[:, 0]
        return (probability >= 0.5).double() if predicted else probability

    return score


def check_maps(inputs: Tensor, maps: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three, detached, maps (n, 1, h, w) squeezed; refuses what does not fit together."""
    if inputs.ndim != 4 or len(inputs) == 0:
        raise InputError(f"inputs: have shape {tuple(inputs.shape)}; (n, channels, height, width) is needed")
    if maps.ndim == 4 and maps.shape[1] == 1:
        maps = maps[:, 0]
    if maps.shape != (len(inputs), *inputs.shape[2:]):
        raise InputError(
            f"maps: have shape {tuple(maps.shape)}; one of {tuple(inputs.shape[2:])} for each of {len(inputs)} images"
        )
    if not torch.isfinite(maps).all():
        raise InputError("maps: hold NaN or infinity")
    if targets.shape != (len(inputs),) or targets.is_floating_point():
        raise InputError(f"targets: have shape {tuple(targets.shape)}; one class index per image is needed")
    return inputs.detach(), maps.detach(), targets.detach()


def unit_range(maps: Float[Tensor, "n height width"]) -> Float[Tensor, "n height width"]:
    """Each map stretched to 0..1; a flat one becomes 0."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return torch.where(high > low, (maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny), 0.0)


def _ranked(maps: Tensor, most_first: bool) -> np.ndarray:
    flat = maps.flatten(1).double().cpu().numpy()
    return np.argsort(-flat if most_first else flat, axis=1, kind="stable")


def _removal(score: Callable, inputs: Tensor, fill: float | Tensor, size: int) -> Callable:
    """The score of images in which all pixels but those kept are `fill`."""
    filled = torch.as_tensor(fill, dtype=inputs.dtype, device=inputs.device).reshape(1, -1, 1, 1)
    if filled.shape[1] not in (1, inputs.shape[1]):
        raise InputError(f"fill: has {filled.shape[1]} values for images of {inputs.shape[1]} channels")

    def of(keep: np.ndarray, rows: np.ndarray) -> np.ndarray:
        stays, row = torch.from_numpy(keep), torch.from_numpy(rows)

        def scores(index: Tensor) -> Tensor:
            mask = stays[index].reshape(-1, 1, *inputs.shape[2:]).to(inputs.device)
            chosen = row[index]
            return score(torch.where(mask, inputs[chosen.to(inputs.device)], filled), chosen)

        return map_batches(scores, torch.arange(len(row)), batch_size=size).numpy()

    return of


def _masked(score: Callable, inputs: Tensor, maps: Tensor, measure: str, size: int) -> np.ndarray:
    weights = unit_range(maps)[:, None].to(inputs)

    def both(rows: Tensor) -> Tensor:
        here = rows.to(inputs.device)
        images = inputs[here]
        return torch.stack([score(images, rows), score(images * weights[here], rows)], 1)

    bare, masked = map_batches(both, torch.arange(len(inputs)), batch_size=size).numpy().T
    if measure == "pic":
        return (masked > bare).astype(np.float64)
    # A probability of exactly 0 cannot drop.
    return np.divide(np.maximum(0, bare - masked), bare, out=np.zeros_like(bare), where=bare > 0)
