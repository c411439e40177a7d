"""The report of `verify concepts`, from the plain data of the audit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from salience.concepts import AuditReport

_TOPS = 12  # classes whose explanations are shown


def write_page(found: AuditReport, settings: Mapping[str, Any], missing: str, path: Path) -> None:
    """Write the page: findings, then probe sets, learnability, number of concepts, explanations."""
    from salience import report

    wrong = [one for one in found.findings if one.good is False]
    label = "Nothing speaks against the explanation here" if not wrong else "; ".join(one.title for one in wrong)
    blocks: list[Any] = [
        report.verdict(label, " ".join(f"{one.text[0].upper()}{one.text[1:]}." for one in wrong or found.findings), not wrong),
        report.facts({
            "concepts compared": len(found.shift.concepts), "learnable": f"{sum(found.learn.keep.values())} of "
            f"{len(found.learn.nap)}", "used by the explanation": len(found.full.names),
            "predictions that it foretells": f"{found.full.fidelity:.0%}",
        }),
        *_sets(report, found), *_learnability(report, found), *_capacity(report, found), *_explanations(report, found),
    ]  # fmt: skip
    left = {**found.shift.skipped, **found.learn.skipped}
    if left:
        blocks += [report.heading("Left out"), report.table(("concept or class", "why"), left.items())]
    notes = [*found.notes, *([missing] if missing else [])]
    if notes:
        blocks += [report.heading("Notes"), *(report.text(note) for note in notes)]
    blocks += [report.heading("How it was made"), report.code(json.dumps(settings, indent=1, ensure_ascii=False))]
    report.page("Can the concept explanation be trusted?", blocks, path=path,
                subtitle=f"An audit of explanations of {settings['model']} by named concepts")  # fmt: skip


def _mean(values: Mapping[Any, float] | None) -> float | None:
    return float(np.mean(list(values.values()))) if values else None


def _sets(report: Any, found: AuditReport) -> list[Any]:
    from salience.report import figures

    shift = found.shift
    rows = [
        (name, shift.rows[name], _mean(shift.cosines.get(name)), _mean(shift.aucs[name]), shift.fidelity[name],
         shift.transfer.get(name), _mean(shift.overlap.get(name)), shift.units.get(name), shift.tcav.get(name))
        for name in shift.rows
    ]  # fmt: skip
    columns = ("probe set", "images", "cosine", "AUC", "own fidelity", "fidelity of the first's", "same concepts",
               "same units", "TCAV rank correlation")  # fmt: skip
    blocks = [
        report.heading("Would another probe set say the same?"),
        report.table(columns, rows, (
            f"All compared with {shift.reference}; {shift.control} is of the same distribution, so what it differs by is "
            "sampling alone. Cosine: between the vectors of a concept, mean over concepts. AUC: of a set's own vectors on "
            "its own held-out images; it can be high where vectors differ. Fidelity: share of the model's predictions that "
            "an explanation foretells, a set's own on its held-out images, the first's on the whole other set. Same "
            f"concepts: share of the {shift.k} strongest of a class with the same sign."
        )),
    ]  # fmt: skip
    for other in shift.others:
        order = sorted(shift.concepts, key=lambda name, other=other: shift.cosines[other][name])  # type: ignore[misc]
        shown = order[:15]
        blocks.append(report.figure(
            lambda ax, other=other, shown=shown: figures.change(
                ax, shown, [shift.cosines[shift.control][name] for name in shown],
                [shift.cosines[other][name] for name in shown], (shift.control, other),
                xlabel=f"cosine with the vector of {shift.reference}"),
            f"The concepts on which {shift.reference} and {other} agree least: from the cosine with {shift.control} to "
            f"that with {other}.", height=1.2 + 0.27 * len(shown),
        ))  # fmt: skip
    return blocks


def _learnability(report: Any, found: AuditReport) -> list[Any]:
    from salience.report import figures

    learn = found.learn
    names = sorted(learn.nap, key=lambda name: learn.nap[name])
    series = {"concepts": list(learn.nap.values())}
    if learn.nap_classes:
        series["the model's classes"] = list(learn.nap_classes.values())
    if learn.nap_probed:
        series["classes learned like concepts"] = list(learn.nap_probed.values())
    edges = np.linspace(0, 1, 26)
    binned: dict[str, Any] = {name: (np.histogram(values, edges)[0], edges) for name, values in series.items()}
    return [
        report.heading("Can the concepts be learned?"),
        report.figure(lambda ax: figures.histogram(ax, binned, xlabel="normalised average precision"),
                      "How well each is known: concepts by a probe on the features of a network trained on something else, "
                      "classes by the model's own scores. With one number of positives for all."),
        report.table(("concept", "normalised average precision", "learnable"),
                     [(name, learn.nap[name], learn.keep[name]) for name in names],
                     f"Learnable is what reaches {learn.threshold:.3g}. A concept that is harder to learn than the class "
                     "explains the simple by the difficult."),
    ]  # fmt: skip


def _capacity(report: Any, found: AuditReport) -> list[Any]:
    from salience.concepts.concept_audit.explaining import LIMIT
    from salience.report import figures

    path = {len(one.names): one for one in found.path if one.names}
    rows = [(one.k, len(one.names), one.fidelity) for one in found.path]
    blocks = [
        report.heading("Are there few enough for a person?"),
        report.table(("concepts at most", "used", "predictions foretold"), rows,
                     f"Concepts used by any class, on held-out images of the first set. People could use about {LIMIT}."),
    ]  # fmt: skip
    if len(path) > 1:
        blocks.append(report.figure(
            lambda ax: figures.curve(ax, np.array(sorted(path)), {"fidelity": np.array([path[n].fidelity for n in sorted(path)])},
                                     xlabel="concepts used", ylabel="predictions foretold"),
            "What each further concept buys.", height=2.6,
        ))  # fmt: skip
    return blocks


def _explanations(report: Any, found: AuditReport) -> list[Any]:
    shift = found.shift
    classes = list(shift.tops[shift.reference])[:_TOPS]

    def told(top: list[tuple[str, float]] | None) -> str:
        return ", ".join(f"{name} {value:+.2f}" for name, value in top or ()) or "–"

    columns = ("class", *(f"from {name}" for name in shift.rows))
    rows = [(found.class_names.get(c, f"class {c}"), *(told(shift.tops[name].get(c)) for name in shift.rows))
            for c in classes]  # fmt: skip
    blocks = [
        report.heading("The explanations, each with its probe set"),
        report.table(columns, rows, "The strongest concepts of each class and their coefficients."),
    ]
    if found.basis:
        blocks.append(report.table(
            ("class", f"its weights in concept vectors of {shift.reference.removesuffix(' (half 1)')}"),
            [(found.class_names.get(c, f"class {c}"), told(found.basis.get(c))) for c in classes],
            f"Basis decomposition: {found.basis_left:.0%} of the length of the weights is in no concept.",
        ))  # fmt: skip
    return blocks
