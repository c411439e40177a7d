"""How large a delta is, and which of the methods is recommended for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from salience.errors import InputError


class DeltaStats(NamedTuple):
    """Size of a delta: over all entries, and of each tensor.

    Attributes
    ----------
    mean, std, mean_abs : float
        Of the entries of all tensors together. The paper's figures plot mean and variance before and after AdamR.
    relative : float
        ``||D|| / ||theta_P||``, Euclidean norms.
    entries : int
    unchanged : float
        Share of entries that are exactly zero.
    tensors : dict of str to (mean, std, relative)
    """

    mean: float
    std: float
    mean_abs: float
    relative: float
    entries: int
    unchanged: float
    tensors: dict[str, tuple[float, float, float]]


class Recommendation(NamedTuple):
    """What to do, and the branches of the flow chart that led there, in words."""

    method: str
    branch: tuple[str, ...]


class StatsSum:
    """Adds up the statistics of a delta piece by piece, in float64."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}

    def add(self, name: str, base: Tensor, tuned: Tensor) -> None:
        """Take in a piece of the tensor called `name`."""
        wide = base.to(torch.float64)
        delta = tuned.to(torch.float64) - wide
        new = torch.stack([
            delta.sum(), delta.square().sum(), delta.abs().sum(), wide.square().sum(), (delta == 0).sum()
        ])  # fmt: skip
        old = self._sums.get(name, [0.0] * 6)
        self._sums[name] = [a + b for a, b in zip(old, [delta.numel(), *new.tolist()], strict=True)]

    def result(self) -> DeltaStats:
        """The statistics so far."""
        if not self._sums:
            raise InputError("base and tuned: have no tensor in common to take statistics of")
        total = [sum(column) for column in zip(*self._sums.values(), strict=True)]
        mean, std, relative = _moments(total)
        count = max(total[0], 1)
        return DeltaStats(
            mean, std, total[3] / count, relative, int(total[0]), total[5] / count,
            {name: _moments(sums) for name, sums in self._sums.items()},
        )  # fmt: skip


def delta_stats(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> DeltaStats:
    """Statistics of ``tuned - base`` over the tensors that both hold with equal shape.

    Parameters
    ----------
    base, tuned : mapping of str to Tensor

    Raises
    ------
    InputError
        They have no floating-point tensor in common.
    """
    sums = StatsSum()
    for name, value in tuned.items():
        if name in base and base[name].shape == value.shape and value.is_floating_point():
            sums.add(name, base[name].detach(), value.detach())
    return sums.result()


def recommend(
    stats: DeltaStats, *, can_train: bool, has_labels: bool, decoder: bool, large: float = 1.0
) -> Recommendation:
    """Go through the paper's flow chart.

    May you fine-tune? AdamR, then DARE on the smaller delta (DAREx-L2). If not, is the delta large? Importance-based
    pruning. Is it small: q by validation where there are labels, else by the change of the outputs; per layer for
    encoders, one for all for decoders.

    Parameters
    ----------
    stats : DeltaStats
    can_train : bool
        Fine-tuning can be done again.
    has_labels : bool
    decoder : bool
        A causal language model.
    large : float
        Relative size from which a delta counts as large. The paper says "large" without a number that we know of; 1
        (as large as the weights themselves) is ours, since on small networks random pruning wins well above 0.3.

    Returns
    -------
    Recommendation
        `method` is "adamr", "magnitude", or "darex" followed by how q is chosen.
    """
    branch = []
    if can_train:
        branch.append("fine-tuning can be done again: train with AdamR, then prune with DARE (DAREx-L2)")
        return Recommendation("adamr", tuple(branch))
    branch.append("fine-tuning cannot be done again")
    size = f"relative size {stats.relative:.3g}, mean {stats.mean:.2g}, standard deviation {stats.std:.2g}"
    if stats.relative > large:
        branch.append(f"the delta is large ({size}; over {large:g}): keep the most important entries")
        return Recommendation("magnitude", tuple(branch))
    branch.append(f"the delta is small ({size}; at most {large:g}): drop at random and choose q")
    branch.append("labels are there: q by validation" if has_labels else "no labels: q by the change of the outputs")
    branch.append("a decoder: one q for all layers" if decoder else "an encoder: a q per layer")
    selection = "validation" if has_labels else "output"
    return Recommendation(f"darex {selection} {'global' if decoder else 'layer'}", tuple(branch))


def _moments(sums: list[float]) -> tuple[float, float, float]:
    count = max(sums[0], 1)
    mean = sums[1] / count
    std = math.sqrt(max(sums[2] / count - mean**2, 0))
    return mean, std, math.sqrt(sums[2] / sums[4]) if sums[4] else math.inf if sums[2] else 0.0
