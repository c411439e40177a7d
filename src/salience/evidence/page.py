"""The report page of one reproduction: the verdict first, then what it rests on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from salience import papers
from salience.evidence.store import Evidence
from salience.evidence.tables import control_table, figure_table, remarks

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_page(evidence: Evidence, pictures: dict[str, Figure], path: Path) -> None:
    """Write the page of `evidence` to `path`.

    Parameters
    ----------
    evidence : Evidence
    pictures : dict of str to matplotlib Figure
        By caption.
    path : Path
        Name of the HTML file.
    """
    from salience import report

    paper = papers.get(evidence.slug)
    verdict = evidence.verdict
    claim = evidence.measured[0].claim if evidence.measured else paper.claim
    undecided = evidence.scale == "smoke" and verdict.shown
    blocks: list[Any] = [
        report.verdict(evidence.label, "; ".join(verdict.reasons) or claim, None if undecided else verdict.shown),
        report.text(f"Claim: {claim}. Scale: {evidence.scale}."),
    ]
    if evidence.measured:
        blocks += [report.heading("Figures"), report.table(*figure_table(evidence))]
        blocks += [report.heading("Controls, which must miss"), report.table(*control_table(evidence))]
    blocks += [report.text(remark) for remark in remarks(evidence)]
    blocks += [report.figure(picture, caption) for caption, picture in pictures.items()]
    for seed, run in evidence.runs.items():
        if run.outcome is None:
            blocks += [report.heading(f"Seed {seed} failed"), report.code(run.traceback or run.error or "")]
    minutes = [[str(seed), f"{run.minutes:.2f}"] for seed, run in evidence.runs.items()]
    blocks += [report.heading("Runs"), report.table(["seed", "minutes"], minutes)]
    blocks += [report.table(["package", "version"], [[name, number] for name, number in evidence.versions.items()])]
    report.page(f"{paper.slug}: {paper.title}", blocks, path)
