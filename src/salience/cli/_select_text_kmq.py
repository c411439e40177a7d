"""`salience select text --method kmq`: the call, what is printed, and its page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from salience.cli._names import check_written
from salience.cli._say import say
from salience.errors import InputError

if TYPE_CHECKING:
    from salience.data.text_clusters import ClusterSelection


def select_by_clusters(
    raw: list[str], out: str, *, text_column: str, clusters: str | None, seed: int, overwrite: bool,
    report: Path | None, as_json: bool, dry_run: bool, **options: Any,
) -> None:  # fmt: skip
    """Run kMQ on a corpus with the options of the command."""
    from rich.console import Console

    from salience.data import select_text_clusters
    from salience.io import Corpus
    from salience.io.remote import is_url

    k: int | str | None = clusters
    if clusters is not None and clusters != "silhouette":
        if not clusters.isdecimal() or int(clusters) < 1:
            raise InputError(f"--clusters must be a whole number of at least 1 or silhouette, not {clusters!r}")
        k = int(clusters)
    page = report or Path(f"{out.rsplit('/', 1)[-1] if is_url(out) else out}.report.html")
    if report is not None and (page.suffix != ".html" or not page.parent.is_dir() or page.is_dir()):
        raise InputError(f"--report must name a file that ends in .html, in a folder that exists, not {page}")
    pool = Corpus(raw, text_column)
    written = {"report": page}
    if not is_url(out):
        written |= {"output": Path(out), "scores file": Path(f"{out}.scores.parquet")}
    read = [source.path for source in pool.sources if source.path]
    given = options.get("embeddings")
    check_written(written, [*read, given] if given else read, overwrite)
    if dry_run:
        size = sum(source.size for source in pool.sources)
        plan = {"raw_files": len(pool.sources), "raw_bytes": size, "units": len(pool.units), "passes": 2}
        if as_json:
            typer.echo(json.dumps(plan))
        else:
            say(f"raw  {len(pool.sources):,} files, {size / 1e6:,.1f} MB, held in memory\nnothing was written")
        return
    with Console(stderr=True).status("reading") as status:
        found = select_text_clusters(
            pool, out, clusters=k, random_state=seed, overwrite=overwrite, progress=status.update, **options
        )
    _write_page(found, page)
    _print(found, page, as_json)


def _print(found: ClusterSelection, page: Path, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({**found.as_dict(), "report": str(page)}))
        return
    if found.proof is not None:
        say(found.proof.verdict[0].upper() + found.proof.verdict[1:] + ".")
        for item in found.proof.comparisons[1:]:
            say(f"{item.measure}: {item.chosen:.3f} against {item.other:.3f} of {item.baseline} (nearer by "
                f"{item.difference:+.3f}, {item.low:+.3f} to {item.high:+.3f})")  # fmt: skip
    say(f"clusters hit: {found.clusters_hit:,} of {found.clusters:,}")
    if found.mean_quality is not None:
        pool, chosen = found.mean_quality
        shown = "not known" if chosen is None else f"{chosen:.3f}"
        say(f"mean quality: {shown} of the choice, {pool:.3f} of all that could be chosen")
    for note in found.notes:
        say(f"note: {note}", err=True)
    say(f"\n{found.equation}")
    if found.quarantined:
        say(f"unreadable records: {found.out}.quarantine.jsonl")
    say(f"written: {found.out}\nscores:  {found.out}.scores.parquet\nreport:  {page}")


def _write_page(found: ClusterSelection, path: Path) -> None:
    from salience import report
    from salience.cli._select_rows_page import not_measured
    from salience.report import figures

    proof = found.proof
    blocks: list[Any] = [report.verdict("not measured", not_measured(found.notes), None)]
    if proof is not None:
        better = proof.comparisons[0].better
        label = {True: "better than random", False: "worse than random", None: "no better than random"}[better]
        blocks = [report.verdict(label, proof.verdict, better)]
    blocks.append(
        report.facts({"records read": found.read, "selected": found.selected, "held out": found.held_out,
                      "clusters": found.clusters, "clusters hit": found.clusters_hit,
                      "quarantined": found.quarantined})
    )  # fmt: skip
    if found.mean_quality is not None:
        pool, chosen = found.mean_quality
        blocks += [report.heading("Quality"),
                   report.table(("", "mean quality"), [("all that could be chosen", pool), ("selected", "not known" if chosen is None else chosen)])]  # fmt: skip
    if proof is not None:
        blocks += [
            report.heading("Does it cover documents that could not be chosen?"),
            report.figure(
                lambda ax: figures.bars(
                    ax, ["kmq", *(item.baseline for item in proof.comparisons)],
                    [proof.comparisons[0].chosen, *(item.other for item in proof.comparisons)], highlight=["kmq"],
                    xlabel="mean distance to the nearest chosen document (lower is better)",
                ),
                f"{proof.rows:,} held-out documents; {proof.chosen:,} chosen by each.",
                height=2.0,
            ),
            report.table(
                ("measure", "against", "kmq", "other", "nearer by", "95 % interval"),
                [(i.measure, i.baseline, i.chosen, i.other, i.difference, f"{i.low:+.3f} … {i.high:+.3f}")
                 for i in proof.comparisons],
            ),
        ]  # fmt: skip
    if found.notes:
        blocks += [report.heading("Notes"), *(report.text(note) for note in found.notes)]
    report.page(f"Documents chosen: {Path(found.out).name}", blocks, path=path, subtitle=found.equation)
