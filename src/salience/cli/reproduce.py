"""`salience reproduce`: measure a paper's claim on this machine."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from salience import papers
from salience.errors import InputError, NothingToDo

if TYPE_CHECKING:
    from salience.evidence import Evidence


class Scale(StrEnum):
    """How large a reproduction is."""

    smoke = "smoke"
    desk = "desk"
    full = "full"


def reproduce(
    slugs: Annotated[
        list[str] | None, typer.Argument(metavar="SLUG", help="Papers, as in 'salience papers list'.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All papers that have a reproduction.")] = False,
    stale: Annotated[
        bool, typer.Option("--stale", help="Of these, only those without an outcome or changed since.")
    ] = False,
    seed: Annotated[
        list[int] | None,
        typer.Option(
            "--seed", min=0, help="Seed; may be repeated, the first is the master.", show_default="11, 12, 13"
        ),
    ] = None,
    scale: Annotated[
        Scale, typer.Option(help="Plumbing and controls in seconds; minutes on a desk; the paper's own size.")
    ] = Scale.desk,
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder with real data, for reproductions that take it."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="How many run at once, each on one thread.")] = 1,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for outcomes and pages.", show_default="your salience folder"),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(metavar="MINUTES", min=0.0, help="Skip, by name, what would not fit; cheapest first."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcomes as JSON.")] = False,
) -> None:
    """Measure a paper's claim on this machine: the figures, the baselines beside them, and the verdict.

    A claim is shown when every bar holds at every seed and every control misses: random scores, and a
    plausible fake.

    Exit codes: 0 shown, 1 a bar was missed or a run failed, 2 usage, 3 bad data, 4 nothing to run.

    Examples:

    salience reproduce dsir

    salience reproduce dsir kmq --seed 0 --jobs 2 --out my-runs

    salience reproduce --all --stale --budget 25
    """
    from salience import evidence

    chosen = _chosen(slugs or [], every, stale)
    console = Console(highlight=False)
    result = evidence.reproduce(
        chosen,
        seed or evidence.JUDGING_SEEDS,
        scale.value,
        data=data,
        jobs=jobs,
        out=out,
        budget=budget,
        on_done=None if as_json else lambda done: _show(done, console),
    )
    if as_json:
        typer.echo(json.dumps(_as_data(result.done, result.skipped), indent=1))
    else:
        for slug, why in result.skipped.items():
            console.print(Text(f"skipped: {slug} {why}"))
        _tell_folder(out, console)
    if not all(done.verdict.shown for done in result.done.values()):
        raise typer.Exit(1)


def _chosen(slugs: list[str], every: bool, stale: bool) -> list[str]:
    from salience.evidence import state
    from salience.evidence.runner import unready

    if every == bool(slugs):
        raise InputError("name the papers to reproduce, or give --all, and not both")
    if every:
        slugs = [slug for slug, paper in papers.load().items() if unready(paper) is None]
        if not slugs:
            raise NothingToDo("nothing to run: no paper has a reproduction yet")
    if stale:
        kept = [slug for slug in slugs if state(papers.get(slug)).name in ("planned", "implemented", "stale")]
        if slugs and not kept:
            raise NothingToDo("nothing to run: no outcome is stale")
        slugs = kept
    return slugs


def show_figures(evidence: Evidence, console: Console) -> None:
    """Print the figures, controls, remarks and failures of `evidence`."""
    from salience.evidence.tables import control_table, figure_table, remarks

    if evidence.measured:
        console.print(Text(f"claim: {evidence.measured[0].claim}"))
        console.print(_table(*figure_table(evidence)))
        console.print(_table(*control_table(evidence)))
    for remark in remarks(evidence):
        console.print(Text(remark))
    for traceback in dict.fromkeys(run.traceback for run in evidence.runs.values() if run.traceback):
        console.print(Text(traceback.rstrip(), style="dim"))
    for seed, run in evidence.runs.items():
        if run.outcome is None:
            console.print(Text(f"seed {seed} failed: {run.error}", style="red"))


def _show(evidence: Evidence, console: Console) -> None:
    console.print(Text(f"\n{evidence.slug}: {papers.get(evidence.slug).title}", style="bold"))
    show_figures(evidence, console)
    verdict = evidence.verdict
    console.print(Text(f"verdict: {evidence.label}", style="bold green" if verdict.shown else "bold red"))
    for reason in verdict.reasons:
        console.print(Text(f"  {reason}"))


def _table(columns: list[str], rows: list[list[str]]) -> Table:
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _tell_folder(out: Path | None, console: Console) -> None:
    from salience.evidence.store import own_outcomes

    console.print(Text(f"outcomes and pages: {out or own_outcomes()}"), soft_wrap=True)


def _as_data(done: dict[str, Evidence], skipped: dict[str, str]) -> dict[str, object]:
    from salience.evidence.store import as_data

    verdicts = {
        slug: {"verdict": evidence.label, "reasons": evidence.verdict.reasons, "outcome": as_data(evidence)}
        for slug, evidence in done.items()
    }
    return {"papers": verdicts, "skipped": skipped}
