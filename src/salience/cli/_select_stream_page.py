"""The report of `select stream`, from the plain data of its result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from salience.data import StreamSelection


def write_page(found: StreamSelection, path: Path) -> None:
    """Write the page: verdict, baselines on held-out rows, rounds, the clusters of the last round."""
    from salience import report
    from salience.cli.select_stream import comparison_rows, verdict_of
    from salience.report import figures

    blocks: list[Any] = []
    proof = found.proof
    if proof is None:
        blocks.append(report.verdict("not measured", verdict_of(found), None))
    else:
        better = proof.comparisons[0].better
        label = {True: "better than random", False: "worse than random", None: "no better than random"}[better]
        blocks.append(report.verdict(label, proof.verdict, better))
    blocks.append(report.facts({"rows read": found.counts["read"], "rounds": len(found.rounds),
                                "in the pool at the end": found.counts["pool"], "pruned": found.counts["pruned"]}))  # fmt: skip
    if proof is not None:
        compared = comparison_rows(found)
        blocks += [
            report.heading("Measured on held-out rows"),
            report.table(
                tuple(compared[0]), [tuple(row.values()) for row in compared],
                "Learners are trained once on the choices of all rounds together, and equally many held-out rows of "
                "every data set are measured on. Random rows come from the pool of the round, as many in every "
                "round, and are the mean of five draws.",
            ),
        ]  # fmt: skip
    rounds, clusters = found.round_rows(), found.cluster_rows()
    last = [row for row in clusters if row["round"] == len(rounds)]
    names = [str(row["cluster"]) for row in last]
    blocks += [
        report.heading("Rounds"),
        report.table(tuple(rounds[0]), [tuple(row.values()) for row in rounds]),
        report.heading("Clusters of the last round"),
        report.figure(
            lambda ax: figures.bars(ax, names, [row["chosen"] / row["rows"] for row in last],
                                    xlabel="share of the cluster that was chosen"),
            "Small clusters give a larger share: the budget is shared out equally over clusters.",
            height=1.1 + 0.34 * len(last),
        ),
        report.table(tuple(last[0]), [tuple(row.values()) for row in last],
                     "Score: the one whose histogram has the largest entropy in the cluster, in bits; none where no "
                     "score tells its rows apart."),
    ]  # fmt: skip
    if found.notes:
        blocks += [report.heading("Notes"), *(report.text(note) for note in found.notes)]
    blocks += [
        report.heading("How it was made"),
        report.code("\n".join(f"{name}: {value}" for name, value in found.settings.items())),
    ]
    report.page("Training data round by round", blocks, path=path, subtitle=found.equation)
