"""`salience compress delta`: keep a small share of what fine-tuning changed."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from salience.cli import _measured as m
from salience.cli.verbs import compress
from salience.errors import InputError

_EPILOG = (
    "Examples:\n\n"
    "salience compress delta base/ tuned/ --evaluate valid.jsonl -o pruned/\n\n"
    "salience compress delta base/ tuned/ --rate 0.95 --rescale 0.1 -o delta.safetensors\n\n"
    "salience compress delta base/ tuned/ --evaluate-command 'python score.py {model}' -o pruned/\n\n"
    "Exit codes: 0 done, 2 usage, 3 bad data, 4 nothing to do, 130 interrupted."
)
_DAREX = "Options of darex alone"


class Method(StrEnum):
    """What is kept of the delta."""

    darex = "darex"
    dare = "dare"
    magnitude = "magnitude"


class Selection(StrEnum):
    """By what q is chosen."""

    auto = "auto"
    validation = "validation"
    output = "output"


@compress.command("delta", epilog=_EPILOG)
def delta(
    base: Annotated[Path, typer.Argument(help="Model directory before fine-tuning.", show_default=False)],
    tuned: Annotated[Path, typer.Argument(help="Model directory after it.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Output: a model directory, or FILE.safetensors for the delta alone.", show_default=False)],
    method: Annotated[Method, typer.Option(help="darex: random, with a searched divisor; dare: divisor 1 - rate; magnitude: the largest.")] = Method.darex,
    rate: Annotated[float, typer.Option(help="Share of entries to drop.")] = 0.99,
    exclude: Annotated[str, typer.Option(help="Parts of tensor names that stay as fine-tuned, with commas between.")] = "classifier,lm_head,score",
    rescale: Annotated[str, typer.Option(help="auto, global, layer, gradient, or q itself.", rich_help_panel=_DAREX)] = "auto",
    selection: Annotated[Selection, typer.Option(help="Choose q by the measure or, without labels, by the change of outputs.", rich_help_panel=_DAREX)] = Selection.auto,
    evaluate: m.Evaluate = None,
    evaluate_command: m.EvaluateCommand = None,
    lower_is_better: m.LowerIsBetter = False,
    limit: m.Limit = 1000,
    image_size: m.ImageSize = None,
    image_mean: m.ImageMean = None,
    image_std: m.ImageStd = None,
    seed: Annotated[int, typer.Option(help="Seed of the masks.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    report: Annotated[Path | None, typer.Option(help="Report page.", show_default="OUT.report.html")] = None,
    dry_run: m.DryRun = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:  # fmt: skip
    """Keep a small share of what fine-tuning changed, and still have the fine-tuned model.

    Drops entries of the difference between two models at random and divides the others by q, which is chosen on one
    half of your data (DAREx, ICLR 2025). Then measures on the other half whether that beats DARE's q = 1 - rate and the
    largest entries at equal size, and prints that first.
    """
    from salience.cli import _changed_page as shown
    from salience.weights.darex.measured import compress_delta

    if method is not Method.darex and (rescale != "auto" or selection is not Selection.auto):
        raise InputError("--rescale and --selection belong to --method darex alone: leave them out")
    page = shown.check_paths(out, report, overwrite)
    evaluation = m.evaluation_of(
        evaluate, evaluate_command, lower_is_better, seed=seed, limit=limit, image_size=image_size,
        image_mean=image_mean, image_std=image_std,
    )  # fmt: skip
    if dry_run:
        from salience.cli._delta_plan import compress_plan

        facts = compress_plan(base, tuned, out, evaluation, _names(exclude), overwrite)
        shown.plan(facts, as_json)
        return
    with shown.progress(as_json) as status:
        result = compress_delta(
            base, tuned, out, evaluation=evaluation, method=method.value, rate=rate, rescale=_number(rescale),
            selection=selection.value, exclude=_names(exclude), seed=seed, overwrite=overwrite, step=status.update,
        )  # fmt: skip
    facts = {"rate": rate, "q": result.q if isinstance(result.q, float) else None, "seed": seed}
    shown.show(result, facts, page, as_json, f"Pruned delta: {out.name}", shown.delta_blocks(result))


def _number(written: str) -> float | str:
    if written in ("auto", "global", "layer", "gradient"):
        return written
    try:
        return float(written)
    except ValueError:
        raise InputError(f"--rescale: got {written!r}; it must be auto, global, layer, gradient or a number") from None


def _names(written: str) -> tuple[str, ...]:
    return tuple(part for part in written.split(",") if part)
