"""The report of `explain table`, from the plain data of its result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from salience.features.blackbox_surrogate.explainer import Explanation
    from salience.features.table_explanation import TableExplanation

_COLUMNS, _RULES = 20, 20


def write_page(found: TableExplanation, name: str, path: Path) -> None:
    """Write the page: fidelity first, then columns, rules, single rows."""
    from salience import report
    from salience.report import figures

    label = "better than random columns" if found.better else "no better than random columns"
    blocks: list[Any] = [
        report.verdict(label, found.verdict, found.better),
        report.facts({
            "agreement": found.agreement, "R2 of probabilities": found.r2,
            "black box accuracy": found.accuracy_black_box, "surrogate accuracy": found.accuracy_surrogate,
            "commonest class": found.commonest, "columns used": len(found.explainer.columns_),
            "of columns": len(found.explainer.names_), "counterfactuals flip": found.flips,
            "flip after a search": found.flips_searched,
        }),
    ]  # fmt: skip
    blocks += _fidelity(report, figures, found)
    blocks += _columns(report, figures, found)
    blocks += _rules(report, found)
    rows = [_example(found, row, e) for row, e in found.examples]
    blocks += [report.heading("Single rows"), report.documents(rows, "Held-out rows, explained one by one")]
    if found.notes:
        blocks += [report.heading("Notes"), *(report.text(note) for note in found.notes)]
    subtitle = (
        f"{found.black_box} trained on {found.train_rows:,} rows, explained by {found.fresh_rows:,} others, measured on "
        f"{found.test_rows:,} held-out rows"
    )
    report.page(f"Explained: {name}", blocks, path=path, subtitle=subtitle)


def _fidelity(report, figures, found: TableExplanation) -> list:
    explainer = found.explainer
    gains = found.gains
    blocks = [
        report.heading("Does the tree do what the black box does?"),
        report.figure(
            lambda ax: figures.bars(
                ax,
                ["surrogate", *(gain.against for gain in gains)],
                [100 * gains[0].chosen, *(100 * gain.other for gain in gains)],
                highlight=["surrogate"],
                xlabel="agreement with the black box on held-out rows, in %",
            ),
            "Trees of equal depth on equally many columns.",
            height=2.0,
        ),
        report.table(
            ("against", "surrogate", "other", "better by", "95 % interval"),
            [(g.against, g.chosen, g.other, g.difference, f"{g.low:+.3f} … {g.high:+.3f}") for g in gains],
        ),
    ]
    if len(explainer.ks_) > 1:
        blocks.append(
            report.figure(
                lambda ax: figures.curve(
                    ax,
                    explainer.ks_,
                    {"agreement": 100 * np.array(explainer.fidelities_)},
                    xlabel="columns of the tree",
                    ylabel="agreement in %",
                ),
                f"Agreement on a quarter of the training rows by the number of columns; {len(explainer.columns_)} were "
                "taken, the fewest within a standard error of the best.",
            )
        )
    return blocks


def _columns(report, figures, found: TableExplanation) -> list:
    explainer = found.explainer
    shown = explainer.order_[:_COLUMNS]
    used = {explainer.names_[column] for column in explainer.columns_}
    moved = explainer.importance_.scores["sensitivity"]
    flips = explainer.importance_.flips

    rows = [
        (explainer.names_[c], explainer.importance_.rank[c], explainer.importance_.scores["permutation"][c], moved[c],
         None if flips is None else 100 * flips[c], explainer.names_[c] in used)
        for c in shown
    ]  # fmt: skip
    return [
        report.heading("Columns that the black box uses"),
        report.figure(
            lambda ax: figures.bars(
                ax,
                [explainer.names_[column] for column in shown],
                [100 * moved[column] for column in shown],
                highlight=used,
                xlabel="probability moved when the column is shuffled, in points",
            ),
            "The columns in the order of their mean rank; those of the surrogate in colour.",
            height=1.0 + 0.27 * len(shown),
        ),
        report.table(("column", "mean rank", "permutation", "sensitivity", "flips in %", "in the surrogate"), rows),
    ]


def _rules(report, found: TableExplanation) -> list:
    held = [rule for _, rule in found.rules]
    lines = [
        rule.text(found.classes).replace(" AND ", "\n   AND ").replace(" THEN ", "\n   THEN ") for rule in held[:_RULES]
    ]
    rest = f"\n… {len(held) - _RULES} more" if len(held) > _RULES else ""
    return [
        report.heading("Rules"),
        report.text(
            "Support and confidence are counted on held-out rows: the share of rows that meet the conditions, and the "
            "share of those to which the black box gives this class."
        ),
        report.code("\n\n".join(lines) + rest),
    ]


def _example(found: TableExplanation, row: int, e: Explanation) -> tuple[str, str]:
    said = found.classes[e.answer]
    lines = [
        f"black box: {said}" + ("" if e.agrees else "   (the surrogate says otherwise: its rule explains nothing)")
    ]
    if e.rule is not None:
        lines += ["rule:      " + e.rule.text(found.classes)]
    strongest = sorted(e.attributions.items(), key=lambda item: -abs(item[1]))[:6]
    lines += ["", "probability lost when the value comes from other rows:"]
    lines += [f"  {name:<32} {value:+.3f}" for name, value in strongest]
    for other in [*e.counterfactuals[:1], *([e.extended] if e.extended else [])]:
        what = f"the black box then says {found.classes[other.answer]}" if other.flips else "the black box stays"
        why = "further columns, searched for a flip" if other is e.extended else "to meet another rule"
        lines += ["", f"{why} ({found.classes[other.rule.label]}); {what}:"]
        lines += [f"  {name:<32} {now:.4g} -> {value:.4g}" for name, (now, value) in list(other.changes.items())[:10]]
        if len(other.changes) > 10:
            lines.append(f"  … {len(other.changes) - 10} more columns")
    return f"row {row}: {said}", "\n".join(lines)
