"""The report of `verify labels`, from the plain data of its result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from salience.trust.labels import LabelsCheck, LabelsPart

_COEFFICIENTS = 12  # drawn; all stand in the table
_LABELS = {"DSL": "DSL", "GSO": "gold only", "SO": "model only", "SL": "plug-in"}


def write_page(found: LabelsCheck, path: Path) -> None:
    """Write the page: verdict, coefficient intervals by method, power, table."""
    from salience import report
    from salience.trust.labels import HELPFUL

    blocks: list[Any] = []
    for part in found.parts:
        ratio = float(np.nanmedian(part.narrower))
        blocks.append(
            report.verdict("labels help" if ratio < HELPFUL else "no better than none", part.verdict, ratio < HELPFUL)
        )
    first = found.parts[0].result
    blocks.append(
        report.facts({
            "rows": first.n, "gold labels": first.n_labeled, "dropped": first.n_dropped,
            "correlation of labels": found.parts[0].correlation,
        })
    )  # fmt: skip
    for part in found.parts:
        blocks += _part(report, found, part)
    if found.notes:
        blocks += [report.heading("Notes"), *(report.text(note) for note in found.notes)]
    blocks += [
        report.heading("How to read it"),
        report.text(
            "DSL: predictions corrected by the gold labels; its intervals hold if the labelled rows were drawn with the "
            "probabilities given.\nGold only: labelled rows alone, weighted; its intervals hold too, and are wider.\n"
            "Model only: the model's labels taken as true. Plug-in: predictions fitted to the gold labels, taken as "
            "true. The intervals of these two are narrow and need not hold."
        ),
        report.heading("How it was made"),
        report.code("\n".join(f"{name}: {value}" for name, value in found.settings.items())),
    ]
    report.page(f"Labels: {', '.join(part.what for part in found.parts)}", blocks, path=path, subtitle=found.equation)


def _part(report, found: LabelsCheck, part: LabelsPart) -> list:
    result = part.result
    shown = list(range(len(result.names)))[:_COEFFICIENTS]
    rows = [
        (
            row["name"],
            _LABELS[row["method"]],
            row["coef"],
            row["se"],
            f"{row['low']:.4f} … {row['high']:.4f}",
            row["p_value"],
        )
        for row in sorted(result.rows(found.alpha), key=lambda row: result.names.index(row["name"]))
    ]
    blocks = [
        report.heading(f"Estimates: {part.what}"),
        report.figure(
            lambda ax: _forest(ax, found, part, shown),
            f"Estimates with {100 * (1 - found.alpha):g} % intervals by method"
            + (", each divided by the standard error of its DSL estimate." if len(shown) > 1 else "."),
            height=1.4 + 0.9 * len(shown),
        ),
        report.table(("coefficient", "method", "estimate", "error", "interval", "p (two-sided)"), rows),
    ]
    if result.n_labeled < result.n:
        blocks += _power(report, part, shown)
    return blocks


def _forest(ax, found: LabelsCheck, part: LabelsPart, shown: list[int]) -> None:
    """Every method's interval of every coefficient, in units that make coefficients of any size visible."""
    unit = part.result.se if len(shown) > 1 else np.ones(1)
    for row, method in enumerate(_LABELS):
        coef, _ = part.result.estimate(method)
        span = part.result.conf_int(found.alpha, method)
        for place, at in enumerate(shown):
            y = place + 0.18 * (row - 1.5)
            ends, wide = span[at] / unit[at], 2.2 if method == "DSL" else 1.4
            ax.plot(ends, [y, y], color=f"C{row}", linewidth=wide, solid_capstyle="butt")
            label = _LABELS[method] if place == 0 else None
            ax.plot(coef[at] / unit[at], y, "oDs^"[row], color=f"C{row}", markersize=5, label=label)
    ax.axvline(0, color=ax.xaxis.label.get_color(), linewidth=0.8)
    ax.set_yticks(range(len(shown)), [_short(part.result.names[at]) for at in shown])
    ax.set_ylim(len(shown) - 0.45, -0.55)
    ax.grid(axis="x", linewidth=0.8)
    columns = 4 if ax.figure.get_figwidth() > 5 else 2
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=columns, borderaxespad=0.2)
    ax.set_xlabel("estimate" if len(shown) == 1 else "in standard errors of DSL", loc="right")


def _power(report, part: LabelsPart, shown: list[int]) -> list:
    from salience.report import figures

    result = part.result
    most = min(result.n, 8 * result.n_labeled)
    numbers = np.unique(np.geomspace(result.n_labeled, most, 25).astype(int))
    now = result.power_se([result.n_labeled])[0]
    widths = result.power_se(numbers) / now
    return [
        report.heading("What more gold labels would give"),
        report.figure(
            lambda ax: figures.curve(
                ax, numbers, {_short(result.names[at], 9): 100 * widths[:, at] for at in shown[:3]},
                xlabel="gold labels in all", ylabel="width in % of now",
            ),
            "Width of the interval to expect with more gold labels drawn in the same way.",
        ),
        report.table(
            ("coefficient", "error now", "half as wide at"),
            [(name, result.se[at], part.labels_needed(at)) for at, name in enumerate(result.names)],
            "“Not by labels”: even with all rows labelled the interval would be wider than half; more rows are needed.",
        ),
    ]  # fmt: skip


def _short(name: str, most: int = 24) -> str:
    return name if len(name) <= most else f"{name[: most // 2]}…{name[-(most - most // 2 - 1) :]}"
