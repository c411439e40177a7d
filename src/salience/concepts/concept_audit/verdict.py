"""The three audits of one model on its probe sets, and what they come to in plain words."""

from __future__ import annotations

import warnings as warning
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import nn

from salience.concepts.concept_audit.explaining import LIMIT, STUDY_KS, Capacity, capacity_path
from salience.concepts.concept_audit.learning import LearnReport, learnability
from salience.concepts.concept_audit.linear import fit_cavs, labels_of, names_of, split
from salience.concepts.concept_audit.observing import last_linear, observe
from salience.concepts.concept_audit.others import basis_decomposition
from salience.concepts.concept_audit.shift import ConceptData, ProbeReport, probe_shift
from salience.errors import DataError, InputError

_SHOWN = 5


class ProbeSet(NamedTuple):
    """Images with concept labels.

    Attributes
    ----------
    images : Tensor (n, ...) or Dataset
    concepts : array (n, c) of bool
    names : sequence of str, length c
    labels : array (n,) of int, optional
        True classes, as the model numbers them.
    """

    images: Any
    concepts: Bool[np.ndarray, "n c"]
    names: Sequence[str]
    labels: Int[np.ndarray, " n"] | None = None


class Finding(NamedTuple):
    """One answer in plain words; `good` is None where nothing was decided."""

    title: str
    text: str
    good: bool | None


@dataclass(frozen=True)
class AuditReport:
    """What the audit found.

    Attributes
    ----------
    shift : ProbeReport
    learn : LearnReport
    path : list of Capacity
        On the first probe set; the last entry may use every concept.
    advised : Capacity or None
        The explanation as the authors advise it: learnable concepts only, at most 32; None if none is learnable.
    basis : dict of int to list of (str, float)
        Of each class: the concepts that its weights are written in, and the coefficients.
    basis_left : float
        Part of the length of the weights that these leave over, mean over classes; NaN where another layer was read.
    class_names : dict of int to str
    predictions : array (n,) of int
        The model's classes of the first probe set.
    findings : list of Finding
        The probe sets, learnability and the number of concepts, in this order.
    notes : list of str
    """

    shift: ProbeReport
    learn: LearnReport
    path: list[Capacity]
    advised: Capacity | None
    basis: dict[int, list[tuple[str, float]]]
    basis_left: float
    class_names: dict[int, str]
    predictions: Int[np.ndarray, " n"]
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def warnings(self) -> list[str]:
        """What speaks against trusting the explanation, and what could not be told."""
        return [finding.text for finding in self.findings if not finding.good] + self.notes

    @property
    def full(self) -> Capacity:
        """The explanation that may use most concepts."""
        return self.path[-1]

    def to_markdown(self) -> str:
        """The report as text: findings, then the figures behind them, the probe set beside each explanation."""
        shift, learn = self.shift, self.learn
        lines = ["# Can the concept explanation be trusted?", ""]
        lines += [f"- **{_cell(one.title)}.** {_cell(one.text)}" for one in self.findings]
        lines += [f"- Note: {_cell(note)}" for note in self.notes]
        lines += ["", "## Probe sets", "", *_table(
            ("set", "rows", "mean cosine with the first", "own fidelity", "fidelity of the first's", "same concepts"),
            [(name, shift.rows[name], _mean(shift.cosines.get(name)), shift.fidelity[name], shift.transfer.get(name),
              _mean(shift.overlap.get(name))) for name in shift.rows],
        )]  # fmt: skip
        lines += ["", "## Concepts", "", *_table(
            ("concept", *(f"cosine with {name}" for name in shift.cosines), "NAP", "learnable"),
            [(name, *(shift.cosines[other].get(name) for other in shift.cosines), learn.nap.get(name),
              {True: "yes", False: "no", None: "-"}[learn.keep.get(name)])
             for name in dict.fromkeys([*shift.concepts, *learn.nap])],
        )]  # fmt: skip
        lines += [
            "",
            "## Number of concepts",
            "",
            *_table(
                ("at most", "used", f"fidelity on {shift.reference.removesuffix(' (half 1)')}"),
                [(one.k, len(one.names), one.fidelity) for one in self.path],
            ),
        ]
        lines += ["", f"## Explanation from {_cell(shift.reference)}", "", *_table(
            ("class", "strongest concepts"),
            [(self.class_names.get(c, str(c)), ", ".join(f"{name} {value:+.2f}" for name, value in top))
             for c, top in shift.tops[shift.reference].items()],
        )]  # fmt: skip
        skipped = {**shift.skipped, **learn.skipped}
        if skipped:
            lines += ["", "## Left out", ""] + [f"- {_cell(name)}: {_cell(why)}" for name, why in skipped.items()]
        return "\n".join(lines) + "\n"


