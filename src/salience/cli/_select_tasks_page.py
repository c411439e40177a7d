"""The report of `select tasks`, from the plain data of its result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from salience.data import TaskSelection

_DRAWN = 20


def write_page(found: TaskSelection, path: Path) -> None:
    """Write the page: verdict, strategies on held-out rows, what is taken of which task."""
    from salience import report
    from salience.cli.select_tasks import comparison_columns, comparison_rows, rows_of
    from salience.data.lasso_task_selection.selection import STRATEGY_NAMES
    from salience.report import figures

    blocks: list[Any] = [_verdict(report, found)]
    rows = rows_of(found)
    blocks.append(report.facts({
        "tasks": len(rows), "tasks of any relevance": sum(row["relevance"] > 0 for row in rows),
        "rows taken": int(found.taken.sum()),
        "target's head left over": None if found.residual != found.residual else f"{100 * found.residual:.0f} %",
    }))  # fmt: skip
    if found.errors:
        names = list(found.errors)
        means = [found.mean(name) for name in names]
        blocks += [
            report.heading("Measured on your target"),
            report.figure(
                lambda ax: figures.bars(
                    ax, [STRATEGY_NAMES[name] for name in names], [one.mean for one in means],
                    [(one.low, one.high) for one in means], highlight=[STRATEGY_NAMES[found.strategy]],
                    xlabel=f"{found.measure} (lower is better)",
                ),
                "Held-out error of the target's rows by strategy, with 95 % intervals, at the same budget.",
                height=1.1 + 0.36 * len(names),
            ),
            report.table(
                comparison_columns(found), comparison_rows(found),
                "All strategies predict the same held-out rows, so differences are paired; the interval against equal "
                "shares also covers the draw of the rows.",
            ),
        ]  # fmt: skip
    first = rows[:_DRAWN]
    blocks += [
        report.heading("What to take"),
        report.figure(
            lambda ax: figures.bars(ax, [row["task"] for row in first], [row["take"] for row in first], xlabel="rows"),
            f"Rows to take of the {len(first)} most relevant tasks.",
            height=1.1 + 0.34 * len(first),
        ),
        report.table(("task", "relevance", "take", "available"), [tuple(row.values()) for row in rows]),
    ]
    if found.notes:
        blocks += [report.heading("Notes"), *(report.text(note) for note in found.notes)]
    blocks += [
        report.heading("How to read it"),
        report.text(
            "Relevance: how much of the target's head each source's head makes up, as shares of 1, in a representation "
            "learned from a few rows of every source. L1 relevance uses as few sources as can be, L2 relevance all of "
            "them.\nLeft over: the part of the target's head that is left over by the penalty, because the target's head "
            "is only known so well; more rows of the target make it smaller.\nHeld out: a fifth of the target's rows in turn took no part in "
            "the choice or the training that it is predicted by."
        ),
        report.heading("How it was made"),
        report.code("\n".join(f"{name}: {value}" for name, value in found.settings.items())),
    ]
    report.page("Source tasks for a target", blocks, path=path, subtitle=found.equation)


def _verdict(report: Any, found: TaskSelection) -> Any:
    if not found.errors:
        return report.verdict("not measured", found.verdict, None)
    other = "passive" if found.strategy != "passive" else "alone"
    gain = found.gain(other)
    label = "better than equal shares" if gain.low > 0 else "no better than equal shares"
    if other == "alone":
        label = "better than the target alone" if gain.low > 0 else "no better than the target alone"
    return report.verdict(label, found.verdict, gain.low > 0)
