"""The report of `select rows`, from the plain data of its result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from salience.data.row_selection import RowSelection

_CLASSES, _SHOWN = 20, 10


def not_measured(notes: list[str]) -> str:
    """Why there is no proof."""
    return next((note for note in notes if note.startswith("nothing was measured")), "nothing was held out")


def write_page(found: RowSelection, name: str, path: Path) -> None:
    """Write the page: proof first, then scores, classes, some of the chosen rows."""
    from salience import report
    from salience.report import figures

    proof = found.proof
    blocks: list[Any] = []
    if proof is None:
        blocks.append(report.verdict("not measured", not_measured(found.notes), None))
    else:
        label = {True: "better than random", False: "worse than random", None: "no better than random"}
        blocks.append(report.verdict(label[proof.comparisons[0].better], proof.verdict, proof.comparisons[0].better))
    blocks.append(
        report.facts({"rows read": found.records.read, "selected": len(found.chosen), "held out": found.held_out,
                      "without a label": found.without_label, "unreadable": found.records.bad})
    )  # fmt: skip
    if proof is not None:
        shown = [item for item in proof.comparisons if item.measure == proof.comparisons[0].measure]
        blocks += [
            report.heading("Measured on held-out rows"),
            report.figure(
                lambda ax: figures.bars(
                    ax, [found.method, *(item.baseline for item in shown)],
                    [shown[0].chosen, *(item.other for item in shown)], highlight=[found.method],
                    xlabel=shown[0].measure,
                ),
                f"Each choice has {proof.chosen:,} rows; {proof.rows:,} held-out rows were measured on.",
                height=1.1 + 0.36 * (1 + len(shown)),
            ),
            report.table(
                ("measure", "against", found.method, "other", "better by", "95 % interval"),
                [(i.measure, i.baseline, i.chosen, i.other, i.difference, f"{i.low:+.3f} … {i.high:+.3f}")
                 for i in proof.comparisons],
                "Random rows keep the shares of the classes and are the mean of five draws."
                if found.classes else "Random rows are the mean of five draws.",
            ),
        ]  # fmt: skip
    chosen = found.scores.aligned(found.records.ids.take(found.chosen).to_pylist())
    blocks += [
        report.heading("Scores"),
        report.figure(
            lambda ax: figures.histogram(ax, {"could be chosen": found.scores.values, "selected": chosen}, "score"),
            "Of kmq, the logarithm of the probability to be drawn next; of gais, the sum of attention and confidence, "
            "each standardised within its class.",
        ),
    ]
    if found.classes:
        largest = sorted(found.classes, key=lambda item: -item[1])[:_CLASSES]
        blocks += [
            report.heading("Classes"),
            report.table(("class", "could be chosen", "selected"), largest),
        ]
    rows = found.table().slice(0, _SHOWN)
    blocks += [
        report.heading("The first chosen rows"),
        report.table(tuple(rows.column_names[:12]), [tuple(str(v) for v in list(row.values())[:12])
                                                     for row in rows.to_pylist()]),
    ]  # fmt: skip
    if found.notes:
        blocks += [report.heading("Notes"), *(report.text(note) for note in found.notes)]
    blocks += [
        report.heading("How it was made"),
        report.code("\n".join(f"{key}: {value}" for key, value in found.settings.items())),
    ]
    report.page(f"Rows chosen: {name}", blocks, path=path, subtitle=found.equation)
