"""`salience rank table`: put the columns of a table in the order of how much they tell about a label."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from salience.cli._say import printable, say
from salience.cli.verbs import rank

if TYPE_CHECKING:
    from salience.features.outrank.proof import RankProof
    from salience.features.outrank.report import RankReport

_EPILOG = (
    "Examples:\n\n"
    "salience rank table clicks.parquet --label click -o ranked\n\n"
    "salience rank table 'logs/*.csv' --label y --order 2 --pairs all -o ranked\n\n"
    "salience rank table by_day.csv --label sold --shuffle global --top 20 -o ranked\n\n"
    "Exit codes: 0 done, 2 usage, 3 bad data, 4 nothing to do, 130 interrupted."
)
_DATA, _SCORING, _MEASURING = "Data", "Scoring", "Measuring"
_SHOWN = 15


class Pairs(StrEnum):
    """Which pairs are scored."""

    target = "target"
    all = "all"


class Shuffle(StrEnum):
    """How rows go to batches."""

    window = "window"
    whole = "global"
    none = "none"


@rank.command("table", epilog=_EPILOG)
def table(
    data: Annotated[list[str], typer.Argument(help="Table: files, globs or directories (.csv, also .gz and .zst; .parquet).", show_default=False)],
    label: Annotated[str, typer.Option("--label", "-y", help="Column that the others are ranked by.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.", show_default=False)],
    order: Annotated[int, typer.Option(help="Also score combinations of so many columns.", rich_help_panel=_SCORING)] = 1,
    pairs: Annotated[Pairs, typer.Option(help="all: also every column against every other (redundancy, 3MR, tree).", rich_help_panel=_SCORING)] = Pairs.target,
    budget: Annotated[int, typer.Option(help="Combinations, and pairs, scored in a batch at most.", rich_help_panel=_SCORING)] = 1 << 15,
    batch_rows: Annotated[int, typer.Option(help="Rows in a batch; a score is the median over batches.", rich_help_panel=_SCORING)] = 1 << 14,
    shuffle: Annotated[Shuffle, typer.Option(help="global: for files sorted by something that goes with the label.", rich_help_panel=_SCORING)] = Shuffle.window,
    shifts: Annotated[int, typer.Option(help="Noise columns whose mean is subtracted from a score.", rich_help_panel=_SCORING)] = 1,
    bins: Annotated[int, typer.Option(help="Quantile bins of numeric columns whose values hardly repeat; 0 leaves them.", rich_help_panel=_SCORING)] = 16,
    controls: Annotated[bool, typer.Option("--controls/--no-controls", help="Rank noise and a copy of the label along.", rich_help_panel=_SCORING)] = True,
    columns: Annotated[str | None, typer.Option(help="Rank these only, with commas between.", rich_help_panel=_DATA, show_default=False)] = None,
    subsample: Annotated[int, typer.Option(help="Keep every so-manieth row.", rich_help_panel=_DATA)] = 1,
    missing: Annotated[list[str] | None, typer.Option(help="Text that means missing, besides nothing, {}, nan, NA, null and ?; may be repeated.", rich_help_panel=_DATA, show_default=False)] = None,
    max_bad: Annotated[float, typer.Option(help="Largest share of unreadable records to put up with.", rich_help_panel=_DATA)] = 0.01,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first unreadable record.", rich_help_panel=_DATA)] = False,
    hold_out: Annotated[float, typer.Option(help="Share of the rows kept out to measure on; 0 measures nothing.", rich_help_panel=_MEASURING)] = 0.2,
    top: Annotated[int | None, typer.Option(help="Columns that are measured.", rich_help_panel=_MEASURING, show_default="10, or half of fewer than 20")] = None,
    seed: Annotated[int, typer.Option(help="Seed of every draw.")] = 0,
    workers: Annotated[int | None, typer.Option(help="Threads (default: all cores); does not change the result.", show_default=False)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be read and how long it would take; write nothing.")] = False,
) -> None:  # fmt: skip
    """Rank columns by what they tell about a label, more than noise with as many values would (OutRank, RecSys 2023).

    Reads the table once, in batches, whatever its size; reports the quality of the data; and measures on rows that no
    score has seen whether a simple learner does better on the first columns than on random ones, which it prints first.
    """
    from salience.errors import InputError, NothingToDo
    from salience.features import rank_table
    from salience.features.outrank.proof import prove
    from salience.features.outrank.ranking import MISSING
    from salience.io import Output, TableReader

    if top is not None and top < 1:
        raise InputError(f"--top must be at least 1, not {top}")
    if seed < 0:
        raise InputError(f"--seed must be 0 or larger, not {seed}")
    options: dict[str, Any] = dict(
        order=order, pairs=pairs.value, combination_budget=budget, batch_rows=batch_rows, subsample=subsample,
        shuffle=shuffle.value, bins=bins or None, missing=[*MISSING, *(missing or ())], hold_out=hold_out,
        shifts=shifts, max_bad=0.0 if strict else max_bad, workers=workers,
        columns=None if columns is None else [name.strip() for name in columns.split(",")],
    )  # fmt: skip
    if dry_run:
        from salience.features.outrank.estimate import estimate_ranking

        _print_plan(estimate_ranking(data, label, **options, with_controls=controls), as_json)
        return
    inputs = [source.path for source in TableReader(data).sources]
    with Output(out, overwrite, [*data, *inputs], folder=True) as output:
        report = _ranked(rank_table, data, label, options | {"controls": controls, "random_state": seed})
        proof = None
        if hold_out:
            try:
                proof = prove(report, top)
                if "3MR" in proof.columns and proof.against("3MR").high < 0:
                    report.warnings.append(
                        f"the first {proof.k} columns of 3MR, which avoids redundant ones, do better: see 3mr_ranks.tsv"
                    )
            except NothingToDo as error:
                report.warnings.append(f"not measured: {error}")
        _write(report, proof, output)
        output.commit(
            {
                "command": "rank table",
                "parameters": report.settings,
                "inputs": inputs,
                "counts": report.counts,
                "warnings": report.warnings,
                "proof": proof.as_dict() if proof else None,
            }
        )
    _print(report, proof, out, as_json)


def _print_plan(plan: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(plan))
        return
    typer.echo(f"table    {plan['files']:,} files, {plan['bytes'] / 1e6:,.1f} MB, {plan['columns']:,} columns to rank")
    if plan["rows"] is None:
        typer.echo("rows     not known: compressed text does not tell before it is read")
    else:
        typer.echo(f"rows     {'' if plan['rows_known'] else 'about '}{plan['rows']:,}, in {plan['batches']:,} batches")
    typer.echo(f"passes   {plan['passes']} (the second over temporary files)" if plan["passes"] > 1 else "passes   1")
    typer.echo(f"memory   about {plan['peak_bytes'] / 1e6:,.0f} MB with {plan['workers']} workers")
    if plan["seconds"] is not None:
        typer.echo(f"time     about {plan['seconds']:,.0f} s and the start, measured on the first batch")
    typer.echo("nothing was written")


def _ranked(rank_table: Any, data: list[str], label: str, options: dict[str, Any]) -> RankReport:
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    shown = TextColumn("ranking"), TextColumn("{task.completed:,.0f} rows"), TimeElapsedColumn()
    with Progress(*shown, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("ranking", total=None)
        return rank_table(data, label, **options, progress=lambda rows: bars.update(task, completed=rows))


def _write(report: RankReport, proof: RankProof | None, output: Any) -> None:
    from salience.cli._rank_table_page import write_page
    from salience.io import write_quarantine

    report.scores().save(output.file("scores.parquet"))
    write_tsv(report.singles, output.file("feature_singles.tsv"))
    write_tsv(report.quality, output.file("quality.tsv"))
    write_tsv(report.rows, output.file("row_quality.tsv"))
    if report.pairs.num_rows:
        write_tsv(report.pairs, output.file("pairwise_ranks.tsv"))
        import pyarrow as pa

        order = report.three_mr()
        write_tsv(pa.table({"feature": order, "rank": range(1, len(order) + 1)}), output.file("3mr_ranks.tsv"))
    if report.aggregated.num_rows:
        write_tsv(report.aggregated, output.file("feature_singles_aggregated.tsv"))
    if report.bad:
        write_quarantine(output.file("quarantine.jsonl"), report.bad)
    write_page(report, proof, output.file("report.html"))


def write_tsv(table: Any, path: Path) -> None:
    """Write a table as tab-separated text that neither a terminal nor a spreadsheet takes for commands."""
    with open(path, "w", encoding="utf-8") as file:
        file.write("\t".join(table.column_names) + "\n")
        for row in table.to_pylist():
            file.write("\t".join(map(_cell, row.values())) + "\n")


def _cell(value: Any) -> str:
    if not isinstance(value, str):
        return "" if value is None else f"{value:.10g}" if isinstance(value, float) else str(value)
    text = printable(value.replace("\t", "\\t").replace("\n", "\\n"))
    return "'" + text if text[:1] in ("=", "+", "-", "@") else text


def _print(report: RankReport, proof: RankProof | None, out: Path, as_json: bool) -> None:
    if as_json:
        names = ("feature", "kind", "score", "plain")
        summary = {
            "out": str(out), "label": report.label, "counts": report.counts, "batches": report.batches,
            "warnings": report.warnings, "proof": proof.as_dict() if proof else None,
            "ranking": [{name: row[name] for name in names} for row in report.singles.to_pylist()],
        }  # fmt: skip
        typer.echo(json.dumps(summary))
        return
    if proof is not None:
        _print_proof(proof)
    _print_ranking(report)
    for warning in report.warnings:
        say(f"note: {warning}", err=True)
    say(report.equation)
    if report.bad:
        say(f"unreadable records: {out}/quarantine.jsonl")
    say(f"written: {out}\nreport:  {out}/report.html")


def _print_proof(proof: RankProof) -> None:
    from rich.console import Console
    from rich.table import Table

    say(proof.verdict[0].upper() + proof.verdict[1:] + ".\n")
    table = Table(box=None, pad_edge=False)
    for column in (
        f"measured on {proof.rows[1]:,} held-out rows",
        f"best {proof.k}",
        "against",
        "",
        "better by",
        "95 % interval",
    ):
        table.add_column(column, justify="left" if column.startswith(("measured", "against")) else "right")
    for item in proof.comparisons:
        table.add_row(
            item.measure, f"{item.chosen:.4f}", item.baseline, f"{item.other:.4f}", f"{item.difference:+.4f}",
            f"{item.low:+.4f} … {item.high:+.4f}",
        )  # fmt: skip
    Console(width=100).print(table)
    typer.echo("")


def _print_ranking(report: RankReport) -> None:
    """The best columns, how many are above the best noise, and the best combinations."""
    for kind, title, most in (("column", "column", _SHOWN), ("combination", "combination", _SHOWN // 3)):
        rows = [row for row in report.singles.to_pylist() if row["kind"] == kind]
        if not rows:
            continue
        _print_scores(rows[:most], title)
        if len(rows) > most:
            typer.echo(f"… {len(rows) - most:,} more in feature_singles.tsv")
        if kind == "column" and report.settings["controls"]:
            above = sum(row["score"] > report.noise() for row in rows)
            typer.echo(f"{above:,} of {len(rows):,} columns score above the best noise ({report.noise():.5f})")
        typer.echo("")


def _print_scores(rows: list[dict[str, Any]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    heads = [("", "right"), (title, "left"), ("score (nats)", "right")]
    plain = rows[0]["plain"] is not None  # of combinations it is not counted
    table = Table(box=None, pad_edge=False)
    for name, side in [*heads, ("plain MI", "right")] if plain else heads:
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    for number, row in enumerate(rows, 1):
        cells = [str(number), _short(row["feature"]), f"{row['score']:.5f}"]
        table.add_row(*cells, *([f"{row['plain']:.5f}"] if plain else []))
    Console(width=110, markup=False, highlight=False).print(table)


def _short(name: str) -> str:
    name = printable(name.replace("\n", "\\n"))
    return name if len(name) <= 60 else f"{name[:40]}…{name[-19:]}"
