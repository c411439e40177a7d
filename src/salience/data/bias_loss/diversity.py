"""Which samples of a data set a trained network finds little in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from salience.data.bias_loss.variance import feature_variance
from salience.errors import InputError
from salience.model.at import capture, logits_of, run, training_mode
from salience.model.batches import map_batches
from salience.scores import Scores


@dataclass(frozen=True)
class Diversity:
    """Variances of the features of n samples, with what a classifier made of them.

    Attributes
    ----------
    variances : (n,) float array
    correct : (n,) bool array
    targets : (n,) int array
    """

    variances: Float[np.ndarray, " n"]
    correct: Bool[np.ndarray, " n"]
    targets: Int[np.ndarray, " n"]

    def summary(self) -> dict[str, float]:
        """Mean variance of all, of the correctly and the wrongly classified, of each class, and quantiles.

        NaN where there is no such sample.
        """
        groups = {"all": np.ones(len(self.correct), bool), "correct": self.correct, "wrong": ~self.correct}
        groups |= {f"class {label}": self.targets == label for label in np.unique(self.targets)}
        means = {name: float(self.variances[where].mean()) if where.any() else np.nan for name, where in groups.items()}
        quantiles = zip((0.05, 0.25, 0.5, 0.75, 0.95), np.quantile(self.variances, (0.05, 0.25, 0.5, 0.75, 0.95)))
        return means | {f"quantile {share}": float(value) for share, value in quantiles}


def diversity_report(
    model: nn.Module, inputs: Any, targets: Int[Tensor, " n"], layer: str, *, batch_size: int = 64
) -> Diversity:
    """Variance of the features of each sample, and whether the classifier is right about it.

    Supported: any classifier that gives logits, by itself or in a `ModelOutput`.

    Parameters
    ----------
    model : torch.nn.Module
        Run in evaluation mode, and left as it was.
    inputs : Tensor, DataLoader, dataset or sequence
        Batches that the model takes, as of `salience.model.map_batches`.
    targets : (n,) int Tensor
        In the order of `inputs`.
    layer : str
        The last stage before pooling, as `model.named_modules()` names it.
    batch_size : int

    Raises
    ------
    InputError
        No such layer, another number of targets, or features that are not finite.
    """
    variances, classes = _variances_and_classes(model, inputs, layer, batch_size)
    truth = targets.detach().cpu().numpy()
    if truth.shape != variances.shape:
        raise InputError(f"targets: shape {truth.shape} for {len(variances)} samples")
    return Diversity(variances, classes == truth, truth)


def diversity_scores(
    model: nn.Module, inputs: Any, layer: str, *, ids: Sequence[str | int] | None = None, batch_size: int = 64
) -> Scores:
    """Scores of samples by the variance of their features, from 0 (least varied of all) to 1 (most varied).

    Supported: any network that gives logits, by itself or in a `ModelOutput`.

    The loss's own v, with minimum and maximum over the whole data set. `Scores` feed selections and `LossReweighter`.

    Parameters
    ----------
    model, inputs, layer, batch_size
        As of `diversity_report`.
    ids : sequence of n ids, optional
        0, 1, 2, … by default.

    Raises
    ------
    InputError
        As of `diversity_report`.
    """
    variances, _ = _variances_and_classes(model, inputs, layer, batch_size)
    low, high = variances.min(), variances.max()
    scaled = (variances - low) / (high - low) if high > low else np.zeros_like(variances)
    name = {"method": "bias-loss", "layer": layer, "model": type(model).__name__}
    return Scores(scaled, range(len(variances)) if ids is None else ids, "sample", name)


def _variances_and_classes(
    model: nn.Module, inputs: Any, layer: str, batch_size: int
) -> tuple[Float[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    def of_batch(batch: Any) -> tuple[Tensor, Tensor]:
        logits = logits_of(run(model, batch))
        return feature_variance(captured[layer]).double(), logits.argmax(1)

    with training_mode(model, False), torch.no_grad(), capture(model, layer) as captured:
        variances, classes = map_batches(of_batch, inputs, batch_size=batch_size)
    return variances.numpy(), classes.numpy()
