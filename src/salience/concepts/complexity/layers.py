"""The layers of a network as matrices, a row an image: which ones, pooled how, and what the last one means."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool1d, adaptive_avg_pool2d

from salience.concepts.complexity.residuals import residual_sums
from salience.errors import DataError, InputError
from salience.features.attribution import device_of, images_and_labels
from salience.model.at import capture, logits_of, training_mode
from salience.model.at import layer as layer_called
from salience.model.batches import map_batches

INPUT, PENULTIMATE = "input", "penultimate"


class LayerActivations(NamedTuple):
    """Layers of a network on the same images.

    Attributes
    ----------
    layers : dict of str to Tensor or memory map (n, d_l)
        Maps averaged to a grid and flattened.
    logits : Tensor (n, classes)
    fingerprints : Tensor (n,) of int64
        A number for each image that follows from its pixels: two passes over the same images in the same order give
        the same ones. `same_order` compares.
    """

    layers: dict[str, Any]
    logits: Float[Tensor, "n classes"]
    fingerprints: Tensor


class Head(NamedTuple):
    """The linear layer that gives the logits."""

    name: str
    weight: Float[Tensor, "classes p"]
    bias: Float[Tensor, " classes"]


def linear_head(model: nn.Module, images: Float[Tensor, "n channel height width"]) -> Head:
    """Find the linear layer whose output are the logits, and whose input is the penultimate layer.

    Raises
    ------
    InputError
        There is none, as in a network that ends in a convolution or an average.
    """
    seen: list[tuple[str, Tensor]] = []
    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: seen.append((name, output)))
        for name, module in model.named_modules() if isinstance(module, nn.Linear)
    ]  # fmt: skip
    try:
        with training_mode(model, False), torch.no_grad():
            logits = logits_of(model(images.to(device_of(model))))
    finally:
        for handle in handles:
            handle.remove()
    for name, output in reversed(seen):
        if output.shape == logits.shape and output.ndim == 2 and torch.equal(output, logits):
            head: Any = layer_called(model, name)
            bias = head.bias if head.bias is not None else torch.zeros(len(head.weight))
            return Head(name, head.weight.detach().double().cpu(), bias.detach().double().cpu())
    raise InputError(
        f"model: {type(model).__name__} does not end in a linear layer whose output are the logits, so that what its "
        "features do to them cannot be told; put nn.Linear behind the average"
    )


def block_layers(model: nn.Module, images: Float[Tensor, "n channel height width"]) -> list[str]:
    """The layers to decode from: input, stem and every residual block, or every activation; and the penultimate one.

    Residual blocks are found by watching a pass (`residual_sums`). In a network without, layers are its activation
    modules (ReLU, GELU and the like), and if it has none, its convolutions.
    """
    with training_mode(model, False), torch.no_grad():
        sums, inner = residual_sums(model, images.to(device_of(model))), []
    if sums:
        blocks = list(dict.fromkeys(s.module for s in sums if s.module))
        blocks = [name for name in blocks if not any(name.startswith(f"{other}.") for other in blocks)]
        inner = [*(s.stem for s in sums[:1] if s.stem and s.stem not in blocks), *blocks]
    else:
        kinds = [module for module in model.modules() if type(module).__module__ == "torch.nn.modules.activation"]
        kinds = kinds or [module for module in model.modules() if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear)]
        head = linear_head(model, images).name
        inner = [name for name, module in model.named_modules() if module in kinds and name != head]
    return [INPUT, *inner, PENULTIMATE]


def layer_activations(
    model: nn.Module,
    images: Any,
    layers: Sequence[str],
    *,
    grid: int = 4,
    batch_size: int = 64,
    out: str | os.PathLike | None = None,
) -> LayerActivations:
    """What layers give for images, each as a matrix with a row an image.

    Maps (n, c, h, w) are averaged to `grid` x `grid` places and flattened, tokens (n, t, c) to ``grid^2`` places.

    Parameters
    ----------
    model : torch.nn.Module
        A classifier with a linear head; in evaluation mode meanwhile.
    images : Tensor, Dataset or DataLoader
        Items may be images or (image, label). A loader must give the same order at each pass.
    layers : sequence of str
        Names in `model.named_modules()`, "input" for the pixels, "penultimate" for what the head reads.
    grid : int
        Complexity depends on it.
    out : path-like, optional
        A ``.npy`` file for activations larger than memory; all layers go there in one pass.

    Raises
    ------
    InputError
        No such layer, named twice, a grid below 1, or one that gives no maps, tokens or vectors.
    DataError
        A layer gives a value that is not finite.
    """
    if grid < 1 or not layers or len(set(layers)) != len(layers):
        raise InputError(f"layers and grid: got {list(layers)} and {grid}; give at least one layer, each once, and at "
                         "least 1 place")  # fmt: skip
    inner = [name for name in layers if name not in (INPUT, PENULTIMATE)]
    device, head, widths = device_of(model), None, {}

    def columns(batch: Any) -> dict[str, Tensor]:
        nonlocal head
        pixels = images_and_labels(batch, device)[0]
        head = head or (linear_head(model, pixels[:2]) if PENULTIMATE in layers else None)
        with capture(model, inner) as seen, _inputs_of(model, head) as fed:
            logits = logits_of(model(pixels))
            named: Mapping[str, Tensor] = {**{n: seen[n] for n in inner}, INPUT: pixels, **fed}
            parts = {name: pooled_to_grid(named[name], grid, name).float() for name in layers}
        widths.update({name: part.shape[1] for name, part in parts.items()})
        return {"all": torch.cat(list(parts.values()), 1), "logits": logits, "fingerprints": _fingerprints(pixels)}

    with training_mode(model, False), torch.no_grad():
        if out is None:
            found = map_batches(columns, images, batch_size=batch_size)
            whole, logits, index = found["all"], found["logits"], found["fingerprints"]
        else:  # one tensor a file: the small ones travel beside it
            beside: list[dict[str, Tensor]] = []

            def keep(batch: Any) -> Tensor:
                part = columns(batch)
                beside.append({key: part[key].cpu() for key in ("logits", "fingerprints")})
                return part["all"]

            whole = map_batches(keep, images, batch_size=batch_size, out=Path(out))
            logits, index = (torch.cat([part[key] for part in beside]) for key in ("logits", "fingerprints"))
    ends = np.cumsum([0, *(widths[name] for name in layers)])
    return LayerActivations(
        {name: whole[:, ends[i] : ends[i + 1]] for i, name in enumerate(layers)}, logits.float(), index
    )


def same_order(first: LayerActivations, second: LayerActivations, what: str = "checkpoints") -> None:
    """A `DataError` if two passes did not see the same images in the same order."""
    one, other = first.fingerprints, second.fingerprints
    if one.shape == other.shape and bool((one == other).all()):
        return
    row = "" if len(one) != len(other) else f", first at row {int((one != other).int().argmax())}"
    raise DataError(
        f"{what}: two passes gave {len(one)} and {len(other)} images in different orders{row}; rows must be the same "
        "images everywhere, so give a loader that does not shuffle or augment"
    )


def pooled_to_grid(activations: Tensor, grid: int, name: str) -> Float[Tensor, "n d"]:
    """Vectors as they are, maps and tokens averaged to ``grid^2`` places and flattened."""
    if activations.ndim == 4:
        size = (min(grid, activations.shape[2]), min(grid, activations.shape[3]))
        return adaptive_avg_pool2d(activations, size).flatten(1)
    if activations.ndim == 3:
        return adaptive_avg_pool1d(activations.transpose(1, 2), min(grid**2, activations.shape[1])).flatten(1)
    if activations.ndim == 2:
        return activations
    raise InputError(f"layer {name!r} gives shape {tuple(activations.shape)}; maps, tokens or vectors are needed")


@contextmanager
def _inputs_of(model: nn.Module, head: Head | None) -> Iterator[dict[str, Tensor]]:
    """What the head is given while the model runs."""
    fed: dict[str, Tensor] = {}
    if head is None:
        yield fed
        return
    handle = layer_called(model, head.name).register_forward_pre_hook(
        lambda module, args: fed.update({PENULTIMATE: args[0].clone()})
    )
    try:
        yield fed
    finally:
        handle.remove()


def _fingerprints(pixels: Tensor) -> Tensor:
    """64 bits of a hash of each image."""
    flat = pixels.detach().cpu().contiguous().flatten(1)
    rows = [hashlib.blake2b(row.numpy().tobytes(), digest_size=8).digest() for row in flat]
    return torch.from_numpy(np.frombuffer(b"".join(rows), np.int64).copy())
