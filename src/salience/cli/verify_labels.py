"""`salience verify labels`: estimates with honest intervals from a model's labels and a hand-labelled sample."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from salience.cli._say import say
from salience.cli.verbs import verify
from salience.errors import InputError

if TYPE_CHECKING:
    from salience.trust.labels import LabelsCheck

_EPILOG = (
    "Examples:\n\n"
    "salience verify labels posts.csv --gold hand --predicted llm --prob chance\n\n"
    'salience verify labels posts.parquet --gold hand --predicted llm --assume-random --formula "hand ~ length + C(topic)" '
    "-o estimates.csv\n\n"
    "salience verify labels posts.csv --gold hand --predicted llm --assume-random --model felm "
    '--formula "hand ~ ads" --fixed-effect city --cluster author\n\n'
    "Exit codes: 0 done, 2 usage, 3 bad data, 4 nothing to do, 130 interrupted."
)
_DESIGN = "How rows were chosen for labelling"
_MODEL = "Model"
_FIT = "Estimation"


class Model(StrEnum):
    """Which regression."""

    auto = "auto"
    logit = "logit"
    lm = "lm"
    felm = "felm"


class Learner(StrEnum):
    """What predicts the gold labels from the model's labels."""

    forest = "forest"
    linear = "linear"
    identity = "identity"


