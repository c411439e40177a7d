"""`salience select stream`: what to train on whenever a data set arrives, and which rows to keep for later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from salience.cli._say import printable, say
from salience.cli.verbs import select

if TYPE_CHECKING:
    from salience.data import StreamSelection

_EPILOG = (
    "Examples:\n\n"
    "salience select stream llava.parquet m3it.parquet minigpt4.parquet --vectors gradient --embeddings hidden "
    "--score nll --score el2n --score entropy --score image_grounding --budget 25000 --pool-limit 100000 -o chosen\n\n"
    "salience select stream m3it.parquet --pool rescored.parquet --vectors gradient --score nll --budget 25000 -o round2\n\n"
    "salience select stream spring.csv summer.csv autumn.csv --label outcome --budget 500 -o chosen\n\n"
    "Exit codes: 0 done, 2 usage, 3 bad data, 4 nothing to do, 130 interrupted."
)
_COLUMNS, _CHOICE = "Columns", "Choice"


@select.command("stream", epilog=_EPILOG)
def stream(
    data: Annotated[list[Path], typer.Argument(help="Tables (.csv, also .gz and .zst; .parquet) in the order in which they arrive.", show_default=False)],
    budget: Annotated[int, typer.Option("--budget", "-n", help="Rows to choose in every round.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.", show_default=False)],
    vectors: Annotated[str | None, typer.Option(help="Column of gradient vectors, for the clusters.", rich_help_panel=_COLUMNS, show_default="the embeddings")] = None,
    embeddings: Annotated[str | None, typer.Option(help="Column of embeddings, for redundancy.", rich_help_panel=_COLUMNS, show_default="the other columns as numbers")] = None,
    score: Annotated[list[str] | None, typer.Option(help="Column with a score; may be repeated. The one that tells most is taken in each cluster.", rich_help_panel=_COLUMNS, show_default=False)] = None,
    label: Annotated[str | None, typer.Option("--label", "-l", help="Column to be learnt: accuracy is measured by it.", rich_help_panel=_COLUMNS, show_default=False)] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Column not to use, such as an identifier; may be repeated.", rich_help_panel=_COLUMNS, show_default=False)] = None,
    clusters: Annotated[int, typer.Option(help="Pseudo-skill clusters.", rich_help_panel=_CHOICE)] = 10,
    pool_limit: Annotated[int | None, typer.Option(help="Rows to keep for later rounds; redundant ones leave for good.", rich_help_panel=_CHOICE, show_default="all")] = None,
    pool: Annotated[Path | None, typer.Option(help="Table of the rows that an earlier run has kept, scored anew.", rich_help_panel=_CHOICE, show_default=False)] = None,
    hold_out: Annotated[float, typer.Option(help="Share of the smallest table; as many rows of each are kept out to measure on. 0 measures nothing.")] = 0.25,
    seed: Annotated[int, typer.Option(help="Seed of every draw.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be read; write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:  # fmt: skip
    """Choose what to train on whenever a data set arrives, skill by skill, and keep a pool of earlier rows.

    Gradient vectors fall into clusters, the budget is shared out equally over them, and in each the score that tells
    its rows apart most is covered over its range; then redundant rows leave the pool (Adapt-infinity, ICLR 2025).
    Vectors and scores are taken as the tables give them: for those of the model of every round, run once a round with
    --pool. First printed: whether learners trained on the choice beat those of as many random rows, on held-out rows.
    """
    from salience.io import Output

    inputs = [str(path) for path in (*data, *([pool] if pool else []))]
    if dry_run:
        _plan(inputs, as_json)
        return
    with Output(out, overwrite, inputs, folder=True) as output:
        found = _run(
            [str(path) for path in data], budget, vectors=vectors, embeddings=embeddings, scores=score or [],
            label=label, ignore=ignore or [], n_clusters=clusters, pool_limit=pool_limit,
            pool=None if pool is None else str(pool), hold_out=hold_out, random_state=seed,
        )  # fmt: skip
        _write(found, output)
        output.commit({"command": "select stream", "inputs": inputs, "parameters": found.settings,
                       "counts": found.counts, "notes": found.notes})  # fmt: skip
    _print(found, out, as_json)


def _plan(inputs: list[str], as_json: bool) -> None:
    from salience.io import TableReader

    facts: list[dict[str, Any]] = [{"table": path, "bytes": reader.bytes, "columns": reader.columns}
             for path, reader in ((path, TableReader(path)) for path in inputs)]  # fmt: skip
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for fact in facts:
        names = ", ".join(fact["columns"][:12])
        say(f"{fact['table']}: {fact['bytes']:,} bytes, {len(fact['columns'])} columns: {names}")
    typer.echo("all tables are read into memory\nnothing was written")


def _run(data: list[str], budget: int, **options: Any) -> StreamSelection:
    from rich.console import Console

    from salience.data import select_stream

    with Console(stderr=True).status("reading") as status:
        return select_stream(data, budget, **options, progress=status.update)


def _write(found: StreamSelection, output: Any) -> None:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    from salience.cli._select_stream_page import write_page

    for number in range(len(found.rounds)):
        pyarrow.parquet.write_table(found.chosen(number), output.file(f"round-{number + 1}.parquet"))
    pyarrow.parquet.write_table(found.pool(), output.file("pool.parquet"))
    pyarrow.csv.write_csv(pa.Table.from_pylist(found.round_rows()), output.file("rounds.csv"))
    pyarrow.csv.write_csv(pa.Table.from_pylist(found.cluster_rows()), output.file("clusters.csv"))
    found.scores.save(output.file("scores.parquet"))
    write_page(found, output.file("report.html"))


def verdict_of(found: StreamSelection) -> str:
    """One sentence, also where nothing was measured."""
    if found.proof is not None:
        return found.proof.verdict
    return next((note for note in found.notes if note.startswith("nothing was measured")), "nothing was held out")


def _print(found: StreamSelection, out: Path, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({
            "out": str(out), "verdict": verdict_of(found), "proof": found.proof.as_dict() if found.proof else None,
            "rounds": found.round_rows(), "counts": found.counts, "notes": found.notes, "settings": found.settings,
        }))  # fmt: skip
        return
    verdict = verdict_of(found)
    say(verdict[0].upper() + verdict[1:] + ".\n")
    if found.proof is not None:
        _table(comparison_rows(found), left=2)
    _table([
        {name: f"{value:,}" if isinstance(value, int) else printable(value)[:40] for name, value in row.items()}
        for row in found.round_rows()
    ], left=2)  # fmt: skip
    for note in found.notes:
        say(f"note: {note}", err=True)
    say(f"{found.equation}\nwritten: {out}\nreport:  {out}/report.html")


def comparison_rows(found: StreamSelection) -> list[dict[str, str]]:
    """The choice beside each baseline on held-out rows."""
    assert found.proof is not None
    return [
        {"measured on held-out rows": item.measure, "against": item.baseline, "choice": f"{item.chosen:.3f}",
         "other": f"{item.other:.3f}", "better by": f"{item.difference:+.3f}",
         "95 % interval": f"{item.low:+.3f} … {item.high:+.3f}"}
        for item in found.proof.comparisons
    ]  # fmt: skip


def _table(rows: list[dict[str, str]], left: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(rows[0]):
        table.add_column(name, justify="left" if number < left else "right")
    for row in rows:
        table.add_row(*row.values())
    Console(width=120, markup=False, highlight=False).print(table)
    typer.echo("")
