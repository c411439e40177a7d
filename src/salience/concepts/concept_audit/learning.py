"""Audit B: can the concepts be learned at all, from features that are not the explained model's?"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from salience.concepts.concept_audit.linear import (
    classes_of,
    features_of,
    fit_cavs,
    labels_of,
    names_of,
    normalized_ap,
    split,
)
from salience.errors import DataError, InputError
from salience.measure.similarity import linear_cka

SAME, NEAR = (
    0.999,
    0.95,
)  # linear CKA from which on generic features are the explained model's own, or suspiciously near


@dataclass(frozen=True)
class LearnReport:
    """How well concepts can be learned, beside how well the model knows its classes.

    Attributes
    ----------
    nap : dict of str to float
        Normalised average precision of each concept's probe on generic features.
    nap_classes : dict of int to float
        Of the model's own scores for each class.
    nap_probed : dict of int to float
        Of the same classes, learned as the concepts are from the same features; empty where rows do not match.
    threshold : float
        What a concept must reach: the median of `nap_classes`, or what the user gave.
    n_pos : float
        The common number of positives.
    skipped : dict of str to str
        Concepts and classes without a figure, with the reason.
    """

    nap: dict[str, float]
    nap_classes: dict[int, float]
    nap_probed: dict[int, float]
    threshold: float
    n_pos: float
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def keep(self) -> dict[str, bool]:
        """Whether each concept is as easy to learn as the threshold asks."""
        return {name: value >= self.threshold for name, value in self.nap.items()}

    @property
    def share_below(self) -> float:
        """Share of the concepts that are harder to learn than the median class is for the model."""
        return 1 - float(np.mean(list(self.keep.values())))


def learnability(
    generic_feats: Float[np.ndarray, "n p"],
    concepts: Bool[np.ndarray, "n c"],
    class_scores: Float[np.ndarray, "m classes"],
    class_labels: Int[np.ndarray, " m"],
    *,
    names: Sequence[str] | None = None,
    explained_feats: Float[np.ndarray, "n q"] | None = None,
    threshold: float | None = None,
    random_state: int = 42,
) -> LearnReport:
    """Learn each concept from the features of a generic network and compare with how well the model knows its classes.

    Both by `normalized_ap` with one number of positives, rows / classes. An explanation by concepts that are harder to
    learn than the class explains the simple by the difficult.

    Parameters
    ----------
    generic_feats : array (n, p)
        Of a network that was trained on something else, never of the explained model: with its own features the audit
        would go in a circle.
    concepts : array (n, c) of bool
    class_scores : array (m, classes)
        The explained model's scores on labelled images that it was not trained on, of the probe set or elsewhere.
    class_labels : array (m,) of int
        True labels.
    names : sequence of str, optional
        Of the concepts.
    explained_feats : array (n, q), optional
        The explained model's features of the same images, to make sure that they are others.
    threshold : float, optional
        In place of the median over the classes.
    random_state : int
        Of the 60/20/20 split.

    Returns
    -------
    LearnReport

    Raises
    ------
    InputError
        NaN, shapes that do not fit, or generic features that are the explained model's own.
    DataError
        No concept, or no class, that can be measured.

    Warns
    -----
    UserWarning
        Generic features that are nearly the explained model's (linear CKA above 0.95).

    Notes
    -----
    Source: section 5 of arXiv 2207.09615 and the authors' ConceptLearning notebook. The comparison of features is ours.
    """
    x, y = features_of("generic_feats", generic_feats), labels_of("concepts", concepts, 2)
    scores, labels = features_of("class_scores", class_scores), classes_of(class_labels, len(class_scores))
    titles = names_of(names, y.shape[1])
    if len(x) != len(y):
        raise InputError(f"generic_feats and concepts: have {len(x)} and {len(y)} rows; they must be as many")
    count = scores.shape[1]
    if labels.min() < 0 or labels.max() >= count:
        raise InputError(
            f"class_labels: go from {labels.min()} to {labels.max()}; the model has classes 0 to {count - 1}"
        )
    if explained_feats is not None:
        _refuse_circle(x, features_of("explained_feats", explained_feats))
    parts = split(len(x), random_state)
    n_pos = len(parts.test) / count
    nap, skipped = _probe(x, y, titles, parts, n_pos)
    classes, lost = {}, []
    for c in range(count):
        if (labels == c).any():
            classes[c] = normalized_ap(labels == c, scores[:, c], len(labels) / count)
        else:
            lost.append(c)
    skipped |= {f"class {c}": "no image of it" for c in lost}
    if not nap or not classes:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
        raise DataError(f"learnability: no {'class' if nap else 'concept'} can be measured ({why})")
    probed = {}
    if len(labels) == len(x):
        hot = np.stack([labels == c for c in classes], axis=1)
        found, _ = _probe(x, hot, [str(c) for c in classes], parts, n_pos)
        probed = {int(c): value for c, value in found.items()}
    limit = float(np.median(list(classes.values()))) if threshold is None else float(threshold)
    return LearnReport(nap, classes, probed, limit, n_pos, skipped)


def _probe(x: np.ndarray, labels: np.ndarray, names: Sequence[str], parts: Any, n_pos: float) -> tuple[dict, dict]:
    """Normalised average precision of a probe for each column, on the test part."""
    cavs, skipped = fit_cavs(x, labels, names, parts)
    truth = dict(zip(names, labels.T, strict=True))
    return {name: normalized_ap(truth[name][parts.test], cav.scores(x[parts.test]), n_pos)
            for name, cav in cavs.items()}, skipped  # fmt: skip


def _refuse_circle(generic: np.ndarray, own: np.ndarray) -> None:
    if len(generic) != len(own):
        raise InputError(
            f"explained_feats: have {len(own)} rows; they must be of the {len(generic)} images of generic_feats"
        )
    alike = linear_cka(generic, own)
    if alike >= SAME:
        raise InputError(
            f"generic_feats: are the explained model's own features (linear CKA {alike:.3f}), which makes the "
            "audit go in a circle; give features of a network that was trained on something else"
        )
    if alike >= NEAR:
        warnings.warn(
            f"generic_feats: are nearly the explained model's own features (linear CKA {alike:.3f}); learnability is "
            "then too favourable",
            stacklevel=3,
        )
