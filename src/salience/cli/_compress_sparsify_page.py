"""The report of `compress sparsify`, from plain data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from salience.weights.evaluation import Comparison

_LAYERS = 40


def write_page(
    path: Path, out: str, method: str, facts: dict[str, Any], comparison: Comparison | None, against: str
) -> None:
    """Write the page: what it cost first, then the account and the layers."""
    from salience import report
    from salience.cli._measured import comparison_blocks
    from salience.report import figures

    if comparison is None:
        blocks: list[Any] = [
            report.verdict("not measured", "give --evaluate to see what this costs on your data", None)
        ]
    else:
        blocks = comparison_blocks(comparison, "after", against)
    layers = facts["layers"]
    shown = dict(list(layers.items())[:_LAYERS])
    more = f" The first {_LAYERS} of {len(layers)}." if len(layers) > _LAYERS else ""
    blocks += [
        report.heading("What is left"),
        report.facts(
            {
                "weights": facts["weights"],
                "kept": facts["kept"],
                "MB as written, zeros included": facts["bytes"]["dense"] / 1e6,
                "MB if stored with a bit mask": facts["bytes"]["bitmask"] / 1e6,
                "MB if stored as compressed rows (CSR)": facts["bytes"]["csr"] / 1e6,
                "ms for one pass, measured here": facts["milliseconds"],
            }
        ),
        report.text(
            f"Hardware and kernels that skip zeros would need {facts['flops'] / max(facts['dense_flops'], 1):.1%} of the "
            "operations. Dense kernels compute the zeros as well, so that a pass takes as long as before."
        ),
        report.figure(
            lambda ax: figures.bars(ax, list(shown), [100 * v for v in shown.values()], xlabel="weights kept, in %"),
            "Share of the weights that each layer keeps." + more,
            height=1.1 + 0.3 * len(shown),
        ),
    ]
    if facts["collapsed"]:
        blocks += [report.text(f"Nothing is left of {', '.join(facts['collapsed'])}, which cuts the network.")]
    blocks += [
        report.heading("How to load it"),
        report.text("As the model before: names and shapes are the same, and the weights that went are zeros."),
    ]
    report.page(f"Sparse model: {Path(out).name}", blocks, path=path, subtitle=f"method: {method}")
