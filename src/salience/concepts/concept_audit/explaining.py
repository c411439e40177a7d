"""The L1 explanation of predictions by concepts, and what each further concept buys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import sklearn
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from sklearn.multiclass import OneVsRestClassifier

from salience.concepts.concept_audit.linear import GRID, classes_of, features_of, logistic, names_of, split
from salience.errors import DataError, InputError

LIMIT = 32  # concepts that people can use, section 6 of the paper
STUDY_KS = (4, 8, 16, 32, 64)
_BISECTIONS = 8  # of log C between the last C with few enough concepts and the first with too many


@dataclass(frozen=True)
class LinearExplanation:
    """A class is what gets the highest score ``coef @ concepts + intercept``.

    Attributes
    ----------
    classes : array (m,) of int
    coef : array (m, c)
    intercept : array (m,)
        Shifted so that the smallest is 0, which changes no prediction.
    names : tuple of str, length c
    C : float
        Inverse strength of the L1 penalty.
    val_accuracy : float
        Share of the model's predictions that it foretells on the rows that chose `C`.
    """

    classes: Int[np.ndarray, " m"]
    coef: Float[np.ndarray, "m c"]
    intercept: Float[np.ndarray, " m"]
    names: tuple[str, ...]
    C: float
    val_accuracy: float

    @property
    def used(self) -> tuple[str, ...]:
        """Concepts that some class uses: the union over all classes."""
        return tuple(name for name, some in zip(self.names, (self.coef != 0).any(0), strict=True) if some)

    def scores(self, concepts: ArrayLike) -> Float[np.ndarray, "n m"]:
        """The explanation scores (n, m)."""
        return np.asarray(concepts, dtype=np.float64) @ self.coef.T + self.intercept

    def predict(self, concepts: ArrayLike) -> Int[np.ndarray, " n"]:
        """The class of the highest score, (n,)."""
        return self.classes[self.scores(concepts).argmax(1)]

    def fidelity(self, concepts: ArrayLike, predictions: ArrayLike) -> float:
        """Share of the model's predictions that it foretells."""
        return float((self.predict(concepts) == np.asarray(predictions)).mean())

    def top(self, class_id: int, k: int) -> list[tuple[str, float]]:
        """The at most k concepts of a class with the largest coefficients either way, zeros left out."""
        row = self.coef[int(np.flatnonzero(self.classes == class_id)[0])]
        order = np.argsort(-np.abs(row), kind="stable")[:k]
        return [(self.names[i], float(row[i])) for i in order if row[i] != 0]


class Capacity(NamedTuple):
    """An explanation with at most `k` concepts: how faithful it is on rows it has not seen, and which it uses."""

    k: int
    fidelity: float
    names: tuple[str, ...]
    explanation: LinearExplanation


