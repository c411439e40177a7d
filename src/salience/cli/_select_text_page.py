"""The report of `select text`, from the plain data of its result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from salience.data.proof import Proof
    from salience.data.text_selection import TextSelection

_SOURCES = 20


def write_page(result: TextSelection, path: Path) -> None:
    """Write the page: proof first, then weights, n-grams, sources, documents."""
    from salience import report
    from salience.report import figures

    blocks: list[Any] = []
    proof = result.proof
    if proof is None:
        blocks.append(report.verdict("not measured", "; ".join(result.warnings) or "nothing was held out", None))
    else:
        label = "better than random" if proof.better else "no better than random"
        blocks.append(report.verdict(label, proof.verdict, proof.better))
    blocks.append(
        report.facts(
            {
                "records read": result.read,
                "selected": result.selected,
                "not selected": result.not_selected,
                "too short": result.too_short,
                "blank": result.blank,
                "quarantined": result.quarantined,
            }
        )
    )
    if proof is not None:
        blocks += _proof(report, figures, result.method, proof)
    blocks += [
        report.heading("Weights"),
        report.figure(
            lambda ax: figures.histogram(
                ax, {"eligible": result.weights, "selected": result.chosen_weights}, xlabel=_axis(result)
            ),
            "How the documents' scores are distributed: a sample of all eligible ones, and those selected.",
        ),
    ]
    if result.ngrams_for or result.ngrams_against:
        blocks += _ngrams(report, result)
    if len(result.sources) > 1:
        blocks += _sources(report, figures, result)
    blocks += [
        report.heading("Documents"),
        report.documents(_titled(result.most), "Most important"),
        report.documents(_titled(result.least), "Least important"),
    ]
    if result.warnings:
        blocks += [report.heading("Notes"), *(report.text(warning) for warning in result.warnings)]
    blocks += [report.heading("How it was made"), report.code(_settings(result))]
    report.page(f"Selected text: {Path(result.out).name}", blocks, path=path, subtitle=result.equation)


def _axis(result: TextSelection) -> str:
    axes = {"heuristic": "p(target | document)", "random": "random number"}
    return axes.get(result.method, "log importance weight")


def _proof(report, figures, method: str, proof: Proof) -> list:
    rows = [
        (item.measure, item.baseline, item.chosen, item.other, item.difference, f"{item.low:+.4f} … {item.high:+.4f}")
        for item in proof.comparisons
    ]
    labels = [f"{item.measure} against {item.baseline}" for item in proof.comparisons]
    return [
        report.heading("Measured on target documents it never saw"),
        report.figure(
            lambda ax: figures.bars(
                ax,
                labels,
                [item.difference for item in proof.comparisons],
                [(item.low, item.high) for item in proof.comparisons],
                xlabel="better by (nats per n-gram, bits per byte)",
            ),
            f"How much better {method} is than each baseline of equal size on {proof.documents} held-out "
            "documents, with 95 % intervals; right of 0 is better.",
        ),
        report.table(
            ("measure", "against", method, "baseline", "better by", "95 % interval"),
            rows,
            f"Random is the mean of several draws (spread of the KL reduction {proof.random_spread:.4f}). Each byte "
            f"model was trained on {proof.model_bytes:,} bytes.",
        ),
    ]


def _ngrams(report, result: TextSelection) -> list:
    columns = ("n-gram", "log ratio", "in raw sample", "in target sample")
    return [
        report.heading("What decided"),
        report.table(columns, result.ngrams_for, "Words and pairs that speak most for the target."),
        report.table(columns, result.ngrams_against, "Words and pairs that speak most against it."),
    ]


def _sources(report, figures, result: TextSelection) -> list:
    eligible, chosen = sum(row[1] for row in result.sources), max(sum(row[2] for row in result.sources), 1)
    shares = [(name, before / max(eligible, 1), after / chosen) for name, before, after in result.sources]
    shares = sorted(shares, key=lambda row: -max(row[1:]))[:_SOURCES]
    return [
        report.heading("Sources"),
        report.figure(
            lambda ax: figures.change(
                ax,
                [row[0] for row in shares],
                [row[1] for row in shares],
                [row[2] for row in shares],
                ("of eligible", "of selected"),
                xlabel="share of documents",
            ),
            "Where the documents come from, before and after.",
            height=1.2 + 0.28 * len(shares),
        ),
    ]


def _titled(documents: list[tuple[str, float, str]]) -> list[tuple[str, str]]:
    return [(f"{score:+.1f}  {where}", text) for where, score, text in documents]


def _settings(result: TextSelection) -> str:
    record = {name: value for name, value in result.manifest.items() if name in ("salience", "method", "parameters")}
    return "\n".join(f"{name}: {value}" for name, value in record.items())
