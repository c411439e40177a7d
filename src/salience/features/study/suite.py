"""The nine attribution methods of the study, and three maps that know nothing, under one signature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import captum.attr
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from salience.errors import InputError, nearest
from salience.features.attribution import LogitsModel, default_layers
from salience.features.baselines import CentreMap, EdgeMap, RandomSmoothMap
from salience.features.normgrad.saliency import GradCAM
from salience.features.study.perturbing import CAM, RISE, MeaningfulPerturbation
from salience.model.at import training_mode
from salience.model.batches import map_batches

# images (n, channels, height, width), classes (n,) -> maps (n, height, width)
MapFunction = Callable[[Tensor, Tensor], Tensor]

KINDS = {
    "gradient": "gradient", "gradient x input": "gradient", "integrated gradients": "gradient",
    "gradient shap": "gradient", "lime": "perturbation", "rise": "perturbation",
    "meaningful perturbation": "perturbation", "cam": "cam", "grad-cam": "cam",
    "random": "control", "centre": "control", "edges": "control",
}  # fmt: skip
CONTROLS = tuple(name for name, kind in KINDS.items() if kind == "control")


def attribution_suite(
    model: nn.Module,
    names: Sequence[str] | None = None,
    *,
    layer: str | None = None,
    example: Float[Tensor, "n channels height width"] | None = None,
    multi_label: bool = False,
    samples: int = 200,
    n_steps: int = 32,
    batch_size: int = 32,
    random_state: int = 0,
) -> dict[str, MapFunction]:
    """The methods by name, each as a function from images and classes to maps.

    Gradient methods explain the logit, and give the sum of absolute values over colours for the bare gradient, the
    sum of values for the others. They come from captum, as does LIME (on squares of an eighth of the side);
    Grad-CAM, which also reads the tokens of vision transformers, RISE, meaningful perturbation and CAM are ours.
    Every function leaves the model as it was, is deterministic, and halves its batches when memory runs out.

    Supported: image classifiers that return logits, alone or in a `ModelOutput`; "cam" is left out where it is not
    defined, see `CAM`.

    Parameters
    ----------
    model : torch.nn.Module
    names : sequence of str, optional
        Of `KINDS`; all of them by default.
    layer : str, optional
        For "cam" and "grad-cam"; by default the last layer with a map, for which `example` is needed.
    example : Tensor (n, channels, height, width), optional
        A few images, to find that layer and try whether CAM is defined.
    multi_label : bool
        Probabilities (RISE, meaningful perturbation) are sigmoids.
    samples : int
        Masks of RISE, samples of LIME; meaningful perturbation takes half as many steps.
    n_steps : int
        Of integrated gradients; gradient SHAP draws as many points.
    batch_size : int
        Images at once.
    random_state : int
        Of what is drawn.

    Returns
    -------
    dict of str to callable

    Raises
    ------
    InputError
        An unknown name, or a method that was asked for and is not defined on this model.
    """
    chosen = list(KINDS) if names is None else list(names)
    for name in chosen:
        if name not in KINDS:
            raise InputError(f"names: got {name!r}; {nearest(name, KINDS)}")
    if {"cam", "grad-cam"} & set(chosen) and layer is None:
        if example is None:
            raise InputError("layer: 'cam' and 'grad-cam' look at a layer; name it, or give example images")
        layer = default_layers(model, example[:1])[-1]
    logits = LogitsModel(model)
    draw = {"samples": samples, "n_steps": n_steps, "size": batch_size, "seed": random_state}
    makers: dict[str, Callable[[], MapFunction]] = {
        "gradient": lambda: _captum(captum.attr.Saliency(logits), batch_size, size=True, abs=False),
        "gradient x input": lambda: _captum(captum.attr.InputXGradient(logits), batch_size),
        "integrated gradients": lambda: _captum(
            captum.attr.IntegratedGradients(logits), batch_size, n_steps=n_steps, internal_batch_size=batch_size * 4
        ),
        "gradient shap": lambda: _gradient_shap(logits, draw),
        "lime": lambda: _lime(logits, draw, multi_label),
        "rise": lambda: _ours(RISE(model, masks=samples, multi_label=multi_label, random_state=random_state)),
        "meaningful perturbation": lambda: _ours(
            MeaningfulPerturbation(model, iterations=max(1, samples // 2), multi_label=multi_label)
        ),
        "cam": lambda: _cam(model, str(layer), example, asked=names is not None),
        "grad-cam": lambda: _ours(GradCAM(model, layer)),
        "random": lambda: _ours(RandomSmoothMap(model, random_state=random_state)),
        "centre": lambda: _ours(CentreMap(model)),
        "edges": lambda: _ours(EdgeMap(model)),
    }
    suite = {}
    for name in chosen:
        try:
            suite[name] = makers[name]()
        except _Undefined:
            continue
    return suite


class _Undefined(Exception):
    """CAM was not asked for by name and is not defined."""


def _captum(method: captum.attr.Attribution, batch: int, size: bool = False, **options: Any) -> MapFunction:
    """A method of captum over batches, summed over the channels."""

    def maps(images: Tensor, classes: Tensor) -> Tensor:
        def one(index: Tensor) -> Tensor:
            rows = index.to(images.device)
            x = images[rows].detach().requires_grad_()  # captum would warn that it sets this itself
            found = method.attribute(x, target=classes[rows], **options).detach()
            return (found.abs() if size else found).sum(1)

        with training_mode(method.forward_func, False), torch.enable_grad():
            return map_batches(one, torch.arange(len(images)), batch_size=batch).to(images)

    return maps


def _gradient_shap(logits: LogitsModel, draw: dict[str, int]) -> MapFunction:
    """Expected gradients from noisy images to black, every image with draws of its own seed."""
    method = captum.attr.GradientShap(logits)

    def maps(images: Tensor, classes: Tensor) -> Tensor:
        found = []
        with training_mode(logits, False), torch.enable_grad():
            for image, target in zip(images, classes, strict=True):
                x = image[None].detach()
                with _seeded(draw["seed"]):
                    found.append(
                        method.attribute(
                            x, torch.zeros_like(x), n_samples=draw["n_steps"], stdevs=0.1, target=int(target)
                        ).sum(1)
                    )
        return torch.cat(found).detach()

    return maps


def _lime(logits: LogitsModel, draw: dict[str, int], multi_label: bool) -> MapFunction:
    """LIME on a grid of squares, of the probability; captum's kernel and linear model."""

    class Probability(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = logits

        def forward(self, x: Tensor) -> Tensor:
            out = self.inner(x)
            return out.sigmoid() if multi_label else out.softmax(1)

    method = captum.attr.Lime(Probability())

    def maps(images: Tensor, classes: Tensor) -> Tensor:
        height, width = images.shape[2:]
        side = max(1, min(height, width) // 8)
        rows, columns = torch.arange(height) // side, torch.arange(width) // side
        squares = (rows[:, None] * (int(columns.max()) + 1) + columns)[None, None].to(images.device)
        found = []
        with training_mode(method.forward_func, False), torch.no_grad():
            for image, target in zip(images, classes, strict=True):
                with _seeded(draw["seed"]):
                    weights = method.attribute(
                        image[None], target=int(target), feature_mask=squares.expand(1, len(image), -1, -1),
                        n_samples=draw["samples"], perturbations_per_eval=draw["size"], show_progress=False,
                    )  # fmt: skip
                found.append(weights[:, 0])
        return torch.cat(found).to(images)

    return maps


def _cam(model: nn.Module, layer: str, example: Tensor | None, asked: bool) -> MapFunction:
    try:
        method = CAM(model, layer)
        if example is not None:
            method.attribute(example[:1])
    except InputError:
        if asked:
            raise
        raise _Undefined from None
    return _ours(method)


def _ours(method: captum.attr.Attribution) -> MapFunction:
    return lambda images, classes: method.attribute(images, target=classes)[:, 0]


class _seeded:
    """The global generators of torch and numpy, which captum draws from, as from `seed`; put back afterwards."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        self.torch_state, self.numpy_state = torch.get_rng_state(), np.random.get_state()
        torch.default_generator.manual_seed(self.seed)
        np.random.seed(self.seed % 2**32)

    def __exit__(self, *error: object) -> None:
        torch.set_rng_state(self.torch_state)
        np.random.set_state(self.numpy_state)
