"""Attacks within a ball around an image, and training that withstands them: PGD and AdvProp.

Sources: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018 (arXiv
1706.06083); Xie et al., "Adversarial Examples Improve Image Recognition", CVPR 2020 (arXiv 1911.09665).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from salience.errors import InputError
from salience.model.at import logits_of, run, training_mode
from salience.model.batches import map_batches
from salience.model.fitting import History, fit

Norm = Literal["linf", "l2"]
Loss = Callable[[Tensor, Tensor], Tensor]


def pgd_attack(
    model: nn.Module,
    inputs: Float[Tensor, "n ..."],
    targets: Shaped[Tensor, "n ..."],
    *,
    eps: float,
    steps: int = 10,
    alpha: float | None = None,
    norm: Norm = "linf",
    loss: Loss = cross_entropy,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    generator: torch.Generator,
    batch_size: int = 256,
) -> Float[Tensor, "n ..."]:
    """Find inputs near the given ones on which the loss is high, by projected gradient ascent.

    From a random point of the ball, `steps` times (for the maximum norm; for the Euclidean one the gradient is
    divided by its length)::

        d <- project(d + alpha sign(grad_d loss(f(x + d), y)))        |d| <= eps,  x + d within bounds

    Supported: any classifier or regressor whose loss has a gradient in the inputs; in evaluation mode meanwhile
    and left as it was.

    Parameters
    ----------
    model : torch.nn.Module
        Returns logits, alone or in a `ModelOutput`.
    inputs : Tensor (n, ...)
        As the model takes them.
    targets : Tensor (n, ...)
        What `loss` takes.
    eps : float
        Radius of the ball, in the scale of pixels.
    steps : int
    alpha : float, optional
        Size of a step; ``2.5 eps / steps`` by default.
    norm : {"linf", "l2"}
    loss : callable
        ``loss(logits, targets)``, the mean over the batch.
    bounds : (low, high) or None
        Range of pixels, which the result keeps; None for inputs without one (tables).
    mean, std : sequence of float, optional
        Per channel, if `inputs` are normalised: ball and bounds are those of pixels before that.
    generator : torch.Generator
        On the CPU, of the starting points.
    batch_size : int
        Halved when memory runs out.

    Returns
    -------
    Tensor (n, ...)
        In the scale of `inputs`, on their device.

    Raises
    ------
    InputError
        An option out of range; inputs outside of `bounds`, or an `eps` larger than them, which is what values in
        0..255 or normalised without `mean` and `std` look like.
    """
    if norm not in ("linf", "l2"):
        raise InputError(f"norm: got {norm!r}; it must be 'linf' or 'l2'")
    if steps < 1 or not 0 <= eps < float("inf"):
        raise InputError(f"eps and steps: got {eps!r} and {steps!r}; at least 0 and 1")
    if (mean is None) != (std is None):
        raise InputError("mean and std: give both or none")
    shape = (1, -1, *(1,) * (inputs.ndim - 2))
    shift, scale = (
        (torch.zeros(shape[:1]), torch.ones(shape[:1]))
        if mean is None or std is None
        else (torch.tensor(list(mean)).view(shape), torch.tensor(list(std)).view(shape))
    )
    shift, scale = shift.to(inputs), scale.to(inputs)
    pixels = inputs.detach() * scale + shift
    if bounds is not None:
        _check_range(pixels, eps, bounds)
    size = 2.5 * eps / steps if alpha is None else alpha
    start = _projected(_random_direction(pixels.shape, norm, generator).to(pixels) * eps, eps, norm)

    def attacked(index: Tensor) -> Tensor:
        rows = index.to(pixels.device)
        x, y, d = pixels[rows], targets[rows], start[rows]
        for _ in range(steps):
            d = d.detach().requires_grad_()
            with torch.enable_grad():
                value = loss(logits_of(run(model, (x + d - shift) / scale)), y)
                (gradient,) = torch.autograd.grad(value, d)
            step = gradient.sign() if norm == "linf" else gradient / _length(gradient).clamp_min(1e-12)
            d = _projected(d.detach() + size * step, eps, norm)
            if bounds is not None:
                d = (x + d).clamp(*bounds) - x
        return (x + d - shift) / scale

    with training_mode(model, False):
        return map_batches(attacked, torch.arange(len(inputs)), batch_size=batch_size).to(inputs)


def adversarial_fit(
    model: nn.Module,
    inputs: Float[Tensor, "n ..."],
    targets: Shaped[Tensor, "n ..."],
    *,
    recipe: Literal["vanilla", "pgd", "advprop", "noise"] = "pgd",
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    epochs: int,
    generator: torch.Generator,
    eps: float = 0.0,
    steps: int = 2,
    norm: Norm = "linf",
    ramp: float = 0.5,
    loss: Loss = cross_entropy,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    batch_size: int = 64,
    milestones: Sequence[int] = (),
    progress: bool = False,
) -> History:
    """Train `model` in place by one of the recipes that the study compares.

    ::

        vanilla    min  loss(f(x), y)
        pgd        min  max_{|d| <= eps} loss(f(x + d), y)
        advprop    min  loss(f_main(x), y) + max_{|d| <= eps} loss(f_aux(x + d), y)
        noise      min  loss(f(x + d), y), d at random on the boundary of the ball: what PGD must not be

    f_main and f_aux share all weights but those of batch normalisation; only f_main is left in the end.

    Supported: any network that `pgd_attack` can attack; for "advprop" one with `torch.nn.BatchNorm2d`.

    Parameters
    ----------
    model : torch.nn.Module
        In training mode meanwhile (attacks see it in evaluation mode); flags are put back.
    inputs, targets : Tensor (n, ...)
        Inputs in the scale of pixels.
    recipe : {"vanilla", "pgd", "advprop", "noise"}
    optimizer : callable
        Makes an optimiser of the parameters, as ``lambda p: torch.optim.Adam(p, lr=1e-3)``.
    epochs, batch_size, milestones, progress
        As in `salience.model.fit`.
    generator : torch.Generator
        On the CPU, of orders and attacks.
    eps, steps, norm, loss, bounds
        As in `pgd_attack`.
    ramp : float in 0..1
        Share of the training over which `eps` grows from 0; a hard attack from the first step on makes small
        networks collapse to a constant.

    Returns
    -------
    History

    Raises
    ------
    InputError
        An option out of range, no batch normalisation for "advprop", or a loss that is no longer finite.
    """
    if recipe not in ("vanilla", "pgd", "advprop", "noise"):
        raise InputError(f"recipe: got {recipe!r}; it must be 'vanilla', 'pgd', 'advprop' or 'noise'")
    if not 0 <= ramp <= 1:
        raise InputError(f"ramp: got {ramp!r}; it must lie in 0..1")
    if bounds is not None and recipe != "vanilla":
        _check_range(inputs, eps, bounds)
    attacks: dict[str, Any] = {
        "eps": eps,
        "steps": steps,
        "norm": norm,
        "loss": loss,
        "bounds": bounds,
        "batch_size": batch_size,
    }
    total = max(1, epochs * (len(inputs) // batch_size))
    done = 0

    def objective(x: Tensor, y: Tensor) -> Tensor:
        nonlocal done
        now = {**attacks, "eps": eps * min(1.0, (done + 1) / (ramp * total)) if ramp else eps}
        done += 1
        if recipe == "vanilla":
            return loss(logits_of(model(x)), y)
        if recipe == "noise":
            d = _random_direction(x.shape, norm, generator).sign() * now["eps"]
            return loss(logits_of(model(x + d.to(x))), y)
        if recipe == "pgd":
            return loss(logits_of(model(pgd_attack(model, x, y, generator=generator, **now))), y)
        clean = loss(logits_of(model(x)), y)
        with _auxiliary(model):
            return clean + loss(logits_of(model(pgd_attack(model, x, y, generator=generator, **now))), y)

    with _two_norms(model) if recipe == "advprop" else training_mode(model, model.training):
        return fit(
            _Whole(model), inputs, targets, loss=objective, optimizer=optimizer(model.parameters()), epochs=epochs,
            generator=generator, batch_size=batch_size, milestones=milestones, progress=progress,
        )  # fmt: skip


class _Whole(nn.Module):
    """Hands its inputs to the loss, which runs the model itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return x


