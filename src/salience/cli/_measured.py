"""What the commands that change weights share: the options of ``--evaluate``, and how the comparison is shown."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from salience.cli._say import say
from salience.errors import InputError

if TYPE_CHECKING:
    from salience.weights.evaluation import Comparison, Evaluation

_PANEL = "Measuring"
Evaluate = Annotated[
    Path | None,
    typer.Option("--evaluate", help="Labelled images (Parquet or a folder per class) or text (.txt, .jsonl, .parquet) to measure on.", rich_help_panel=_PANEL, show_default=False),
]  # fmt: skip
EvaluateCommand = Annotated[
    str | None,
    typer.Option("--evaluate-command", help="Or a command line with {model} in it that prints a number last.", rich_help_panel=_PANEL, show_default=False),
]  # fmt: skip
LowerIsBetter = Annotated[
    bool, typer.Option("--lower-is-better", help="Of the figure that the command prints.", rich_help_panel=_PANEL)
]
Limit = Annotated[int, typer.Option("--limit", help="Examples to measure on at most.", rich_help_panel=_PANEL)]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check the models and say what would be read and written; write nothing.")
]
Arch = Annotated[
    str | None,
    typer.Option("--arch", help="package.module:factory that builds the network of a FILE.safetensors.", show_default=False),
]  # fmt: skip
ImageMean = Annotated[
    str | None,
    typer.Option(help="Mean per channel where the model has no image processor, as in 0.5,0.5,0.5.", rich_help_panel=_PANEL, show_default=False),
]  # fmt: skip
ImageStd = Annotated[
    str | None, typer.Option(help="Deviation per channel, likewise.", rich_help_panel=_PANEL, show_default=False)
]
ImageSize = Annotated[
    int | None, typer.Option(help="Height and width, likewise.", rich_help_panel=_PANEL, show_default=False)
]


def evaluation_of(
    data: Path | None,
    command: str | None,
    lower_is_better: bool = False,
    *,
    seed: int,
    limit: int = 1000,
    arch: str | None = None,
    image_mean: str | None = None,
    image_std: str | None = None,
    image_size: int | None = None,
) -> Evaluation | None:
    """The evaluation that the options ask for, checked before anything is computed; None without any."""
    from salience.weights.evaluation import Evaluation

    if data is None and command is None:
        if lower_is_better:
            raise InputError("--lower-is-better goes with --evaluate-command")
        return None
    return Evaluation(
        data, command, lower_is_better, arch=arch, limit=limit, seed=seed, size=image_size,
        mean=channels_of("--image-mean", image_mean), std=channels_of("--image-std", image_std),
    )  # fmt: skip


def channels_of(option: str, written: str | None) -> list[float] | None:
    """The numbers that an option has written with commas between; None without it."""
    if written is None:
        return None
    try:
        return [float(part) for part in written.split(",")]
    except ValueError:
        raise InputError(f"{option} must be numbers with commas between, not {written!r}") from None


def sentence(comparison: Comparison, name: str, over: str) -> str:
    """Whether `name` beats `over`, in one sentence with its figures."""
    gain, decided = comparison.gain(name, over), comparison.verdict(name, over)
    words = {True: "better than", False: "no better than", None: "not clearly better than"}[decided]
    if decided is False and comparison.examples >= 5 and gain.high < 0:
        words = "worse than"
    interval = f", 95 % interval {_interval(gain.low, gain.high)}" if comparison.examples > 1 else ""
    return f"{name} is {words} {over} here: {comparison.measure} {gain.mean:+.4f} in its favour{interval}"


def print_comparison(comparison: Comparison, name: str, against: str) -> None:
    """The sentence on `name` against the baseline `against`, then a table of all models."""
    from rich.console import Console
    from rich.table import Table

    words = sentence(comparison, name, against)
    say(words[0].upper() + words[1:] + ".\n")
    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(_columns(comparison, name)):
        table.add_column(column, justify="right" if number else "left")
    for row in _rows(comparison, name):
        table.add_row(row[0], f"{row[1]:.4f}", "" if row[2] is None else f"{row[2]:+.4f}", row[3])
    Console(width=100).print(table)
    typer.echo("")


def comparison_blocks(comparison: Comparison, name: str, against: str) -> list[Any]:
    """The same as blocks of a report page: verdict first."""
    from salience import report
    from salience.report import figures

    decided = comparison.verdict(name, against)
    label = {True: f"better than {against}", False: f"no better than {against}", None: "not decided"}[decided]
    names = list(comparison.scores)
    means = [comparison.mean(each) for each in names]
    whole = comparison.examples > 1
    return [
        report.verdict(label, sentence(comparison, name, against), decided),
        report.heading("Measured on your data"),
        report.figure(
            lambda ax: figures.bars(
                ax,
                names,
                [each.mean for each in means],
                [(each.low, each.high) for each in means] if whole else None,
                highlight=[name],
                xlabel=f"{comparison.measure} ({'higher' if comparison.higher_is_better else 'lower'} is better)",
            ),
            f"Mean {comparison.measure} of {comparison.examples} examples"
            + (", with 95 % intervals." if whole else "."),
            height=1.1 + 0.36 * len(names),
        ),
        report.table(
            _columns(comparison, name),
            _rows(comparison, name),
            f"All models were scored on the same {comparison.examples} examples, so differences are paired."
            if whole
            else "A command gives one figure a model, so no interval can be given.",
        ),
    ]


def _columns(comparison: Comparison, name: str) -> tuple[str, ...]:
    return ("model", comparison.measure, f"{name} better by", "95 % interval")


def _rows(comparison: Comparison, name: str) -> list[tuple[str, float, float | None, str]]:
    rows: list[tuple[str, float, float | None, str]] = []
    for other, scores in comparison.scores.items():
        if other == name:
            rows.append((other, float(scores.mean()), None, ""))
            continue
        gain = comparison.gain(name, other)
        rows.append((other, float(scores.mean()), gain.mean, _interval(gain.low, gain.high)))
    return rows


def _interval(low: float, high: float) -> str:
    return f"{low:+.4f} … {high:+.4f}" if math.isfinite(low) else "–"
