"""`salience verify saliency`: which explanation may be trusted on the user's own model and images?"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from salience.cli._say import say
from salience.cli.verbs import verify
from salience.errors import InputError, nearest

if TYPE_CHECKING:
    from salience.features.study.trust import MapTrust, TrustReport
    from salience.model import ImageSet

_EPILOG = (
    "Examples:\n\n"
    "salience verify saliency my-resnet/ test.parquet -o verdict\n\n"
    "salience verify saliency my-vit/ photos/ --method grad-cam,rise,integrated-gradients "
    "--metric insertion,deletion,adp -o verdict\n\n"
    "salience verify saliency net.safetensors photos/ --arch my_package.models:net --size 224 "
    "--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 -o verdict\n\n"
    "Exit codes: 0 done, 2 usage, 3 bad data, 4 nothing to do, 130 interrupted."
)
_DATA = "Images"
_MEASURES = {
    "insertion": "insertion", "deletion": "deletion", "normalised-insertion": "insertion, normalised",
    "normalised-deletion": "deletion, normalised", "pos": "pos", "neg": "neg", "pic": "pic", "adp": "adp",
    "aic": "aic", "sic": "sic",
}  # fmt: skip
_RANDOMISATION = "randomisation"


@verify.command("saliency", epilog=_EPILOG)
def saliency(
    model: Annotated[str, typer.Argument(help="A transformers directory of an image classifier, or FILE.safetensors with --arch.", show_default=False)],
    images: Annotated[list[str], typer.Argument(help="A folder (sub-folders are classes), image files, globs, or .parquet with columns image and label.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Output folder: scores.jsonl, report.html.", show_default=False)],
    method: Annotated[str, typer.Option(help="all, or names with commas between: gradient, gradient-x-input, integrated-gradients, gradient-shap, lime, rise, meaningful-perturbation, cam, grad-cam, normgrad, linear.")] = "all",
    metric: Annotated[str, typer.Option(help="Names with commas between: insertion, deletion, normalised-insertion, normalised-deletion, pos, neg, pic, adp, aic, sic, randomisation.")] = "insertion,deletion,randomisation",
    layer: Annotated[str | None, typer.Option("--layer", "-l", help="Layer of cam, grad-cam, normgrad and linear.", show_default="the last with a map")] = None,
    target: Annotated[str, typer.Option(help="Class to explain: predicted, label, or a number.")] = "predicted",
    arch: Annotated[str | None, typer.Option(help="For a .safetensors file: package.module:factory that builds the network.", show_default=False)] = None,
    size: Annotated[str | None, typer.Option(help="Without a processor: size of the images, as in 224 or 224x320.", rich_help_panel=_DATA, show_default="as they are")] = None,
    mean: Annotated[str | None, typer.Option(help="Without a processor: mean of each channel of 0..1, as in 0.485,0.456,0.406.", rich_help_panel=_DATA, show_default=False)] = None,
    std: Annotated[str | None, typer.Option(help="Without a processor: standard deviation of each channel.", rich_help_panel=_DATA, show_default=False)] = None,
    limit: Annotated[int, typer.Option(help="Take at most so many images, evenly spread.", rich_help_panel=_DATA)] = 100,
    steps: Annotated[int, typer.Option(help="Steps of the curves.")] = 20,
    samples: Annotated[int, typer.Option(help="Masks of rise, samples of lime, twice the steps of meaningful-perturbation.")] = 200,
    batch_size: Annotated[int, typer.Option(help="Images at once; halved when memory runs out.")] = 32,
    device: Annotated[str, typer.Option(help="Where to compute, as in cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of everything drawn.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output folder of this command.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:  # fmt: skip
    """Find out which explanation may be trusted on your model and images.

    Explains your images with each method and measures the maps by each metric, against random smooth maps, the centre
    of the image and its edges, with intervals. A map that does not change when the network's weights are drawn anew
    shows the picture and not the model. The verdict is printed first; "no better than a random map" is one.
    """
    from salience.cli.explain_saliency import _bars, _device, _numbers, _size, _target
    from salience.features.study.trust import trust_report
    from salience.io import Output
    from salience.model import load, read_images

    names, measures, randomise = _chosen(method, metric)
    if limit < 1 or steps < 2 or samples < 2 or batch_size < 1:
        raise InputError("--limit and --batch-size must be at least 1, --steps and --samples at least 2")
    wanted, shape = _target(target), _size(size)
    means, spreads = _numbers("--mean", mean), _numbers("--std", std)
    loaded = load(model, arch=arch, device=_device(device))
    processor = getattr(loaded.processor, "image_processor", loaded.processor)
    own = shape is not None or means is not None
    pictures = read_images(images, None if own else processor, size=shape, mean=means, std=spreads, limit=limit)
    with Output(out, overwrite, [model, *images], folder=True) as folder:
        pixels, classes, agree = _inputs(loaded.model, pictures, wanted, batch_size)
        methods, left_out = _methods(loaded.model, names, layer, pixels, samples, batch_size, seed)
        with _bars() as advance, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = trust_report(
                loaded.model, pixels, classes, methods, measures, randomise=randomise, steps=steps,
                batch_size=batch_size * 2, random_state=seed, progress=advance,
            )  # fmt: skip
        result.notes += left_out + list(
            dict.fromkeys(str(one.message) for one in caught if one.category is UserWarning)
        )
        settings = {
            "command": "verify saliency", "model": model, "images": list(images), "methods": list(methods),
            "metrics": measures, "layer": layer, "target": target, "seed": seed, "steps": steps, "samples": samples,
        }  # fmt: skip
        _write(folder, result, pictures, classes, settings, agree)
        folder.commit({**settings, "counts": {"images": len(pictures)}})
    _print(result, len(pictures), out, as_json)


def _chosen(method: str, metric: str) -> tuple[list[str] | None, list[str], bool]:
    """Methods as the suite calls them (None: all), measures, and whether weights are drawn anew."""
    from salience.features.study.suite import CONTROLS, KINDS

    known = [name.replace(" ", "-") for name in KINDS if name not in CONTROLS] + ["normgrad", "linear"]
    names: list[str] | None = None
    if method.strip() != "all":
        names = [name.strip() for name in method.split(",") if name.strip()]
        for name in names:
            if name not in known:
                raise InputError(f"--method: there is no {name!r}; {nearest(name, [*known, 'all'])}")
        if not names or len(set(names)) < len(names):
            raise InputError(f"--method must be all, or different names with commas between, not {method!r}")
    measures = [name.strip() for name in metric.split(",") if name.strip()]
    for name in measures:
        if name not in (*_MEASURES, _RANDOMISATION):
            raise InputError(f"--metric: there is no {name!r}; {nearest(name, [*_MEASURES, _RANDOMISATION])}")
    scored = [_MEASURES[name] for name in measures if name != _RANDOMISATION]
    if not scored or len(set(measures)) < len(measures):
        raise InputError(f"--metric must name at least one measure besides {_RANDOMISATION}, each once, not {metric!r}")
    return names, scored, _RANDOMISATION in measures


def _inputs(model: Any, pictures: ImageSet, target: str | int, batch_size: int) -> tuple:
    """Pixels, the class to explain of each image, and how often prediction and label agree (None without labels)."""
    import torch

    from salience.features.attribution import device_of, evaluating, target_classes
    from salience.model import logits_of, map_batches, run

    device = device_of(model)
    pixels = torch.stack([pictures[i][0] for i in range(len(pictures))]).to(device)
    with evaluating(model), torch.no_grad():
        logits = map_batches(lambda x: logits_of(run(model, x)), pixels, batch_size=batch_size)
    predicted = target_classes(logits, None)
    if target == "label" and pictures.labels is None:
        raise InputError("--target label: the images have no labels (sub-folders, or a column 'label')")
    wanted: Any = {"predicted": None, "label": pictures.labels}.get(str(target), target)
    classes = target_classes(logits, wanted)
    agree = None if pictures.labels is None else float((predicted == pictures.labels).double().mean())
    return pixels, classes.to(device), agree


def _methods(model, names, layer, pixels, samples, batch_size, seed) -> tuple[dict, list[str]]:
    """The functions to run, controls last, and what was left out."""
    from salience.features.attribution import default_layers
    from salience.features.methods import METHODS
    from salience.features.study.suite import CONTROLS, KINDS, attribution_suite

    at = layer or default_layers(model, pixels[:1])[-1]
    options = {
        "layer": at, "example": pixels[:2], "samples": samples, "batch_size": batch_size, "random_state": seed,
    }  # fmt: skip
    if names is None:
        suite = attribution_suite(model, **options)
        left = [f"{name} is not defined on this model and was left out" for name in KINDS if name not in suite]
        return suite, left
    inner = [name.replace("-", " ") if name.replace("-", " ") in KINDS else name for name in names]
    suite = attribution_suite(model, [name for name in inner if name in KINDS] + list(CONTROLS), **options)
    for name in inner:
        if name not in KINDS:
            suite[name] = _summed(METHODS[name].make(model, [at]))
    return {**{name: suite[name] for name in inner}, **{name: suite[name] for name in CONTROLS}}, []


def _summed(method: Any) -> Any:
    return lambda images, classes: method.attribute(images, target=classes).sum(1)


def _write(
    folder: Any, result: TrustReport, pictures: ImageSet, classes: Any, settings: dict, agree: float | None
) -> None:
    from salience.cli._verify_saliency_page import write_page

    with open(folder.file("scores.jsonl"), "w", encoding="utf-8") as file:
        for (_, method, measure), values in result.result.scores.items():
            for name, label, value in zip(pictures.ids, classes.tolist(), values.tolist()):
                line = {"id": name, "class": label, "method": method, "measure": measure,
                        "score": value if value == value else None}  # fmt: skip
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    write_page(result, pictures, classes.cpu(), settings, agree, folder.file("report.html"))


def record(one: MapTrust) -> dict[str, Any]:
    """A verdict as plain data."""

    def plain(value: Any) -> Any:
        return None if isinstance(value, float) and value != value else value

    def differences(found: dict) -> dict[str, Any]:
        return {name: [plain(float(v)) for v in values[:3]] for name, values in found.items()}

    return {
        "method": one.method, "kind": one.kind, "trust": one.level, "verdict": one.words,
        "means": {name: plain(value) for name, value in one.means.items()},
        "better_than_random_by": differences(one.over_random),
        "better_than_heuristic_by": differences(one.over_heuristic),
        "correlation_with_random_weights": plain(one.randomised),
    }  # fmt: skip


def _interval(gain: tuple[float, float, float, int]) -> str:
    mean, low, high, _ = gain
    return f"{mean:+.3f}" if low != low else f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def _print(result: TrustReport, images: int, out: Path, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({
            "out": str(out), "report": str(out / "report.html"), "images": images,
            "methods": [record(one) for one in result.verdicts],
            "controls": [record(one) for one in result.controls.values()],
            "correlation_with_confidence": result.confidence, "notes": result.notes,
        }))  # fmt: skip
        return
    from rich.console import Console
    from rich.table import Table

    measures = list(result.verdicts[0].means)
    table = Table(box=None, pad_edge=False)
    table.add_column("method")
    table.add_column("trust")
    for measure in measures:
        table.add_column(measure, justify="right")
        table.add_column("better than random by", justify="right", max_width=22)
    table.add_column("with random weights", justify="right", max_width=12)
    for one in [*result.verdicts, *result.controls.values()]:
        cells: list[str] = []
        for measure in measures:
            cells.append(f"{one.means[measure]:.3f}")
            gain = one.over_random.get(measure)
            cells.append("" if gain is None else _interval(gain))
        same = "" if one.randomised != one.randomised else f"{one.randomised:.2f}"
        table.add_row(one.method, "(control)" if one.method in result.controls else one.level, *cells, same)
    for one in result.verdicts:
        say(f"{one.method}: {one.level}. {one.words[0].upper() + one.words[1:]}.")
    typer.echo("")
    Console(width=120, highlight=False).print(table)
    for measure, value in result.confidence.items():
        if abs(value) > 0.7:
            say(f"note: {measure} follows the model's confidence here (r = {value:.2f}): it ranks methods on this model, "
                "and says nothing between models", err=True)  # fmt: skip
    for note in result.notes:
        say(f"note: {note}", err=True)
    say(f"\non {images:,} images; written: {out}\nreport:  {out / 'report.html'}")