def audit(
    model: nn.Module,
    probes: Mapping[str, ProbeSet],
    generic: nn.Module | Float[np.ndarray, "n p"],
    *,
    layer: str | None = None,
    generic_layer: str | None = None,
    control: str | None = None,
    threshold: float | None = None,
    ks: Sequence[int] = STUDY_KS,
    class_names: Mapping[int, str] | None = None,
    batch_size: int = 64,
    generator: torch.Generator | None = None,
    progress: Callable[[str], None] | None = None,
) -> AuditReport:
    """Before a concept explanation is believed: would another probe set say the same, can the concepts be learned, and
    are there few enough for a person to use?

    Supported: image classifiers that return logits; by default those with a linear last layer, whose input is read.

    Parameters
    ----------
    model : torch.nn.Module
        The classifier that is explained.
    probes : dict of str to ProbeSet
        The first is the reference: best one close to what the model was trained on. The others are compared with it,
        and two halves of it with each other. With `labels` on images that the model has not seen, concepts are compared
        with how well it knows its classes.
    generic : torch.nn.Module or array (n, p)
        A network trained on something else, for the same images; or its features of the first set.
    layer, generic_layer : str, optional
        To read; by default what goes into the last linear layer.
    control : str, optional
        A probe set of the same distribution as the first, in place of its halves.
    threshold : float, optional
        NAP that a concept must reach, in place of the median class.
    ks : sequence of int
        Numbers of concepts to try; as many as there are is always tried too.
    class_names : dict of int to str, optional
    batch_size : int
        Halved when memory runs out.
    generator : torch.Generator, optional
        Seeds the splits; by default they are those of the authors' code (random state 42).
    progress : callable, optional
        Told what is done now.

    Returns
    -------
    AuditReport

    Raises
    ------
    InputError
        A model without a linear layer and no `layer`, shapes that do not fit, NaN, or a generic network that is the
        explained one.
    DataError
        No concept in common, none that can be probed, or a single predicted class.

    Notes
    -----
    Source: arXiv 2207.09615. That two halves are compared for the noise, and the verdict by an interval, is ours.
    """
    say = progress or (lambda message: None)
    seed = 42 if generator is None else int(torch.randint(2**31 - 1, (), generator=generator))
    if not probes:
        raise InputError("probes: give at least one probe set")
    if layer is None:
        last_linear(model)
    data, logits = {}, {}
    for name, probe in probes.items():
        say(f"running the model on {name}")
        concepts = labels_of(f"probe set {name!r}, concepts", probe.concepts, 2)
        seen = observe(model, probe.images, layer, batch_size=batch_size)
        titles = names_of(probe.names, concepts.shape[1])
        data[name] = ConceptData(seen.features, concepts, titles, seen.logits.argmax(1), seen.gradients)
        logits[name] = seen.logits
    first, reference = next(iter(probes)), next(iter(probes.values()))
    own = data[first]
    say("comparing probe sets")
    shift = probe_shift(data, control=control, random_state=seed)
    say(f"learning concepts from generic features of {first}")
    features: Any = generic
    if isinstance(generic, nn.Module):
        features = observe(generic, reference.images, generic_layer, batch_size=batch_size).features
    learn, notes = _learn(features, own, logits[first], reference.labels, threshold, seed)
    say("counting concepts")
    concepts = own.concepts.astype(np.float64)
    path = capacity_path(concepts, own.predictions, [*ks, len(own.names)], names=own.names, random_state=seed)
    kept = [name for name, keep in learn.keep.items() if keep]
    advised = None
    if kept:
        few = own.only(kept).concepts.astype(np.float64)
        (advised,) = capacity_path(few, own.predictions, [LIMIT], names=kept, random_state=seed)
    basis, left = _basis(model, own, seed) if layer is None else ({}, float("nan"))
    never = sorted(set(range(logits[first].shape[1])) - set(own.predictions.tolist()))
    if never:
        shown = ", ".join(map(str, never[:8])) + (", …" if len(never) > 8 else "")
        notes.append(f"nothing is said of classes that the model never predicts on {first}: {shown}")
    report = AuditReport(shift, learn, path, advised, basis, left, dict(class_names or {}), own.predictions,
                         notes=notes + shift.notes)  # fmt: skip
    return replace(report, findings=[*_on_shift(shift), _on_learning(learn), _on_number(report)])


def _learn(features: np.ndarray, own: ConceptData, logits: np.ndarray, labels: Any, threshold: float | None,
           seed: int) -> tuple[LearnReport, list[str]]:  # fmt: skip
    notes: list[str] = []
    truth = own.predictions if labels is None else np.asarray(labels)
    with warning.catch_warnings(record=True) as caught:
        warning.simplefilter("always")
        found = learnability(features, own.concepts, logits, truth, names=own.names, explained_feats=own.features,
                             threshold=threshold, random_state=seed)  # fmt: skip
    notes += [str(one.message) for one in caught if one.category is UserWarning]
    if labels is None:
        if threshold is None and not found.nap_probed:
            raise DataError(
                "learnability: without labels and a threshold, some class must be frequent enough to be learned"
            )
        limit = threshold if threshold is not None else float(np.median(list(found.nap_probed.values())))
        found = replace(found, nap_classes={}, threshold=limit)
        notes.append("without true labels it is not known how well the model knows its classes; concepts are compared "
                     "with the classes that it predicts, learned from the same generic features")  # fmt: skip
    return found, notes


