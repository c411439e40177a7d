"""`salience compress sparsify`: set the weights of a network that matter least to zero."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
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
from salience.cli.compress_channels import example_input, write_model
from salience.cli.verbs import compress
from salience.errors import InputError

if TYPE_CHECKING:
    from salience.model import Loaded
    from salience.weights.evaluation import Comparison, Evaluation

_EPILOG = (
    "Examples:\n\n"
    "salience compress sparsify my-resnet/ --density 0.3 --evaluate test.parquet -o sparse/\n\n"
    "salience compress sparsify my-llama/ --n-m 2:4 --method wanda --data some.txt --evaluate held-out.txt -o sparse/\n\n"
    "salience compress sparsify net.safetensors --arch mine.nets:build --density 0.1 --method synflow "
    "--input-shape 3,32,32 -o sparse.safetensors\n\n"
    "Sparse training (RigL, SET, gradual pruning, lottery tickets) runs inside your own loop: see SparseTrainer and "
    "SparsityCallback in salience.weights.\n\n"
    "Exit codes: 0 done, 2 usage, 3 bad data, 4 nothing to do, 130 interrupted."
)
_CALIBRATION = "Options of wanda, snip and grasp"


class Method(StrEnum):
    """What says that a weight matters."""

    magnitude = "magnitude"
    wanda = "wanda"
    snip = "snip"
    grasp = "grasp"
    synflow = "synflow"
    random = "random"


class Scope(StrEnum):
    """Among which weights they are compared."""

    global_ = "global"
    layer = "layer"
    row = "row"


class Grain(StrEnum):
    """What goes or stays as one."""

    weight = "weight"
    kernel = "kernel"
    channel = "channel"


class Allocation(StrEnum):
    """How density is shared out over the layers."""

    uniform = "uniform"
    uniform_plus = "uniform+"
    er = "er"
    erk = "erk"


@compress.command("sparsify", epilog=_EPILOG)
def sparsify(
    model: Annotated[Path, typer.Argument(help="A model directory, or FILE.safetensors with --arch.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write the sparse model.", show_default=False)],
    density: Annotated[float | None, typer.Option("--density", "-d", help="Share of the weights to keep.", show_default=False)] = None,
    n_m: Annotated[str | None, typer.Option("--n-m", help="Instead: keep N of each M consecutive inputs, as in 2:4.", show_default=False)] = None,
    method: Annotated[Method, typer.Option(help="magnitude; wanda: weight times input; snip, grasp, synflow: before training; random. Random and magnitude are compared.")] = Method.magnitude,
    scope: Annotated[Scope | None, typer.Option(help="Compare weights over all layers, within each, or within each row.", show_default="global; row for wanda")] = None,
    allocation: Annotated[Allocation | None, typer.Option(help="Share density out over the layers (scope layer or row).", show_default="uniform")] = None,
    layer_scores: Annotated[Path | None, typer.Option(help="Or by the Scores file of a method that weighs layers.", show_default=False)] = None,
    grain: Annotated[Grain, typer.Option(help="Single weights, kernels of convolutions, or all that leads to a channel.")] = Grain.weight,
    exclude: Annotated[list[str] | None, typer.Option("--exclude", help="Leave weights with this name or pattern dense, as in 'lm_head.*'; may be repeated.", show_default=False)] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Labelled images or text to weigh by; not what you measure on.", rich_help_panel=_CALIBRATION, show_default=False)] = None,
    data_limit: Annotated[int, typer.Option(help="Examples of it at most.", rich_help_panel=_CALIBRATION)] = 128,
    arch: Arch = None,
    input_shape: Annotated[str | None, typer.Option(help="Shape of one input where neither model nor --evaluate tells it, as in 3,32,32.", show_default=False)] = None,
    evaluate: Evaluate = None,
    evaluate_command: EvaluateCommand = None,
    lower_is_better: LowerIsBetter = False,
    limit: Limit = 1000,
    image_mean: ImageMean = None,
    image_std: ImageStd = None,
    image_size: ImageSize = None,
    seed: Annotated[int, typer.Option(help="Seed of random masks and of intervals.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    report: Annotated[Path | None, typer.Option(help="Report page.", show_default="OUT.report.html")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:  # fmt: skip
    """Set the weights that matter least to zero, once, without training on.

    The output has the same shapes and loads like the input. With --evaluate the result is measured on your own data,
    against the model before and against random and magnitude masks of equal size, and that is printed first.
    """
    pair, by = _check_usage(density, n_m, method, scope, allocation, layer_scores, data)
    page = check_paths(out, report, overwrite)
    images = {"image_mean": image_mean, "image_std": image_std, "image_size": image_size}
    evaluation = evaluation_of(evaluate, evaluate_command, lower_is_better, seed=seed, limit=limit, arch=arch, **images)  # type: ignore[arg-type]
    calibration = None if data is None else evaluation_of(data, None, seed=seed, limit=data_limit, arch=arch, **images)  # type: ignore[arg-type]
    from salience.model import load
    from salience.model.narrowing import shapes_file
    from salience.weights.model_output import model_output, put_model, work_folder

    with model_output(out, overwrite, [model], evaluation) as output, quiet_transformers(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "layer collapse")  # told in words of its own
        loaded = load(model, arch=arch)
        example = _sample(loaded, evaluation or calibration, input_shape)
        scores = _scores(loaded, method, calibration, example, exclude or (), seed)
        masks = _masks(loaded.model, scores, density, pair, by, allocation, layer_scores, grain,
                       flow=example if method is Method.synflow else None)  # fmt: skip
        baselines = _baselines(loaded.model, masks, method, exclude or (), seed, pair)
        facts = _account(loaded.model, masks, method, example)
        comparison = _measure(evaluation, model, loaded, {"after": masks, **baselines}, out)
        made = work_folder(output) / out.name
        _write(loaded, masks, model, made)
        listed = shapes_file(made).exists()
        put_model(output, made)
        output.commit({
            "command": "compress sparsify", "model": str(model), "method": method.value, "density": density,
            "n_m": n_m, "kept": facts["kept"], "seed": seed,
        })  # fmt: skip
    if not listed:
        shapes_file(out).unlink(missing_ok=True)  # of a narrower model that stood here before
    against = next(iter(baselines))
    from salience.cli._compress_sparsify_page import write_page

    write_page(page, str(out), method.value, facts, comparison, against)
    _print(facts, comparison, against, out, page, as_json)


def _check_usage(
    density: float | None, n_m: str | None, method: Method, scope: Scope | None, allocation: Allocation | None,
    layer_scores: Path | None, data: Path | None,
) -> tuple[tuple[int, int] | None, str]:  # fmt: skip
    """N and M, and the scope in force."""
    if (density is None) == (n_m is None):
        raise InputError("give either --density or --n-m")
    if density is not None and not 0 < density < 1:
        raise InputError(f"--density must lie between 0 and 1, not {density}")
    wants_data = method in (Method.wanda, Method.snip, Method.grasp)
    if wants_data != (data is not None):
        raise InputError(
            f"--method {method.value} needs --data" if wants_data else f"--data means nothing for {method.value}"
        )
    if allocation is not None and layer_scores is not None:
        raise InputError("give either --allocation or --layer-scores")
    if n_m is not None and (scope or allocation or layer_scores):
        raise InputError("--n-m says itself how many stay where: leave --scope, --allocation and --layer-scores out")
    by = scope or (
        Scope.row if method is Method.wanda else Scope.layer if allocation or layer_scores else Scope.global_
    )
    if by is Scope.global_ and (allocation or layer_scores):
        raise InputError("--allocation and --layer-scores go with --scope layer or row")
    if n_m is None:
        return None, by.value
    try:
        n, m = (int(part) for part in n_m.split(":"))
    except ValueError:
        raise InputError(f"--n-m must read N:M, as in 2:4, not {n_m!r}") from None
    return (n, m), by.value


def _sample(loaded: Loaded, evaluation: Evaluation | None, shape: str | None) -> Any:
    from salience.weights.ifm.merging import example_of

    return example_of(loaded.model, example_input(loaded, evaluation, shape))


def _scores(loaded: Loaded, method: Method, calibration: Evaluation | None, example: Any, exclude: Any,
            seed: int) -> dict[str, Any]:  # fmt: skip
    import torch

    from salience import weights

    model = loaded.model
    if method is Method.magnitude:
        return weights.score_magnitude(model, exclude)
    if method is Method.random:
        return weights.score_random(model, torch.Generator().manual_seed(seed), exclude)
    if method is Method.synflow:
        return weights.score_synflow(model, _image(example), exclude=exclude)
    assert calibration is not None
    batches = calibration_batches(calibration, loaded)
    if method is Method.wanda:
        return weights.score_wanda(model, batches, exclude)
    score = weights.score_snip if method is Method.snip else weights.score_grasp
    return score(model, batches, _loss(calibration.kind), exclude=exclude)


def _image(example: Any) -> Any:
    import torch

    if not isinstance(example, torch.Tensor):
        example = example.get("pixel_values") if "pixel_values" in example else None
    if example is None:
        raise InputError("--method synflow needs a network that takes images or vectors")
    return example


def calibration_batches(data: Evaluation, loaded: Loaded, batch_size: int = 32) -> list[tuple[Any, Any]]:
    """Batches of inputs and targets of images or text, as `Evaluation` reads them."""
    import torch

    if data.kind == "images":
        from torch.utils.data import DataLoader

        from salience.model import read_images

        images = read_images(
            str(data.data), loaded.processor, size=data.size, mean=data.mean, std=data.std, limit=data.limit
        )
        return [(pixels, labels) for pixels, labels in DataLoader(images, batch_size)]
    if loaded.processor is None:
        raise InputError(f"--data {data.data} is text, and the model comes without a tokenizer")
    from salience.io import Corpus, read

    corpus = Corpus(str(data.data), data.text_column)
    texts = [text for unit in corpus.units for batch in read(corpus, unit) for text in batch.text.to_pylist()]
    texts = [text for text in texts if text.strip()][: data.limit]
    rows = loaded.processor(texts, truncation=True, max_length=data.max_tokens)["input_ids"] if texts else []
    ids = [torch.tensor([row]) for row in rows if len(row) > 1]
    return [({"input_ids": row}, row) for row in ids]


def _loss(kind: str) -> Any:
    from torch.nn.functional import cross_entropy

    if kind == "images":
        return cross_entropy
    return lambda logits, ids: cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def _masks(model: Any, scores: dict[str, Any], density: float | None, pair: tuple[int, int] | None, scope: str,
           allocation: Allocation | None, layer_scores: Path | None, grain: Grain,
           flow: Any = None) -> dict[str, Any]:  # fmt: skip
    """Masks by the scores; with an input to `flow` through the network they are those of SynFlow's many rounds."""
    from salience.scores import Scores
    from salience.weights import allocate, mask_from_scores, prunable, synflow_masks
    from salience.weights.sparseland.masking import transposed_names

    weights = prunable(model)
    transposed = transposed_names(weights) & set(scores)
    if pair is not None:  # of SynFlow as well: N of each M stay, so that no layer can collapse in one round
        return mask_from_scores(scores, n_m=pair, transposed=transposed)
    shares: Any = density
    mode: Any = Scores.load(layer_scores) if layer_scores else allocation.value if allocation else None
    if mode is not None:
        shares = allocate({name: tuple(score.shape) for name, score in scores.items()}, density or 1.0, mode)
    if flow is not None:
        others = [name for name in weights if name not in scores]
        return synflow_masks(model, _image(flow), shares, exclude=others, scope=scope, grain=grain.value)  # type: ignore[arg-type]
    return mask_from_scores(scores, shares, scope=scope, grain=grain.value, transposed=transposed)  # type: ignore[arg-type]


