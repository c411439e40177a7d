"""What the learned scores estimate: the loss that damping a single layer costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from salience.errors import InputError, NothingToDo
from salience.model.at import run, training_mode
from salience.weights.ist.damping import damped, find_layers

LossFn = Callable[[nn.Module, Any], Tensor]


def layer_ablation(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn | None = None,
    *,
    suppression: float = 0.25,
    layers: str | Sequence[str] = "auto",
    start: Mapping[str, Tensor] | None = None,
) -> Float[Tensor, " layers"]:
    """How much the loss rises when what was tuned in one layer is damped, layer by layer.

        rise_i = L(adapter of layer i times beta) - L

    in evaluation mode and without gradient, as the mean over the batches. It takes a pass over the data for each
    layer; the importance of `ImportanceSparseTuning` is the estimate of it that comes with training.

    Supported: models whose layers hold trainable adapters of `peft`, or any trainable parameters.

    Parameters
    ----------
    model : torch.nn.Module
        Left as it was.
    batches : iterable
        What `loss_fn` takes, such as dictionaries with labels; gone through once.
    loss_fn : callable, optional
        ``loss_fn(model, batch)``, a scalar. The loss that the model itself returns by default.
    suppression : float
        beta, in [0, 1).
    layers
        As of `ImportanceSparseTuning`.
    start : mapping of str to Tensor, optional
        Parameters before tuning, by name: needed for what no adapter's scaling multiplies (full fine-tuning, IA3,
        OFT and so on). `ImportanceSparseTuning.start_` is such a mapping. A parameter without an entry is taken
        not to have moved, so that a layer that was never drawn has a rise of 0.

    Returns
    -------
    Tensor of float64, shape (layers,)
        Above 0 where damping hurts.

    Raises
    ------
    InputError
        No layers, an option out of range, or a layer with parameters that need `start`, which is not given.
    NothingToDo
        There are no batches.
    """
    check_suppression(suppression)
    found = find_layers(model, layers)
    for layer in found:
        if start is None and layer.unscaled:
            raise InputError(
                f"start: {next(iter(layer.unscaled))!r} of layer {layer.name!r} has no scaling by which to damp it, so "
                "give the values before tuning by name"
            )
    start = start or {}  # no entry: the parameter has not moved, and damping it changes nothing
    loss_fn = loss_fn or own_loss
    rows = []
    with training_mode(model, False), torch.no_grad():
        for batch in batches:
            whole = float(loss_fn(model, batch))
            row = []
            for layer in found:
                with damped([layer], suppression, start):
                    row.append(float(loss_fn(model, batch)) - whole)
            rows.append(row)
    if not rows:
        raise NothingToDo("batches: there are none to measure the loss on")
    return torch.tensor(rows, dtype=torch.float64).mean(0)


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that a model of transformers computes when its batch holds labels."""
    output = run(model, batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise InputError(
            f"loss_fn: {type(model).__name__} returned no loss; put labels into the batch, or give loss_fn"
        )
    return loss


def check_suppression(suppression: float) -> None:
    """Refuse what does not damp."""
    if not (math.isfinite(suppression) and 0 <= suppression < 1):
        raise InputError(f"suppression: got {suppression!r}; it must lie in [0, 1)")
