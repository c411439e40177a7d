"""A network seen through concepts: images -> activations -> codes -> activations -> logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from salience.concepts.extractors import ConceptExtractor
from salience.errors import InputError
from salience.features.attribution import device_of, target_classes
from salience.model.at import training_mode
from salience.model.batches import map_batches
from salience.model.split import Split

Images = Float[Tensor, "n channel height width"]
Codes = Float[Tensor, "n *positions k"]


class ConceptModel(nn.Module):
    """A network cut at a layer, with a dictionary of concepts in the cut.

        f = g o h,    codes U(x) of h(x),    logits of codes  g(decode(U))

    Activations are vectors (n, p), maps (n, channel, height, width) or tokens (n, token, channel); codes have the
    positions of the activations and k concepts last: (n, k), (n, height, width, k) or (n, token, k). Calling it with
    codes gives logits, so that any captum attribution of it explains concepts.

    Parameters
    ----------
    model : torch.nn.Module
        A classifier; in evaluation mode whenever it is run here.
    layer : str
        Name in `model.named_modules()`.
    extractor : ConceptExtractor
        Fitted at that layer.

    Raises
    ------
    InputError
        The model has no such layer.
    """

    def __init__(self, model: nn.Module, layer: str, extractor: ConceptExtractor) -> None:
        super().__init__()
        self.model, self.layer, self.extractor = model, layer, extractor
        self.split = Split(model, layer)

    def activations(self, images: Images) -> Float[Tensor, "n *positions p"]:
        """What the layer gives, with channels last."""
        with training_mode(self.model, False):
            return channels_last(self.split.encode(images))

    def encode(self, images: Images) -> Codes:
        """Codes of images, position by position."""
        return _each(self.extractor.encode, self.activations(images))

    def decode(self, codes: Codes) -> Float[Tensor, "n ..."]:
        """Activations as the layer gives them, from codes."""
        return _as_given(_each(self.extractor.decode, codes))

    def forward(self, codes: Codes, images: Images) -> Float[Tensor, "n classes"]:
        """Logits of codes.

        Parameters
        ----------
        codes : Tensor (n, ..., k)
        images : Tensor (n or 1, channel, height, width)
            What a skip connection carries around the layer comes from here.
        """
        return self.behind(_each(self.extractor.decode, codes), images)

    def behind(self, activations: Float[Tensor, "n *positions p"], images: Images) -> Float[Tensor, "n classes"]:
        """Logits of activations, channels last, which need not be written in concepts."""
        with training_mode(self.model, False):
            logits = self.split.decode(_as_given(activations), images, copy=False)
        return logits.mean((2, 3)) if logits.ndim == 4 else logits


class ConceptScores(nn.Module):
    """Images -> how much of each concept they hold: codes of the activations averaged over the positions.

        U_i(x) = argmin_{u >= 0} 1/2 |mean_positions h(x) - u V|^2, entry i

    Differentiable in the image, so that ``GradCAM(ConceptScores(concepts), "concepts.model.layer4")`` or any other
    attribution with ``target=i`` says where concept i is.

    Parameters
    ----------
    concepts : ConceptModel
    """

    def __init__(self, concepts: ConceptModel) -> None:
        super().__init__()
        self.concepts = concepts

    def forward(self, images: Images) -> Float[Tensor, "n k"]:
        """Codes (n, k) of the mean activations."""
        return self.concepts.extractor.encode(pooled(self.concepts.activations(images)))


def channels_last(activations: Tensor) -> Float[Tensor, "n *positions p"]:
    """Vectors (n, p) and tokens (n, token, p) as they are, maps (n, p, height, width) with channels moved last."""
    if activations.ndim not in (2, 3, 4):
        raise InputError(
            f"layer: gives shape {tuple(activations.shape)}; vectors (n, p), tokens (n, token, p) or maps "
            "(n, p, height, width) are needed"
        )
    return activations.movedim(1, -1) if activations.ndim == 4 else activations


def _as_given(activations: Float[Tensor, "n *positions p"]) -> Float[Tensor, "n ..."]:
    """Channels back where the layer has them; contiguous as from it: layers behind are slower on another layout."""
    return activations.movedim(-1, 1).contiguous() if activations.ndim == 4 else activations


def pooled(activations: Float[Tensor, "n *positions p"]) -> Float[Tensor, "n p"]:
    """The mean over the positions."""
    return activations if activations.ndim == 2 else activations.flatten(1, -2).mean(1)


def classes_of(target: Any, n: int) -> Int[Tensor, " n"]:
    """One class for all of n images, or one for each."""
    wanted = (
        torch.as_tensor(target) if isinstance(target, int | np.integer | Tensor | list | tuple | np.ndarray) else None
    )
    if wanted is None or wanted.is_floating_point() or wanted.dtype == torch.bool or wanted.shape not in ((), (n,)):
        raise InputError(f"target: got {target!r}; give a class, or one for each of the {n} images")
    return wanted.expand(n).cpu()


class Masked:
    """Codes of an image times each mask, made when they are asked for."""

    def __init__(self, codes: Float[Tensor, "*positions k"], masks: Float[Tensor, "m *positions k"]) -> None:
        self.codes, self.masks = codes, masks

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, rows: slice) -> Tensor:
        return self.codes * self.masks[rows]


def logits_of_codes(
    concepts: ConceptModel, codes: Codes | Masked, image: Float[Tensor, "1 channel height width"], batch_size: int
) -> Float[Tensor, "n classes"]:
    """Logits of many codes of one image, without gradients, on the CPU."""
    device = device_of(concepts.model)
    image = image.to(device)
    with torch.no_grad():
        return map_batches(lambda part: concepts(part.to(device), image), codes, batch_size=batch_size)


def chosen_logits(logits: Float[Tensor, "n classes"], target: int) -> Float[Tensor, " n"]:
    """The logit of one class; an `InputError` tells which classes there are."""
    return logits.gather(1, target_classes(logits, target)[:, None])[:, 0]


def _each(fn: Any, values: Float[Tensor, "n *positions a"]) -> Float[Tensor, "n *positions b"]:
    """Apply a function of rows at every position."""
    return fn(values.flatten(0, -2)).unflatten(0, values.shape[:-1])
