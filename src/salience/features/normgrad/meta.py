"""Meta-saliency: look at the network one training step later, at what the image would teach it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from captum.attr import Attribution
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from salience.errors import InputError
from salience.features.attribution import Target, evaluating, target_classes
from salience.model.at import logits_of, run


class MetaSaliency(Attribution):
    """Any attribution, of the network after one step of gradient descent on the image itself.

        theta' = theta - lr * d/dtheta CE(f_theta(x), c)        map = attribution of class c in f_theta'

    Each image takes its own step from the same weights, so that a batch gives what its images give alone: two
    forward and two backward passes an image. The weights are exchanged, not changed: the model has its own tensors
    back afterwards, bit for bit, whatever happens. It is in evaluation mode meanwhile, so no running statistic moves.

    Parameters
    ----------
    attribution : captum Attribution
        On a `torch.nn.Module`, such as `NormGrad`, or one of captum's on a `LogitsModel`.
    lr : float
        Length of the step. The authors' function takes 1e-4 by default, their experiments 2.5e-3.
    ascend : bool
        Step up the loss instead: what would unteach the class.

    Raises
    ------
    InputError
        `attribution` is none or explains no module, or `lr` is not above 0.

    Notes
    -----
    Source: Rebuffi et al., CVPR 2020 (arXiv 2004.02866); step and defaults as in the authors' code.
    """

    predicts = True

    def __init__(self, attribution: Attribution, lr: float = 2.5e-3, *, ascend: bool = False) -> None:
        if not isinstance(attribution, Attribution) or not isinstance(attribution.forward_func, nn.Module):
            raise InputError(
                f"attribution: got {type(attribution).__name__}; give a captum Attribution of a torch.nn.Module"
            )
        if not (isinstance(lr, int | float) and math.isfinite(lr) and lr > 0):
            raise InputError(f"lr: got {lr!r}; it must be above 0")
        super().__init__(attribution.forward_func)
        self.attribution, self.lr, self.ascend = attribution, float(lr), ascend

    def attribute(
        self,
        inputs: Float[Tensor, "batch channel height width"],
        target: Target = None,
        additional_forward_args: Any = None,
        **options: Any,
    ) -> Tensor:
        """What the attribution gives for each image after the image's own step.

        Parameters
        ----------
        inputs : Tensor (batch, channel, height, width)
        target : int, sequence of int or Tensor (batch,), optional
            The class that is trained on and explained; by default the one that the untouched model predicts.
        additional_forward_args : tuple, optional
            As for `attribution`; the same for all images.
        **options
            Passed on to the attribution.

        Raises
        ------
        InputError
            The loss is not finite, or as in the attribution.
        """
        if not isinstance(inputs, Tensor) or not inputs.ndim or not len(inputs):
            raise InputError("inputs: must be at least one image")
        if callable(target):
            raise InputError("target: the step is taken on the cross-entropy of a class; give a class, not a function")
        extra = () if additional_forward_args is None else additional_forward_args
        extra = extra if isinstance(extra, tuple) else (extra,)
        model: nn.Module = self.forward_func
        with evaluating(model), torch.no_grad():
            classes = None if target is None else target_classes(logits_of(run(model, (inputs, *extra))), target)
        maps = []
        for i in range(len(inputs)):
            with _stepped(self, inputs[i : i + 1], None if classes is None else classes[i : i + 1], extra) as own:
                one = self.attribution.attribute(
                    inputs[i : i + 1], target=own, additional_forward_args=additional_forward_args, **options
                )
                maps.append(one.detach())
        return torch.cat(maps)


@contextmanager
def _stepped(meta: MetaSaliency, image: Tensor, classes: Tensor | None, extra: tuple) -> Iterator[Tensor]:
    """The model one step further inside the block; yields the class that the step was taken on."""
    model: nn.Module = meta.forward_func
    weights = [p for p in model.parameters() if p.is_floating_point()]
    frozen = [p for p in weights if not p.requires_grad]
    before = [p.data for p in weights]
    with evaluating(model):
        try:
            for p in frozen:  # the step is one of all weights
                p.requires_grad_(True)
            with torch.enable_grad():
                logits = logits_of(run(model, (image.detach(), *extra)))
                own = target_classes(logits, classes)
                wanted = own if logits.ndim == 2 else own[:, None, None].expand(-1, *logits.shape[2:])
                loss = cross_entropy(logits, wanted)  # of a fully convolutional model the mean over its positions
            if not bool(torch.isfinite(loss)):
                raise InputError(f"inputs: the loss of class {int(own)} is {loss.item()}; no step can be taken on it")
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
            step = meta.lr if meta.ascend else -meta.lr
            for p, g in zip(weights, gradients, strict=True):
                if g is not None:
                    p.data = p.data + step * g
            for p in frozen:
                p.requires_grad_(False)
            yield own
        finally:
            for p, data in zip(weights, before, strict=True):
                p.data = data
            for p in frozen:
                p.requires_grad_(False)
