"""Do two networks have functionally equivalent features?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from salience.errors import InputError
from salience.measure import linear_cka
from salience.model.at import capture, logits_of, run, training_mode


class LayerEquivalence(NamedTuple):
    """How the features of two networks map onto each other at one layer.

    Parameters
    ----------
    map : Tensor, shape (n_a, n_b)
        T of least squares, ``F_b ~ F_a T``.
    error : float
        ``||F_b - F_a T|| / ||F_b||`` (Frobenius).
    rank : int
        Rank of T: equivalence asks for an invertible map, and two duplicates in one network lower the rank.
    cka : float
        Linear CKA of the features, for contrast: similarity without a word on what follows.
    """

    map: Float[Tensor, "n_a n_b"]
    error: float
    rank: int
    cka: float


class Equivalence(NamedTuple):
    """The report: each layer, and the largest and relative difference of the outputs."""

    layers: dict[str, LayerEquivalence]
    largest_difference: float
    relative_difference: float


@torch.no_grad()
def equivalence_report(
    model: nn.Module, other: nn.Module, data: Any, layers: Sequence[str | tuple[str, str]]
) -> Equivalence:
    """Compare the features and outputs of two networks on the same inputs.

    Features are functionally equivalent at a layer if an invertible linear map takes one to the other *and* the
    outputs agree, so that what follows undoes the map.

    Supported: any two networks that take the same inputs and give outputs of one shape.

    Parameters
    ----------
    model, other : torch.nn.Module
        Run in evaluation mode; left as they were.
    data : tensor, tuple or mapping
        Inputs of one pass; more rows (times places in an image) than a layer has channels, or any map fits.
    layers : sequence of str or (str, str)
        Layer in both networks, or its name in the first and in the second.

    Returns
    -------
    Equivalence

    Raises
    ------
    InputError
        A layer that is not there, or outputs of different shapes.

    References
    ----------
    Chen, Zhou, Yan, arXiv 2310.06756, section 3 (definition of functionally equivalent features).
    """
    pairs = [(layer, layer) if isinstance(layer, str) else layer for layer in layers]
    with training_mode(model, False), training_mode(other, False):
        with capture(model, [one for one, _ in pairs]) as first:
            output = logits_of(run(model, data)).double()
        with capture(other, [two for _, two in pairs]) as second:
            output_other = logits_of(run(other, data)).double()
    if output.shape != output_other.shape:
        raise InputError(f"other: gives {tuple(output_other.shape)}, the model gives {tuple(output.shape)}")
    gap = output_other - output
    return Equivalence(
        {one: _compare(_rows(first[one]), _rows(second[two])) for one, two in pairs},
        float(gap.abs().max()),
        float(gap.norm() / output.norm().clamp_min(torch.finfo(torch.float64).tiny)),
    )


def _rows(activations: Tensor) -> Float[Tensor, "rows channel"]:
    """One row per input and place: channels stand in dimension 1 of images, else last."""
    moved = activations.movedim(1, -1) if activations.ndim > 3 else activations
    return moved.reshape(-1, moved.shape[-1]).double().cpu()


def _compare(one: Tensor, two: Tensor) -> LayerEquivalence:
    solved, *_ = np.linalg.lstsq(one.numpy(), two.numpy(), rcond=None)
    linear = torch.from_numpy(solved)
    error = float((two - one @ linear).norm() / two.norm().clamp_min(torch.finfo(torch.float64).tiny))
    constant = one.std(0).max() == 0 or two.std(0).max() == 0
    cka = float("nan") if constant else float(linear_cka(one.numpy(), two.numpy()))
    return LayerEquivalence(linear, error, int(np.linalg.matrix_rank(solved)), cka)