@verify.command("labels", epilog=_EPILOG)
def labels(
    data: Annotated[Path, typer.Argument(help="Table: .csv (also .gz) or .parquet, read into memory.", show_default=False)],
    gold: Annotated[list[str], typer.Option("--gold", "-g", help="Column of gold labels, empty where there is none; may be repeated.", show_default=False)],
    predicted: Annotated[list[str], typer.Option("--predicted", "-p", help="Column of the model's labels or scores, one for each --gold.", show_default=False)],
    formula: Annotated[str | None, typer.Option("--formula", "-f", help='Such as "y ~ x1 + C(group)" (default: the mean or share of --gold).', show_default=False)] = None,
    category: Annotated[str | None, typer.Option(help="Label to estimate where labels are words.", show_default="each of them")] = None,
    model: Annotated[Model, typer.Option(help="auto: logit for labels 0 and 1 with a formula, else lm.", rich_help_panel=_MODEL)] = Model.auto,
    fixed_effect: Annotated[list[str] | None, typer.Option(help="Column of groups for felm; may be repeated.", rich_help_panel=_MODEL, show_default=False)] = None,
    cluster: Annotated[str | None, typer.Option(help="Column of clusters whose rows hang together.", rich_help_panel=_MODEL, show_default=False)] = None,
    prob: Annotated[str | None, typer.Option(help="Column with each row's probability of being labelled.", rich_help_panel=_DESIGN, show_default=False)] = None,
    assume_random: Annotated[bool, typer.Option("--assume-random", help="Every row had the same chance of being labelled.", rich_help_panel=_DESIGN)] = False,
    labeled: Annotated[str | None, typer.Option(help="Column that marks labelled rows by 1.", rich_help_panel=_DESIGN, show_default="where --gold is not empty")] = None,
    rescale: Annotated[bool, typer.Option("--rescale/--no-rescale", help="Scale probabilities to the share that is labelled.", rich_help_panel=_DESIGN)] = True,
    feature: Annotated[list[str] | None, typer.Option(help="Further column to predict the gold label from; may be repeated.", rich_help_panel=_FIT, show_default=False)] = None,
    learner: Annotated[Learner, typer.Option(help="What predicts gold labels; identity takes the model's labels as they are.", rich_help_panel=_FIT)] = Learner.forest,
    folds: Annotated[int, typer.Option(help="Folds of the cross-fit.", rich_help_panel=_FIT)] = 5,
    splits: Annotated[int, typer.Option(help="How often the data are cut anew.", rich_help_panel=_FIT)] = 10,
    alpha: Annotated[float, typer.Option(help="Intervals cover the truth with probability 1 - alpha.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Seed of the splits.")] = 1234,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Estimates as .csv, one row per method and coefficient.", show_default=False)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    report: Annotated[Path | None, typer.Option(help="Report page.", show_default="OUT.report.html, or none without --out")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:  # fmt: skip
    """Estimate shares or a regression from a model's labels, with intervals that hold although the labels are biased.

    A hand-labelled random sample corrects the model's labels (design-based supervised learning, NeurIPS 2023). First
    printed: what the labels are worth here, the estimate beside what gold labels alone and the model's labels alone
    give, and how many gold labels in all would halve each interval.
    """
    from salience.io import Output

    if len(gold) != len(predicted):
        raise InputError(f"--predicted must name one column for each --gold; got {len(predicted)} for {len(gold)}")
    if prob is not None and assume_random:
        raise InputError("give either --prob or --assume-random")
    if fixed_effect and model is not Model.felm:
        raise InputError("--fixed-effect belongs to --model felm")
    if seed < 0:
        raise InputError(f"--seed must be 0 or larger, not {seed}")
    page = report or (Path(f"{out}.report.html") if out else None)
    _check_names(data, out, page, overwrite)
    found = _run(
        data, formula, gold, predicted, category, model.value, feature or [], prob, labeled, cluster, fixed_effect or [],
        learner.value, folds, splits, rescale, assume_random, seed, alpha,
    )  # fmt: skip
    if out is not None:
        with Output(out, overwrite) as output:
            _write_csv(found, output.file())
            output.commit({"command": "verify labels", "data": str(data), **found.settings})
    if page is not None:
        from salience.cli._verify_labels_page import write_page

        write_page(found, page)
    _print(found, out, page, as_json)


def _check_names(data: Path, out: Path | None, page: Path | None, overwrite: bool) -> None:
    if out is not None and out.suffix != ".csv":
        raise InputError(f"--out must end in .csv, not {out.name}")
    if out is not None and out.exists() and not overwrite:
        raise InputError(f"output {out} exists; pass --overwrite to replace it")
    if out is not None and out.resolve() == data.resolve():
        raise InputError(f"output {out} is the input")
    if page is not None and (page.suffix != ".html" or not page.parent.is_dir() or page.is_dir()):
        raise InputError(f"--report must name a file that ends in .html, in a folder that exists, not {page}")
    if page is not None and page.exists() and not overwrite:
        raise InputError(f"report {page} exists; pass --overwrite to replace it")


def _run(
    data, formula, gold, predicted, category, model, features, prob, labeled, cluster, fixed_effects, learner, folds,
    splits, rescale, assume_random, seed, alpha,
) -> LabelsCheck:  # fmt: skip
    from rich.console import Console

    from salience.trust.labels import check_labels_of

    console = Console(stderr=True)
    with console.status("reading") as status:
        return check_labels_of(
            data, gold=gold, predicted=predicted, formula=formula, category=category, model=model, features=features,
            prob=prob, labeled=labeled, cluster=cluster, fixed_effects=fixed_effects, learner=learner, folds=folds,
            splits=splits, rescale=rescale, assume_random=assume_random, random_state=seed, alpha=alpha,
            progress=status.update,
        )  # fmt: skip


def _write_csv(found: LabelsCheck, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.csv

    rows = found.rows()
    pyarrow.csv.write_csv(pa.Table.from_pylist(rows), path)


def _print(found: LabelsCheck, out: Path | None, page: Path | None, as_json: bool) -> None:
    if as_json:
        named = {"out": str(out) if out else None, "report": str(page) if page else None}
        typer.echo(json.dumps(_plain(found.as_dict() | named), allow_nan=False))
        return
    for part in found.parts:
        _print_part(found, part)
    for note in found.notes:
        say(f"note: {note}", err=True)
    say(found.equation)
    if out is not None:
        say(f"written: {out}")
    if page is not None:
        say(f"report:  {page}")


def _print_part(found: LabelsCheck, part: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    say(part.verdict + "\n")
    table = Table(box=None, pad_edge=False)
    table.add_column(part.what)
    for column in ("DSL", f"{100 * (1 - found.alpha):g} % interval", "gold only", "its interval", "model only",
                   "half as wide at"):  # fmt: skip
        table.add_column(column, justify="right")
    spans = {method: part.result.conf_int(found.alpha, method) for method in ("DSL", "GSO")}
    for at, name in enumerate(part.result.names):
        table.add_row(
            name, f"{part.result.coef[at]:.3f}", _span(spans["DSL"][at]), f"{part.result.others['GSO'][0][at]:.3f}",
            _span(spans["GSO"][at]), f"{part.result.others['SO'][0][at]:.3f}", part.labels_needed(at),
        )  # fmt: skip
    Console(width=110).print(table, markup=False)
    typer.echo("")


def _span(pair: Any) -> str:
    return f"{pair[0]:.3f} … {pair[1]:.3f}"


def _plain(value: Any) -> Any:
    """The same with NaN as null: JSON has no other word for it."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and value != value else value
