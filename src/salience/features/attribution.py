"""What all explainers of the room share: the class that is explained, layers to look at, and runs over data."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from captum.attr import Attribution
from jaxtyping import Float, Int
from torch import Tensor, nn

from salience.errors import InputError
from salience.model.at import logits_of, run, training_mode
from salience.model.batches import map_batches

# What is explained: the predicted class (None), a class for all images or one for each, or a function of the logits.
Target = int | Sequence[int] | Int[Tensor, " batch"] | Callable[[Tensor], Tensor] | None


class LogitsModel(nn.Module):
    """A model that gives its logits as a tensor, which captum's own methods need of `forward_func`.

    Parameters
    ----------
    model : torch.nn.Module
        Returns a tensor, a tuple, or a `transformers` output with `logits`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any) -> Tensor:
        """The logits, (batch, classes)."""
        return logits_of(run(self.model, inputs))


def target_classes(logits: Float[Tensor, "batch classes ..."], target: Target) -> Int[Tensor, " batch"]:
    """The class to explain of each image: the predicted one for None, else as given and checked.

    Raises
    ------
    InputError
        A class that the model does not have, or not one for each image.
    """
    if logits.ndim not in (2, 4):
        raise InputError(f"model: gives logits of shape {tuple(logits.shape)}; (batch, classes) is needed")
    if logits.ndim == 4:  # fully convolutional: the mean over the positions decides
        logits = logits.mean((2, 3))
    n, classes = logits.shape
    if target is None:
        return logits.argmax(1)
    try:
        wanted = torch.as_tensor(target, device=logits.device)
    except (TypeError, ValueError, RuntimeError):
        wanted = None
    if wanted is None or wanted.is_floating_point() or wanted.is_complex() or wanted.dtype == torch.bool:
        raise InputError(f"target: got {target!r}; give a class, or one for each of the {n} images")
    if wanted.ndim == 0:
        wanted = wanted.expand(n)
    if wanted.shape != (n,):
        raise InputError(f"target: has shape {tuple(wanted.shape)}; there are {n} images")
    if n and (int(wanted.min()) < 0 or int(wanted.max()) >= classes):
        raise InputError(
            f"target: got classes {int(wanted.min())}..{int(wanted.max())}; the model has 0..{classes - 1}"
        )
    return wanted.long()


def target_scores(logits: Float[Tensor, "batch ..."], target: Target) -> Float[Tensor, " batch"]:
    """The number to explain of each image: the logit of its class, before the softmax.

    Logits (batch, classes, height, width) of a fully convolutional model are averaged over the positions. A single
    output per image, (batch,) or (batch, 1), is taken as it is when `target` is None.

    Raises
    ------
    InputError
        As in `target_classes`, or a `target` function that does not return one number per image.
    """
    if callable(target):
        scores = target(logits)
        if not isinstance(scores, Tensor) or scores.shape != logits.shape[:1]:
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise InputError(f"target: the function must return one number per image, ({len(logits)},); got {got}")
        return scores
    if target is None and (logits.ndim == 1 or logits.shape[1:] == (1,)):
        return logits.reshape(-1)
    classes = target_classes(logits, target)
    if logits.ndim == 4:
        logits = logits.mean((2, 3))
    return logits.gather(1, classes[:, None])[:, 0]


def attribute_batches(
    attribution: Attribution,
    data: Any,
    *,
    target: str | int | Callable[[Tensor], Tensor] = "predicted",
    batch_size: int = 32,
    progress: bool = False,
    out: str | os.PathLike | None = None,
    **options: Any,
) -> Any:
    """Explain all images of a data set with any captum attribution, batch by batch, in order.

    The model is in evaluation mode meanwhile, and memory that runs out halves the batch (`map_batches`).

    Parameters
    ----------
    attribution : captum Attribution
        One of ours, or captum's on a `LogitsModel`.
    data : Tensor, DataLoader, Dataset or sequence
        Batches are images, ``(images, labels)``, or a mapping with `pixel_values` and perhaps `labels`.
    target : {"predicted", "label"}, int or callable
        The class to explain: the one that the model predicts, the label in the batch, this one, or
        ``target(logits)``, the class of each image.
    batch_size : int
        Images at once; a `DataLoader` has its own.
    progress : bool
        Draw a progress bar.
    out : path-like, optional
        A ``.npy`` file for maps larger than memory.
    **options
        Passed on to ``attribution.attribute``, such as ``n_steps`` or ``internal_batch_size``.

    Returns
    -------
    Tensor or numpy.memmap
        What `attribute` returns, for all images; on the CPU.

    Raises
    ------
    InputError
        Labels asked for and not there, or a class that the model does not have.
    """
    if not isinstance(attribution, Attribution):
        raise InputError(f"attribution: got {type(attribution).__name__}; give a captum Attribution")
    if isinstance(target, str) and target not in ("predicted", "label"):
        raise InputError(
            f"target: got {target!r}; it must be 'predicted', 'label', a class, or a function of the logits"
        )
    model = attribution.forward_func

    def classes_of(images: Tensor, labels: Tensor | None) -> Any:
        if target == "label":
            if labels is None or int(labels.min()) < 0:
                raise InputError("target: 'label' needs data with labels; there are none")
            return labels
        # Our own methods read the predicted class off the pass that they make anyway.
        if target == "predicted" and getattr(attribution, "predicts", False):
            return None
        if isinstance(target, int):
            return torch.full((len(images),), target, device=images.device)
        with torch.no_grad():
            logits = logits_of(model(images))
        return target_classes(logits, None if target == "predicted" else target(logits))  # type: ignore[operator]

    def one(batch: Any) -> Tensor:
        images, labels = images_and_labels(batch, device_of(model))
        return attribution.attribute(images, target=classes_of(images, labels), **options)

    with evaluating(model):
        return map_batches(one, data, batch_size=batch_size, progress=progress, out=out)