def _baselines(model: Any, masks: dict[str, Any], method: Method, exclude: Any, seed: int,
               pair: tuple[int, int] | None) -> dict[str, Any]:  # fmt: skip
    """Masks of equal size: magnitude for other methods, and random ones with the same count in each layer."""
    import torch

    from salience.weights import mask_from_scores, prunable, score_magnitude, score_random, shuffle_masks
    from salience.weights.sparseland.masking import transposed_names

    transposed = transposed_names(prunable(model)) & set(masks)
    generator = torch.Generator().manual_seed(seed + 1)
    if pair is None:
        random = {"random": shuffle_masks(masks, generator)}
    else:
        random = {"random": mask_from_scores(score_random(model, generator, exclude), n_m=pair, transposed=transposed)}
    if method is Method.magnitude:
        return random
    share = sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    options: dict[str, Any] = {"density": share} if pair is None else {"n_m": pair}
    sized = mask_from_scores(score_magnitude(model, exclude), **options, transposed=transposed)
    return {"magnitude": sized, **random}


def _account(model: Any, masks: dict[str, Any], method: Method, example: Any) -> dict[str, Any]:
    from salience.weights import measure_latency, sparsity_report

    report = sparsity_report(model, masks, example)
    return {
        "method": method.value,
        "density": report.density,
        "weights": sum(layer.entries for layer in report.layers.values()),
        "kept": sum(layer.kept for layer in report.layers.values()),
        "flops": report.flops,
        "dense_flops": report.dense_flops,
        "bytes": report.bytes,
        "milliseconds": 1e3 * measure_latency(model, example, rounds=5),
        "collapsed": list(report.collapsed),
        "head": _head(model, masks),
        "layers": {name: layer.density for name, layer in report.layers.items()},
    }