def _basis(model: nn.Module, own: ConceptData, seed: int) -> tuple[dict[int, list[tuple[str, float]]], float]:
    """Each predicted class's weights written in concept vectors."""
    weights = last_linear(model).weight.detach().double().cpu().numpy()
    cavs = fit_cavs(own.features, own.concepts, own.names, split(len(own.features), seed)).cavs
    if not cavs or len(weights) <= own.predictions.max():
        return {}, float("nan")
    classes = np.unique(own.predictions)
    found, names = basis_decomposition(weights[classes], cavs), list(cavs)
    tops = {}
    for c, row in zip(classes.tolist(), found.coef, strict=True):
        tops[c] = [(names[i], float(row[i])) for i in np.argsort(-row, kind="stable")[:_SHOWN] if row[i] > 0]
    return tops, float(found.share.mean())


def _on_shift(shift: ProbeReport) -> list[Finding]:
    noise = _mean(shift.cosines[shift.control])
    pair = f"{shift.reference} and {shift.control}"
    if not shift.others:
        return [Finding(
            "One probe set alone",
            f"another set was not given, so nothing is known but the noise: concept vectors of {pair} have a mean "
            f"cosine of {noise:.2f}, and an explanation of the first foretells {shift.transfer[shift.control]:.0%} of "
            "the model's predictions on the second",
            None,
        )]  # fmt: skip
    found = []
    for other in shift.others:
        gap, agrees, mean = shift.gap(other), shift.agrees(other), _mean(shift.cosines[other])
        here, there = shift.transfer[shift.control], shift.transfer[other]
        found.append(Finding(
            f"{shift.reference} and {other} {'agree' if agrees else 'disagree'}",
            f"concept vectors of {shift.reference} and {other} have a mean cosine of {mean:.2f}, those of {pair}, of "
            f"one distribution, {noise:.2f} (difference {gap.mean:.2f}, 95 % interval {gap.low:.2f} to {gap.high:.2f}: "
            f"{'no ' if agrees else ''}more than sampling explains). The explanation of {shift.reference} foretells "
            f"{there:.0%} of the model's predictions on {other}, and {here:.0%} on {shift.control}",
            agrees,
        ))  # fmt: skip
    return found


def _on_learning(learn: LearnReport) -> Finding:
    kept, count = sum(learn.keep.values()), len(learn.nap)
    median = float(np.median(list(learn.nap.values())))
    asked = "the model's median class has" if learn.nap_classes else "asked for is"
    text = (
        f"learned from generic features, the median concept has a normalised average precision of {median:.2f}, "
        f"{asked} {learn.threshold:.2f}; {1 - kept / count:.0%} of the concepts are below that"
    )
    again = (
        float(np.median(list(learn.nap_probed.values()))) if learn.nap_classes and learn.nap_probed else float("nan")
    )
    if kept < count and again < median:  # then the probe is to blame, and not the concepts
        text += (
            f". But the classes themselves, learned as the concepts are, have {again:.2f} only: the generic network is "
            "too weak to tell"
        )
        return Finding(f"{kept} of {count} concepts are learnable, from a weak network", text, None)
    if kept < count:
        text += ", so explanations by them explain the simple by the difficult"
    return Finding(f"{kept} of {count} concepts are learnable", text, kept == count)


def _on_number(report: AuditReport) -> Finding:
    full, few = report.full, [one for one in report.path if one.k <= LIMIT]
    used, best = len(full.names), max(few, key=lambda one: one.fidelity, default=None)
    text = f"without a limit the explanation uses {used} concepts and foretells {full.fidelity:.0%} of the predictions"
    if used > LIMIT:
        within = (
            f"with at most {LIMIT} it foretells {best.fidelity:.0%}" if best else f"none with at most {LIMIT} was tried"
        )
        text += f"; people can use about {LIMIT}, and {within}"
    if report.advised is not None:
        text += f". With learnable concepts only, at most {LIMIT}, it is {report.advised.fidelity:.0%}"
    return Finding(f"{used} concepts against {LIMIT}", text, used <= LIMIT)


def _mean(values: Mapping[Any, float] | None) -> float:
    return float(np.mean(list(values.values()))) if values else float("nan")


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    def shown(value: Any) -> str:
        if value is None or (isinstance(value, float) and value != value):
            return "-"
        return _cell(f"{value:.2f}" if isinstance(value, float) else str(value))

    head = ["| " + " | ".join(map(_cell, columns)) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    return head + ["| " + " | ".join(map(shown, row)) + " |" for row in rows]


def _cell(text: str) -> str:
    """Names of the user's as plain text: no markup, no line breaks, no hidden characters."""
    plain = "".join(c if c.isprintable() else " " for c in text)
    return "".join("\\" + c if c in "\\|<>[]`*_#" else c for c in plain)
