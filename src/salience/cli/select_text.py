"""`salience select text`: choose the documents of a corpus that are most like a target."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from salience.cli._say import say
from salience.cli.verbs import select
from salience.errors import InputError

if TYPE_CHECKING:
    from salience.data.proof import Proof
    from salience.data.text_selection import AlreadyDone, TextSelection
    from salience.io import Corpus

_EPILOG = (
    "Examples:\n\n"
    "salience select text raw/*.jsonl --target mine.jsonl --count 50000 -o chosen.jsonl\n\n"
    "salience select text pool/ --target a.jsonl --target b.jsonl --separate-targets --fraction 0.1 -o out.jsonl\n\n"
    "salience select text raw/*.jsonl --target mine.jsonl --count 50000 -o chosen.jsonl --resume\n\n"
    "salience select text raw/ --target mine.parquet --scores-only -o scored/\n\n"
    "salience select text raw/ --target mine.parquet --from-scores scored/ --count 9000 -o chosen.parquet\n\n"
    "salience select text /shared/raw --target mine.jsonl --fraction 0.01 -o out.jsonl --engine ray --ray-address auto\n\n"
    "Exit codes: 0 done, 2 usage, 3 bad data, 4 nothing to do, 130 interrupted."
)
_DSIR = "Options of dsir alone"
_KMQ = "Options of kmq alone"
_WEIGHING = "Options of weighing"
_DATA = "Data"
_RUN = "The run"


class Method(StrEnum):
    """How documents are weighed."""

    dsir = "dsir"
    kmq = "kmq"
    heuristic = "heuristic"
    random = "random"


class Engine(StrEnum):
    """Where the corpus is worked at."""

    threads = "threads"
    ray = "ray"


class Hash(StrEnum):
    """How n-grams are hashed."""

    sha256 = "sha256"
    fast = "fast"


@select.command("text", epilog=_EPILOG)
def text(
    raw: Annotated[list[str], typer.Argument(help="Raw corpus: files, globs or directories (.jsonl, .csv, .txt, also .gz and .zst; .parquet).", show_default=False)],
    out: Annotated[str, typer.Option("--out", "-o", help="Output, a path or URL: .jsonl, or the format of the input.", show_default=False)],
    target: Annotated[list[str] | None, typer.Option("--target", "-t", help="Target text, the same formats; may be repeated. Every method but kmq needs it.", show_default=False)] = None,
    count: Annotated[int | None, typer.Option("--count", "-n", help="Documents to choose.", show_default=False)] = None,
    fraction: Annotated[float | None, typer.Option(help="Or the share of the raw documents to choose.", show_default=False)] = None,
    method: Annotated[Method, typer.Option(help="dsir: importance resampling; heuristic: classifier; random: all three are compared. kmq: no target, but quality inside clusters.")] = Method.dsir,
    text_column: Annotated[str, typer.Option(help="Field or column that holds the text.", rich_help_panel=_DATA)] = "text",
    max_bad: Annotated[float, typer.Option(help="Largest share of unreadable records to put up with.", rich_help_panel=_DATA)] = 0.01,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first unreadable record.", rich_help_panel=_DATA)] = False,
    hash: Annotated[Hash, typer.Option(help="sha256: the published buckets; fast: quicker, other buckets.", rich_help_panel=_WEIGHING)] = Hash.sha256,
    ngrams: Annotated[int, typer.Option(help="Longest n-gram.", rich_help_panel=_WEIGHING)] = 2,
    buckets: Annotated[int, typer.Option(help="Size of the hash table.", rich_help_panel=_WEIGHING)] = 10_000,
    min_tokens: Annotated[int, typer.Option(help="Shorter documents are not chosen.", rich_help_panel=_WEIGHING)] = 100,
    smoothing: Annotated[float, typer.Option(help="Pseudo-count per bucket for small targets.", rich_help_panel=_DSIR)] = 0.0,
    top_k: Annotated[bool, typer.Option("--top-k", help="Take the largest weights instead of drawing by them.", rich_help_panel=_WEIGHING)] = False,
    separate_targets: Annotated[bool, typer.Option("--separate-targets", help="Choose for every target by itself.", rich_help_panel=_DSIR)] = False,
    proportions: Annotated[str | None, typer.Option(help="Quotas of separate targets, as in 0.7,0.3.", rich_help_panel=_DSIR, show_default="by size")] = None,
    quality: Annotated[str | None, typer.Option(help="Field or column of numbers, larger for better documents.", rich_help_panel=_KMQ, show_default=False)] = None,
    embeddings: Annotated[str | None, typer.Option(help="Directory of a transformers model, or a .npy matrix with a row per document.", rich_help_panel=_KMQ, show_default="TF-IDF in 50 dimensions")] = None,
    clusters: Annotated[str | None, typer.Option(help="Number of clusters, or silhouette.", rich_help_panel=_KMQ, show_default="one for every four documents to choose, at most 512")] = None,
    hold_out: Annotated[float, typer.Option(help="Share of the target (of kmq: of the documents) kept out to measure on; 0 uses all of it and measures nothing.")] = 0.2,
    scores: Annotated[Path | None, typer.Option(help="Draw by the log-weights of this Scores file instead of a method.", show_default=False)] = None,
    scores_only: Annotated[bool, typer.Option("--scores-only", help="Weigh all documents, write the Scores into the folder OUT, and choose nothing.")] = False,
    from_scores: Annotated[Path | None, typer.Option(help="Folder that --scores-only wrote of the same files: count and weigh nothing again.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Seed of every draw.")] = 0,
    workers: Annotated[int | None, typer.Option(help="Threads, or Ray tasks at once (default: all cores); does not change the result.", rich_help_panel=_RUN, show_default=False)] = None,
    engine: Annotated[Engine, typer.Option(help="threads of this machine, or tasks of a Ray cluster; does not change the result.", rich_help_panel=_RUN)] = Engine.threads,
    ray_address: Annotated[str | None, typer.Option(help="Cluster to join, as in auto or ray://HOST:10001.", rich_help_panel=_RUN, show_default="one on this machine")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run of the same options; the result is the same byte for byte.", rich_help_panel=_RUN)] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output, or start an interrupted run again.", rich_help_panel=_RUN)] = False,
    report: Annotated[Path | None, typer.Option(help="Report page.", show_default="OUT.report.html")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be read and how long it would take; write nothing.")] = False,
) -> None:  # fmt: skip
    """Choose the documents of a raw corpus that are most like a target, or that cover it and are of high quality.

    Weighs every document by how much likelier its words and word pairs are in the target than in the raw corpus, and
    draws without replacement by that weight (DSIR, NeurIPS 2023). Then measures on target documents that it never saw
    whether the choice beats a random one of equal size, and prints that first. With --method kmq (2024) no target is
    needed: documents are clustered, each cluster gets its share, quality decides inside it, and coverage is measured.
    """
    from salience.data import DSIR, AlreadyDone, select_text
    from salience.io import Corpus, connect_ray
    from salience.io.remote import is_url
    from salience.scores import Scores

    if method is Method.kmq:
        from salience.cli._select_text_kmq import select_by_clusters

        _refuse_weighing(
            target=target, hash=hash is not Hash.sha256, ngrams=ngrams != 2, buckets=buckets != 10_000,
            min_tokens=min_tokens != 100, smoothing=smoothing, top_k=top_k, separate_targets=separate_targets,
            proportions=proportions, scores=scores, scores_only=scores_only, from_scores=from_scores, resume=resume,
            engine=engine is not Engine.threads, ray_address=ray_address, workers=workers,
        )  # fmt: skip
        select_by_clusters(
            raw, out, text_column=text_column, count=count, fraction=fraction, quality=quality, embeddings=embeddings,
            clusters=clusters, hold_out=hold_out, max_bad=0.0 if strict else max_bad, seed=seed, overwrite=overwrite,
            report=report, as_json=as_json, dry_run=dry_run,
        )  # fmt: skip
        return
    if not target:
        raise InputError("--target is missing: every method but kmq chooses by likeness to a target")
    if quality or embeddings or clusters:
        raise InputError("--quality, --embeddings and --clusters belong to --method kmq alone")
    _check_usage(count, fraction, scores_only, scores, from_scores, method, top_k)
    if resume and overwrite:
        raise InputError("--resume goes on with a run and --overwrite starts again: leave one out")
    if ray_address is not None and engine is not Engine.ray:
        raise InputError("--ray-address needs --engine ray")
    if method is not Method.dsir or scores is not None:
        _refuse_own(smoothing=smoothing, separate_targets=separate_targets, proportions=proportions)
    model = DSIR(
        ngrams=ngrams, num_buckets=buckets, hash=hash.value, min_tokens=min_tokens, smoothing=smoothing,
        separate_targets=separate_targets, target_proportions=_numbers(proportions), max_bad=0.0 if strict else max_bad,
        workers=workers, random_state=seed,
    )  # fmt: skip
    pool, targets = Corpus(raw, text_column), [Corpus(name, text_column) for name in target]
    page = report or Path(f"{out.rsplit('/', 1)[-1] if is_url(out) else out}.report.html")
    if report is not None and (page.suffix != ".html" or not page.parent.is_dir() or page.is_dir()):
        raise InputError(f"--report must name a file that ends in .html, in a folder that exists, not {page}")
    if page.exists() and not (overwrite or resume):
        raise InputError(f"report {page} exists; pass --overwrite to replace it")
    if dry_run:
        _print_plan(pool, targets, model, count, as_json)
        return
    if engine is Engine.ray:
        connect_ray(ray_address, workers)
    how: dict[str, Any] = {
        "model": model, "hold_out": hold_out, "engine": engine.value, "resume": resume, "overwrite": overwrite,
    }  # fmt: skip
    if scores_only:
        _write_scores(pool, targets, out, how, as_json)
        return
    how |= {"count": count, "fraction": fraction, "method": method.value, "top_k": top_k, "from_scores": from_scores}
    how["scores"] = None if scores is None else Scores.load(scores)
    try:
        with _progress(pool, targets, model, out) as advance:
            result = select_text(pool, targets, out, **how, progress=advance)
    except AlreadyDone as done:
        _print_done(done, as_json)
        return
    _report(result, page)
    _print(result, page, as_json)


def _check_usage(count, fraction, scores_only, scores, from_scores, method, top_k) -> None:
    if scores_only and any(option is not None for option in (count, fraction, scores, from_scores)):
        raise InputError("--scores-only chooses nothing: leave --count, --fraction, --scores and --from-scores out")
    if not scores_only and (count is None) == (fraction is None):
        raise InputError("give either --count or --fraction")
    if scores is not None and method is not Method.dsir:
        raise InputError("--scores replaces the method: leave --method out")
    if scores_only and (method is not Method.dsir or top_k):
        raise InputError("--scores-only writes the weights of dsir: leave --method and --top-k out")
    if top_k and method is Method.random:
        raise InputError("--top-k means nothing for --method random")


def _refuse_own(**options: Any) -> None:
    """Refuse options of dsir that were given together with another method."""
    given = ["--" + name.replace("_", "-") for name, value in options.items() if value]
    if given:
        raise InputError(f"{', '.join(given)} belongs to --method dsir alone: leave it out, or --method and --scores")


def _refuse_weighing(**options: Any) -> None:
    """Refuse what means nothing to kmq."""
    given = ["--" + name.replace("_", "-") for name, value in options.items() if value]
    if given:
        raise InputError(f"{', '.join(given)} does not go with --method kmq: leave it out")


def _numbers(written: str | None) -> list[float] | None:
    if written is None:
        return None
    try:
        return [float(part) for part in written.split(",")]
    except ValueError:
        raise InputError(f"--proportions must be numbers with commas between, not {written!r}") from None


@contextmanager
def _progress(pool: Corpus, targets: list[Corpus], model: Any, out: str) -> Iterator[Callable[[str, int, int], None]]:
    """A progress line by the estimate of --dry-run; says after an interrupt how to go on."""
    from salience.cli._progress import StageProgress
    from salience.data.estimate import estimate
    from salience.data.text_passes import kept_beside

    expected = estimate(pool, targets, model, None)["stages"] if sys.stderr.isatty() else {}
    try:
        with StageProgress(expected) as advance:
            yield advance
    except (KeyboardInterrupt, OSError):
        if kept_beside(out).exists():
            say("finished units are kept: the same command with --resume goes on from there", err=True)
        raise


def _write_scores(pool: Corpus, targets: list[Corpus], out: str, how: dict[str, Any], as_json: bool) -> None:
    from salience.data import AlreadyDone, score_text

    try:
        with _progress(pool, targets, how["model"], out) as advance:
            manifest = score_text(pool, targets, out, **how, progress=advance)
    except AlreadyDone as done:
        _print_done(done, as_json)
        return
    counts = manifest["counts"]
    if as_json:
        typer.echo(json.dumps({"out": str(out), **counts}))
        return
    say(
        f"{counts['read']:,} records read = {counts['documents']:,} weighed + {counts['blank']:,} blank + "
        f"{counts['quarantined']:,} quarantined\nwritten: {out}/scores.parquet\n"
        f"choose from it: the same command with --from-scores {out} --count N in place of --scores-only"
    )


def _print_done(done: AlreadyDone, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"already_complete": True, **done.manifest["counts"], "proof": done.manifest["proof"]}))
        return
    say(f"{done}, written by the same options from the same bytes: nothing was done")


def _print_plan(pool: Corpus, targets: list[Corpus], model: Any, count: int | None, as_json: bool) -> None:
    from salience.data.estimate import estimate

    plan = estimate(pool, targets, model, count)
    if as_json:
        typer.echo(json.dumps(plan))
        return
    typer.echo(f"raw      {plan['raw_files']:,} files, {plan['raw_bytes'] / 1e6:,.1f} MB in {plan['units']:,} units")
    typer.echo(f"targets  {plan['target_bytes'] / 1e6:,.1f} MB")
    typer.echo(f"passes   {plan['passes']} over the raw corpus (count, weigh), then the chosen units once more")
    typer.echo(f"memory   about {plan['peak_bytes'] / 1e6:,.0f} MB with {plan['workers']} workers")
    stages = ", ".join(f"{stage} {seconds:,.0f}" for stage, seconds in plan["stages"].items())
    typer.echo(
        f"time     about {plan['seconds']:,.0f} s ({stages}) at the measured "
        f"{plan['bytes_per_second'] / 1e6:,.1f} MB/s a pass"
    )
    typer.echo("nothing was written")


def _report(result: TextSelection, page: Path) -> None:
    from salience.cli._select_text_page import write_page

    write_page(result, page)


def _print(result: TextSelection, page: Path, as_json: bool) -> None:
    if as_json:
        summary = {name: getattr(result, name) for name in (
            "out", "method", "read", "selected", "not_selected", "too_short", "blank", "quarantined",
            "target_documents", "target_held_out", "warnings",
        )}  # fmt: skip
        summary |= {"proof": result.proof.as_dict() if result.proof else None, "report": str(page)}
        typer.echo(json.dumps(summary))
        return
    if result.proof is not None:
        _print_proof(result.method, result.proof)
    for warning in result.warnings:
        say(f"note: {warning}", err=True)
    say(result.equation)
    if result.quarantined:
        say(f"unreadable records: {result.out}.quarantine.jsonl")
    say(f"written: {result.out}\nreport:  {page}")


def _print_proof(method: str, proof: Proof) -> None:
    from rich.console import Console
    from rich.table import Table

    typer.echo(proof.verdict[0].upper() + proof.verdict[1:] + ".\n")
    table = Table(box=None, pad_edge=False)
    for column in ("measured on held-out target", method, "against", "", "better by", "95 % interval"):
        table.add_column(column, justify="left" if column in ("measured on held-out target", "against") else "right")
    for item in proof.comparisons:
        table.add_row(
            item.measure, f"{item.chosen:.3f}", item.baseline, f"{item.other:.3f}", f"{item.difference:+.3f}",
            f"{item.low:+.3f} … {item.high:+.3f}",
        )  # fmt: skip
    Console(width=100).print(table)
    typer.echo("")
