"""`salience explain table`: which columns a black box uses, and rules that mimic it, measured on held-out rows."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from salience.cli._say import say
from salience.cli.verbs import explain
from salience.errors import InputError

if TYPE_CHECKING:
    from salience.features.table_explanation import TableExplanation

_EPILOG = (
    "Examples:\n\n"
    "salience explain table patients.csv --label outcome\n\n"
    "salience explain table genes.parquet --label type --ignore sample --black-box boosting -k 20 -o columns.parquet\n\n"
    "Exit codes: 0 done, 2 usage, 3 bad data, 4 nothing to do, 130 interrupted."
)
_SURROGATE = "Surrogate"


class BlackBox(StrEnum):
    """What is trained on the table and then explained."""

    forest = "forest"
    boosting = "boosting"
    attention = "attention"
    autoencoder = "autoencoder"


@explain.command("table", epilog=_EPILOG)
def table(
    data: Annotated[Path, typer.Argument(help="Table: .csv (also .gz) or .parquet, read into memory.", show_default=False)],
    label: Annotated[str, typer.Option("--label", "-l", help="Column that the black box predicts.", show_default=False)],
    ignore: Annotated[list[str] | None, typer.Option(help="Column not to use, such as an identifier; may be repeated.", show_default=False)] = None,
    black_box: Annotated[BlackBox, typer.Option(help="What is trained on the table and explained; attention and autoencoder are the paper's networks.")] = BlackBox.forest,
    k: Annotated[int | None, typer.Option("-k", help="Columns of the surrogate.", rich_help_panel=_SURROGATE, show_default="as few as do")] = None,
    max_depth: Annotated[int, typer.Option(help="Depth of the surrogate tree.", rich_help_panel=_SURROGATE)] = 6,
    min_support: Annotated[float, typer.Option(help="Smallest share of rows of a rule that is told.", rich_help_panel=_SURROGATE)] = 0.01,
    test: Annotated[float, typer.Option(help="Share of the rows held out to measure on.")] = 0.3,
    examples: Annotated[int, typer.Option(help="Held-out rows to explain one by one on the page.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of every draw.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Scores of all columns, a .parquet file.", show_default=False)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    report: Annotated[Path | None, typer.Option(help="Report page.", show_default="OUT.report.html, or none without --out")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:  # fmt: skip
    """Explain a black box on a wide table: the columns it uses, a small tree that mimics it, rules, counterfactuals.

    A model is trained on part of the table, probed on rows that it has not seen by shuffling their columns, and mimicked
    there by a decision tree on the few that matter. First printed: on how many held-out rows the tree agrees with the model, against trees on random columns
    and on the columns with the largest F statistic.
    """
    from salience.io import Output

    if seed < 0:
        raise InputError(f"--seed must be 0 or larger, not {seed}")
    page = report or (Path(f"{out}.report.html") if out else None)
    _check_names(data, out, page, overwrite)
    found = _run(data, label, ignore or [], black_box.value, k, max_depth, min_support, test, examples, seed)
    if page is not None:
        from salience.cli._explain_table_page import write_page

        write_page(found, data.name, page)
    if out is not None:
        with Output(out, overwrite) as output:
            _scores(found, data).save(output.file())
            output.commit({"command": "explain table", "data": str(data), "label": label, **found.as_dict()})
    _print(found, out, page, as_json)


def _check_names(data: Path, out: Path | None, page: Path | None, overwrite: bool) -> None:
    if out is not None and out.suffix != ".parquet":
        raise InputError(f"--out must end in .parquet, not {out.name}")
    if out is not None and out.resolve() == data.resolve():
        raise InputError(f"output {out} is the input")
    if out is not None and out.exists() and not overwrite:
        raise InputError(f"output {out} exists; pass --overwrite to replace it")
    if page is not None and (page.suffix != ".html" or not page.parent.is_dir() or page.is_dir()):
        raise InputError(f"--report must name a file that ends in .html, in a folder that exists, not {page}")
    if page is not None and page.exists() and not overwrite:
        raise InputError(f"report {page} exists; pass --overwrite to replace it")


def _run(data, label, ignore, black_box, k, max_depth, min_support, test, examples, seed) -> TableExplanation:
    from rich.console import Console
    from rich.progress import Progress

    from salience.features.table_explanation import explain_table

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("reading", total=1)

        def advance(stage: str, done: int, total: int) -> None:
            bars.update(task, description=stage, completed=done, total=total)

        return explain_table(
            data, label, ignore=ignore, black_box=black_box, k="auto" if k is None else k, max_depth=max_depth,
            min_support=min_support, test=test, examples=examples, random_state=seed, progress=advance,
        )  # fmt: skip


def _scores(found: TableExplanation, data: Path):
    from salience.scores import Scores

    rank = found.explainer.importance_.rank
    provenance = {"method": "blackbox-surrogate", "data": str(data), "black_box": found.black_box,
                  "value": "minus the mean rank over probes"}  # fmt: skip
    return Scores(-rank, found.explainer.names_, "feature", provenance)


def _print(found: TableExplanation, out: Path | None, page: Path | None, as_json: bool) -> None:
    if as_json:
        named = {"out": str(out) if out else None, "report": str(page) if page else None}
        typer.echo(json.dumps(found.as_dict() | named))
        return
    explainer = found.explainer
    say(found.verdict[0].upper() + found.verdict[1:] + ".")
    other = found.gains[1]
    say(
        f"Against a tree on the columns with the largest F statistic ({100 * other.other:.1f} %): "
        f"{100 * other.difference:+.1f} points ({100 * other.low:+.1f} to {100 * other.high:+.1f}). "
        f"R2 of probabilities {found.r2:.2f}.\n"
        f"Accuracy on the labels: black box ({found.black_box}) {100 * found.accuracy_black_box:.1f} %, surrogate "
        f"{100 * found.accuracy_surrogate:.1f} %, always the commonest class {100 * found.commonest:.1f} %.\n"
    )
    names = [explainer.names_[column] for column in explainer.columns_]
    shown = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    say(f"{len(names)} of {len(explainer.names_):,} columns, most important first: {shown}\n")
    for _, rule in found.rules[:8]:
        say("  " + rule.text(found.classes))
    if len(found.rules) > 8:
        say(f"  … {len(found.rules) - 8} more rules")
    say(
        f"\nnearest counterfactuals that flip the black box: {100 * found.flips:.0f} % "
        f"({100 * found.flips_searched:.0f} % once further columns are changed until it flips)"
    )
    for note in found.notes:
        say(f"note: {note}", err=True)
    if out is not None:
        say(f"written: {out}")
    if page is not None:
        say(f"report:  {page}")
