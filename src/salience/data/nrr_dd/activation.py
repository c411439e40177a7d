"""Which pixels of an image does the decision for its class rest on?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import interpolate

from salience.errors import InputError
from salience.model.at import capture, logits_of, training_mode
from salience.model.batches import map_batches

BATCH = 128


def class_activation_map(
    model: nn.Module,
    x: Float[Tensor, "batch channel height width"],
    y: Int[Tensor, " batch"],
    layer: str | None = None,
) -> Float[Tensor, "batch 1 height width"]:
    """Where the evidence for each image's class stands, from 0 to 1.

        CAM(h, w) = sum_ch w_ch F_ch(h, w),    w_ch = mean over positions of d logit_y / d F_ch

    Behind a global average and a linear head the gradient is the head's row of the class over the number of positions,
    so that this is the class activation map ``sum_ch W_fc[y, ch] F_ch``; elsewhere it is Grad-CAM without the ReLU.
    Each map is scaled to 0..1 and brought to the size of the image (bilinear).

    Parameters
    ----------
    model : torch.nn.Module
        An image classifier; in evaluation mode meanwhile.
    x : (batch, channel, height, width) Tensor
    y : (batch,) int Tensor
        The class to look for in each image.
    layer : str, optional
        Layer of the features F, as ``model.named_modules()`` names it; by default the last whose output is a map of
        several positions that the logits depend on.

    Returns
    -------
    (batch, 1, height, width) Tensor
        0 everywhere for an image whose map is constant: nothing in it is critical.

    Raises
    ------
    InputError
        Images and classes that do not fit, or a network without such a layer.

    Notes
    -----
    Source: section 3.2 of the paper; Zhou et al., CVPR 2016. Grad-CAM for other heads is a proposal of ours.
    """
    check_images(x, y)
    name = last_map(model, x[:1]) if layer is None else layer

    def maps(rows: range) -> Tensor:
        part, classes = x[rows.start : rows.stop], y[rows.start : rows.stop]
        with training_mode(model, False), torch.enable_grad(), capture(model, name) as seen:
            logits = logits_of(model(part.detach().clone().requires_grad_()))
            check_classes(classes, logits)
            (gradient,) = torch.autograd.grad(logits.gather(1, classes[:, None].to(logits.device)).sum(), seen[name])
        features = seen[name].detach()
        cam = (gradient.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True)
        low, high = cam.amin((2, 3), keepdim=True), cam.amax((2, 3), keepdim=True)
        span = high - low
        scaled = torch.where(span > 1e-12, (cam - low) / span.clamp(min=1e-12), 0.0)
        return interpolate(scaled, size=x.shape[2:], mode="bilinear", align_corners=False).clamp(0, 1)

    return map_batches(maps, range(len(x)), batch_size=BATCH).to(x.device)


def last_map(model: nn.Module, x: Float[Tensor, "one channel height width"]) -> str:
    """The last layer that gives a map (batch, channel, height, width) which the logits depend on.

    Raises
    ------
    InputError
        There is none.
    """
    finished: dict[str, None] = {}

    def hook_for(name: str) -> Callable:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            finished.pop(name, None)
            if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] * output.shape[3] > 1:
                finished[name] = None

        return hook

    handles = [module.register_forward_hook(hook_for(name)) for name, module in model.named_modules() if name]
    try:
        with training_mode(model, False), torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    names = list(finished)
    with training_mode(model, False), torch.enable_grad(), capture(model, names) as seen:
        score = logits_of(model(x.detach().clone().requires_grad_())).sum()
        outputs = [seen[name] for name in names]
        gradients = torch.autograd.grad(score, outputs, allow_unused=True) if outputs else ()
    alive = [name for name, gradient in zip(names, gradients, strict=True) if gradient is not None]
    if not alive:
        raise InputError(
            f"teacher: {type(model).__name__} has no layer that gives a map (batch, channel, height, width); a "
            "convolutional network is needed"
        )
    return alive[-1]


def check_images(x: Any, y: Any) -> None:
    """Refuse what are no images with a class each."""
    if not isinstance(x, Tensor) or x.ndim != 4 or not x.is_floating_point() or not len(x):
        got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"images: got {got}; floats of shape (batch, channel, height, width) are needed")
    if not isinstance(y, Tensor) or y.ndim != 1 or y.is_floating_point() or len(y) != len(x):
        got = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise InputError(f"labels: got {got}; one whole number for each of the {len(x)} images is needed")


def check_classes(y: Tensor, logits: Tensor) -> None:
    """Refuse labels that the network has no logit for."""
    if logits.ndim != 2 or int(y.min()) < 0 or int(y.max()) >= logits.shape[1]:
        raise InputError(
            f"labels: {int(y.min())} to {int(y.max())}, but the network gives logits of shape {tuple(logits.shape[1:])}"
        )
