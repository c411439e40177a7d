"""`salience explain concepts`: what a classifier sees in a class of the user's images, measured on held-out ones."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from salience.cli.explain_saliency import _device, _numbers, _size
from salience.cli.verbs import explain
from salience.errors import InputError, nearest

if TYPE_CHECKING:
    from torch import nn

    from salience.model import ImageSet

# A method, and the options that are its alone; its runner is the module _explain_concepts_METHOD.
METHODS: dict[str, tuple[str, ...]] = {
    "craft": ("patch_size", "stride", "crops", "design", "refine", "earlier_layer"),
    "holistic-concepts": ("extractor", "importance", "clusters"),
    "pace": ("reduce_dim",),
}
_EPILOG = (
    "Examples:\n\n"
    "salience explain concepts my-resnet/ photos/ --class parachute -o concepts\n\n"
    "salience explain concepts net.safetensors test.parquet --arch my_package.models:net --mean 0.485,0.456,0.406 "
    "--std 0.229,0.224,0.225 --class 3 --class 5 --concepts 10 -o concepts\n\n"
    "salience explain concepts my-resnet/ photos/ --method holistic-concepts --class cat --class dog -o concepts\n\n"
    "salience explain concepts my-vit/ photos/ --method pace --concepts 30 -o concepts\n\n"
    "Exit codes: 0 done, 2 usage, 3 bad data, 4 nothing to do, 130 interrupted."
)
_DATA = "Images"
_MEASURING = "Measuring"
_CRAFT = "Options of craft alone"
_HOLISTIC = "Options of holistic-concepts alone"
_PACE = "Options of pace alone"


@explain.command("concepts", epilog=_EPILOG)
def concepts(
    model: Annotated[str, typer.Argument(help="A transformers directory of an image classifier, or FILE.safetensors with --arch.", show_default=False)],
    images: Annotated[list[str], typer.Argument(help="A folder (sub-folders are classes), image files, globs, or .parquet with columns image and label.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Output folder: concepts.safetensors, concepts.jsonl, crops/, report.html.", show_default=False)],
    class_: Annotated[list[str] | None, typer.Option("--class", "-c", help="Class to explain, by number or name; may be repeated. Images that the model predicts as it are used, whatever their label. pace explains all without it.", show_default=False)] = None,
    method: Annotated[str, typer.Option(help="How concepts are found and weighed: craft; holistic-concepts, which has any extractor and any importance, and the strategies behind the classes; or pace, for vision transformers.")] = "craft",
    layer: Annotated[str | None, typer.Option("--layer", "-l", help="Layer to look at, by its name in named_modules; for craft, and for holistic-concepts with nmf, one whose output is never negative (default: the last such); for pace the number of a block (default: -1).", show_default=False)] = None,
    count: Annotated[int, typer.Option("--concepts", "-k", help="Concepts of a class; for pace of all images.")] = 10,
    arch: Annotated[str | None, typer.Option(help="For a .safetensors file: package.module:factory that builds the network.", show_default=False)] = None,
    size: Annotated[str | None, typer.Option(help="Without a processor: size of the images, as in 224 or 224x320.", rich_help_panel=_DATA, show_default="as they are")] = None,
    mean: Annotated[str | None, typer.Option(help="Without a processor: mean of each channel of 0..1, as in 0.485,0.456,0.406.", rich_help_panel=_DATA, show_default=False)] = None,
    std: Annotated[str | None, typer.Option(help="Without a processor: standard deviation of each channel.", rich_help_panel=_DATA, show_default=False)] = None,
    limit: Annotated[int | None, typer.Option(help="Take at most so many images, evenly spread.", rich_help_panel=_DATA, show_default=False)] = None,
    measure: Annotated[int, typer.Option(help="Images of a class at most to estimate importance on, and held-out ones to measure on.", rich_help_panel=_MEASURING)] = 100,
    patch_size: Annotated[int | None, typer.Option(help="Side of the crops in pixels.", rich_help_panel=_CRAFT, show_default="64 per 224 of the shorter side, at least 16 or half of it")] = None,
    stride: Annotated[int | None, typer.Option(help="Step of the grid of crops.", rich_help_panel=_CRAFT, show_default="0.8 of the side")] = None,
    crops: Annotated[str | None, typer.Option(help="Where crops are: grid or random (10 an image).", rich_help_panel=_CRAFT, show_default="grid")] = None,
    design: Annotated[int | None, typer.Option(help="Points of a block of the Sobol design; an image costs design x (concepts + 2) passes behind the layer.", rich_help_panel=_CRAFT, show_default="32")] = None,
    refine: Annotated[int | None, typer.Option(help="Most important concepts to take apart at an earlier layer.", rich_help_panel=_CRAFT, show_default="1")] = None,
    earlier_layer: Annotated[str | None, typer.Option(help="That layer.", rich_help_panel=_CRAFT, show_default="the last never negative one of the next finer resolution")] = None,
    extractor: Annotated[str | None, typer.Option(help="How concepts are found: nmf, k-means, pca, semi-nmf, sae (a top-K sparse autoencoder), random.", rich_help_panel=_HOLISTIC, show_default="nmf")] = None,
    importance: Annotated[str | None, typer.Option(help="How they are weighed: gradient_input, saliency, smoothgrad, squaregrad, vargrad, integrated_gradients, occlusion, tcav, rise, sobol, hsic, kernelshap.", rich_help_panel=_HOLISTIC, show_default="gradient_input")] = None,
    clusters: Annotated[int | None, typer.Option(help="Strategies in the graph.", rich_help_panel=_HOLISTIC, show_default="5")] = None,
    reduce_dim: Annotated[int | None, typer.Option(help="Principal components of the patches to work in.", rich_help_panel=_PACE, show_default="25 where there are more than 64 dimensions")] = None,
    batch_size: Annotated[int, typer.Option(help="Images at once; halved when memory runs out.")] = 64,
    device: Annotated[str, typer.Option(help="Where to compute, as in cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of random crops, designs, orders and intervals.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output folder of this command.")] = False,
    report: Annotated[Path | None, typer.Option(help="Report page.", show_default="OUT/report.html")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be read and looked at; write nothing.")] = False,
) -> None:  # fmt: skip
    """Show which concepts a classifier uses for a class: what they look like, where they are, how much they matter.

    Concepts are found in 70 % of the images that the model predicts as the class, and weighed there. First printed is
    what was measured on the other 30 %: concepts are taken out and put in from the most important on, and the
    probability of the class is followed; against random orders and cheaper ways to weigh concepts. pace finds concepts
    in 70 % of all images, and measures whether they tell the predictions of the others, and stay under perturbation.
    """
    given = {"patch_size": patch_size, "stride": stride, "crops": crops, "design": design, "refine": refine,
             "earlier_layer": earlier_layer, "extractor": extractor, "importance": importance,
             "clusters": clusters, "reduce_dim": reduce_dim}  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    _check(method, given)
    if method != "pace" and not class_:
        raise InputError(f"--class: name the class that {method} is to explain, by number or name")
    if count < 1 or measure < 2 or batch_size < 1 or seed < 0:
        raise InputError("--concepts and --batch-size must be at least 1, --measure at least 2, --seed at least 0")
    if report is not None and (report.suffix != ".html" or not report.parent.is_dir() or report.is_dir()):
        raise InputError(f"--report must name a file that ends in .html, in a folder that exists, not {report}")
    if report is not None and report.exists() and not overwrite:
        raise InputError(f"report {report} exists; pass --overwrite to replace it")

    from salience.model import load, read_images

    loaded = load(model, arch=arch, device=_device(device))
    processor = getattr(loaded.processor, "image_processor", loaded.processor)
    own = size is not None or mean is not None
    pictures = read_images(images, None if own else processor, size=_size(size), mean=_numbers("--mean", mean),
                           std=_numbers("--std", std), limit=limit)  # fmt: skip
    names = _class_names(loaded.model, pictures)
    wanted = list(dict.fromkeys(_class_number(each, names) for each in class_ or ()))
    runner(method).run(Request(
        model, list(images), loaded.model, pictures, wanted, names, out, layer, count, given, measure, batch_size, seed,
        overwrite, report, as_json, dry_run,
    ))  # fmt: skip


class Request(NamedTuple):
    """What was asked for, read and checked; what the runner of every method gets."""

    source: str
    image_sources: list[str]
    model: nn.Module
    images: ImageSet
    classes: list[int]
    names: list[str] | None  # of all classes, where the model or the images tell them
    out: Path
    layer: str | None
    n_concepts: int
    given: dict[str, Any]  # options that are the method's alone, where they were given
    measure: int
    batch_size: int
    seed: int
    overwrite: bool
    report: Path | None
    as_json: bool
    dry_run: bool

    @property
    def settings(self) -> dict[str, Any]:
        """The part of a manifest that all methods share."""
        return {"command": "explain concepts", "model": self.source, "images": self.image_sources,
                "classes": self.classes, "n_concepts": self.n_concepts, "measure": self.measure,
                "batch_size": self.batch_size, "seed": self.seed}  # fmt: skip


def runner(method: str) -> Any:
    """The module that does one method."""
    return import_module(f"salience.cli._explain_concepts_{method.split('-')[0]}")


def _check(method: str, given: dict[str, Any]) -> None:
    """Refuse a method that is not there, and options of another one."""
    if method not in METHODS:
        raise InputError(f"--method: there is no {method!r}; {nearest(method, METHODS)}")
    for name in given:
        owners = [owner for owner, options in METHODS.items() if name in options]
        if method not in owners:
            raise InputError(f"--{name.replace('_', '-')} belongs to --method {' or '.join(owners)}: leave it out")


def _class_names(model: Any, images: ImageSet) -> list[str] | None:
    """What the model calls its classes, or else the images."""
    labels = getattr(getattr(model, "config", None), "id2label", None)
    if labels and not all(str(name) == f"LABEL_{i}" for i, name in labels.items()):
        return [str(labels[i]) for i in sorted(labels)]
    return images.class_names


def _class_number(written: str, names: list[str] | None) -> int:
    if names is not None and written in names:
        return names.index(written)
    if written.isdigit():
        return int(written)
    known = nearest(written, names) if names else "the images name no classes, so give its number"
    raise InputError(f"--class: there is no class {written!r}; {known}")


def class_name(number: int, names: list[str] | None) -> str:
    """The name of a class, or its number."""
    return names[number] if names is not None and number < len(names) else f"class {number}"
