"""Stage 2, non-critical region refinement: what is not critical in an image learns to speak for its class."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from salience.data.nrr_dd.activation import check_classes, check_images, class_activation_map
from salience.errors import InputError
from salience.model.at import logits_of, training_mode

BATCH = 100  # images refined at a time; statistics are taken over them


def refine_noncritical(
    model: nn.Module,
    x: Float[Tensor, "n channel height width"],
    y: Int[Tensor, " n"],
    *,
    eps: float = 0.6,
    steps: int = 1000,
    lr: float = 0.1,
    alpha_bn: float = 0.05,
    recompute_every: int | None = None,
    low: Float[Tensor, " channel"] | None = None,
    high: Float[Tensor, " channel"] | None = None,
) -> Float[Tensor, "n channel height width"]:
    """Rewrite the pixels that are not critical so that the teacher finds the class in them; the others stay.

        M = max(0, eps - CAM(x)),    x <- x - lr M step(grad_x L),
        L = CE(T(x), y) + alpha_bn sum_l ( |mu_l(x) - running mean_l|_2 + |var_l(x) - running var_l|_2 )

    l runs over the batch normalisations of the teacher, whose inputs are to keep the statistics of real images; `step`
    is Adam's. The mask is soft: a pixel moves the more the less critical it is, and pixels with CAM >= eps keep their
    bits.

    Parameters
    ----------
    model : torch.nn.Module
        The teacher; frozen and in evaluation mode meanwhile.
    x : (n, channel, height, width) Tensor
        Normalised as the teacher takes them, the classes well mixed: the statistics are those of 100 at a time.
    y : (n,) int Tensor
    eps : float in (0, 1]
        From here on a pixel is critical.
    steps : int
        0 gives x back.
    lr : float
    alpha_bn : float
        0 looks at the class alone, which ends in adversarial speckle.
    recompute_every : int, optional
        Steps after which the mask follows the images; by default it is that of the start.
    low, high : (channel,) Tensor, optional
        Range that pixels are held in: what 0 and 255 become by the normalisation.

    Returns
    -------
    (n, channel, height, width) Tensor

    Raises
    ------
    InputError
        Options out of range, images and labels that do not fit, or a loss that is not finite.

    Warns
    -----
    UserWarning
        The teacher has no batch normalisation with running statistics, so that `alpha_bn` means nothing.

    Notes
    -----
    Source: section 3.3. The constants, and Adam for the step, are proposals of ours.
    """
    check_images(x, y)
    _check(eps, steps, lr, alpha_bn, recompute_every)
    if alpha_bn and not norms(model):
        warnings.warn(
            f"{type(model).__name__} has no batch normalisation with running statistics: alpha_bn is left out",
            stacklevel=2,
        )
        alpha_bn = 0.0
    parts = [
        _refine(model, *rows, eps, steps, lr, alpha_bn, recompute_every or steps, (low, high))
        for rows in zip(x.split(BATCH), y.split(BATCH), strict=True)
    ]
    return torch.cat(parts)


def bn_distance(model: nn.Module, x: Float[Tensor, "n channel height width"]) -> Float[Tensor, ""]:
    """How far the statistics at the teacher's batch normalisations are from those it was trained with.

        sum_l ( |mu_l(x) - running mean_l|_2 + |var_l(x) - running var_l|_2 )

    0 for a network without batch normalisation. Gradients flow to x.
    """
    with training_mode(model, False), _statistics(model) as distances:
        model(x)
    return torch.stack(distances).sum() if distances else x.new_zeros(())


def norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch normalisations of a network that know running statistics."""
    return [layer for layer in model.modules() if isinstance(layer, _BatchNorm) and layer.running_mean is not None]


def _refine(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    steps: int,
    lr: float,
    alpha_bn: float,
    every: int,
    bounds: tuple[Tensor | None, Tensor | None],
) -> Tensor:
    low, high = (None if bound is None else bound.to(x)[:, None, None] for bound in bounds)
    with training_mode(model, False), _frozen(model), torch.enable_grad():
        for step in range(steps):
            if step % every == 0:
                mask = (eps - class_activation_map(model, x, y)).clamp(min=0)
                start, change = x, torch.zeros_like(x, requires_grad=True)
                # Adam is blind to a factor on the gradient: the mask stands on the step, x - lr M Adam(grad).
                optimizer = torch.optim.Adam([change], lr)
            image = start + mask * change
            with _statistics(model) as distances:
                logits = logits_of(model(image))
            check_classes(y, logits)
            loss = cross_entropy(logits, y)
            if alpha_bn:
                loss = loss + alpha_bn * torch.stack(distances).sum()
            if not bool(loss.isfinite()):
                raise InputError(f"lr: the loss is {float(loss)} in step {step + 1}; lower lr, or look at the images")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            moved = (start + mask * change).detach()
            if low is not None or high is not None:
                moved = moved.clamp(low, high)
                # Adam goes on from where the pixel is, not from where it would be beyond the range.
                change.data = torch.where(mask > 0, (moved - start) / mask.clamp(min=1e-6), 0.0)
            x = torch.where(mask > 0, moved, start)
    return x


@contextmanager
def _statistics(model: nn.Module) -> Iterator[list[Tensor]]:
    """Distance of mean and variance at the input of each batch normalisation from the running ones."""
    distances: list[Tensor] = []

    def hook(layer: _BatchNorm, args: tuple[Tensor, ...]) -> None:
        rows = args[0].transpose(0, 1).flatten(1)
        mean, variance = rows.mean(1), rows.var(1, unbiased=False)
        assert layer.running_mean is not None and layer.running_var is not None
        distances.append((mean - layer.running_mean).norm() + (variance - layer.running_var).norm())

    handles = [layer.register_forward_pre_hook(hook) for layer in norms(model)]
    try:
        yield distances
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _check(eps: float, steps: int, lr: float, alpha_bn: float, recompute_every: int | None) -> None:
    if not 0 < eps <= 1:
        raise InputError(f"eps: got {eps!r}; it must lie in 0..1, 0 not included")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise InputError(f"steps: got {steps!r}; it must be a whole number, 0 or more")
    if not 0 < lr < float("inf") or not 0 <= alpha_bn < float("inf"):
        raise InputError(f"lr and alpha_bn: got {lr!r} and {alpha_bn!r}; above 0, and at least 0")
    if recompute_every is not None and (isinstance(recompute_every, bool) or recompute_every < 1):
        raise InputError(f"recompute_every: got {recompute_every!r}; it must be a whole number of at least 1")
