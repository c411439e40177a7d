"""One short deterministic training loop, for the small networks that methods and worlds train."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Shaped
from rich.progress import track
from torch import Tensor, nn

from salience.errors import InputError
from salience.model.at import training_mode


@dataclass
class History:
    """What training did: `loss` is the mean loss of each epoch, `steps` the number of optimiser steps."""

    loss: list[float] = field(default_factory=list)
    steps: int = 0


def fit(
    model: nn.Module,
    inputs: Shaped[Tensor, "n ..."],
    targets: Shaped[Tensor, "_ ..."],
    *,
    loss: Callable[[Any, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    epochs: int,
    generator: torch.Generator,
    batch_size: int = 64,
    milestones: Sequence[int] = (),
    gamma: float = 0.1,
    drop_last: bool = True,
    on_step: Callable[[int], None] | None = None,
    progress: bool = False,
) -> History:
    """Train `model` in place by minibatch gradient descent.

    Same model, data and generator state give the same weights, bit for bit, on the same machine and number
    of threads. The global random state is left as it was.

    Parameters
    ----------
    model : torch.nn.Module
        In training mode meanwhile; every module gets its own flag back.
    inputs, targets : Tensor, shape (n, ...)
        Row i of one belongs to row i of the other. Batches are moved to the model's device.
    loss : callable
        ``loss(model(inputs), targets)``, the mean over the batch.
    optimizer : torch.optim.Optimizer
        Over the parameters to train, such as ``torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)``.
    epochs : int
        Passes over the data, each in a new random order.
    generator : torch.Generator
        On the CPU. Draws the orders, and seeds what the model itself draws (dropout).
    milestones : sequence of int
        Epochs after which every learning rate is multiplied by `gamma`.
    drop_last : bool
        Leave out the last batch of an epoch if it is smaller, which batch normalisation needs.
    on_step : callable, optional
        Called with the number of steps taken so far after each step, to put masked weights back, say.
    progress : bool
        Draw a progress bar over the epochs.

    Raises
    ------
    InputError
        Shapes or sizes do not fit, or the loss is no longer finite.
    """
    n, size = len(inputs), batch_size
    if n != len(targets):
        raise InputError(f"targets: {len(targets)} rows for {n} rows of inputs")
    if epochs < 1 or size < 1:
        raise InputError(f"epochs and batch_size: got {epochs} and {size}; both must be at least 1")
    if n < (size if drop_last else 1):
        raise InputError(f"inputs: {n} rows are fewer than one batch of {size}; lower batch_size")
    device = next(model.parameters()).device
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(milestones), gamma)
    history = History()
    seeded = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(seeded), training_mode(model, True), torch.enable_grad():
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        for epoch in track(range(epochs), "epochs", disable=not progress):
            order = torch.randperm(n, generator=generator)
            total, rows = torch.zeros((), dtype=torch.float64, device=device), 0
            for batch in order[: n - n % size if drop_last else n].split(size):
                optimizer.zero_grad(set_to_none=True)
                value = loss(model(inputs[batch].to(device)), targets[batch].to(device))
                value.backward()
                optimizer.step()
                history.steps += 1
                if on_step is not None:
                    on_step(history.steps)
                total += value.detach().double() * len(batch)
                rows += len(batch)
            schedule.step()
            history.loss.append(float(total) / rows)  # once an epoch: reading it waits for the device
            if not math.isfinite(history.loss[-1]):
                raise InputError(
                    f"optimizer: the loss is {history.loss[-1]} in epoch {epoch + 1}; lower the learning rate"
                )
    optimizer.zero_grad(set_to_none=True)
    return history