def images_and_labels(batch: Any, device: torch.device | None = None) -> tuple[Tensor, Tensor | None]:
    """The images of a batch and its labels, if it has any, on `device`."""
    labels = None
    if isinstance(batch, Mapping):
        images, labels = batch.get("pixel_values"), batch.get("labels", batch.get("label"))
    elif isinstance(batch, list | tuple):
        images, labels = batch[0], batch[1] if len(batch) > 1 else None
    else:
        images = batch
    if not isinstance(images, Tensor):
        raise InputError(
            f"data: a batch must be images, (images, labels) or hold pixel_values; got {type(batch).__name__}"
        )
    return images.to(device), None if labels is None else torch.as_tensor(labels).to(device)


def device_of(model: Any) -> torch.device | None:
    """Where the model's parameters are; None where it has none."""
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return None if first is None else first.device


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode for a while, where `model` is a module at all."""
    if not isinstance(model, nn.Module):
        yield
        return
    with training_mode(model, False):
        yield


def as_grid(activations: Tensor, image: tuple[int, int]) -> Float[Tensor, "batch channel height width"] | None:
    """Activations as a grid over the image, or None if they are none.

    A map (batch, channel, height, width) is one. Tokens (batch, token, channel) of a vision transformer are laid
    out in rows after leading ones (CLS, registers) are dropped: as few of them as leave a grid of the shape of the
    image, 16 at most.
    """
    if activations.ndim == 4:
        return activations
    if activations.ndim != 3:
        return None
    height, width = image
    for extra in range(min(17, activations.shape[1])):
        patches = activations.shape[1] - extra
        rows = round((patches * height / width) ** 0.5)
        if rows and patches % rows == 0 and rows * width == patches // rows * height:
            return activations[:, extra:].transpose(1, 2).unflatten(2, (rows, patches // rows))
    return None


def spatial_layers(model: nn.Module, inputs: Float[Tensor, "batch channel height width"]) -> dict[str, tuple[int, int]]:
    """Layers whose output is a grid of more than one position, in the order in which they finish, with its size."""
    found: dict[str, tuple[int, int]] = {}

    def hook_for(name: str) -> Callable:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            try:
                first = logits_of(output)
            except InputError:
                return
            grid = as_grid(first, (inputs.shape[2], inputs.shape[3]))
            found.pop(name, None)
            if grid is not None and grid.shape[2] * grid.shape[3] > 1:
                found[name] = (grid.shape[2], grid.shape[3])

        return hook

    handles = [module.register_forward_hook(hook_for(name)) for name, module in model.named_modules() if name]
    try:
        with training_mode(model, False), torch.no_grad():
            run(model, (inputs,))
    finally:
        for handle in handles:
            handle.remove()
    return found


def default_layers(model: nn.Module, inputs: Float[Tensor, "batch channel height width"], count: int = 4) -> list[str]:
    """Up to `count` layers to look at, from shallow to deep: the last one of each resolution of a network.

    Where all layers share one resolution (vision transformers), they are spread evenly over its depth. Layers whose
    positions the prediction does not read, such as the patches after a transformer's last attention, are left out.

    Raises
    ------
    InputError
        The model has no layer that keeps a grid.
    """
    from salience.model.at import capture

    sizes = spatial_layers(model, inputs)
    if not sizes:
        raise InputError(f"model: {type(model).__name__} has no layer whose output is a map or tokens of a grid")
    with training_mode(model, False), torch.enable_grad(), capture(model, sizes) as seen:
        scores = target_scores(logits_of(run(model, (inputs.detach().clone().requires_grad_().clone(),))), None)
        outputs = {name: seen[name] for name in sizes if seen[name].requires_grad}
        gradients = torch.autograd.grad(scores.sum(), list(outputs.values()), allow_unused=True)
    alive = []
    for name, gradient in zip(outputs, gradients, strict=True):
        grid = None if gradient is None else as_grid(gradient, (inputs.shape[2], inputs.shape[3]))
        if grid is not None and bool(grid.ne(0).any()):
            alive.append(name)
    by_size: dict[tuple[int, int], list[str]] = {}
    for name in alive:
        by_size.setdefault(sizes[name], []).append(name)
    if len(by_size) > 1:
        return [names[-1] for names in by_size.values()][-count:]
    ends = [len(alive) * (k + 1) // count - 1 for k in range(count)]
    return list(dict.fromkeys(alive[end] for end in ends if end >= 0))
