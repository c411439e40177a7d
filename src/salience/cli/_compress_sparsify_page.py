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
        blocks: list[Any] = [report.verdict("not measured", "no evaluation data was given", None)]
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
                "MB as written": facts["bytes"]["dense"] / 1e6,
                "MB with a bit mask": facts["bytes"]["bitmask"] / 1e6,
                "MB in compressed rows": facts["bytes"]["csr"] / 1e6,
                "ms a pass, here": facts["milliseconds"],
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
    report.page(f"Sparse model: {Path(out).name}", blocks, path=path, subtitle=f"method: {method}")
