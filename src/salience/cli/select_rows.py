"""`salience select rows`: choose rows of a table to train on, measured on rows held out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from salience.cli._say import say
from salience.cli.verbs import select
from salience.errors import InputError

if TYPE_CHECKING:
    from salience.data.row_proof import RowProof
    from salience.data.row_selection import RowSelection

_EPILOG = (
    "Examples:\n\n"
    "salience select rows people.csv --label income --count 500 -o chosen.csv\n\n"
    "salience select rows people.csv --label income --method gais --count 500 -o chosen.csv\n\n"
    "salience select rows pool.parquet --embeddings vectors.npy --quality grade --fraction 0.05 -o chosen.parquet\n\n"
    "salience select rows people.csv --label income --scores a.parquet --scores b.parquet --count 500 -o chosen.csv\n\n"
    "Exit codes: 0 done, 2 usage, 3 bad data, 4 nothing to do, 130 interrupted."
)
_KMQ = "Options of kmq alone"
_GAIS = "Options of gais alone"
_SCORES = "Choosing by Scores"


@select.command("rows", epilog=_EPILOG)
def rows(
    data: Annotated[Path, typer.Argument(help="Table: .csv (also .gz) or .parquet, read into memory.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Chosen rows, in the format of the input (.csv or .parquet).", show_default=False)],
    count: Annotated[int | None, typer.Option("--count", "-n", help="Rows to choose.", show_default=False)] = None,
    fraction: Annotated[float | None, typer.Option(help="Or the share of all rows to choose.", show_default=False)] = None,
    method: Annotated[str | None, typer.Option(help="kmq: quality inside clusters; gais: a graph attention network, by --label; medoids; random. With commas between, the others are measured beside the first.", show_default="kmq")] = None,
    label: Annotated[str | None, typer.Option("--label", "-l", help="Column to be learnt: accuracy is measured by it; it is not part of what clusters are made of.", show_default=False)] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Column not to use, such as an identifier; may be repeated.", show_default=False)] = None,
    embeddings: Annotated[str | None, typer.Option(help="A .npy matrix with a row per row, or a column of vectors.", show_default="the columns as numbers")] = None,
    quality: Annotated[str | None, typer.Option(help="Column of numbers, larger for better rows.", rich_help_panel=_KMQ, show_default=False)] = None,
    clusters: Annotated[str | None, typer.Option(help="Number of clusters, or silhouette.", rich_help_panel=_KMQ, show_default="one for every four rows to choose, at most 512")] = None,
    allocation: Annotated[str, typer.Option(help="Budget of a cluster: proportional to its size, or equal.", rich_help_panel=_KMQ)] = "proportional",
    temperature: Annotated[float, typer.Option(help="The smaller, the more quality decides.", rich_help_panel=_KMQ)] = 1.0,
    graph: Annotated[str, typer.Option(help="How alike rows are found: minibatch, sl_lsh, ml_lsh or mv_lsh.", rich_help_panel=_GAIS)] = "minibatch",
    coverage: Annotated[bool, typer.Option("--coverage/--no-coverage", help="Choose in turns over buckets of alike rows, or the best scores alone.", rich_help_panel=_GAIS)] = True,
    scores: Annotated[list[Path] | None, typer.Option(help="Choose by this Scores file instead of a method; several are combined by rank.", rich_help_panel=_SCORES, show_default=False)] = None,
    draw: Annotated[bool, typer.Option("--draw", help="Draw by exp(score) instead of taking the largest.", rich_help_panel=_SCORES)] = False,
    hold_out: Annotated[float, typer.Option(help="Share of the rows kept out to measure on; 0 can choose all of them and measures nothing.")] = 0.25,
    seed: Annotated[int, typer.Option(help="Seed of every draw.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    report: Annotated[Path | None, typer.Option(help="Report page.", show_default="OUT.report.html")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be read; write nothing.")] = False,
) -> None:  # fmt: skip
    """Choose rows of a table that cover it and are of high quality.

    kmq: k-means cuts the table into clusters, each gets its share of the budget, and rows are drawn inside it by quality
    (kMQ, 2024). gais: a network on a graph of alike rows learns the label, and the rows that others attend to and whose
    class is clear are taken (GAIS, 2025). First printed is what the choice is worth here: accuracy on held-out rows of simple learners trained on
    it, beside random rows and k-means medoids of equal number; without --label, how well it covers held-out rows. Scores
    of all rows are written beside the output.
    """
    from salience.scores import Scores

    names = (method or "kmq").split(",")
    if scores and method:
        raise InputError("--scores replaces the method: leave --method out")
    own: dict[str, dict[str, Any]] = {
        "kmq": {"--quality": quality, "--clusters": clusters, "--allocation": allocation != "proportional",
                "--temperature": temperature != 1.0},
        "gais": {"--graph": graph != "minibatch", "--no-coverage": not coverage},
    }  # fmt: skip
    for of, given in own.items():
        wrong = [name for name, value in given.items() if value]
        if wrong and (scores or names[0] != of):
            raise InputError(
                f"{', '.join(wrong)} belongs to --method {of} alone: leave it out, or --method and --scores"
            )
    page = report or Path(f"{out}.report.html")
    _check_names([data, *(scores or []), *([embeddings] if embeddings else [])], out, page, overwrite)
    if dry_run:
        _plan(data, as_json)
        return
    found = _run(
        data, count=count, fraction=fraction, method=names[0], compare=names[1:], label=label, quality=quality,
        ignore=ignore or [], embeddings=embeddings, scores=[Scores.load(path) for path in scores or []], draw=draw,
        model=_gais(graph, coverage, seed) if names[0] == "gais" else _model(
            names[0], clusters, allocation, temperature, count, seed), hold_out=hold_out, random_state=seed,
    )  # fmt: skip
    _save(found, data, out, report, overwrite)
    _print(found, out, page, as_json)


def _gais(graph: str, coverage: bool, seed: int) -> Any:
    """The selector that the options ask for; None for the defaults."""
    from salience.data import GAIS

    if graph == "minibatch" and coverage:
        return None
    return GAIS(graph=graph, coverage=coverage, random_state=seed)


def _model(method: str, clusters: str | None, allocation: str, temperature: float, count: int | None, seed: int) -> Any:
    """The selector that the options ask for; None for the defaults."""
    from salience.data import KMQSelector

    if method != "kmq" or (clusters is None and allocation == "proportional" and temperature == 1.0):
        return None
    if clusters is None and count is None:
        raise InputError("--allocation and --temperature with --fraction need --clusters")
    k: int | str = clusters or str(max(1, min(512, (count or 1) // 4)))
    if k != "silhouette":
        try:
            k = int(k)
        except ValueError:
            raise InputError(f"--clusters must be a whole number or silhouette, not {clusters!r}") from None
    return KMQSelector(n_clusters=k, allocation=allocation, temperature=temperature, random_state=seed)


def _check_names(inputs: list[str | Path], out: Path, page: Path, overwrite: bool) -> None:
    from salience.cli._names import check_written

    if out.suffix not in (".csv", ".parquet"):
        raise InputError(f"--out must end in .csv or .parquet, not {out.name}")
    if page.suffix != ".html" or not page.parent.is_dir() or page.is_dir():
        raise InputError(f"--report must name a file that ends in .html, in a folder that exists, not {page}")
    written = {"output": out, "scores file": Path(f"{out}.scores.parquet"), "report": page}
    check_written(written, inputs, overwrite)


def _plan(data: Path, as_json: bool) -> None:
    from salience.io import TableReader

    reader = TableReader(data)
    plan = {"bytes": reader.bytes, "columns": reader.columns}
    if as_json:
        typer.echo(json.dumps(plan))
        return
    say(f"{data}: {plan['bytes']:,} bytes, {len(reader.columns)} columns: {', '.join(reader.columns[:12])}\n"
        "the table is read into memory\nnothing was written")  # fmt: skip


def _run(data: Path, **options: Any) -> RowSelection:
    from rich.console import Console

    from salience.data import select_rows

    with Console(stderr=True).status("reading") as status:
        return select_rows(data, **options, progress=status.update)


def _save(found: RowSelection, data: Path, out: Path, report: Path | None, overwrite: bool) -> None:
    """All files; a report of another name than OUT's gets it when the others have theirs."""
    import os
    from contextlib import nullcontext
    from tempfile import TemporaryDirectory

    from salience.cli._select_rows_page import write_page
    from salience.io import Output

    aside: Any = nullcontext() if report is None else TemporaryDirectory(".partial", f".{report.name}.", report.parent)
    with Output(out, overwrite, [data]) as output, aside as folder:
        _write(found, output.file())
        found.scores.save(output.file(".scores.parquet"))
        fresh = output.file(".report.html") if folder is None else Path(folder) / "report.html"
        write_page(found, data.name, fresh)
        output.commit({"command": "select rows", "data": str(data), "settings": found.settings, **found.as_dict()})
        if report is not None:
            os.replace(fresh, report)


