"""The report of `compress quantize`, from plain data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from salience.weights.evaluation import Comparison
    from salience.weights.rsq.directories import QuantizedDirectory

_MATRICES = 40


def write_page(
    path: Path, out: str, facts: dict[str, Any], done: QuantizedDirectory, comparison: Comparison, against: str
) -> None:
    """Write the page: what it cost first, then sizes and the error of each matrix."""
    from salience import report
    from salience.cli._measured import comparison_blocks
    from salience.report import figures

    ratios = {name.removeprefix("model."): e / r if r else 1.0 for name, (e, r) in done.errors.items()}
    shown = dict(sorted(ratios.items(), key=lambda item: -item[1])[:_MATRICES])
    blocks = comparison_blocks(comparison, "after", against)
    if facts["perplexity"]:
        rows = [(name, value) for name, value in facts["perplexity"].items()]
        blocks.append(report.table(("model", "perplexity"), rows, "Two to the power of the mean bits per token."))
    blocks += [
        report.heading("Size"),
        report.facts(
            {
                "MB before": facts["dense_bytes"] / 1e6,
                "MB of codes and scales": facts["codes_bytes"] / 1e6,
                "MB that stay as they are": facts["rest_bytes"] / 1e6,
                "quantised weights": facts["weights"],
                "bits a weight, scales included": facts["bits_per_weight"],
                "calibration tokens": facts["calibration_tokens"],
            }
        ),
        report.heading("Each matrix"),
        report.figure(
            lambda ax: figures.bars(
                ax, list(shown), [100 * value for value in shown.values()], xlabel="error, in % of rounding to nearest"
            ),
            "Weighted error on the calibration text against rounding the same weights to nearest; largest first"
            + (f", the first {_MATRICES} of {len(ratios)}." if len(ratios) > _MATRICES else "."),
            height=1.1 + 0.3 * len(shown),
        ),
    ]
    report.page(f"Quantised model: {Path(out).name}", blocks, path=path, subtitle=f"{facts['bits']} bits")
