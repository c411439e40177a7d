"""The report of `compress channels`, from plain data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from salience.weights.evaluation import Comparison

_GROUPS = 40


def write_page(
    path: Path, out: str, method: str, facts: dict[str, Any], comparison: Comparison | None, against: str
) -> None:
    """Write the page: what it cost first, then the widths."""
    from salience import report
    from salience.cli._measured import comparison_blocks
    from salience.report import figures

    if comparison is None:
        blocks: list[Any] = [
            report.verdict("not measured", "give --evaluate to see what this costs on your data", None)
        ]
    else:
        blocks = comparison_blocks(comparison, "after", against)
    widths = facts["widths"]
    blocks += [
        report.heading("What changed"),
        report.facts(
            {
                "channels before": sum(pair[0] for pair in widths.values()),
                "channels after": sum(pair[1] for pair in widths.values()),
                "parameters before": facts["params"][0],
                "parameters after": facts["params"][1],
                "operations before": facts["flops"][0],
                "operations after": facts["flops"][1],
            }
        ),
    ]
    shown = dict(list(widths.items())[:_GROUPS])
    more = f" The first {_GROUPS} of {len(widths)}." if len(widths) > _GROUPS else ""
    blocks += [
        report.figure(
            lambda ax: figures.change(
                ax, list(shown), [p[0] for p in shown.values()], [p[1] for p in shown.values()], xlabel="channels"
            ),
            "Channels of each hidden width, before and after." + more,
            height=1.2 + 0.28 * len(shown),
        ),
        report.table(("hidden width", "before", "after"), [(name, *pair) for name, pair in widths.items()]),
    ]
    if facts["skipped"]:
        blocks += [
            report.heading("Left as they are"),
            report.table(("hidden width", "because"), list(facts["skipped"].items())),
        ]
    load = "salience.model.load(...)" if facts["needs_list"] else "from_pretrained(...), or salience.model.load(...)"
    blocks += [report.heading("How to load it"), report.code(f"{load}  # {out}")]
    report.page(f"Narrower model: {Path(out).name}", blocks, path=path, subtitle=f"method: {method}")
