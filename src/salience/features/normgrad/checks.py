"""Can a map be relied on? Does it depend on the class, on the weights, and does it point at the object?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from captum.attr import Attribution
from jaxtyping import Bool, Float, Int
from scipy.ndimage import distance_transform_edt
from torch import Tensor, nn

from salience.errors import InputError
from salience.features.attribution import device_of, evaluating, images_and_labels, target_classes
from salience.measure.ranking import spearman
from salience.model.at import layer as layer_called
from salience.model.at import logits_of
from salience.model.batches import map_batches


class ClassSensitivity(NamedTuple):
    """Rank correlation between the maps of the likeliest and the least likely class.

    Attributes
    ----------
    mean : float
        Over the images with two maps that are not flat; 1: maps do not depend on the class; NaN: no such image.
    per_sample : array (n,)
        NaN where a map is flat.
    flat : int
        Images left out of the mean.
    """

    mean: float
    per_sample: Float[np.ndarray, " n"]
    flat: int


def class_sensitivity(attribution: Attribution, data: Any, *, batch_size: int = 32) -> ClassSensitivity:
    """How much maps depend on the class that they are to explain.

    The mean over images of ``spearman(map(argmax p), map(argmin p))``, of the values as they are, not their size.
    The lower, the more class-sensitive. (A flat or random map is low too: read it together with the pointing game.)

    Parameters
    ----------
    attribution : captum Attribution
        Of a `torch.nn.Module`.
    data : Tensor, DataLoader, Dataset
        Images, see `attribute_batches`.
    batch_size : int

    Returns
    -------
    ClassSensitivity

    Notes
    -----
    Source: Rebuffi et al., CVPR 2020 (arXiv 2004.02866); measure as in the authors' code.
    """
    model = attribution.forward_func

    def one(batch: Any) -> Tensor:
        images, _ = images_and_labels(batch, device_of(model))
        with torch.no_grad():
            logits = logits_of(model(images))
        logits = logits.mean((2, 3)) if logits.ndim == 4 else logits
        maps = [attribution.attribute(images, target=classes) for classes in (logits.argmax(1), logits.argmin(1))]
        return correlations(*(one.detach() for one in maps))

    with evaluating(model):
        per_sample = map_batches(one, data, batch_size=batch_size).numpy()
    return ClassSensitivity(_mean(per_sample), per_sample, int(np.isnan(per_sample).sum()))


def correlations(first: Tensor, second: Tensor, *, of_size: bool = False) -> Float[Tensor, " batch"]:
    """Spearman's rank correlation of two maps of each image; NaN where one is flat.

    With `of_size` the absolute values are ranked.
    """
    values = []
    for a, b in zip(first.flatten(1).double().cpu().numpy(), second.flatten(1).double().cpu().numpy(), strict=True):
        a, b = (np.abs(a), np.abs(b)) if of_size else (a, b)
        values.append(np.nan if np.ptp(a) == 0 or np.ptp(b) == 0 else spearman(a, b))
    return torch.tensor(values, dtype=torch.float64)


class Randomised(NamedTuple):
    """How alike maps stay when the weights of a layer (and, in a cascade, of all above it) are drawn anew.

    Attributes
    ----------
    spearman, spearman_of_size : float
        Mean rank correlation with the maps of the trained network, of values and of absolute values; NaN if every
        map is flat.
    flat : int
        Images left out since one of the two maps is flat.
    """

    spearman: float
    spearman_of_size: float
    flat: int


def weight_layers(model: nn.Module) -> list[str]:
    """Modules with parameters of their own, in the order of `named_modules`, from the input to the output."""
    return [name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))]


def randomization_check(
    attribution: Attribution,
    data: Any,
    *,
    mode: str = "cascade",
    layers: Sequence[str] | None = None,
    generator: torch.Generator,
    batch_size: int = 32,
) -> dict[str, Randomised]:
    """Draw weights anew, from the output to the input, and see whether the maps notice.

    A map that stays the same does not explain the network. The classes explained are those that the trained network
    predicts. Layers with a `reset_parameters` are drawn as they are before training, other parameters from a normal
    distribution of their own mean and spread. The model has its weights and buffers back afterwards.

    Parameters
    ----------
    attribution : captum Attribution
        Of a `torch.nn.Module`.
    data : Tensor, Dataset
        Images; they are read once for every layer.
    mode : {"cascade", "independent"}
        Each layer together with all above it, or by itself.
    layers : sequence of str, optional
        After which of the layers (`weight_layers`) to compare; after every one by default.
    generator : torch.Generator
        Of the new weights.
    batch_size : int

    Returns
    -------
    dict of str to Randomised
        From the output to the input.

    Raises
    ------
    InputError
        An unknown mode, or a layer without weights.

    Notes
    -----
    Source: Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018 (arXiv 1810.03292).
    """
    model = attribution.forward_func
    if mode not in ("cascade", "independent"):
        raise InputError(f"mode: got {mode!r}; it must be 'cascade' or 'independent'")
    if not isinstance(model, nn.Module):
        raise InputError("attribution: explains no torch.nn.Module, so that it has no weights to draw anew")
    known = weight_layers(model)
    wanted = known if layers is None else list(layers)
    for name in wanted:
        layer_called(model, name)
        if name not in known:
            raise InputError(f"layers: {name!r} has no parameters of its own; those with some: {', '.join(known[-8:])}")

    def maps_and_classes(classes: Tensor | None) -> tuple[Tensor, Tensor]:
        start = 0

        def one(batch: Any) -> tuple[Tensor, Tensor]:
            nonlocal start
            images, _ = images_and_labels(batch, device_of(model))
            if classes is None:
                with torch.no_grad():
                    own = target_classes(logits_of(model(images)), None)
            else:
                own = classes[start : start + len(images)].to(images.device)
            result = attribution.attribute(images, target=own).detach(), own
            start += len(images)
            return result

        return map_batches(one, data, batch_size=batch_size)

    with evaluating(model):
        reference, classes = maps_and_classes(None)
        found = {}
        with _restored(model), torch.random.fork_rng(_cuda(model)):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            for name in reversed(known):
                if mode == "independent" and name not in wanted:
                    continue
                if mode == "independent":
                    with _restored(model):
                        _draw_anew(layer_called(model, name))
                        found[name] = _compared(reference, maps_and_classes(classes)[0])
                    continue
                _draw_anew(layer_called(model, name))
                if name in wanted:
                    found[name] = _compared(reference, maps_and_classes(classes)[0])
    return found


def _compared(reference: Tensor, maps: Tensor) -> Randomised:
    plain, sized = correlations(reference, maps), correlations(reference, maps, of_size=True)
    return Randomised(_mean(plain.numpy()), _mean(sized.numpy()), int(plain.isnan().sum()))


def _mean(values: Float[np.ndarray, " n"]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def _cuda(model: nn.Module) -> list[torch.device]:
    device = device_of(model)
    return [device] if device is not None and device.type == "cuda" else []


@torch.no_grad()
def _draw_anew(module: nn.Module) -> None:
    """New random values for a module's own parameters, in new tensors."""
    own = list(module.parameters(recurse=False))
    for p in own:
        p.data = p.data.clone()
    reset: Callable[[], None] | None = getattr(module, "reset_parameters", None)
    if reset is not None:
        reset()
        return
    for p in own:
        spread = float(p.std()) if p.numel() > 1 else float(p.abs().mean())
        p.normal_(float(p.mean()), spread or 0.02)  # a constant vector, such as a class token before training


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Give parameters their own tensors back, and buffers their values."""
    parameters = [(p, p.data) for p in model.parameters()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for p, data in parameters:
                p.data = data
            for b, value in buffers:
                b.copy_(value)


class PointingGame:
    """Does the highest point of a map lie on the object?

    A hit is a map whose largest value lies on the object or less than `tolerance` pixels from it. The accuracy is
    the mean over the classes of ``hits / (hits + misses)``, so that rare classes count like others.

    Parameters
    ----------
    tolerance : float
        In pixels, at least 0; 15 in the paper's benchmarks of photographs.

    Examples
    --------
    >>> game = PointingGame(tolerance=0)
    >>> maps = torch.tensor([[[0.0, 1.0], [0.0, 0.0]]])
    >>> game.update(maps, maps > 0.5, [3])
    >>> game.compute()
    1.0

    Notes
    -----
    Source: Zhang et al., "Top-down Neural Attention by Excitation Backprop", 2016 (arXiv 1608.00507), section 5.1.
    """

    def __init__(self, tolerance: float = 15) -> None:
        if not (isinstance(tolerance, int | float) and 0 <= tolerance < float("inf")):
            raise InputError(f"tolerance: got {tolerance!r}; it must be a number of pixels of at least 0")
        self.tolerance = tolerance
        self.hits: dict[int, int] = {}
        self.totals: dict[int, int] = {}

    def update(
        self,
        maps: Float[Tensor, "batch height width"],
        masks: Bool[Tensor, "batch height width"],
        class_ids: Sequence[int] | Int[Tensor, " batch"],
    ) -> Bool[np.ndarray, " batch"]:
        """Count more maps, and tell which of them hit.

        Parameters
        ----------
        maps : Tensor (batch, height, width)
            Of the images' size. Of several largest values the first counts, so that a flat map points at a corner.
        masks : bool Tensor (batch, height, width)
            The object of the class: its box or its pixels.
        class_ids : sequence of int
            The class of each map.

        Raises
        ------
        InputError
            Shapes that do not fit, NaN, or a mask without a pixel.
        """
        values, inside = torch.as_tensor(maps), torch.as_tensor(masks)
        ids = [int(one) for one in class_ids]
        if values.ndim != 3 or values.shape != inside.shape or len(ids) != len(values):
            raise InputError(
                f"maps, masks and class_ids: must be (batch, height, width) twice and (batch,); got "
                f"{tuple(values.shape)}, {tuple(inside.shape)} and ({len(ids)},)"
            )
        if inside.dtype != torch.bool:
            raise InputError(f"masks: must be bool; got {inside.dtype}")
        if not bool(torch.isfinite(values).all()):
            raise InputError("maps: hold NaN or infinite values")
        hits = np.zeros(len(values), dtype=bool)
        for i, (one, mask) in enumerate(zip(values.cpu().numpy(), inside.cpu().numpy(), strict=True)):
            if not mask.any():
                raise InputError(f"masks: number {i} marks no pixel; leave out images without the object")
            distance = distance_transform_edt(~mask).flat[int(one.argmax())]
            hits[i] = distance == 0 or distance < self.tolerance
            self.hits[ids[i]] = self.hits.get(ids[i], 0) + int(hits[i])
            self.totals[ids[i]] = self.totals.get(ids[i], 0) + 1
        return hits

    def per_class(self) -> dict[int, float]:
        """Accuracy of each class that was seen."""
        return {c: self.hits[c] / self.totals[c] for c in sorted(self.totals)}

    def compute(self) -> float:
        """Mean accuracy over the classes.

        Raises
        ------
        InputError
            Nothing was counted yet.
        """
        if not self.totals:
            raise InputError("nothing was counted: call update first")
        return float(np.mean(list(self.per_class().values())))

    def reset(self) -> None:
        """Begin again."""
        self.hits, self.totals = {}, {}
