"""The report of `refine traces`, from the plain data of its result."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from salience.data import TraceRefinement

_TITLE = 90


def write_page(found: TraceRefinement, path: Path) -> None:
    """Write the page: verdict, perplexities, tokens by pattern, scores, examples with struck-out steps."""
    from salience import report
    from salience.cli.refine_traces import COMPARED, PRUNED, comparison_rows, pattern_rows
    from salience.report import figures

    label = {True: "better than random removal", False: "no better than random removal", None: "not measured"}
    before, after = found.tokens
    blocks: list[Any] = [
        report.verdict(label[found.better], found.verdict, found.better),
        report.facts({
            "traces read": found.read, "traces shortened": found.refined, "steps removed": sum(found.removed.values()),
            "tokens before": before, "tokens after": after, "fewer tokens": f"{1 - after / max(before, 1):.1%}",
        }),
        report.heading("Does the answer stay as likely?"),
        report.figure(
            lambda ax: _gains(ax, figures, found),
            f"How much likelier the gold answer is after PIR than after each other removal, in the {found.refined:,} "
            "shortened traces, with 95 % intervals; right of 0 PIR is better.",
            height=2.0,
        ),
        report.table(COMPARED, comparison_rows(found),
                     "Means over the shortened traces; random removal is the mean of 5 draws.",
                     align=["left", "right", "right", "right", "right"]),
        report.heading("Tokens by step pattern"),
        report.figure(
            lambda ax: figures.change(
                ax, [name for name, row in found.stats.items() if row["steps"]],
                [row["tokens"] for row in found.stats.values() if row["steps"]],
                [row["kept_tokens"] for row in found.stats.values() if row["steps"]], xlabel="tokens",
            ),
            "Tokens of all steps before and after.",
            height=1.2 + 0.36 * len(found.stats),
        ),
        report.table(PRUNED, pattern_rows(found), align=["left", *["right"] * 6]),
    ]  # fmt: skip
    if found.scores:
        blocks += [
            report.heading("Scores"),
            report.figure(
                lambda ax: figures.histogram(ax, found.scores, xlabel="PIR, nats per token of the answer"),
                "How the scores of the functional steps are distributed. Right of 0 the step makes the answer likelier; "
                "left of it the answer is likelier without the step.",
            ),
        ]
    if found.examples:
        blocks += [
            report.heading("Examples"),
            report.edits([_example(example) for example in found.examples],
                         "Some of the shortened traces; struck-out steps were removed."),
        ]  # fmt: skip
    blocks += [report.heading("Notes"), *(report.text(note) for note in found.notes)] if found.notes else []
    blocks += [
        report.heading("How it was made"),
        report.code("\n".join(f"{name}: {value}" for name, value in found.settings.items())),
    ]
    report.page(f"Refined traces: {Path(found.out).name}", blocks, path=path, subtitle=found.equation)


def _gains(ax: Any, figures: Any, found: TraceRefinement) -> None:
    names = {"random": "random removal", "longest steps": "longest first", "full chain": "nothing removed"}
    gains = [found.gain(name) for name in names]
    spans = [(gain.low, gain.high) if math.isfinite(gain.low) else (math.nan, math.nan) for gain in gains]
    figures.bars(ax, [f"against {words}" for words in names.values()], [gain.mean for gain in gains], spans,
                 highlight=["against random removal"], xlabel="answer likelier by, nats per token")  # fmt: skip


def _example(example: Any) -> tuple[str, list[tuple[str, str, bool]]]:
    question = " ".join(example.question.split())
    title = question if len(question) <= _TITLE else question[: _TITLE - 1] + "…"
    parts = []
    for number, step in enumerate(example.steps):
        note = f"{number} · {step.pattern}"
        note += f" of step {step.relates_to}" if step.relates_to is not None else ""
        note += f" · PIR {step.pir:+.4f}" if step.pir is not None else ""
        note += f" · removed: {step.reason}" if step.removed else ""
        parts.append((step.text.strip(), note, step.removed))
    return f"{title}  ({example.name})", parts
