"""`salience explain saliency`: show where in the user's images a classifier looks, and measure whether it is true."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from salience.cli._say import say
from salience.cli.verbs import explain
from salience.errors import InputError

if TYPE_CHECKING:
    from salience.features.explain import Explained
    from salience.features.methods import SaliencyMethod
    from salience.model import ImageSet

_EPILOG = (
    "Examples:\n\n"
    "salience explain saliency my-vit/ photos/ -o maps\n\n"
    "salience explain saliency my-resnet/ test.parquet --method normgrad,gradcam,integrated-gradients -o maps\n\n"
    "salience explain saliency net.safetensors photos/*.jpg --arch my_package.models:net --size 224 "
    "--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 -o maps\n\n"
    "salience explain saliency net.safetensors photos/*.jpg --arch my_package.models:net --method bee --metric deletion "
    "-o maps\n\n"
    "Exit codes: 0 done, 2 usage, 3 bad data, 4 nothing to do, 130 interrupted."
)
_DATA = "Images"
_MEASURING = "Measuring"
_NORMGRAD = "Options of normgrad alone"
_BEE = "Options of bee alone"


@explain.command("saliency", epilog=_EPILOG)
def saliency(
    model: Annotated[str, typer.Argument(help="A transformers directory of an image classifier, or FILE.safetensors with --arch.", show_default=False)],
    images: Annotated[list[str], typer.Argument(help="A folder (sub-folders are classes), image files, globs, or .parquet with columns image and label.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Output folder: maps.safetensors, images.jsonl, overlays/, report.html.", show_default=False)],
    method: Annotated[str, typer.Option(help="One or several, with commas between: normgrad, gradcam, linear (gradient x activation), gradient, integrated-gradients, bee.")] = "normgrad",
    layer: Annotated[list[str] | None, typer.Option("--layer", "-l", help="Layer to look at, by its name in named_modules; may be repeated.", show_default="the last of each resolution")] = None,
    target: Annotated[str, typer.Option(help="Class to explain: predicted, label, or a number.")] = "predicted",
    arch: Annotated[str | None, typer.Option(help="For a .safetensors file: package.module:factory that builds the network.", show_default=False)] = None,
    size: Annotated[str | None, typer.Option(help="Without a processor: size of the images, as in 224 or 224x320.", rich_help_panel=_DATA, show_default="as they are")] = None,
    mean: Annotated[str | None, typer.Option(help="Without a processor: mean of each channel of 0..1, as in 0.485,0.456,0.406.", rich_help_panel=_DATA, show_default=False)] = None,
    std: Annotated[str | None, typer.Option(help="Without a processor: standard deviation of each channel.", rich_help_panel=_DATA, show_default=False)] = None,
    limit: Annotated[int | None, typer.Option(help="Take at most so many images, evenly spread.", rich_help_panel=_DATA, show_default=False)] = None,
    measure: Annotated[int, typer.Option(help="Images to measure on; 0 measures nothing.", rich_help_panel=_MEASURING)] = 100,
    steps: Annotated[int, typer.Option(help="Steps of insertion and deletion.", rich_help_panel=_MEASURING)] = 20,
    selective: Annotated[bool, typer.Option("--selective", help="Only what speaks for the class.", rich_help_panel=_NORMGRAD)] = False,
    fuse: Annotated[str | None, typer.Option(help="How layers become one map: product or mean.", rich_help_panel=_NORMGRAD, show_default="product")] = None,
    layer_weights: Annotated[str | None, typer.Option(help="uniform, or linear: deeper layers count more.", rich_help_panel=_NORMGRAD, show_default="uniform")] = None,
    meta_lr: Annotated[float | None, typer.Option(help="Meta-saliency: take one training step of this length on each image first, as in 0.0025.", rich_help_panel=_NORMGRAD, show_default=False)] = None,
    metric: Annotated[str | None, typer.Option(help="Measure that the map is to be best under: insertion, deletion, pos, neg, pic, adp, aic, sic.", rich_help_panel=_BEE, show_default="insertion")] = None,
    draws: Annotated[int | None, typer.Option(help="Maps drawn per image, of which the best is kept.", rich_help_panel=_BEE, show_default="20")] = None,
    finetune: Annotated[bool, typer.Option("--finetune", help="Learn on from the draws of each image itself.", rich_help_panel=_BEE)] = False,
    overlays: Annotated[int, typer.Option(help="Images to write overlays of, evenly spread.")] = 16,
    batch_size: Annotated[int, typer.Option(help="Images at once; halved when memory runs out.")] = 32,
    device: Annotated[str, typer.Option(help="Where to compute, as in cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of random maps, random weights and intervals.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output folder of this command.")] = False,
    report: Annotated[Path | None, typer.Option(help="Report page.", show_default="OUT/report.html")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be read and looked at; write nothing.")] = False,
) -> None:  # fmt: skip
    """Show where in your images a classifier looks.

    Makes a saliency map of every image with each method. Then measures whether the maps point at what the model uses,
    and prints that first: pixels are put into a blurred image and taken out of the image in the order of the map, and
    the probability of the class is followed; against random smooth maps, the centre of the image, and its edges.
    """
    from salience.features.methods import method as method_called

    chosen = {name: method_called(name) for name in _names(method)}
    options = {"selective": selective, "fuse": fuse, "layer_weights": layer_weights, "meta_lr": meta_lr,
               "metric": metric, "draws": draws, "finetune": finetune}  # fmt: skip
    given = {name: value for name, value in options.items() if value not in (None, False)}
    _refuse_strays(given, chosen, layer)
    if min(measure, overlays) < 0 or batch_size < 1 or steps < 2:
        raise InputError("--measure and --overlays must be at least 0, --batch-size at least 1, --steps at least 2")
    if report is not None and (report.suffix != ".html" or not report.parent.is_dir() or report.is_dir()):
        raise InputError(f"--report must name a file that ends in .html, in a folder that exists, not {report}")
    if report is not None and report.exists() and not overwrite:
        raise InputError(f"report {report} exists; pass --overwrite to replace it")
    _run(
        model, images, out, chosen, given, layers=layer or [], target=_target(target), arch=arch, size=_size(size),
        mean=_numbers("--mean", mean), std=_numbers("--std", std), limit=limit, measure=measure, steps=steps,
        overlays=overlays, batch_size=batch_size, device=device, seed=seed, overwrite=overwrite, report=report,
        as_json=as_json, dry_run=dry_run,
    )  # fmt: skip


def _run(model, images, out, chosen, given, *, layers, target, arch, size, mean, std, limit, measure, steps, overlays,
         batch_size, device, seed, overwrite, report, as_json, dry_run) -> None:  # fmt: skip
    from salience.cli._explain_saliency_page import write_overlays, write_page
    from salience.features.explain import explain as explain_images
    from salience.io import Output
    from salience.model import load, read_images

    loaded = load(model, arch=arch, device=_device(device))
    processor = getattr(loaded.processor, "image_processor", loaded.processor)
    own = size is not None or mean is not None
    pictures = read_images(images, None if own else processor, size=size, mean=mean, std=std, limit=limit)
    if dry_run:
        _print_plan(loaded.model, pictures, chosen, layers, measure, steps, as_json)
        return
    with Output(out, overwrite, [model, *images], folder=True) as folder:
        with _bars() as advance:
            result = explain_images(
                loaded.model, pictures, chosen, layers=layers, options=given, target=target, measure=measure,
                steps=steps, batch_size=batch_size, random_state=seed, progress=advance,
            )  # fmt: skip
        _write_maps(folder, result, pictures)
        write_overlays(folder, result, pictures, overlays)
        settings = {
            "command": "explain saliency", "model": model, "images": list(images), "methods": list(chosen),
            "layers": result.layers, "target": target, "options": given, "seed": seed, "steps": steps,
        }  # fmt: skip
        page = report or f"{out}/report.html"
        write_page(result, pictures, settings, report or folder.file("report.html"))
        folder.commit({**settings, "counts": {"images": len(pictures), "measured": len(result.measured)}})
    _print(result, pictures, out, page, as_json)


def _names(written: str) -> list[str]:
    names = [name.strip() for name in written.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise InputError(f"--method must be one or several different names with commas between, not {written!r}")
    return names


def _refuse_strays(given: dict[str, Any], chosen: dict[str, SaliencyMethod], layer: list[str] | None) -> None:
    from salience.features.methods import METHODS

    for name in given:
        owners = [owner for owner, method in METHODS.items() if name in method.options]
        if not set(owners) & set(chosen):
            raise InputError(f"--{name.replace('_', '-')} belongs to --method {' or '.join(owners)}: leave it out")
    if layer and all(method.layers == "none" for method in chosen.values()):
        raise InputError(f"--layer means nothing for --method {','.join(chosen)}, which looks at the image")


def _target(written: str) -> str | int:
    if written in ("predicted", "label"):
        return written
    try:
        return int(written)
    except ValueError:
        raise InputError(f"--target must be predicted, label, or the number of a class, not {written!r}") from None


def _numbers(name: str, written: str | None) -> list[float] | None:
    if written is None:
        return None
    try:
        return [float(part) for part in written.split(",")]
    except ValueError:
        raise InputError(f"{name} must be numbers with commas between, not {written!r}") from None


def _size(written: str | None) -> tuple[int, int] | None:
    if written is None:
        return None
    parts = written.lower().split("x")
    if len(parts) > 2 or not all(part.isdigit() for part in parts):
        raise InputError(f"--size must be a number of pixels or HEIGHTxWIDTH, not {written!r}")
    return int(parts[0]), int(parts[-1])


def _device(name: str) -> Any:
    import torch

    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name!r} cannot be used: {str(error).splitlines()[0]}") from None


class _bars:
    """A progress bar on the error output for each stage, where somebody watches."""

    def __enter__(self):
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        self.progress = Progress(console=console, transient=True, disable=not console.is_terminal)
        self.progress.start()
        tasks: dict[str, Any] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = self.progress.add_task(stage, total=total)
            self.progress.update(tasks[stage], completed=done)

        return advance

    def __exit__(self, *error: object) -> None:
        self.progress.stop()


def _write_maps(folder: Any, result: Explained, images: ImageSet) -> None:
    from safetensors.torch import save_file

    maps = {name: one.contiguous() for name, one in result.maps.items()}
    save_file(maps, folder.file("maps.safetensors"), metadata={"rows": "as in images.jsonl"})
    names = images.class_names
    with open(folder.file("images.jsonl"), "w", encoding="utf-8") as file:
        for i, name in enumerate(images.ids):
            line: dict[str, Any] = {
                "id": name, "explained": int(result.classes[i]), "probability": float(result.probabilities[i]),
                "predicted": int(result.predicted[i]), "measured": i in set(result.measured),
            }  # fmt: skip
            if images.labels is not None:
                line["label"] = int(images.labels[i])
            if names is not None and line["explained"] < len(names):
                line["name"] = names[line["explained"]]
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _print_plan(model, images, chosen, layers, measure, steps, as_json) -> None:
    from salience.features.explain import BASELINES, attributions_for

    _, places = attributions_for(model, images, chosen, layers, {})
    measured = min(measure, len(images))
    plan = {
        "images": len(images), "image_size": list(images[0][0].shape), "layers": places,
        "measured": measured, "passes_of_measuring": 2 * measured * (steps + 1) * (len(chosen) + len(BASELINES)),
        "map_bytes": 4 * len(chosen) * len(images) * int(images[0][0][0].numel()),
    }  # fmt: skip
    if as_json:
        typer.echo(json.dumps(plan))
        return
    say(f"images   {plan['images']:,} of {' x '.join(map(str, plan['image_size']))}")
    for name, where in places.items():
        say(f"{name:<8} at {', '.join(where) or 'the image itself'}")
    typer.echo(f"measured {measured:,} images, {plan['passes_of_measuring']:,} forward passes")
    typer.echo(f"maps     {plan['map_bytes'] / 1e6:,.1f} MB\nnothing was written")


def _print(result: Explained, images: ImageSet, out: Path, page: Path | str, as_json: bool) -> None:
    from salience.features.faithfulness import record

    if as_json:
        summary = {
            "out": str(out), "report": str(page), "images": len(images), "measured": len(result.measured),
            "layers": result.layers, "methods": [record(proof) for proof in result.proofs.values()],
            "notes": result.notes,
        }  # fmt: skip
        typer.echo(json.dumps(summary))
        return
    if result.proofs:
        _print_proofs(result)
    else:
        typer.echo("Not measured: --measure 0.\n")
    for note in result.notes:
        say(f"note: {note}", err=True)
    for name, where in result.layers.items():
        say(f"{name} looked at {', '.join(where) or 'the image itself'}")
    say(f"written: {out} ({len(images):,} images)\nreport:  {page}")


def _print_proofs(result: Explained) -> None:
    from rich.console import Console
    from rich.table import Table

    for name, proof in result.proofs.items():
        say(f"{name}: {proof.words}.")
    typer.echo("")
    table = Table(box=None, pad_edge=False)
    columns = (
        "",
        "insertion",
        "deletion",
        "better than random by",
        "95 % interval",
        "than heuristic by",
        "95 % interval",
    )
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for name, proof in result.proofs.items():
        random, other = proof.over_random, proof.over_heuristic
        table.add_row(
            name, f"{proof.insertion:.3f}", f"{proof.deletion:.3f}", f"{random.mean:+.3f}",
            f"{random.low:+.3f} … {random.high:+.3f}", f"{other.mean:+.3f}", f"{other.low:+.3f} … {other.high:+.3f}",
        )  # fmt: skip
    Console(width=110).print(table)
    best = next(iter(result.proofs.values())).heuristic
    say(f"\non {len(result.measured)} images; the best heuristic here is {best}")
