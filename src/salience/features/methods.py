"""The saliency methods of the command line, by name: the one table that commands read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from captum.attr import Attribution, IntegratedGradients
from jaxtyping import Float
from torch import Tensor, nn

from salience.errors import InputError, nearest
from salience.features.attribution import LogitsModel
from salience.features.bee.explain import BEE
from salience.features.normgrad.meta import MetaSaliency
from salience.features.normgrad.saliency import GradCAM, Gradient, LinearApproximation, NormGrad


class SaliencyMethod(NamedTuple):
    """How a command makes and runs a method.

    Attributes
    ----------
    make : callable
        ``make(model, layers, **options)`` gives a captum Attribution.
    layers : {"several", "last", "none"}
        What `layers` holds unless the user names some: the last layer of each resolution, the last one alone, or
        nothing, where the method looks at the input.
    about : str
        A line for the help.
    options : tuple of str
        Options that belong to it alone, by the names of `make`.
    run : dict
        What its `attribute` is to be called with.
    """

    make: Callable[..., Attribution]
    layers: str
    about: str
    options: tuple[str, ...] = ()
    run: dict[str, Any] = {}  # noqa: RUF012


def _normgrad(
    model: nn.Module,
    layers: Sequence[str],
    *,
    selective: bool = False,
    fuse: str = "product",
    layer_weights: str = "uniform",
    meta_lr: float | None = None,
) -> Attribution:
    plain = NormGrad(model, layers, selective=selective, fuse=fuse, weights=layer_weights)
    return plain if meta_lr is None else MetaSaliency(plain, meta_lr)


def _bee(model: nn.Module, layers: Sequence[str], **options: Any) -> Attribution:
    return BEE(model, layers, **{"draws": 20, **options})


METHODS: dict[str, SaliencyMethod] = {
    "normgrad": SaliencyMethod(
        _normgrad, "several", "NormGrad, fused over layers", ("selective", "fuse", "layer_weights", "meta_lr")
    ),
    "bee": SaliencyMethod(
        _bee, "last", "the best of several maps under a measure, from baselines drawn by what was learned",
        ("metric", "draws", "finetune"),
    ),
    "gradcam": SaliencyMethod(lambda model, layers: GradCAM(model, layers), "last", "Grad-CAM at the last layer"),
    "linear": SaliencyMethod(
        lambda model, layers: LinearApproximation(model, layers), "several", "gradient x activation, fused over layers"
    ),
    "gradient": SaliencyMethod(lambda model, layers: Gradient(model), "none", "largest gradient of a pixel"),
    "integrated-gradients": SaliencyMethod(
        lambda model, layers: IntegratedGradients(LogitsModel(model)), "none",
        "integrated gradients from captum, 50 steps from the zero image", run={"internal_batch_size": 64},
    ),
}  # fmt: skip


def method(name: str) -> SaliencyMethod:
    """The entry called `name`; an `InputError` tells the nearest names if there is none."""
    if name not in METHODS:
        raise InputError(f"--method: there is no {name!r}; {nearest(name, METHODS)}")
    return METHODS[name]


def as_maps(attributions: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch height width"]:
    """One number per pixel: the sum over the channels."""
    return attributions.float().sum(1)
