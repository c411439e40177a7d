"""`salience papers`: the catalogue, and where each paper stands."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from salience import papers
from salience.errors import InputError, NothingToDo, nearest

if TYPE_CHECKING:
    from salience.evidence import State
    from salience.papers import Paper

app = typer.Typer(
    no_args_is_help=True,
    help="The papers that salience implements, and what has been shown of each.",
    epilog="Example: salience papers list 'data selection' --state shown",
)

_STYLES = {"shown (mechanism)": "green", "shown (claim)": "green", "reproduced": "green", "not shown": "red",
           "stale": "yellow"}  # fmt: skip


@app.command("list", epilog="Example: salience papers list selection --unit sample --json")
def list_papers(
    query: Annotated[str, typer.Argument(help="Words that must all occur in a paper's row.", show_default=False)] = "",
    unit: Annotated[str | None, typer.Option(help="Only papers that weigh this unit, such as sample.")] = None,
    state: Annotated[
        str | None,
        typer.Option(help="Only papers in this state; its beginning is enough: shown, stale, not."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the papers with their state: planned, implemented, shown, reproduced, not shown, or stale."""
    _check_state(state)
    found = [(paper, _ours(paper), _own(paper)) for paper in papers.find(query, unit=unit)]
    found = [row for row in found if state is None or row[1].name.startswith(state)]
    if not found:
        raise NothingToDo("no paper of the catalogue fits; 'salience papers list' names them all")
    if as_json:
        typer.echo(json.dumps([_as_data(*row) for row in found], indent=1))
        return
    with_own = any(own for _, _, own in found)
    table = Table(box=None, pad_edge=False, header_style="bold")
    rows = []
    for paper, ours, own in found:
        states = [_styled(ours), _styled(own) if own else Text("")]
        title = Text(paper.title, no_wrap=True, overflow="ellipsis")
        rows.append([Text(str(paper.number)), Text(paper.slug), *states[: 1 + with_own], title])
    for name in ["no.", "slug", "state", *["your run"] * with_own]:
        table.add_column(name, no_wrap=True)
    table.add_column("title")  # what a narrow terminal lacks is taken from columns that may wrap: this one alone
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)


@app.command("show", epilog="Example: salience papers show dsir")
def show_paper(
    slug: Annotated[str, typer.Argument(help="Slug of the paper, as in 'salience papers list'.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show one paper: its claim, how to use and reproduce it, and what has been measured here and by you."""
    from salience.evidence.store import OUTCOMES, own_outcomes

    paper = papers.get(slug)
    ours, own = _ours(paper), _own(paper)
    if as_json:
        typer.echo(json.dumps(_as_data(paper, ours, own, outcomes=True), indent=1))
        return
    console = Console(highlight=False)
    console.print(Text(f"{paper.number}. {paper.title}", style="bold"))
    facts = {
        "claim": paper.claim,
        "paper": f"https://arxiv.org/abs/{paper.arxiv}" if paper.arxiv else "",
        "takes": paper.takes,
        "gives": paper.gives,
        "checked against": paper.fidelity,
        "install": "pip install salience" if paper.extra == "base" else f"pip install 'salience[{paper.extra}]'",
        "in Python": "\n".join("from {} import {}".format(*entry.split(":")) for entry in paper.entry),
        "on the command line": "\n".join(f"salience {command}" for command in paper.commands if paper.entry),
        "reproduce": f"salience reproduce {paper.slug}" if paper.entry else "",
    }
    grid = Table.grid("", "", padding=(0, 2))
    for name, fact in facts.items():
        if fact:
            grid.add_row(Text(name, style="dim"), Text(fact))
    console.print(grid)
    _show_outcomes(paper, "state", ours, OUTCOMES, console)
    if own:
        _show_outcomes(paper, "your run", own, own_outcomes(), console)


def _show_outcomes(paper: Paper, whose: str, state: State, folder: Path, console: Console) -> None:
    from salience.cli.reproduce import show_figures
    from salience.evidence.store import read

    console.print()
    console.print(Text.assemble((f"{whose}: ", "bold"), _styled(state)))
    for reason in state.reasons:
        console.print(Text(f"  {reason}"))
    evidence = read(paper.slug, folder)
    if evidence is not None:
        minutes = max(run.minutes for run in evidence.runs.values())
        console.print(Text(f"scale: {evidence.scale}, at most {minutes:g} minutes a seed"))
        show_figures(evidence, console)


def _check_state(state: str | None) -> None:
    from salience.evidence.store import STATES

    if state is not None and not any(name.startswith(state) for name in STATES):
        raise InputError(f"--state is {state!r}, which no state begins with; {nearest(state, STATES)}")


def _ours(paper: Paper) -> State:
    from salience.evidence import state

    return state(paper)


def _own(paper: Paper) -> State | None:
    """The state of the user's own run, whatever its seeds; None without one."""
    from salience.evidence import state
    from salience.evidence.store import own_outcomes, read

    folder = own_outcomes()
    return state(paper, folder, seeds=()) if read(paper.slug, folder) else None


def _styled(state: State) -> Text:
    return Text(str(state), style=_STYLES.get(state.name, ""))


def _as_data(paper: Paper, ours: State, own: State | None, outcomes: bool = False) -> dict[str, Any]:
    from salience.evidence.store import OUTCOMES, as_data, own_outcomes, read

    data = {
        **dataclasses.asdict(paper),
        "room": paper.room,
        "state": dataclasses.asdict(ours),
        "your_run": own and dataclasses.asdict(own),
    }
    if outcomes:
        for name, folder in (("outcomes", OUTCOMES), ("your_outcomes", own_outcomes())):
            evidence = read(paper.slug, folder)
            data[name] = evidence and as_data(evidence)
    return data
