"""`salience compress channels`: merge similar channels of a network into fewer."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from salience.cli._changed_page import check_paths, quiet_transformers
from salience.cli._measured import (
    Arch,
    Evaluate,
    EvaluateCommand,
    ImageMean,
    ImageSize,
    ImageStd,
    Limit,
    LowerIsBetter,
    evaluation_of,
    print_comparison,
)
from salience.cli._say import say
from salience.cli.verbs import compress
from salience.errors import InputError, NothingToDo

if TYPE_CHECKING:
    from salience.model import Loaded
    from salience.weights.evaluation import Comparison, Evaluation

_EPILOG = (
    "Examples:\n\n"
    "salience compress channels my-resnet/ --keep 0.7 --evaluate test.parquet -o narrow/\n\n"
    "salience compress channels net.safetensors --arch mine.nets:build --beta 0.1 --input-shape 3,32,32 "
    "-o narrow.safetensors\n\n"
    "salience compress channels my-llama/ --keep 0.9 --evaluate held-out.txt -o narrow/\n\n"
    "Exit codes: 0 done, 2 usage, 3 bad data, 4 nothing to do, 130 interrupted."
)
_IFM = "Options of ifm alone"


class Method(StrEnum):
    """How channels go."""

    ifm = "ifm"
    l1 = "l1"
    random = "random"


class Rule(StrEnum):
    """How two channels become one."""

    mean_in = "mean_in"
    sum_in = "sum_in"


@compress.command("channels", epilog=_EPILOG)
def channels(
    model: Annotated[Path, typer.Argument(help="A model directory, or FILE.safetensors with --arch.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write the narrower model.", show_default=False)],
    keep: Annotated[float | None, typer.Option(help="Share of the channels of each hidden width to keep.", show_default=False)] = None,
    method: Annotated[Method, typer.Option(help="ifm: merge similar channels; l1, random: remove channels. All are compared at equal widths.")] = Method.ifm,
    groups: Annotated[list[str] | None, typer.Option("--groups", help="Only hidden widths with this name or pattern; may be repeated.", show_default=False)] = None,
    beta: Annotated[float | None, typer.Option(help="Instead of --keep: merge what is closer than this share of the largest distance, such as 0.1.", rich_help_panel=_IFM, show_default=False)] = None,
    rule: Annotated[Rule | None, typer.Option(help="mean_in: average what makes the channels (the default); sum_in: the published code's.", rich_help_panel=_IFM, show_default=False)] = None,
    keep_norm: Annotated[bool, typer.Option("--keep-norm", help="Leave batch normalisation in place instead of folding it.")] = False,
    arch: Arch = None,
    input_shape: Annotated[str | None, typer.Option(help="Shape of one input where neither model nor --evaluate tells it, as in 3,32,32.", show_default=False)] = None,
    evaluate: Evaluate = None,
    evaluate_command: EvaluateCommand = None,
    lower_is_better: LowerIsBetter = False,
    limit: Limit = 1000,
    image_mean: ImageMean = None,
    image_std: ImageStd = None,
    image_size: ImageSize = None,
    seed: Annotated[int, typer.Option(help="Seed of the random baseline and of intervals.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    report: Annotated[Path | None, typer.Option(help="Report page.", show_default="OUT.report.html")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:  # fmt: skip
    """Make the layers of a network narrower by merging channels that do the same (IFM, ICLR 2024).

    No data and no training are needed. With --evaluate the result is measured on your own data, against the model
    before and against removing as many channels by their L1 norm or at random, and that is printed first.
    """
    share, rule = _share(keep, beta, method, rule), rule or (Rule.mean_in if method is Method.ifm else None)
    page = check_paths(out, report, overwrite)
    evaluation = evaluation_of(
        evaluate, evaluate_command, lower_is_better, seed=seed, limit=limit, arch=arch, image_mean=image_mean,
        image_std=image_std, image_size=image_size,
    )  # fmt: skip
    from salience.model import load
    from salience.model.narrowing import shapes_file
    from salience.weights.model_output import model_output, put_model, work_folder

    with model_output(out, overwrite, [model], evaluation) as output, quiet_transformers():
        loaded = load(model, arch=arch)
        example = example_input(loaded, evaluation, input_shape)
        result, others = _narrow(loaded.model, example, method, share, rule, groups, keep_norm, seed)
        comparison = _measure(evaluation, model, loaded, {"after": result["model"], **others}, out)
        made = work_folder(output) / out.name
        listed = write_model(_widest(loaded, arch), result["model"], made, model)
        put_model(output, made)
        output.commit({
            "command": "compress channels", "model": str(model), "method": method.value, "widths": result["widths"],
            "seed": seed,
        })  # fmt: skip
    if not listed:
        shapes_file(out).unlink(missing_ok=True)  # of a narrower model that stood here before
    facts = {key: value for key, value in result.items() if key != "model"} | {"needs_list": listed}
    against = next(iter(others))
    from salience.cli._compress_channels_page import write_page

    write_page(page, str(out), method.value, facts, comparison, against)
    _print(facts, comparison, against, out, page, as_json)


def write_model(wide: Any, narrow: Any, out: Path, source: Path) -> bool:
    """Write the model; whether it needs `salience.model.load`."""
    from salience.model import save_narrowed

    return save_narrowed(wide, narrow, out, source=source if source.is_dir() else None)


def _share(keep: float | None, beta: float | None, method: Method, rule: Rule | None) -> tuple[float, float]:
    """Threshold and largest share that may go."""
    if method is not Method.ifm and (beta is not None or rule is not None):
        raise InputError("--beta and --rule belong to --method ifm: leave them out")
    if keep is not None and beta is not None:
        raise InputError("give either --keep or --beta")
    if keep is not None and not 0 < keep < 1:
        raise InputError(f"--keep must lie between 0 and 1, not {keep}")
    if keep is None and method is not Method.ifm:
        raise InputError(f"--method {method.value} needs --keep")
    if keep is not None:
        # Rounding up the channels to go must not let the complement's last digit take one more.
        return float("inf"), 1 - keep
    if beta is not None and not 0 <= beta < 1:
        raise InputError(f"--beta must lie in 0..1, 1 not included, not {beta}")
    return 0.1 if beta is None else beta, 1.0


def example_input(loaded: Loaded, evaluation: Evaluation | None, shape: str | None) -> Any:
    """One input: zeros of the shape given, an image of the data, or None where `transformers` knows one."""
    import torch

    if shape is not None:
        try:
            sizes = [int(part) for part in shape.split(",")]
            if min(sizes) < 1:
                raise ValueError
        except ValueError:
            raise InputError(f"--input-shape must be sizes with commas between, not {shape!r}") from None
        return _taken(loaded.model, torch.zeros(1, *sizes), "--input-shape")
    if getattr(loaded.model, "config", None) is not None:
        return None
    if evaluation is not None and evaluation.kind == "images":
        from salience.model import read_images

        size, mean, std = evaluation.size, evaluation.mean, evaluation.std
        image = read_images(str(evaluation.data), size=size, mean=mean, std=std, limit=1)[0][0][None]
        return _taken(loaded.model, image, "--evaluate, whose images are read in three colours")
    raise InputError("--input-shape: the model does not tell the shape of its inputs; give one, as in 3,32,32")


def _taken(model: Any, example: Any, of: str) -> Any:
    """The example, if the network takes it."""
    import torch

    from salience.model import run

    try:
        with torch.no_grad():
            run(model, example)
    except (RuntimeError, ValueError, IndexError) as error:
        shape, why = ",".join(map(str, example.shape[1:])), (str(error).splitlines() or [""])[0]
        raise InputError(f"{of}: {type(model).__name__} does not take an input of shape {shape}: {why}") from error
    return example


def _narrow(model: Any, example: Any, method: Method, share: tuple[float, float], rule: Rule | None,
            groups: list[str] | None, keep_norm: bool, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """The result and, for the comparison, what removes as many channels in other ways."""
    import sys

    import torch

    from salience.weights import iterative_feature_merging, prune_channels

    beta, max_ratio = share
    merged = iterative_feature_merging(
        model, example=example, beta=beta, max_ratio=max_ratio, groups=groups, rule=(rule or Rule.mean_in).value,
        fold_norm=not keep_norm, progress=sys.stderr.isatty(),
    )  # fmt: skip
    if all(before == after for before, after in merged.widths.values()):
        raise NothingToDo(
            f"no two channels are within --beta {beta} of each other; raise it, or say with --keep how many are to stay"
        )
    widths = {name: after for name, (_, after) in merged.widths.items()}

    def pruned(by: str) -> Any:
        generator = torch.Generator().manual_seed(seed) if by == "random" else None
        narrow = prune_channels(model, widths, by=by, example=example, generator=generator, fold_norm=not keep_norm)  # type: ignore[arg-type]
        return narrow.model

    makers: dict[str, Callable[[], Any]] = {
        "ifm": lambda: merged.model, "l1": lambda: pruned("l1"), "random": lambda: pruned("random"),
    }  # fmt: skip
    chosen = makers.pop(method.value)()
    names = {"l1": "L1 norm", "random": "random", "ifm": "ifm"}
    others = {names[name]: make() for name, make in makers.items()}
    if method is Method.l1:
        others = dict(reversed(others.items()))  # random first: it is the cheaper baseline
    return {
        "model": chosen,
        "method": method.value,
        "widths": {name: list(pair) for name, pair in merged.widths.items()},
        "params": list(merged.params),
        "flops": list(merged.flops),
        "skipped": merged.skipped,
    }, others


def _measure(
    evaluation: Evaluation | None, path: Path, loaded: Loaded, models: dict[str, Any], out: Path
) -> Comparison | None:
    """Scores of the model before, after, and of the baselines, on the same examples."""
    if evaluation is None:
        return None
    from salience.model import Loaded
    from salience.weights.evaluation import Comparison

    scores = {"before": evaluation.score(path if evaluation.kind == "command" else loaded)}
    for name, model in models.items():
        if evaluation.kind != "command":
            scores[name] = evaluation.score(Loaded(model, loaded.processor))
            continue
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.absolute().parent) as folder:
            target = Path(folder, out.name)
            write_model(loaded.model, model, target, path)
            scores[name] = evaluation.score(target)
    return Comparison(evaluation.measure, evaluation.higher_is_better, scores, evaluation.seed)


def _widest(loaded: Loaded, arch: str | None) -> Any:
    """What the architecture builds, which the list of shapes refers to; a model may have been narrowed before."""
    if arch is None:
        return loaded.model
    from salience.model.loading import factory

    return factory(arch)()


def _print(
    facts: dict[str, Any], comparison: Comparison | None, against: str, out: Path, page: Path, as_json: bool
) -> None:
    if as_json:
        result = facts | {"out": str(out), "report": str(page)}
        typer.echo(json.dumps(result | {"evaluation": comparison.as_dict("after") if comparison else None}))
        return
    if comparison is not None:
        print_comparison(comparison, "after", against)
    else:
        say("Not measured: give --evaluate or --evaluate-command to see what it costs.\n")
    before = sum(pair[0] for pair in facts["widths"].values())
    after = sum(pair[1] for pair in facts["widths"].values())
    say(
        f"channels   {before:,} -> {after:,} in {len(facts['widths'])} hidden widths ({len(facts['skipped'])} left as they are)\n"
        f"parameters {facts['params'][0]:,} -> {facts['params'][1]:,}\n"
        f"operations {facts['flops'][0]:,} -> {facts['flops'][1]:,} in one pass"
    )
    if facts["needs_list"]:
        say("load it with salience.model.load: these widths cannot be said in a configuration")
    say(f"written: {out}\nreport:  {page}")
