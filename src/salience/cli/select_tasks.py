"""`salience select tasks`: how many rows to take of each source task, for the sake of one target task."""

from __future__ import annotations

import json
import math
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from salience.cli._say import printable, say
from salience.cli.verbs import select
from salience.errors import DataError, InputError

if TYPE_CHECKING:
    from salience.data import TaskSelection

_EPILOG = (
    "Examples:\n\n"
    "salience select tasks clinics/*.csv --target ours.csv --label stay --budget 2000 -o chosen\n\n"
    "salience select tasks all.parquet --task clinic --target ours.csv --label outcome --positive died --budget 500 "
    "--top 5 -o chosen\n\n"
    "salience select tasks clinics/*.csv --target ours.csv --label stay --budget 900 --costs prices.csv -o chosen\n\n"
    "Exit codes: 0 done, 2 usage, 3 bad data, 4 nothing to do, 130 interrupted."
)
_DATA, _CHOICE = "Data", "Choice"
_SHOWN = 20


class Strategy(StrEnum):
    """By what the budget is shared."""

    l1 = "l1"
    l2 = "l2"
    passive = "passive"


@select.command("tasks", epilog=_EPILOG)
def tasks(
    sources: Annotated[list[Path], typer.Argument(help="Tables (.csv, also .gz and .zst; .parquet), one for each source task.", show_default=False)],
    target: Annotated[Path, typer.Option("--target", "-t", help="Table with the few rows of the target task.", show_default=False)],
    label: Annotated[str, typer.Option("--label", "-y", help="Column of labels: numbers, or words of two classes.", show_default=False)],
    budget: Annotated[int, typer.Option("--budget", "-n", help="Source rows to take in all; money with --costs.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.", show_default=False)],
    task: Annotated[str | None, typer.Option(help="Column of the sources that names the task of a row.", rich_help_panel=_DATA, show_default="a task a file")] = None,
    positive: Annotated[str | None, typer.Option(help="Class to tell from all others.", rich_help_panel=_DATA, show_default=False)] = None,
    costs: Annotated[Path | None, typer.Option(help="Table with the columns task and cost: the price of a row.", rich_help_panel=_DATA, show_default=False)] = None,
    strategy: Annotated[Strategy, typer.Option(help="Sparse relevance, least-norm relevance, or equal shares.", rich_help_panel=_CHOICE)] = Strategy.l1,
    top: Annotated[int | None, typer.Option(help="Spend what is left after the floor on so many tasks at most.", rich_help_panel=_CHOICE, show_default=False)] = None,
    rank: Annotated[int | None, typer.Option(help="Width of the shared representation.", rich_help_panel=_CHOICE, show_default="a fifth of the target's rows, 8 at most")] = None,
    floor: Annotated[int | None, typer.Option(help="Rows of every task, from which relevance is estimated.", rich_help_panel=_CHOICE, show_default="rank + 6, or fewer")] = None,
    rounds: Annotated[int, typer.Option(help="Estimates and purchases.", rich_help_panel=_CHOICE)] = 1,
    seed: Annotated[int, typer.Option(help="Seed of every draw.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read the tables and say what would be done; write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:  # fmt: skip
    """Choose how many rows of each source task to train on, so that they serve a target task with few rows.

    A few rows of every source give a shared representation and a head per task; the target's head is explained by as
    few source heads as can be, and the budget goes to these (L1-A-MTRL, ICML 2023). First printed: whether that beats
    equal shares, and the target's rows alone, on target rows that were held out.
    """
    from salience.data.lasso_task_selection.selection import plan_of
    from salience.data.lasso_task_selection.tables import read_tasks
    from salience.io import Output

    if seed < 0:
        raise InputError(f"--seed must be 0 or larger, not {seed}")
    prices = None if costs is None else read_prices(costs)
    if dry_run:
        tables = read_tasks(sources, target, label, task=task, positive=positive)
        plan = plan_of(tables, budget, rank=rank, floor=floor, costs=prices)
        _print_plan(tables, plan, as_json)
        return
    inputs = [str(path) for path in (*sources, target, *([costs] if costs else []))]
    with Output(out, overwrite, inputs, folder=True) as output:
        found = _choose(
            sources, target, label, budget, task=task, positive=positive, strategy=strategy.value, rank=rank, floor=floor,
            rounds=rounds, top=top, costs=prices, random_state=seed,
        )  # fmt: skip
        _write(found, output)
        output.commit({"command": "select tasks", "inputs": inputs, "parameters": found.settings,
                       "counts": found.counts, "notes": found.notes})  # fmt: skip
    _print(found, out, as_json)


def read_prices(path: Path) -> dict[str, float]:
    """The price of a row of each task, from a table with the columns ``task`` and ``cost``."""
    from salience.io.whole import numbers_of, read_records, words_of

    found = read_records(path)
    names, values = words_of(found.raw, "task", "column"), numbers_of(found.table, "cost", "column")
    for row, (name, value) in enumerate(zip(names, values)):
        if name is None or not (math.isfinite(value) and value > 0):
            raise DataError(f"{path}, row {row}: task {name!r} has the cost {value:g}; a price above 0 is needed")
    if len(set(names)) < len(names):
        raise DataError(f"{path} gives more than one price for a task")
    return dict(zip(names.tolist(), values.tolist()))


def _choose(sources: list[Path], *arguments: Any, **options: Any) -> TaskSelection:
    from rich.console import Console

    from salience.data import select_tasks

    with Console(stderr=True).status("reading") as status:
        return select_tasks(sources, *arguments, **options, progress=status.update)


def _write(found: TaskSelection, output: Any) -> None:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    from salience.cli._select_tasks_page import write_page

    pyarrow.csv.write_csv(pa.Table.from_pylist(rows_of(found)), output.file("plan.csv"))
    pyarrow.parquet.write_table(found.chosen, output.file("chosen.parquet"))
    found.scores.save(output.file("scores.parquet"))
    write_page(found, output.file("report.html"))


def rows_of(found: TaskSelection) -> list[dict[str, Any]]:
    """The plan: one row per task, the most relevant first."""
    order = sorted(range(len(found.names)), key=lambda at: (-found.nu[at], found.names[at]))
    return [{"task": found.names[at], "relevance": float(found.nu[at]), "take": int(found.taken[at]),
             "available": int(found.available[at])} for at in order]  # fmt: skip


def _print(found: TaskSelection, out: Path, as_json: bool) -> None:
    if as_json:
        measured = {name: list(found.mean(name)) for name in found.errors}
        gains = {name: found.gain(name)._asdict() for name in found.errors if name != found.strategy}
        typer.echo(json.dumps({
            "out": str(out), "verdict": found.verdict, "measure": found.measure, "held_out": measured, "gains": gains,
            "plan": rows_of(found), "residual": None if math.isnan(found.residual) else found.residual,
            "counts": found.counts, "notes": found.notes, "settings": found.settings,
        }))  # fmt: skip
        return
    from rich.console import Console
    from rich.table import Table

    say(found.verdict[0].upper() + found.verdict[1:] + ".\n")
    console = Console(width=100, markup=False, highlight=False)
    if found.errors:
        table = Table(box=None, pad_edge=False)
        for number, column in enumerate(comparison_columns(found)):
            table.add_column(column, justify="right" if number else "left")
        for row in comparison_rows(found):
            table.add_row(*row)
        console.print(table)
        typer.echo("")
    table = Table(box=None, pad_edge=False)
    for column in ("task", "relevance", "take", "available"):
        table.add_column(column, justify="left" if column == "task" else "right")
    plan = rows_of(found)
    for task in plan[:_SHOWN]:
        table.add_row(
            printable(task["task"])[:60], f"{task['relevance']:.3f}", f"{task['take']:,}", f"{task['available']:,}"
        )
    console.print(table)
    if len(plan) > _SHOWN:
        typer.echo(f"… {len(plan) - _SHOWN:,} more in plan.csv")
    typer.echo("")
    for note in found.notes:
        say(f"note: {note}", err=True)
    if found.residual == found.residual:
        say(f"{100 * found.residual:.0f} % of the target's head is left over by the penalty, because the head is only known "
            "so well")  # fmt: skip
    say(found.equation)
    say(f"written: {out}\nreport:  {out}/report.html")


def comparison_columns(found: TaskSelection) -> tuple[str, ...]:
    """Heads of the table of strategies."""
    return ("held-out target rows", found.measure, "worse by", "95 % interval")


def comparison_rows(found: TaskSelection) -> list[tuple[str, ...]]:
    """Held-out error of every strategy, and how much worse than the chosen one it is."""
    from salience.data.lasso_task_selection.selection import STRATEGY_NAMES

    rows: list[tuple[str, ...]] = []
    for name in sorted(found.errors, key=lambda name: name != found.strategy):
        gain = None if name == found.strategy else found.gain(name)
        rows.append((
            STRATEGY_NAMES[name], f"{found.mean(name).mean:.4f}", "" if gain is None else f"{gain.mean:+.4f}",
            "" if gain is None else f"{gain.low:+.4f} … {gain.high:+.4f}",
        ))  # fmt: skip
    return rows


def _print_plan(tables: Any, plan: dict[str, Any], as_json: bool) -> None:
    smallest = min(tables.sources, key=len)
    facts = {
        "tasks": len(tables.sources), "inputs": len(tables.columns), "source rows": tables.counts["used"],
        "target rows": len(tables.target), "smallest task": f"{smallest.name} ({len(smallest)} rows)",
        "budget": plan["budget"], "rank": plan["rank"], "rows of every task first": plan["floor"],
    }  # fmt: skip
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        say(f"{name}: {value}")
    for note in tables.notes:
        say(f"note: {note}", err=True)
    typer.echo("nothing was written")