def baseline_explanation(
    concepts: Float[np.ndarray, "n c"],
    predictions: Int[np.ndarray, " n"],
    val: tuple[Any, Any],
    *,
    names: Sequence[str] | None = None,
    max_concepts: int | None = None,
    sample_weight: Float[np.ndarray, " n"] | None = None,
    Cs: Sequence[float] = GRID,
) -> LinearExplanation:
    """The simplest explanation: an L1 logistic regression from concept labels to what the MODEL predicts.

    One class against the rest. The penalty is chosen by the accuracy on `val`; with `max_concepts` among penalties
    under which no more concepts are used, those of all classes taken together.

    Parameters
    ----------
    concepts : array (n, c)
        Labels 0 and 1, or probabilities (`predicted_concepts`).
    predictions : array (n,) of int
        The model's classes, never the true labels: what the model thinks is to be explained.
    val : (concepts, predictions)
        Rows to choose the penalty on; of equally accurate ones the strongest is taken.
    names : sequence of str, optional
        Of the concepts.
    max_concepts : int, optional
        Between penalties of the grid the weakest that is allowed is then searched for too.
    sample_weight : array (n,), optional
    Cs : sequence of float

    Returns
    -------
    LinearExplanation

    Raises
    ------
    InputError
        NaN, shapes that do not fit, or `max_concepts` below 1.
    DataError
        The model predicts a single class, so that there is nothing to tell apart.

    Notes
    -----
    Source: sections 3 and 6 of arXiv 2207.09615 and the authors' DatasetChoice notebook.
    """
    x, y = features_of("concepts", concepts), classes_of(predictions, len(concepts))
    x_val, y_val = features_of("val concepts", val[0]), classes_of(val[1], len(val[0]))
    titles = names_of(names, x.shape[1])
    if x_val.shape[1] != x.shape[1]:
        raise InputError(f"val: has {x_val.shape[1]} concepts; it must have the {x.shape[1]} of `concepts`")
    if max_concepts is not None and max_concepts < 1:
        raise InputError(f"max_concepts: got {max_concepts}; it must be at least 1")
    if len(np.unique(y)) < 2:
        raise DataError(f"predictions: are all of class {y[0]}; an explanation must tell at least two classes apart")
    weights = np.ones(len(y)) if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)

    def at(C: float) -> LinearExplanation:
        return _one_vs_rest(x, y, weights, C, titles, (x_val, y_val))

    limit = x.shape[1] if max_concepts is None else max_concepts
    tried = [at(C) for C in sorted(Cs)]
    allowed = [one for one in tried if len(one.used) <= limit]
    above = [one.C for one in tried if len(one.used) > limit]
    if above:
        low, high = (max((one.C for one in allowed if min(above) > one.C), default=min(above) / 100)), min(above)
        for _ in range(_BISECTIONS):
            one = at(float(np.sqrt(low * high)))
            low, high = (one.C, high) if len(one.used) <= limit else (low, one.C)
            allowed += [one] if len(one.used) <= limit else []
    if not allowed:
        raise InputError(f"Cs: even the smallest, {min(Cs)}, uses more than {limit} concepts; give a smaller one")
    return max(sorted(allowed, key=lambda one: one.C), key=lambda one: one.val_accuracy)


def capacity_path(
    concepts: Float[np.ndarray, "n c"],
    predictions: Int[np.ndarray, " n"],
    ks: Sequence[int] = STUDY_KS,
    *,
    names: Sequence[str] | None = None,
    random_state: int = 42,
) -> list[Capacity]:
    """How much of the model explanations of few concepts foretell: fidelity for at most k concepts, for each k.

    Parameters
    ----------
    concepts : array (n, c)
    predictions : array (n,) of int
        The model's classes.
    ks : sequence of int
        A k above c is the same as c.
    names : sequence of str, optional
    random_state : int
        Of the split: 60 % to fit on, 20 % to choose the penalty on, 20 % to measure on.

    Returns
    -------
    list of Capacity

    Raises
    ------
    InputError, DataError
        As `baseline_explanation`.

    Notes
    -----
    Source: section 6 of arXiv 2207.09615.
    """
    x, y = features_of("concepts", concepts), classes_of(predictions, len(concepts))
    train, val, test = split(len(x), random_state)
    found = []
    for k in sorted(set(ks)):
        one = baseline_explanation(x[train], y[train], (x[val], y[val]), names=names, max_concepts=k)
        found.append(Capacity(k, one.fidelity(x[test], y[test]), one.used, one))
    return found


def _one_vs_rest(x: np.ndarray, y: np.ndarray, weights: np.ndarray, C: float, names: tuple[str, ...],
                 val: tuple[np.ndarray, np.ndarray]) -> LinearExplanation:  # fmt: skip
    with sklearn.config_context(enable_metadata_routing=True):  # that is how weights reach the inner regressions
        inner = logistic("l1", C).set_fit_request(sample_weight=True)
        model = OneVsRestClassifier(inner).fit(x, y, sample_weight=weights)
    coef = np.concatenate([one.coef_ for one in model.estimators_]).astype(np.float64)
    intercept = np.concatenate([one.intercept_ for one in model.estimators_]).astype(np.float64)
    if len(model.classes_) == 2:  # one regression, of the second class: the first has the opposite score
        coef, intercept = np.concatenate([-coef, coef]), np.concatenate([-intercept, intercept])
    found = LinearExplanation(model.classes_, coef, intercept - intercept.min(), names, float(C), np.nan)
    return LinearExplanation(found.classes, found.coef, found.intercept, names, found.C, found.fidelity(*val))
