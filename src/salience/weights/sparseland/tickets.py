"""Lottery tickets: train, prune, rewind, again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from salience.errors import InputError
from salience.weights.sparseland.densities import count_kept, prunable
from salience.weights.sparseland.masking import Masks, _largest, apply_masks

# Trains a model in place under masks; calls the last argument with the number of steps taken, after each step.
TrainUnderMasks = Callable[[nn.Module, Mapping[str, Tensor], Callable[[int], None]], None]


@dataclass
class Ticket:
    """A sparse network to be trained again.

    Parameters
    ----------
    model : torch.nn.Module
        Rewound and masked, untrained since.
    masks : dict of str to bool Tensor
    densities : list of float
        After each round.
    trainings : int
        Trainings that it took: a fair comparison counts their steps.
    """

    model: nn.Module
    masks: Masks
    densities: list[float] = field(default_factory=list)
    trainings: int = 0


def lottery_ticket(
    make_model: Callable[[], nn.Module],
    train: TrainUnderMasks,
    *,
    density: float,
    rate: float = 0.2,
    rewind_step: int = 0,
) -> Ticket:
    """Find a lottery ticket by iterative magnitude pruning with rewinding.

    In each round: train; keep of the weights that are left the share ``1 - rate`` with the largest magnitude,
    over all layers; set them back to their values at step `rewind_step` of the first training.

    Parameters
    ----------
    make_model : callable
        Builds the untrained network.
    train : callable
        ``train(model, masks, on_step)`` trains in place and keeps the weights outside the masks at 0, as
        `SparseTrainer` with ``method="static"`` does; it calls ``on_step(steps)`` after each step.
    density : float
        Share of the weights to keep at the end, in (0, 1); the last round stops exactly there.
    rate : float
        Share of the survivors pruned in a round.
    rewind_step : int
        0 is the initialisation.

    Returns
    -------
    Ticket
        Train its `model` under its `masks`. The controls: the same masks over a fresh network, and
        `shuffle_masks` of them over this one.

    Raises
    ------
    InputError
        An option out of range, or a training that ends before `rewind_step`.

    References
    ----------
    Frankle, Carbin, ICLR 2019; with rewinding: Frankle et al., ICML 2020.
    """
    if not 0 < density < 1 or not 0 < rate < 1 or rewind_step < 0:
        raise InputError(
            f"density, rate, rewind_step: got {density}, {rate}, {rewind_step}; the first two in (0, 1), the last >= 0"
        )
    model = make_model()
    start: dict[str, Tensor] = copy.deepcopy(model.state_dict()) if rewind_step == 0 else {}
    masks = {name: torch.ones_like(e.weight, dtype=torch.bool) for name, e in prunable(model).items()}
    total = sum(mask.numel() for mask in masks.values())
    left, ticket = total, Ticket(model, masks)

    def remember(steps: int) -> None:
        if steps == rewind_step and not start:
            start.update(copy.deepcopy(model.state_dict()))

    while left > count_kept(density, total):
        train(model, masks, remember)
        ticket.trainings += 1
        if not start:
            raise InputError(f"rewind_step: {rewind_step}, but the training took fewer steps")
        # At least one goes in a round, however few are left.
        left = max(min(count_kept(1 - rate, left), left - 1), count_kept(density, total))
        sizes = {name: e.weight.detach().abs().masked_fill(~masks[name], -1) for name, e in prunable(model).items()}
        flat = _largest(torch.cat([size.flatten() for size in sizes.values()]), left)
        parts = flat.split([size.numel() for size in sizes.values()])
        masks = {name: part.view(sizes[name].shape) for name, part in zip(sizes, parts)}
        model.load_state_dict(start)
        apply_masks(model, masks)
        ticket.masks = masks
        ticket.densities.append(left / total)
    return ticket
