"""What `compress delta`, `merge delta` and `merge permute` print and show of their result."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from salience.cli._measured import comparison_blocks, print_comparison
from salience.cli._say import say
from salience.errors import InputError


def check_paths(out: Path, report: Path | None, overwrite: bool) -> Path:
    """Refuse an output that exists before anything is computed; gives the path of the page."""
    page = report or Path(f"{out}.report.html")
    if report is not None and (page.suffix != ".html" or not page.parent.is_dir() or page.is_dir()):
        raise InputError(f"--report must name a file that ends in .html, in a folder that exists, not {page}")
    for what, path in (("output", out), ("report", page)):
        if path.exists() and not overwrite:
            raise InputError(f"{what} {path} exists; pass --overwrite to replace it")
    if not out.resolve().parent.is_dir():
        raise InputError(f"output folder {out.parent} does not exist")
    return page


def show(result: Any, facts: Mapping[str, object], page: Path, as_json: bool, title: str, more: list[Any]) -> None:
    """Write the page, and print the comparison first."""
    from salience import report

    blocks: list[Any] = []
    if result.comparison is None:
        blocks.append(
            report.verdict(
                "not measured", "give --evaluate, or --evaluate-command, to see how good this is on your data", None
            )
        )
    else:
        blocks += comparison_blocks(result.comparison, result.method, result.against)
    blocks += [report.heading("What was done"), report.facts(facts), report.text(result.branch), *more]
    if result.notes:
        blocks += [report.heading("Notes"), *(report.text(note) for note in result.notes)]
    report.page(title, blocks, path=page)
    if as_json:
        measured = None if result.comparison is None else result.comparison.as_dict(result.method)
        record = {"out": result.out, "method": result.method, "measured": measured, "branch": result.branch}
        typer.echo(json.dumps({**record, **facts, "notes": result.notes, "report": str(page)}, default=str))
        return
    if result.comparison is None:
        typer.echo("Not measured: give --evaluate or --evaluate-command.\n")
    else:
        print_comparison(result.comparison, result.method, result.against)
    say(result.branch)
    for note in result.notes:
        say(f"note: {note}", err=True)
    say(f"written: {result.out} ({_megabytes(Path(result.out)):,.2f} MB)\nreport:  {page}")


def _megabytes(out: Path) -> float:
    files = [out] if out.is_file() else out.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6


def delta_blocks(result: Any) -> list[Any]:
    """The delta's size, the recommendation, and the search."""
    from salience import report
    from salience.report import figures

    blocks: list[Any] = []
    if result.stats is not None:
        relative = {name: sizes[2] for name, sizes in result.stats.tensors.items() if math.isfinite(sizes[2])}
        largest = sorted(relative, key=lambda name: -relative[name])[:12]
        blocks += [
            report.heading("The delta"),
            report.facts({
                "entries": result.stats.entries, "mean": result.stats.mean, "standard deviation": result.stats.std,
                "relative size": result.stats.relative, "unchanged, share": result.stats.unchanged,
            }),
        ]  # fmt: skip
        if largest:
            blocks.append(
                report.figure(
                    lambda ax: figures.bars(ax, largest, [relative[n] for n in largest], xlabel="size of the delta"),
                    "Tensors that fine-tuning changed most, relative to their own size.",
                    height=1.1 + 0.3 * len(largest),
                )
            )
        blocks += [
            report.text(f"Recommended: {result.recommendation.method}. " + "; ".join(result.recommendation.branch))
        ]
    if len(result.search) > 1:
        trials = sorted(result.search)
        blocks += [
            report.heading("The search"),
            report.figure(
                lambda ax: figures.curve(
                    ax,
                    [x for x, _ in trials],
                    {"score": [y for _, y in trials]},
                    xlabel="candidate q, or eta",
                    ylabel="score",
                ),
                "Each candidate q (or eta, of a q per layer) and its score on the half that chooses; larger is better.",
            ),
        ]
    return blocks


def plan(facts: Mapping[str, object], as_json: bool) -> None:
    """What ``--dry-run`` prints."""
    if as_json:
        typer.echo(json.dumps({"dry_run": True, **facts}, default=str))
        return
    for name, value in facts.items():
        say(f"{name}: {value}")
    say("nothing written (--dry-run)")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the bars that `transformers` draws while it loads and saves."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


@contextmanager
def progress(as_json: bool) -> Iterator[Any]:
    """A spinner on the error output that names the present step, and no bars of others beside it."""
    from rich.console import Console

    with quiet_transformers(), Console(stderr=True, quiet=as_json).status("starting") as status:
        yield status
