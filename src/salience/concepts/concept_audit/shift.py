"""Audit A: would another probe set give the same explanation?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from sklearn.metrics import roc_auc_score

from salience.concepts.concept_audit.explaining import LinearExplanation, baseline_explanation
from salience.concepts.concept_audit.linear import (
    CAV,
    Parts,
    classes_of,
    features_of,
    fit_cav,
    labels_of,
    names_of,
    predicted_concepts,
    split,
    unfit,
)
from salience.concepts.concept_audit.others import (
    directional_derivatives,
    unit_concept_iou,
    unit_concepts,
    unit_vectors,
)
from salience.errors import DataError, InputError, nearest
from salience.measure.paired import Interval, bootstrap_interval
from salience.measure.ranking import spearman

RAREST = 0.02  # a concept must be more frequent than this in every set
HALVES = ("{} (half 1)", "{} (half 2)")
_ACTIVE = 0.95  # quantile above which a unit is active in a whole image


@dataclass(frozen=True)
class ConceptData:
    """A probe set as the explained model sees it.

    Parameters
    ----------
    features : array (n, p)
        Of the layer that is looked at.
    concepts : array (n, c) of bool
    names : sequence of str, length c
    predictions : array (n,) of int
        The model's classes, or groups of them.
    gradients : array (n, p), optional
        Of the predicted class's logit by the features; with them TCAV is compared too.
    """

    features: Float[np.ndarray, "n p"]
    concepts: Bool[np.ndarray, "n c"]
    names: tuple[str, ...]
    predictions: Int[np.ndarray, " n"]
    gradients: Float[np.ndarray, "n p"] | None = None

    def rows(self, chosen: np.ndarray) -> ConceptData:
        """Some rows of it."""
        gradients = None if self.gradients is None else self.gradients[chosen]
        return ConceptData(
            self.features[chosen], self.concepts[chosen], self.names, self.predictions[chosen], gradients
        )

    def only(self, names: list[str]) -> ConceptData:
        """Some concepts of it, in the order asked for."""
        chosen = [self.names.index(name) for name in names]
        return ConceptData(self.features, self.concepts[:, chosen], tuple(names), self.predictions, self.gradients)


@dataclass(frozen=True)
class ProbeReport:
    """How much explanations differ between probe sets, and between two sets of one distribution.

    Attributes
    ----------
    reference, control : str
        The set that all are compared with, and the one of its own distribution.
    rows : dict of str to int
        Of each set that was compared: all have as many.
    concepts : tuple of str
        What was compared.
    skipped : dict of str to str
        Concepts left out, with the reason.
    cosines : dict of str to dict of str to float
        Of each other set and concept: between its vector and the reference's.
    aucs : dict of str to dict of str to float
        Of each set and concept: on its own test part.
    fidelity : dict of str to float
        Of each set's own L1 explanation on its own test part.
    transfer : dict of str to float
        Of the reference's explanation on all of another set.
    overlap : dict of str to dict of int to float
        Of each other set and class: share of the reference's `k` strongest concepts that are among its own, with the
        same sign.
    tops : dict of str to dict of int to list of (str, float)
        Of each set and class: these concepts and their coefficients.
    bottleneck, bottleneck_transfer : dict of str to float
        The same two figures for a linear head on predicted concepts.
    units : dict of str to float
        Of each other set: share of the units of some concept that are of the same concept there, by an overlap over
        whole images of 0.04 beyond chance.
    tcav : dict of str to float
        Of each other set: rank correlation of the concepts' mean directional derivatives, mean over classes.
    notes : list of str
    k : int
    """

    reference: str
    control: str
    rows: dict[str, int]
    concepts: tuple[str, ...]
    skipped: dict[str, str]
    cosines: dict[str, dict[str, float]]
    aucs: dict[str, dict[str, float]]
    fidelity: dict[str, float]
    transfer: dict[str, float]
    overlap: dict[str, dict[int, float]]
    tops: dict[str, dict[int, list[tuple[str, float]]]]
    bottleneck: dict[str, float]
    bottleneck_transfer: dict[str, float]
    units: dict[str, float]
    tcav: dict[str, float]
    notes: list[str] = field(default_factory=list)
    k: int = 5

    @property
    def others(self) -> list[str]:
        """Sets that are neither the reference nor the control."""
        return [name for name in self.cosines if name != self.control]

    def gap(self, other: str) -> Interval:
        """Cosine with the control minus cosine with another set, mean over concepts: above 0 it is not sampling alone.

        The interval takes concepts for independent, which they are not quite.
        """
        return bootstrap_interval(
            [self.cosines[self.control][name] - self.cosines[other][name] for name in self.concepts], random_state=0
        )

    def agrees(self, other: str) -> bool:
        """Whether the vectors of another set differ no more than those of two sets of one distribution."""
        return self.gap(other).low <= 0


class _Probed(NamedTuple):
    """What was fitted on one set."""

    cavs: dict[str, CAV]
    explanation: LinearExplanation
    bottleneck: LinearExplanation


def probe_shift(
    probes: Mapping[str, ConceptData],
    *,
    control: str | None = None,
    k: int = 5,
    rarest: float = RAREST,
    random_state: int = 42,
) -> ProbeReport:
    """Fit concept vectors and explanations on each probe set and compare them with those of the first.

    Two sets of one distribution differ by chance alone, so one such pair is always compared too: the set named as
    `control`, or else the two halves of the first set. All sets are cut to the same number of rows, as vectors of fewer
    rows differ more.

    Parameters
    ----------
    probes : dict of str to ConceptData
        At least two, or one alone to see the noise. Concepts are matched by name.
    control : str, optional
        A set of the same distribution as the first.
    k : int
        Strongest concepts of a class to compare.
    rarest : float
        Only concepts that are more frequent than this in all sets are compared: rare ones would rule the disagreement.
    random_state : int
        Of the halves and of the 60/20/20 split.

    Returns
    -------
    ProbeReport

    Raises
    ------
    InputError
        No probe set, no set of that name, NaN, or shapes that do not fit.
    DataError
        No concept that all sets share, none that is frequent enough, or a model that predicts a single class.

    Notes
    -----
    Source: section 4 of arXiv 2207.09615 and the authors' DatasetChoice notebook. The control is not in the paper.
    """
    if not probes or k < 1:
        raise InputError("probes and k: give at least one probe set, and k of at least 1")
    checked = {name: _checked(name, data) for name, data in probes.items()}
    shared = [name for name in next(iter(checked.values())).names if all(name in d.names for d in checked.values())]
    if not shared:
        raise DataError(f"probe sets {', '.join(checked)}: have no concept in common; concepts are matched by name")
    skipped = {name: "not in all probe sets" for data in checked.values() for name in data.names if name not in shared}
    sets, reference, control = _equal_sets(checked, shared, control, random_state)
    parts = split(len(sets[reference].features), random_state)
    keep, rare = _keep(sets, parts, shared, rarest)
    if not keep:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(rare.items())[:3])
        raise DataError(f"probe sets {', '.join(checked)}: no concept can be compared ({why})")
    sets = {name: data.only(keep) for name, data in sets.items()}
    fitted = {name: _fit(name, data, parts) for name, data in sets.items()}
    return _compare(sets, fitted, parts, reference, control, {**skipped, **rare}, k)


def _checked(name: str, data: ConceptData) -> ConceptData:
    features = features_of(f"probe set {name!r}, features", data.features)
    concepts = labels_of(f"probe set {name!r}, concepts", data.concepts, 2)
    gradients = None if data.gradients is None else features_of(f"probe set {name!r}, gradients", data.gradients)
    if len(concepts) != len(features) or (gradients is not None and gradients.shape != features.shape):
        raise InputError(f"probe set {name!r}: features {features.shape}, concepts {concepts.shape} and gradients must "
                         "have as many rows")  # fmt: skip
    titles = names_of(data.names, concepts.shape[1])
    return ConceptData(features, concepts, titles, classes_of(data.predictions, len(features)), gradients)


def _equal_sets(
    probes: dict[str, ConceptData], shared: list[str], control: str | None, random_state: int
) -> tuple[dict[str, ConceptData], str, str]:
    """Sets of as many rows each, the reference first, and the names of reference and control."""
    first, *others = probes
    rng = np.random.default_rng(random_state)
    if control is not None and control not in others:
        raise InputError(f"control: there is no other probe set {control!r}; {nearest(control, others)}")
    if control is None:
        data, order = probes[first], rng.permutation(len(probes[first].features))
        halves = [name.format(first) for name in HALVES]
        sides = {name: data.rows(order[i::2]) for i, name in enumerate(halves)}
        probes, (first, control) = {**sides, **{name: probes[name] for name in others}}, halves
    rows = min(len(data.features) for data in probes.values())
    return {
        name: data.only(shared).rows(np.sort(rng.permutation(len(data.features))[:rows]))
        for name, data in probes.items()
    }, first, control  # fmt: skip


def _keep(
    sets: dict[str, ConceptData], parts: Parts, names: list[str], rarest: float
) -> tuple[list[str], dict[str, str]]:
    """Concepts that are frequent enough, and can be fitted, in every set."""
    keep, left = [], {}
    for i, name in enumerate(names):
        for which, data in sets.items():
            labels = [data.concepts[rows, i] for rows in parts]
            share = labels[0].mean()
            why = f"in {share:.1%} of {which}, more than {rarest:.0%} is needed" if share <= rarest else unfit(*labels)
            if why:
                left[name] = why if which in why else f"{why} (in {which})"
                break
        else:
            keep.append(name)
    return keep, left


def _fit(name: str, data: ConceptData, parts: Parts) -> _Probed:
    x, y, p = data.features, data.concepts, data.predictions
    cavs = {
        concept: fit_cav(x[parts.train], y[parts.train, i], (x[parts.val], y[parts.val, i]))
        for i, concept in enumerate(data.names)
    }
    try:
        explain = [
            baseline_explanation(z[parts.train], p[parts.train], (z[parts.val], p[parts.val]), names=data.names)
            for z in (y.astype(np.float64), predicted_concepts(cavs, x))
        ]
    except DataError as error:
        raise DataError(f"probe set {name!r}: {error}") from error
    return _Probed(cavs, *explain)


def _compare(sets: dict[str, ConceptData], fitted: dict[str, _Probed], parts: Parts, reference: str, control: str,
             skipped: dict[str, str], k: int) -> ProbeReport:  # fmt: skip
    first, others = fitted[reference], [name for name in sets if name != reference]
    vectors = {name: unit_vectors(one.cavs) for name, one in fitted.items()}
    concepts = sets[reference].names
    notes, overlap = [], {}
    tops = {name: {int(c): one.explanation.top(int(c), k) for c in one.explanation.classes}
            for name, one in fitted.items()}  # fmt: skip
    for name in others:
        both = [c for c in tops[reference] if c in tops[name]]
        overlap[name] = {c: _shared(tops[reference][c], tops[name][c]) for c in both}
        lost = sorted(set(tops[reference]) ^ set(tops[name]))
        if lost:
            notes.append(f"classes {', '.join(map(str, lost))} are not predicted in both {reference} and {name}, and "
                         "are left out of their overlap")  # fmt: skip
    test = {name: data.rows(parts.test) for name, data in sets.items()}
    inner = {name: predicted_concepts(first.cavs, data.features) for name, data in sets.items()}
    return ProbeReport(
        reference, control, {name: len(data.features) for name, data in sets.items()}, concepts, skipped,
        cosines={name: dict(zip(concepts, (vectors[reference] * vectors[name]).sum(1).tolist(), strict=True))
                 for name in others},
        aucs={name: {c: float(roc_auc_score(test[name].concepts[:, i], one.cavs[c].scores(test[name].features)))
                     for i, c in enumerate(concepts)} for name, one in fitted.items()},
        fidelity={name: one.explanation.fidelity(test[name].concepts, test[name].predictions)
                  for name, one in fitted.items()},
        transfer={name: first.explanation.fidelity(sets[name].concepts, sets[name].predictions) for name in others},
        overlap=overlap, tops=tops,
        bottleneck={name: one.bottleneck.fidelity(predicted_concepts(one.cavs, test[name].features),
                                                  test[name].predictions) for name, one in fitted.items()},
        bottleneck_transfer={name: first.bottleneck.fidelity(inner[name], sets[name].predictions) for name in others},
        units=_same_units(sets, reference), tcav=_same_tcav(sets, fitted, reference), notes=notes, k=k,
    )  # fmt: skip


def _shared(a: list[tuple[str, float]], b: list[tuple[str, float]]) -> float:
    """Share of the concepts of the longer list that both hold with the same sign; 1 where neither holds any."""
    one, two = ({(name, value > 0) for name, value in top} for top in (a, b))
    return len(one & two) / max(len(one), len(two)) if one or two else 1.0


def _same_units(sets: dict[str, ConceptData], reference: str) -> dict[str, float]:
    # Of whole images even a unit that knows nothing overlaps with a frequent concept: what counts is beyond chance.
    found, on = {}, 1 - _ACTIVE
    for name, data in sets.items():
        share = data.concepts.mean(0)
        chance = on * share / (on + share - on * share)
        found[name] = unit_concepts(unit_concept_iou(data.features, data.concepts, _ACTIVE) - chance)
    own = [(i, concept) for i, concept in enumerate(found[reference]) if concept is not None]
    return {name: float(np.mean([found[name][i] == concept for i, concept in own])) if own else float("nan")
            for name in sets if name != reference}  # fmt: skip


def _same_tcav(sets: dict[str, ConceptData], fitted: dict[str, _Probed], reference: str) -> dict[str, float]:
    if any(data.gradients is None for data in sets.values()) or len(sets[reference].names) < 2:
        return {}
    mean: dict[str, dict[int, np.ndarray]] = {}
    for name, data in sets.items():
        assert data.gradients is not None
        along = directional_derivatives(data.gradients, fitted[name].cavs)
        mean[name] = {int(c): along[data.predictions == c].mean(0) for c in np.unique(data.predictions)}
    found = {}
    for name in sets:
        pairs = [(mean[reference][c], mean[name][c]) for c in mean[reference] if c in mean[name]]
        ranks = [spearman(a, b) for a, b in pairs if np.ptp(a) > 0 and np.ptp(b) > 0]
        if name != reference and ranks:
            found[name] = float(np.mean(ranks))
    return found