class DualNorm(nn.Module):
    """Two batch normalisations, of clean and of attacked images, one of which is in use."""

    def __init__(self, main: nn.BatchNorm2d) -> None:
        super().__init__()
        self.main, self.aux = main, copy.deepcopy(main)
        self.use_aux = False

    def forward(self, x: Tensor) -> Tensor:
        return (self.aux if self.use_aux else self.main)(x)


@contextmanager
def _two_norms(model: nn.Module) -> Iterator[None]:
    """Give every batch normalisation an auxiliary twin, and take it away in the end."""
    places: list[tuple[nn.Module, str, nn.Module]] = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.BatchNorm2d)
    ]
    if not places:
        raise InputError(f"recipe: 'advprop' needs batch normalisation; {type(model).__name__} has no BatchNorm2d")
    modes = [(module, module.training) for module in model.modules()]
    twins: dict[int, DualNorm] = {}
    try:
        for parent, name, child in places:
            setattr(parent, name, twins.setdefault(id(child), DualNorm(child)))  # type: ignore[arg-type]
        yield
    finally:
        for parent, name, child in places:
            setattr(parent, name, child)
        for module, flag in modes:
            module.training = flag


@contextmanager
def _auxiliary(model: nn.Module) -> Iterator[None]:
    norms = [module for module in model.modules() if isinstance(module, DualNorm)]
    for module in norms:
        module.use_aux = True
    try:
        yield
    finally:
        for module in norms:
            module.use_aux = False


def _check_range(pixels: Tensor, eps: float, bounds: tuple[float, float]) -> None:
    low, high = bounds
    if not low < high:
        raise InputError(f"bounds: got {bounds}; give (low, high)")
    if eps > high - low:
        raise InputError(f"eps: {eps:g} is more than the range of pixels, {low:g}..{high:g}; is it in 0..255?")
    least, most = float(pixels.min()), float(pixels.max())
    slack = 1e-3 * (high - low)
    if least < low - slack or most > high + slack:
        raise InputError(
            f"inputs: lie in {least:g}..{most:g}, outside of bounds {low:g}..{high:g}; give the mean and std that they "
            "were normalised by, or the bounds of their own scale"
        )


def _random_direction(shape: Any, norm: str, generator: torch.Generator) -> Tensor:
    if norm == "linf":
        return 2 * torch.rand(shape, generator=generator) - 1
    noise = torch.randn(shape, generator=generator)
    return noise / _length(noise).clamp_min(1e-12)


def _projected(d: Tensor, eps: float, norm: str) -> Tensor:
    if norm == "linf":
        return d.clamp(-eps, eps)
    return d * (eps / _length(d).clamp_min(1e-12)).clamp_max(1)


def _length(d: Tensor) -> Tensor:
    return d.flatten(1).norm(dim=1).view(-1, *(1,) * (d.ndim - 1))
