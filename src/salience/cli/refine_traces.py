"""`salience refine traces`: shorten reasoning traces by the functional steps that their answers do not need."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from salience.cli._names import check_written
from salience.cli._say import say
from salience.cli.verbs import refine
from salience.errors import InputError

if TYPE_CHECKING:
    from salience.data import TraceRefinement
    from salience.io import Corpus

_EPILOG = (
    "Examples:\n\n"
    "salience refine traces traces.jsonl --model qwen/ --ratio 0.4 -o shorter.jsonl\n\n"
    "salience refine traces s1k.parquet --model qwen/ --judge qwen/ --pattern verification -o shorter.parquet\n\n"
    "salience refine traces traces.jsonl --model qwen/ --judge http://localhost:8000/v1 --judge-model judge -o out.jsonl\n\n"
    "Exit codes: 0 done, 2 usage, 3 bad data, 4 nothing to do, 130 interrupted."
)
_DATA, _STEPS, _SCORING = "Data", "Steps", "Scoring"


@refine.command("traces", epilog=_EPILOG)
def traces(
    files: Annotated[list[str], typer.Argument(metavar="TRACES", help="Files, globs or directories (.jsonl, .csv, also .gz and .zst; .parquet).", show_default=False)],
    model: Annotated[Path, typer.Option("--model", "-m", help="Directory of a causal language model that scores the answers.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Output: .jsonl, or .parquet for Parquet inputs.", show_default=False)],
    ratio: Annotated[float, typer.Option(help="Share of each functional pattern's steps to remove, trace by trace, rounded down.")] = 0.4,
    pattern: Annotated[list[str] | None, typer.Option("--pattern", help="Prune this pattern alone: verification, multi_method or error_correction; may be repeated.", rich_help_panel=_STEPS, show_default="all")] = None,
    judge: Annotated[str | None, typer.Option(help="Classifies steps without a marker: a model directory, or the URL of a chat endpoint, which is sent the steps.", rich_help_panel=_STEPS, show_default="they stay")] = None,
    judge_model: Annotated[str | None, typer.Option("--judge-model", help="Name of the model at the endpoint.", rich_help_panel=_STEPS, show_default=False)] = None,
    judge_key: Annotated[str | None, typer.Option("--judge-key", metavar="VARIABLE", help="Environment variable that holds the endpoint's key.", rich_help_panel=_STEPS, show_default=False)] = None,
    judge_timeout: Annotated[float, typer.Option("--judge-timeout", help="Seconds to wait for a reply.", rich_help_panel=_STEPS)] = 60.0,
    question: Annotated[str, typer.Option(help="Field or column of the question.", rich_help_panel=_DATA)] = "question",
    reasoning: Annotated[str, typer.Option(help="Of the reasoning: a text, or a list of steps.", rich_help_panel=_DATA)] = "reasoning",
    answer: Annotated[str, typer.Option(help="Of the gold answer.", rich_help_panel=_DATA)] = "answer",
    max_bad: Annotated[float, typer.Option(help="Largest share of unusable records to put up with.", rich_help_panel=_DATA)] = 0.01,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first unusable record.", rich_help_panel=_DATA)] = False,
    template: Annotated[str | None, typer.Option(help="How the parts are put together, as in '{question} {reasoning} #### {answer}'.", rich_help_panel=_SCORING, show_default="the chat template of the model, or blank lines")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest example in tokens.", rich_help_panel=_SCORING, show_default="what the model reads")] = None,
    skip_long: Annotated[bool, typer.Option("--skip-long", help="Leave longer examples as they are instead of stopping.", rich_help_panel=_SCORING)] = False,
    batch_size: Annotated[int, typer.Option(help="Shortened chains per pass.", rich_help_panel=_SCORING)] = 8,
    device: Annotated[str, typer.Option(help="Where to compute, as in cpu or cuda.", rich_help_panel=_SCORING)] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of the random removals to compare with.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output.")] = False,
    report: Annotated[Path | None, typer.Option(help="Report page.", show_default="OUT.report.html")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Cut and classify the steps by their markers, say what there is to prune; score and write nothing.")] = False,
) -> None:  # fmt: skip
    """Shorten reasoning traces by the verification, alternative and correction steps that the answer does not need.

    Each functional step is left out by itself, and the perplexity of the gold answer says what it was worth; of each
    pattern the lowest go, progressive steps never (PIR, NeurIPS 2025). First printed: the answer's perplexity after
    that against random removal of as many steps.
    """
    from salience.io import Corpus

    page = report or Path(f"{out}.report.html")
    if report is not None and (page.suffix != ".html" or not page.parent.is_dir() or page.is_dir()):
        raise InputError(f"--report must name a file that ends in .html, in a folder that exists, not {page}")
    corpus = Corpus(files, question)
    check_written({"report": page, "output": out}, [source.path for source in corpus.sources if source.path], overwrite)
    columns = (question, reasoning, answer)
    if dry_run:
        _plan(corpus, columns, ratio, as_json)
        return
    found = _refine(
        corpus, out, model, columns, ratio=ratio, patterns=pattern,
        judge=(judge, judge_model, judge_key, judge_timeout), device=device, template=template, max_length=max_length,
        batch_size=batch_size, skip_long=skip_long, max_bad=0.0 if strict else max_bad, seed=seed, overwrite=overwrite,
    )  # fmt: skip
    from salience.cli._refine_traces_page import write_page

    write_page(found, page)
    _print(found, page, as_json)


def _refine(
    corpus: Corpus, out: Path, model: Path, columns: tuple[str, str, str], *, ratio: float,
    patterns: list[str] | None, judge: tuple[str | None, str | None, str | None, float], device: str,
    template: str | None, max_length: int | None, batch_size: int, skip_long: bool, max_bad: float, seed: int,
    overwrite: bool,
) -> TraceRefinement:  # fmt: skip
    from salience.cli._progress import StageProgress
    from salience.cli.explain_saliency import _device
    from salience.data import PIR, refine_traces
    from salience.data.pir.pruning import check_ratio
    from salience.data.pir.steps import FUNCTIONAL, check_patterns
    from salience.io import Output
    from salience.model import load

    check_ratio(ratio)
    chosen = check_patterns(patterns or FUNCTIONAL)
    where = _device(device)
    judging = _judge(*judge, where)
    Output(out, overwrite, [corpus]).discard()  # refuses what is refused in the end, before a model is loaded
    loaded = load(model, device=where)
    pir = PIR(
        loaded.model, loaded.processor, ratio=ratio, patterns=chosen, judge=judging, columns=columns, template=template,
        batch_size=batch_size, max_length=max_length, on_overflow="skip" if skip_long else "raise",
    )  # fmt: skip
    settings = {"model": str(model), "judge": judge[0], "judge_model": judge[1], "template": template}
    with StageProgress({"scoring": 1.0}) as bar:
        bar("scoring", 0, corpus.bytes)
        return refine_traces(
            corpus, out, pir, max_bad=max_bad, seed=seed, overwrite=overwrite, settings=settings,
            progress=lambda done, total: bar("scoring", done, total),
        )  # fmt: skip


def _judge(judge: str | None, name: str | None, variable: str | None, timeout: float, device: Any) -> Any:
    from salience.data import chat_judge, model_judge
    from salience.model import load

    remote = judge is not None and judge.startswith(("http://", "https://"))
    if not remote and (name or variable):
        raise InputError("--judge-model and --judge-key go with a --judge that is the URL of a chat endpoint")
    if judge is None:
        return None
    if not remote:
        loaded = load(judge, device=device)
        return model_judge(loaded.model, loaded.processor)
    if not name:
        raise InputError("--judge-model is missing: name the model at the endpoint")
    key = None
    if variable is not None:
        key = os.environ.get(variable)
        if not key:
            raise InputError(f"--judge-key: the environment variable {variable} is not set")
    return chat_judge(judge, name, key=key, timeout=timeout)


def _plan(corpus: Corpus, columns: tuple[str, str, str], ratio: float, as_json: bool) -> None:
    from salience.data.pir.traces import plan

    found = plan(corpus, columns, ratio)
    if as_json:
        typer.echo(json.dumps(found))
        return
    say(f"traces   {found['traces']:,} in {found['bytes'] / 1e6:,.1f} MB")
    for name, steps in found["steps"].items():
        say(f"{name:<17}{steps:,} steps, {found['remove'][name]:,} would go")
    say(f"passes   {found['passes']:,} through the model, most of them over a part of a trace\nnothing was written")


def _print(found: TraceRefinement, page: Path, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({**found.as_dict(), "report": str(page)}))
        return
    from rich.console import Console
    from rich.table import Table

    say(found.verdict[0].upper() + found.verdict[1:] + ".\n")
    console = Console(width=100, markup=False, highlight=False)
    for columns, rows in ((COMPARED, comparison_rows(found)), (PRUNED, pattern_rows(found))):
        table = Table(box=None, pad_edge=False)
        for number, column in enumerate(columns):
            table.add_column(column, justify="right" if number else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        typer.echo("")
    for note in found.notes:
        say(f"note: {note}", err=True)
    say(found.equation)
    if found.quarantined:
        say(f"unusable records: {found.out}.quarantine.jsonl")
    say(f"written: {found.out}\nsteps:   {found.out}.steps.jsonl\nscores:  {found.out}.scores.parquet\nreport:  {page}")


COMPARED = ("answer after", "perplexity", "nats per token", "PIR lower by", "95 % interval")
PRUNED = ("pattern", "steps", "removed", "tokens before", "after", "share before", "after")


def comparison_rows(found: TraceRefinement) -> list[tuple[str, ...]]:
    """Answer perplexity after each kind of removal."""
    import math

    rows: list[tuple[str, ...]] = []
    for name, words in (("PIR", "PIR"), ("random", "as many functional steps at random"),
                        ("longest steps", "as many, the longest first"), ("full chain", "nothing (full chain)")):  # fmt: skip
        gain = None if name == "PIR" else found.gain(name)
        span = gain is not None and math.isfinite(gain.low)
        rows.append((
            words, f"{math.exp(found.mean(name)):.4g}", f"{found.mean(name):.4f}",
            "" if gain is None else f"{gain.mean:+.4f}", f"{gain.low:+.4f} … {gain.high:+.4f}" if gain and span else "",
        ))  # fmt: skip
    return rows


def pattern_rows(found: TraceRefinement) -> list[tuple[str, ...]]:
    """Steps and tokens of each pattern, before and after."""
    before, after = (max(count, 1) for count in found.tokens)
    rows = [
        (name, f"{row['steps']:,}", f"{found.removed[name]:,}", f"{row['tokens']:,}", f"{row['kept_tokens']:,}",
         f"{row['tokens'] / before:.1%}", f"{row['kept_tokens'] / after:.1%}") for name, row in found.stats.items()
    ]  # fmt: skip
    steps, removed = sum(int(row["steps"]) for row in found.stats.values()), sum(found.removed.values())
    return [*rows, ("all", f"{steps:,}", f"{removed:,}", f"{found.tokens[0]:,}", f"{found.tokens[1]:,}", "", "")]
