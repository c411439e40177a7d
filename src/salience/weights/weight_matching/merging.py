"""Between networks: interpolation, the loss barrier, merging of two and more, batch normalisation afterwards."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from salience.errors import DataError, InputError
from salience.model.at import run, training_mode
from salience.weights.weight_matching.matching import match_weights
from salience.weights.weight_matching.spec import PermutationSpec, apply_permutation

State = Mapping[str, Tensor]


class BarrierResult(NamedTuple):
    """Loss and accuracy on the line between two networks.

    Attributes
    ----------
    t : (points,) array
        0 at a, 1 at b.
    losses, accuracies : (points,) arrays
    barrier : float
        ``max_t L(theta_t) - ((1-t) L(theta_a) + t L(theta_b))``, 0 at least, since the ends are on the line.
    accuracy_barrier : float
        The same of ``1 - accuracy``.
    midpoint_loss, midpoint_accuracy : float
    """

    t: np.ndarray
    losses: np.ndarray
    accuracies: np.ndarray
    barrier: float
    accuracy_barrier: float
    midpoint_loss: float
    midpoint_accuracy: float


def interpolate(state_a: State, state_b: State, t: float) -> dict[str, Tensor]:
    """``(1 - t) theta_a + t theta_b``, computed in float32 at least; integer tensors are those of a.

    Parameters
    ----------
    state_a, state_b : mapping of str to Tensor
    t : float
        0 gives a, 1 gives b.
    """
    return _combined([state_a, state_b], [1 - t, t])


def barrier(
    model: nn.Module,
    state_a: State,
    state_b: State,
    evaluate: Callable[[nn.Module], tuple[float, float]],
    *,
    points: int = 25,
    recalibrate: Iterable[Any] | None = None,
) -> BarrierResult:
    """Loss and accuracy along the line from a to b, and how far they rise above the line between the ends.

        B = max_t [ L(theta_t) - ((1-t) L(theta_a) + t L(theta_b)) ]

    Supported: any `torch.nn.Module`.

    Parameters
    ----------
    model : torch.nn.Module
        The architecture; a copy of it is filled with each point.
    state_a, state_b : mapping of str to Tensor
        b as it was, or permuted.
    evaluate : callable
        ``evaluate(model) -> (loss, accuracy)``.
    points : int
        Grid of t; an odd number has the midpoint on it.
    recalibrate : iterable, optional
        Inputs from which the running statistics of batch normalisation are taken anew at every point but the ends.

    Raises
    ------
    InputError
        Fewer than 3 points, or an even number.
    DataError
        A loss is not finite.
    """
    if points < 3 or points % 2 == 0:
        raise InputError(f"points: got {points}; an odd number of at least 3 has the midpoint on it")
    batches = None if recalibrate is None else list(recalibrate)
    normed = any(isinstance(module, _BatchNorm) for module in model.modules())
    if normed and batches is None:
        warnings.warn(
            "model: has batch normalisation, whose statistics do not fit between networks; give recalibrate",
            stacklevel=2,
        )
    other = copy.deepcopy(model).eval()
    t = np.linspace(0, 1, points)
    values = []
    for number, point in enumerate(t):
        other.load_state_dict(interpolate(state_a, state_b, float(point)))
        if normed and batches is not None and 0 < number < points - 1:
            recalibrate_norms(other, batches)
        values.append(evaluate(other))
    losses, accuracies = np.array(values, dtype=np.float64).T
    if not np.isfinite(losses).all():
        raise DataError(f"evaluate: the loss at t = {t[~np.isfinite(losses)][0]:.2f} is not finite")

    def above(line: np.ndarray) -> float:
        return float((line - ((1 - t) * line[0] + t * line[-1])).max())

    middle = points // 2
    return BarrierResult(
        t, losses, accuracies, above(losses), above(1 - accuracies), float(losses[middle]), float(accuracies[middle])
    )


def recalibrate_norms(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Take the running statistics of batch normalisation anew from data, as the mean over the batches; in place.

    Supported: any `torch.nn.Module`; without batch normalisation nothing happens.

    Parameters
    ----------
    model : torch.nn.Module
        Its training flags are given back.
    batches : iterable
        Inputs of the model, labels are not used. Batches of some size: variances of small ones are noisy, and a batch
        of one example, such as a last one often is, is left out where there is a larger one.

    Raises
    ------
    InputError
        There are no batches, or the model cannot take statistics of them. The statistics are as before then.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return model
    momenta = [norm.momentum for norm in norms]
    kept = [{name: value.clone() for name, value in norm.named_buffers()} for norm in norms]
    single: list[Any] = []
    count = 0
    with training_mode(model, False), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative mean
            norm.train()
        try:
            for batch in batches:
                if _rows(batch) == 1:
                    single.append(batch)
                    continue
                run(model, batch)
                count += 1
            for batch in single if not count else ():
                run(model, batch)
                count += 1
            if not count:
                raise InputError("batches: there are none to take statistics of")
        except BaseException as error:
            for norm, buffers in zip(norms, kept, strict=True):
                for name, value in norm.named_buffers():
                    value.copy_(buffers[name])
            if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):
                raise InputError("batches: of one example have no variance; give larger ones") from error
            raise
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    return model


def _rows(batch: Any) -> int | None:
    """Examples of a batch, by the first axis of its first tensor."""
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple) else [batch]
    return next((len(part) for part in parts if isinstance(part, Tensor) and part.ndim), None)


def merge_many(
    spec: PermutationSpec,
    states: Sequence[State],
    *,
    reference: int = 0,
    mode: Literal["reference", "mean"] = "reference",
    max_iter: int = 100,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Mean of several networks after matching.

    "reference" matches every network to one of them, by itself. "mean" then goes on and matches each network to the
    mean of the others until nothing moves.

    Parameters
    ----------
    spec : PermutationSpec
    states : sequence of mapping of str to Tensor
        Two or more.
    reference : int
        Number of the network that keeps its order.
    mode : {"reference", "mean"}
    max_iter : int
        Passes of each matching at most, and rounds of "mean".
    generator : torch.Generator, optional
        Order of the layers, and of the networks in "mean"; seeded with 0 by default.

    Raises
    ------
    InputError
        Fewer than two networks, an unknown mode, or a reference that is not there.
    """
    if len(states) < 2 or not 0 <= reference < len(states):
        raise InputError(f"states and reference: got {len(states)} and {reference}; two networks or more, one of them")
    if mode not in ("reference", "mean"):
        raise InputError(f"mode: got {mode!r}; it must be 'reference' or 'mean'")
    draw = generator if generator is not None else torch.Generator().manual_seed(0)

    def matched(target: State, state: State) -> tuple[dict[str, Tensor], bool]:
        found = match_weights(spec, target, state, max_iter=max_iter, generator=draw).permutations
        moved = any(not torch.equal(order, torch.arange(len(order))) for order in found.values())
        return apply_permutation(spec, found, state), moved

    permuted = [
        dict(state) if number == reference else matched(states[reference], state)[0]
        for number, state in enumerate(states)
    ]
    for _ in range(max_iter if mode == "mean" else 0):
        moved = False
        for number in torch.randperm(len(permuted), generator=draw).tolist():
            others = [state for other, state in enumerate(permuted) if other != number]
            permuted[number], now = matched(_combined(others, [1 / len(others)] * len(others)), permuted[number])
            moved |= now
        if not moved:
            break
    return _combined(permuted, [1 / len(permuted)] * len(permuted))


def _combined(states: Sequence[State], shares: Sequence[float]) -> dict[str, Tensor]:
    first = states[0]
    combined = {}
    for name, value in first.items():
        for number, state in enumerate(states):
            if name not in state or state[name].shape != value.shape:
                raise DataError(f"network {number}: has no tensor {name!r} of shape {tuple(value.shape)}")
        if not value.is_floating_point():
            combined[name] = value
            continue
        wide = torch.promote_types(value.dtype, torch.float32)
        parts = [share * state[name].to(wide) for share, state in zip(shares, states, strict=True)]
        combined[name] = torch.stack(parts).sum(0).to(value.dtype)
    return combined
