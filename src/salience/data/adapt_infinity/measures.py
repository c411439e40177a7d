"""How a model fares over a stream of tasks."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from salience.errors import DataError, InputError


def forgetting(accuracy: ArrayLike) -> float:
    r"""Forgetting rate: how much of each skill's best earlier accuracy is lost at the end.

        F = mean_s max(0, a*_s - a_{T,s}) / a*_s,      a*_s = max_{t < T} a_{t,s}

    Parameters
    ----------
    accuracy : (T, S) float
        Accuracy of every skill after every step; NaN for a skill that was not measured at a step.

    Returns
    -------
    float
        In 0..1. Skills without a step before the last, or whose best is 0, take no part; NaN if none is left.

    Raises
    ------
    InputError, DataError

    Notes
    -----
    Reconstructed from notes on arXiv 2410.10636, section on measures: "mean relative drop from each skill's earlier
    best". That a gain counts as no drop is ours.
    """
    table = _accuracies("accuracy", accuracy, 2)
    if len(table) < 2:
        raise InputError(f"accuracy must have at least two steps, not {len(table)}")
    before = np.where(np.isnan(table[:-1]), -np.inf, table[:-1]).max(axis=0)
    counted = (before > 0) & ~np.isnan(table[-1])
    if not counted.any():
        return float("nan")
    return float(np.maximum(0.0, 1 - table[-1][counted] / before[counted]).mean())


def relative_gain(accuracy: ArrayLike, reference: ArrayLike) -> float:
    """Mean over skills of the accuracy relative to that of the best model of a single data set, in %.

    Parameters
    ----------
    accuracy, reference : (S,) float
        Accuracy of every skill; the reference above 0.

    Raises
    ------
    InputError, DataError

    Notes
    -----
    Reconstructed from notes on arXiv 2410.10636; 100 is as good as the references.
    """
    own, other = _accuracies("accuracy", accuracy, 1), _accuracies("reference", reference, 1)
    if own.shape != other.shape:
        raise InputError(f"accuracy and reference must be of the same skills, not {len(own)} and {len(other)}")
    if np.isnan(own).any() or not (other > 0).all():
        raise DataError("accuracy must be known for every skill, and reference above 0")
    return float(100 * (own / other).mean())


def _accuracies(name: str, values: ArrayLike, dims: int) -> np.ndarray:
    try:
        found = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise DataError(f"{name} must be numbers") from None
    if found.ndim != dims or not found.size:
        raise InputError(f"{name} must have {dims} dimension{'s' * (dims > 1)} and a value, not shape {found.shape}")
    if np.isinf(found).any() or (found < 0).any():
        raise DataError(f"{name} must be finite and not below 0")
    return found
