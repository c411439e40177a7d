"""`salience merge delta`: put several fine-tuned models of one base into one."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from salience.cli import _measured as m
from salience.cli.verbs import merge
from salience.errors import InputError

_EPILOG = (
    "Examples:\n\n"
    "salience merge delta one/ two/ --evaluate valid.jsonl -o merged/\n\n"
    "salience merge delta math/ code/ --base base/ --method darex --evaluate valid.jsonl -o merged/\n\n"
    "salience merge delta a.safetensors b.safetensors --base base/ --method task --weights 0.7,0.7 -o merged/\n\n"
    "Exit codes: 0 done, 2 usage, 3 bad data, 4 nothing to do, 130 interrupted."
)
_PRUNING = "Options of dare and darex alone"


class Method(StrEnum):
    """How models are put together."""

    linear = "linear"
    task = "task"
    dare = "dare"
    darex = "darex"


@merge.command("delta", epilog=_EPILOG)
def delta(
    models: Annotated[list[Path], typer.Argument(help="Two model directories or more, or delta files of `compress delta`.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Output directory.", show_default=False)],
    base: Annotated[Path | None, typer.Option(help="The model from which all were fine-tuned.", show_default=False)] = None,
    method: Annotated[Method | None, typer.Option(help="linear: mean; task: sum of deltas; dare, darex: of pruned deltas.", show_default="linear; with --base, task")] = None,
    weights: Annotated[str | None, typer.Option(help="One number per model, as in 0.6,0.4.", show_default="1/n each")] = None,
    rate: Annotated[float | None, typer.Option(help="Share of entries to drop.", rich_help_panel=_PRUNING, show_default="0.9")] = None,
    q: Annotated[float | None, typer.Option("--rescale", help="Divisor of the kept entries; darex chooses it on data if left out.", rich_help_panel=_PRUNING, show_default=False)] = None,
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
    """Put several fine-tuned models of one base into one.

    Works block by block, so memory does not grow with the models. Different architectures, tokenizers, tensors or shapes
    are refused before anything is written. With --evaluate the merged model is measured beside each model and the
    plain mean, and that is printed first.
    """
    from salience.cli import _changed_page as shown
    from salience.weights.darex.measured import merge_deltas

    chosen = method or (Method.linear if base is None else Method.task)
    if chosen not in (Method.dare, Method.darex) and (rate is not None or q is not None):
        raise InputError("--rate and --rescale belong to --method dare and darex alone: leave them out")
    if chosen is Method.dare and q is not None:
        raise InputError("--rescale belongs to --method darex: dare divides by 1 - rate")
    page = shown.check_paths(out, report, overwrite)
    evaluation = m.evaluation_of(
        evaluate, evaluate_command, lower_is_better, seed=seed, limit=limit, image_size=image_size,
        image_mean=image_mean, image_std=image_std,
    )  # fmt: skip
    if dry_run:
        from salience.cli._delta_plan import merge_plan

        shown.plan(merge_plan(models, out, evaluation, base, overwrite), as_json)
        return
    with shown.progress(as_json) as status:
        result = merge_deltas(
            models, out, evaluation=evaluation, base=base, method=chosen.value, weights=_weights(weights),
            rate=0.9 if rate is None else rate, q=q, seed=seed, overwrite=overwrite, step=status.update,
        )  # fmt: skip
    facts = {"models": len(models), "weights": weights or "equal", "q": result.q, "seed": seed}
    shown.show(result, facts, page, as_json, f"Merged model: {out.name}", shown.delta_blocks(result))


def _weights(written: str | None) -> list[float] | None:
    if written is None:
        return None
    try:
        return [float(part) for part in written.split(",")]
    except ValueError:
        raise InputError(f"--weights must be numbers with commas between, not {written!r}") from None
