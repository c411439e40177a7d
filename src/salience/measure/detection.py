"""How well a score tells two groups apart: AUROC, AUPR, FPR at a TPR, and the open-set OSCR.

Everywhere a higher score means "more likely positive", and samples with equal scores are accepted or rejected
together: no measure depends on the order of the samples.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.integrate import trapezoid
from sklearn.metrics import average_precision_score, roc_auc_score

from salience.errors import InputError
from salience.measure._checks import finite, truths


class Detection(NamedTuple):
    """The usual figures of a detector of known samples: areas in 0..1, higher is better; `fpr95` lower."""

    auroc: float
    aupr_known: float
    aupr_unknown: float
    fpr95: float


class OSCR(NamedTuple):
    """Open-set classification rate curve: `ccr` (points,) over `fpr` (points,), and its `area`."""

    fpr: Float[np.ndarray, " points"]
    ccr: Float[np.ndarray, " points"]
    area: float


def auroc(positive: ArrayLike, negative: ArrayLike) -> float:
    """Area under the ROC curve: P(positive > negative) + P(positive = negative) / 2.

    Parameters
    ----------
    positive, negative : array (n,), array (m,)
        Scores of the two groups.

    Returns
    -------
    float
        1 when every positive scores above every negative, 0.5 for a score that says nothing.

    Raises
    ------
    InputError
        A group is empty or holds NaN or infinity.
    """
    return float(roc_auc_score(*_labelled(finite("positive", positive, 1), finite("negative", negative, 1))))


def aupr(positive: ArrayLike, negative: ArrayLike) -> float:
    """Area under the precision-recall curve as average precision, ``sum_t (R_t - R_{t-1}) P_t``.

    Its value for a score that says nothing is ``n / (n + m)``. For the other way round (how well a low score
    finds the negatives) call ``aupr(-negative, -positive)``; `detection_report` gives both.

    Parameters
    ----------
    positive, negative : array (n,), array (m,)
        Scores of the two groups.

    Returns
    -------
    float

    Raises
    ------
    InputError
        A group is empty or holds NaN or infinity.
    """
    labelled = _labelled(finite("positive", positive, 1), finite("negative", negative, 1))
    return float(average_precision_score(*labelled))


def fpr_at_tpr(positive: ArrayLike, negative: ArrayLike, tpr: float = 0.95) -> float:
    """Share of the negatives accepted at the highest threshold that accepts a share `tpr` of the positives.

    Parameters
    ----------
    positive, negative : array (n,), array (m,)
        Scores of the two groups; a sample is accepted when its score is at least the threshold.
    tpr : float in (0, 1]
        Share of the positives that has to be accepted.

    Returns
    -------
    float
        In 0..1, lower is better.

    Raises
    ------
    InputError
        A group is empty or holds NaN or infinity, or `tpr` is out of range.
    """
    inside, outside = finite("positive", positive, 1), finite("negative", negative, 1)
    if not 0 < tpr <= 1:
        raise InputError(f"tpr must lie in (0, 1]; got {tpr!r}")
    accepted = max(1, math.ceil(tpr * inside.size - 1e-9))  # 0.95 * 20 is 19, whatever floats say
    threshold = np.sort(inside)[inside.size - accepted]
    return float(np.mean(outside >= threshold))


def oscr(known: ArrayLike, correct: ArrayLike, unknown: ArrayLike) -> OSCR:
    """Open-set classification rate: known samples accepted *and* classified right, over unknown accepted.

    For each threshold t, ``CCR(t) = |{known: score >= t, class right}| / |known|`` and
    ``FPR(t) = |{unknown: score >= t}| / |unknown|``; the area is taken by the trapezoid rule. With every
    known sample classified right the area is the AUROC.

    Parameters
    ----------
    known : array (n,)
        Scores of samples from known classes, higher = more likely known.
    correct : boolean array (n,)
        Whether the class predicted for each known sample is right.
    unknown : array (m,)
        Scores of samples from unknown classes.

    Returns
    -------
    OSCR
        Points from (0, 0) to (1, accuracy).

    Raises
    ------
    InputError
        A group is empty or holds NaN or infinity, or `correct` does not fit `known`.

    Notes
    -----
    Source: Dhamija, Günther and Boult, "Reducing Network Agnostophobia", NeurIPS 2018 (arXiv 1811.04110),
    section on evaluation.
    """
    inside, outside = finite("known", known, 1), finite("unknown", unknown, 1)
    right = truths("correct", correct, inside.shape)
    thresholds = np.unique(np.concatenate([inside, outside]))[::-1]
    ccr = _accepted(inside[right], thresholds) / inside.size
    fpr = _accepted(outside, thresholds) / outside.size
    fpr, ccr = np.concatenate([[0.0], fpr]), np.concatenate([[0.0], ccr])
    return OSCR(fpr, ccr, float(trapezoid(ccr, fpr)))


def detection_report(known: ArrayLike, unknown: ArrayLike) -> Detection:
    """AUROC, AUPR with either group as the positive one, and FPR at 95 % TPR, of a score for "known".

    Parameters
    ----------
    known, unknown : array (n,), array (m,)
        Scores, higher = more likely known.

    Returns
    -------
    Detection

    Raises
    ------
    InputError
        A group is empty or holds NaN or infinity.
    """
    inside, outside = finite("known", known, 1), finite("unknown", unknown, 1)
    return Detection(
        auroc=auroc(inside, outside),
        aupr_known=aupr(inside, outside),
        aupr_unknown=aupr(-outside, -inside),
        fpr95=fpr_at_tpr(inside, outside),
    )


def _labelled(positive: np.ndarray, negative: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(labels, scores) as scikit-learn wants them."""
    labels = np.repeat([1, 0], [positive.size, negative.size])
    return labels, np.concatenate([positive, negative])


def _accepted(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """How many scores are at least each threshold."""
    return scores.size - np.searchsorted(np.sort(scores), thresholds, side="left")
