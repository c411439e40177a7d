"""`salience merge permute`: average networks that were trained apart, after lining up their units."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from salience.cli import _measured as m
from salience.cli.verbs import merge
from salience.errors import InputError

_EPILOG = (
    "Examples:\n\n"
    "salience merge permute one/ two/ --evaluate images/ -o merged/\n\n"
    "salience merge permute a.safetensors b.safetensors --arch nets:resnet --evaluate test.parquet -o ab.safetensors\n\n"
    "salience merge permute a.safetensors b.safetensors --arch nets:mlp --input-shape 64 -o ab.safetensors\n\n"
    "Exit codes: 0 done, 2 usage, 3 bad data, 4 nothing to do, 130 interrupted."
)


class Method(StrEnum):
    """By what units are lined up."""

    weights = "weights"
    activations = "activations"


class Mode(StrEnum):
    """To what each network is matched."""

    reference = "reference"
    mean = "mean"


@merge.command("permute", epilog=_EPILOG)
def permute(
    models: Annotated[list[Path], typer.Argument(help="Two networks or more of one architecture: directories, or FILE.safetensors.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Output, of the same kind.", show_default=False)],
    method: Annotated[Method, typer.Option(help="Line units up by their weights or by their activations on the data.")] = Method.weights,
    mode: Annotated[Mode, typer.Option(help="Match to the first network, or go on to the mean of the others.", rich_help_panel="Options of weights alone")] = Mode.reference,
    arch: m.Arch = None,
    input_shape: Annotated[str | None, typer.Option(help="Shape of one input where there is no data, as in 3,32,32.", show_default=False)] = None,
    evaluate: m.Evaluate = None,
    evaluate_command: m.EvaluateCommand = None,
    lower_is_better: m.LowerIsBetter = False,
    limit: m.Limit = 1000,
    image_size: m.ImageSize = None,
    image_mean: m.ImageMean = None,
    image_std: m.ImageStd = None,
    seed: Annotated[int, typer.Option(help="Seed of the order of the layers.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    report: Annotated[Path | None, typer.Option(help="Report page.", show_default="OUT.report.html")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:  # fmt: skip
    """Average networks that were trained apart, after lining up their hidden units.

    The order of hidden units is arbitrary, so a plain mean of two networks mixes units that do different things. This
    permutes the units of each network to match the first (weight matching), takes the mean, and measures it beside the
    plain mean and each network, which is printed first.
    """
    from salience.cli import _changed_page as shown
    from salience.weights.weight_matching.measured import merge_permuted

    if method is not Method.weights and mode is not Mode.reference:
        raise InputError("--mode belongs to --method weights alone: leave it out")
    page = shown.check_paths(out, report, overwrite)
    evaluation = m.evaluation_of(
        evaluate, evaluate_command, lower_is_better, seed=seed, limit=limit, arch=arch, image_size=image_size,
        image_mean=image_mean, image_std=image_std,
    )  # fmt: skip
    with shown.progress(as_json) as status:
        result = merge_permuted(
            models, out, evaluation=evaluation, arch=arch, method=method.value, mode=mode.value,
            example=_example(input_shape), seed=seed, overwrite=overwrite, step=status.update,
        )  # fmt: skip
    facts = {
        "models": len(models), "units": result.units, "groups of units": result.groups,
        "distance cut, %": result.distance_cut, "R(0.3) before": result.aligned["0.3"][0],
        "R(0.3) after": result.aligned["0.3"][1], "seed": seed,
    }  # fmt: skip
    shown.show(result, facts, page, as_json, f"Merged networks: {out.name}", _blocks(result))


def _example(written: str | None) -> Any:
    if written is None:
        return None
    import torch

    try:
        shape = [int(part) for part in written.split(",")]
    except ValueError:
        raise InputError(f"--input-shape must be whole numbers with commas between, not {written!r}") from None
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))


def _blocks(result: Any) -> list[Any]:
    from salience import report
    from salience.report import figures

    blocks: list[Any] = []
    if result.line:
        points = len(next(iter(result.line.values())))
        t = [number / (points - 1) for number in range(points)]
        blocks += [
            report.heading("The line between the first two"),
            report.figure(
                lambda ax: figures.curve(
                    ax, t, result.line, xlabel="share of the second", ylabel=result.comparison.measure
                ),
                "Mean score on the way from one network to the other, with the second as trained and permuted.",
            ),
        ]
    rows = [(f"R({gamma})", before, after) for gamma, (before, after) in result.aligned.items()]
    blocks += [
        report.heading("Why it works, or does not"),
        report.table(
            ("agreement of singular directions", "as trained", "permuted"),
            rows,
            "1 for equal networks, about 0 for independent ones; R(0.3) looks at the large singular values alone. The "
            f"distance between the first two shrank by {result.distance_cut:.0f} %.",
        ),
    ]
    return blocks