def _head(model: Any, masks: dict[str, Any]) -> str | None:
    """Name of a language model's output weights where they are among those that were cut."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return next((name for name in masks if head is not None and model.get_parameter(name) is head.weight), None)


def _measure(
    evaluation: Evaluation | None, path: Path, loaded: Loaded, masks: dict[str, dict[str, Any]], out: Path
) -> Comparison | None:
    """Scores before and under each set of masks; one masked copy of the weights at a time."""
    if evaluation is None:
        return None
    from salience.weights import apply_masks
    from salience.weights.evaluation import Comparison

    command = evaluation.kind == "command"
    scores = {"before": evaluation.score(path if command else loaded)}
    for name, each in masks.items():
        dense = {key: loaded.model.get_parameter(key).detach().clone() for key in each}
        apply_masks(loaded.model, each)
        if command:
            with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.absolute().parent) as folder:
                target = Path(folder, out.name)
                _write(loaded, {}, path, target)
                scores[name] = evaluation.score(target)
        else:
            scores[name] = evaluation.score(loaded)
        for key, value in dense.items():
            loaded.model.get_parameter(key).data.copy_(value)
    return Comparison(evaluation.measure, evaluation.higher_is_better, scores, evaluation.seed)


def _write(loaded: Loaded, masks: dict[str, Any], source: Path, out: Path) -> None:
    """Write the sparse model; a directory tensor by tensor where it stores weights under the network's names."""
    from salience.model import TensorStore, rewrite
    from salience.model.narrowing import shapes_file
    from salience.weights import apply_masks

    if masks and source.is_dir():
        with TensorStore(source) as stored:
            streamed = set(masks) <= set(stored.entries)
        if streamed:
            rewrite(source, out, lambda name, t: _masked(t, masks.get(name)))
            return
    if masks:
        apply_masks(loaded.model, masks)
    listed = shapes_file(source)
    write_model(loaded.model, loaded.model, out, source)
    if source.is_file() and listed.is_file():
        shutil.copyfile(listed, shapes_file(out))


def _masked(tensor: Any, mask: Any) -> Any:
    return tensor if mask is None else tensor.masked_fill(~mask, 0)


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
    if facts["collapsed"]:
        say(f"note: nothing is left of {', '.join(facts['collapsed'][:5])}, which cuts the network", err=True)
    if facts["head"]:
        name = facts["head"]
        say(f"note: the output head was cut as well; leave it dense with --exclude {name!r}", err=True)
    say(
        f"weights    {facts['kept']:,} of {facts['weights']:,} kept ({facts['density']:.1%})\n"
        f"storage    {facts['bytes']['dense'] / 1e6:,.2f} MB as written; {facts['bytes']['bitmask'] / 1e6:,.2f} MB with a "
        f"bit mask, {facts['bytes']['csr'] / 1e6:,.2f} MB in compressed rows\n"
        f"operations {facts['flops'] / max(facts['dense_flops'], 1):.1%} of the dense ones, for hardware that skips zeros; "
        f"here a pass takes {facts['milliseconds']:.1f} ms with or without zeros"
    )
    say(f"written: {out}\nreport:  {page}")