def _write(found: RowSelection, path: Path) -> None:
    """The chosen rows as they stood in the file."""
    import csv

    import pyarrow.parquet

    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(found.table(), path, write_page_checksum=True)
    else:
        table = found.table()
        wrong = next((f for f in table.schema if not _fits_csv(f.type)), None)
        if wrong is not None:
            raise InputError(
                f"column {wrong.name!r} holds {wrong.type}, which cannot be written as .csv; choose an --out that "
                "ends in .parquet"
            )
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(table.column_names)
            writer.writerows(zip(*(column.to_pylist() for column in table.columns)))


def _fits_csv(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _fits_csv(kind.value_type)
    binary = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)
    return not (types.is_nested(kind) or any(check(kind) for check in binary))


def _print(found: RowSelection, out: Path, page: Path, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"out": str(out), "report": str(page), **found.as_dict()}))
        return
    if found.proof is not None:
        _print_proof(found.method, found.proof)
    for note in found.notes:
        say(f"note: {note}", err=True)
    say(f"{found.equation}\nwritten: {out}\nscores:  {out}.scores.parquet\nreport:  {page}")


def _print_proof(method: str, proof: RowProof) -> None:
    from rich.console import Console
    from rich.table import Table

    say(proof.verdict[0].upper() + proof.verdict[1:] + ".\n")
    table = Table(box=None, pad_edge=False)
    for column in ("measured on held-out rows", method, "against", "", "better by", "95 % interval"):
        table.add_column(column, justify="left" if column in ("measured on held-out rows", "against") else "right")
    for item in proof.comparisons:
        table.add_row(item.measure, f"{item.chosen:.3f}", item.baseline, f"{item.other:.3f}", f"{item.difference:+.3f}",
                      f"{item.low:+.3f} … {item.high:+.3f}")  # fmt: skip
    Console(width=120).print(table)
    if proof.full is not None:
        say(f"\naccuracy of the same learners on all rows that could be chosen: {proof.full:.3f}")
    typer.echo("")
