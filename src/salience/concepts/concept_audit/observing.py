"""What a network makes of images: features of a layer, logits, and the gradient of the predicted class."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from salience.concepts.concept_model import channels_last, pooled
from salience.errors import InputError
from salience.features.attribution import device_of, images_and_labels, target_classes
from salience.model import at
from salience.model.batches import map_batches


class Observed(NamedTuple):
    """Features (n, p), logits (n, classes), and gradients (n, p) of each image's largest logit by its features."""

    features: Float[np.ndarray, "n p"]
    logits: Float[np.ndarray, "n classes"]
    gradients: Float[np.ndarray, "n p"]


def observe(model: nn.Module, images: Any, layer: str | None = None, *, batch_size: int = 64) -> Observed:
    """Run a network on images and read a layer.

    Parameters
    ----------
    model : torch.nn.Module
        In evaluation mode meanwhile.
    images : Tensor (n, ...) or Dataset
    layer : str, optional
        Its output is read; by default what goes into the last linear layer. Maps and tokens are averaged over the
        positions, gradients summed.
    batch_size : int
        Halved when memory runs out.

    Raises
    ------
    InputError
        No such layer, or no linear layer.
    """
    device = device_of(model)

    def some(batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        pixels = batch if isinstance(batch, Tensor) else images_and_labels(batch)[0]
        with torch.enable_grad(), _read(model, layer) as held:
            logits = at.logits_of(at.run(model, pixels.to(device)))
            logits = logits.mean((2, 3)) if logits.ndim == 4 else logits  # fully convolutional
            if "h" not in held:
                raise InputError(
                    f"layer: {layer or 'the last linear layer'} does not run when {type(model).__name__} does"
                )
            chosen = logits.gather(1, target_classes(logits, None)[:, None]).sum()
            (gradient,) = torch.autograd.grad(chosen, held["h"])
        h, g = channels_last(held["h"].detach()), channels_last(gradient)
        return pooled(h), logits.detach(), g.flatten(1, -2).sum(1) if g.ndim > 2 else g

    with at.training_mode(model, False):
        found = map_batches(some, images, batch_size=batch_size)
    return Observed(*(part.double().numpy() for part in found))


def last_linear(model: nn.Module) -> nn.Linear:
    """The last linear layer in the order of `named_modules`; an `InputError` if there is none."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise InputError(f"model: {type(model).__name__} has no linear layer to read; name the layer to look at")
    return layers[-1]


@contextmanager
def _read(model: nn.Module, layer: str | None) -> Iterator[dict[str, Tensor]]:
    """Hold the activations, as a leaf that gradients stop at."""
    held: dict[str, Tensor] = {}

    def hold(h: Tensor) -> Tensor:
        held["h"] = h.detach().requires_grad_()
        return held["h"].clone()  # what follows may change its input in place

    if layer is not None:
        with at.replace(model, layer, hold):
            yield held
        return
    handle = last_linear(model).register_forward_pre_hook(lambda module, args: (hold(args[0]), *args[1:]))
    try:
        yield held
    finally:
        handle.remove()
