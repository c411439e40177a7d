"""`salience explain concepts`: what a classifier sees in a class of the user's images, measured on held-out ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from salience.cli._say import say
from salience.cli.explain_saliency import _bars, _device, _numbers, _size
from salience.cli.verbs import explain
from salience.errors import InputError, nearest

if TYPE_CHECKING:
    from salience.concepts.craft.explain import ClassConcepts
    from salience.model import ImageSet

METHODS = ("craft",)
_EPILOG = (
    "Examples:\n\n"
    "salience explain concepts my-resnet/ photos/ --class parachute -o concepts\n\n"
    "salience explain concepts net.safetensors test.parquet --arch my_package.models:net --mean 0.485,0.456,0.406 "
    "--std 0.229,0.224,0.225 --class 3 --class 5 --concepts 10 -o concepts\n\n"
    "Exit codes: 0 done, 2 usage, 3 bad data, 4 nothing to do, 130 interrupted."
)
_DATA = "Images"
_MEASURING = "Measuring"
_CRAFT = "Options of craft alone"


@explain.command("concepts", epilog=_EPILOG)
def concepts(
    model: Annotated[str, typer.Argument(help="A transformers directory of an image classifier, or FILE.safetensors with --arch.", show_default=False)],
    images: Annotated[list[str], typer.Argument(help="A folder (sub-folders are classes), image files, globs, or .parquet with columns image and label.", show_default=False)],
    class_: Annotated[list[str], typer.Option("--class", "-c", help="Class to explain, by number or name; may be repeated. Images that the model predicts as it are used, whatever their label.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Output folder: concepts.safetensors, concepts.jsonl, crops/, report.html.", show_default=False)],
    method: Annotated[str, typer.Option(help="How concepts are found and weighed: craft.")] = "craft",
    layer: Annotated[str | None, typer.Option("--layer", "-l", help="Layer to look at, by its name in named_modules; for craft one whose output is never negative [default: the last such].", show_default=False)] = None,
    count: Annotated[int, typer.Option("--concepts", "-k", help="Concepts of a class.")] = 10,
    arch: Annotated[str | None, typer.Option(help="For a .safetensors file: package.module:factory that builds the network.", show_default=False)] = None,
    size: Annotated[str | None, typer.Option(help="Without a processor: size of the images, as in 224 or 224x320 [default: as they are].", rich_help_panel=_DATA, show_default=False)] = None,
    mean: Annotated[str | None, typer.Option(help="Without a processor: mean of each channel of 0..1, as in 0.485,0.456,0.406.", rich_help_panel=_DATA, show_default=False)] = None,
    std: Annotated[str | None, typer.Option(help="Without a processor: standard deviation of each channel.", rich_help_panel=_DATA, show_default=False)] = None,
    limit: Annotated[int | None, typer.Option(help="Take at most so many images, evenly spread.", rich_help_panel=_DATA, show_default=False)] = None,
    measure: Annotated[int, typer.Option(help="Images of a class at most to estimate importance on, and held-out ones to measure on.", rich_help_panel=_MEASURING)] = 100,
    patch_size: Annotated[int | None, typer.Option(help="Side of the crops in pixels [default: 64 per 224 of the shorter side, at least 16 or half of it].", rich_help_panel=_CRAFT, show_default=False)] = None,
    stride: Annotated[int | None, typer.Option(help="Step of the grid of crops [default: 0.8 of the side].", rich_help_panel=_CRAFT, show_default=False)] = None,
    crops: Annotated[str | None, typer.Option(help="Where crops are: grid or random (10 an image) [default: grid].", rich_help_panel=_CRAFT, show_default=False)] = None,
    design: Annotated[int | None, typer.Option(help="Points of a block of the Sobol design; an image costs design x (concepts + 2) passes behind the layer [default: 32].", rich_help_panel=_CRAFT, show_default=False)] = None,
    refine: Annotated[int | None, typer.Option(help="Most important concepts to take apart at an earlier layer [default: 1].", rich_help_panel=_CRAFT, show_default=False)] = None,
    earlier_layer: Annotated[str | None, typer.Option(help="That layer [default: the last never negative one of the next finer resolution].", rich_help_panel=_CRAFT, show_default=False)] = None,
    batch_size: Annotated[int, typer.Option(help="Images at once; halved when memory runs out.")] = 64,
    device: Annotated[str, typer.Option(help="Where to compute, as in cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of random crops, designs, orders and intervals.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output folder of this command.")] = False,
    report: Annotated[Path | None, typer.Option(help="Report page [default: OUT/report.html].", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be read and looked at; write nothing.")] = False,
) -> None:  # fmt: skip
    """Show which concepts a classifier uses for a class: what they look like, where they are, how much they matter.

    Concepts are found in 70 % of the images that the model predicts as the class, and weighed there. First printed is
    what was measured on the other 30 %: concepts are taken out and put in from the most important on, and the
    probability of the class is followed; against random orders and cheaper ways to weigh concepts.
    """
    if method not in METHODS:
        raise InputError(f"--method: there is no {method!r}; {nearest(method, METHODS)}")
    if (
        count < 1
        or measure < 2
        or batch_size < 1
        or min(design or 2, patch_size or 2) < 2
        or (refine or 0) < 0
        or seed < 0
    ):
        raise InputError("--concepts and --batch-size must be at least 1, --measure, --design and --patch-size at least "
                         "2, --refine and --seed at least 0")  # fmt: skip
    if report is not None and (report.suffix != ".html" or not report.parent.is_dir() or report.is_dir()):
        raise InputError(f"--report must name a file that ends in .html, in a folder that exists, not {report}")
    if report is not None and report.exists() and not overwrite:
        raise InputError(f"report {report} exists; pass --overwrite to replace it")
    options = {"layer": layer, "n_concepts": count, "patch_size": patch_size, "stride": stride,
               "crops": crops or "grid", "batch_size": batch_size, "random_state": seed}  # fmt: skip
    _run(model, images, class_, out, options, design=design or 32, refine=1 if refine is None else refine,
         earlier_layer=earlier_layer, measure=measure, arch=arch, size=_size(size), mean=_numbers("--mean", mean),
         std=_numbers("--std", std), limit=limit, device=device, seed=seed, overwrite=overwrite, report=report,
         as_json=as_json, dry_run=dry_run)  # fmt: skip


def _run(model, images, classes, out, options, *, design, refine, earlier_layer, measure, arch, size, mean, std, limit,
         device, seed, overwrite, report, as_json, dry_run) -> None:  # fmt: skip
    from salience.cli._explain_concepts_page import write_crops, write_page
    from salience.concepts.craft.estimator import Craft
    from salience.concepts.craft.explain import explain_classes
    from salience.io import Output
    from salience.model import load, read_images

    loaded = load(model, arch=arch, device=_device(device))
    processor = getattr(loaded.processor, "image_processor", loaded.processor)
    own = size is not None or mean is not None
    pictures = read_images(images, None if own else processor, size=size, mean=mean, std=std, limit=limit)
    names = _class_names(loaded.model, pictures)
    wanted = list(dict.fromkeys(_class_number(each, names) for each in classes))
    if dry_run:
        _print_plan(loaded.model, pictures, wanted, names, options, design, measure, as_json)
        return
    with Output(out, overwrite, [model, *images], folder=True) as folder:
        with _bars() as advance:
            found = explain_classes(
                loaded.model, pictures, wanted, Craft(**options), n_design=design, measure=measure, refine=refine,
                earlier_layer=earlier_layer, random_state=seed, progress=advance,
            )  # fmt: skip
        _write_tensors(folder, found)
        _write_lines(folder, found, pictures, names)
        write_crops(folder, found, pictures)
        settings = {
            "command": "explain concepts", "model": model, "images": list(images), "method": "craft",
            "classes": wanted, **{**options, "layer": found[0].craft.layer_,
                                  "patch_size": found[0].craft.crops_.patch_size},
            "design": design, "refine": refine, "measure": measure, "seed": seed,
        }  # fmt: skip
        page = report or f"{out}/report.html"
        write_page(found, pictures, names, settings, report or folder.file("report.html"))
        folder.commit({**settings, "counts": {"images": len(pictures), "classes": len(wanted)}})
    _print(found, names, out, page, as_json)


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


def record(one: ClassConcepts, names: list[str] | None) -> dict[str, Any]:
    """What was measured of a class, as plain data."""
    proof = one.proof
    result: dict[str, Any] = {
        "class": one.class_id, "name": class_name(one.class_id, names), "images": len(one.images),
        "learned_from": len(one.learned), "measured": len(one.measured), "relative_error": one.relative_error,
        "prediction_kept": one.agreement, "layer": one.craft.layer_,
        "concepts": [{"concept": int(i), "importance": list(one.importance[i][:3]), "effect": float(one.effect[i])}
                     for i in one.order],
        "parts": {str(i): parts.layer_ for i, parts in one.parts.items()}, "notes": one.notes,
    }  # fmt: skip
    if proof is not None:
        result |= {
            "verdict": proof.words, "better_than_random": proof.better, "over_random": list(proof.over_random[:3]),
            "heuristic": proof.heuristic, "over_heuristic": list(proof.over_heuristic[:3]),
            "random_orders_beaten": proof.beaten,
            "areas": {name: {which: float(order.area(which).mean())
                             for which in ("deletion", "insertion", "logit_deletion")}
                      for name, order in proof.orders.items()},
        }  # fmt: skip
    return result


def _write_tensors(folder: Any, found: list[ClassConcepts]) -> None:
    """Dictionary, codes of crops and the crops' places of every class, and of the concepts that were taken apart."""
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for one in found:
        parts = {f"class{one.class_id}": one.craft}
        parts |= {f"class{one.class_id}.concept{i}": part for i, part in one.parts.items()}
        for name, craft in parts.items():
            boxes = torch.from_numpy(craft.crops_.boxes.copy())
            boxes[:, 0] = torch.from_numpy(one.learned)[craft.kept_][boxes[:, 0]]
            tensors |= {f"{name}.dictionary": craft.components_.contiguous(), f"{name}.boxes": boxes,
                        f"{name}.codes": craft.crop_codes_.contiguous()}  # fmt: skip
    save_file(tensors, folder.file("concepts.safetensors"), metadata={"boxes": "row of images.jsonl, top, left"})


def _write_lines(folder: Any, found: list[ClassConcepts], images: ImageSet, names: list[str] | None) -> None:
    with open(folder.file("concepts.jsonl"), "w", encoding="utf-8") as file:
        for one in found:
            for place, i in enumerate(map(int, one.order)):
                boxes = one.craft.crops_.boxes[one.top_crops[i]]
                rows = one.learned[one.craft.kept_][boxes[:, 0]]
                line = {
                    "class": one.class_id, "name": class_name(one.class_id, names), "place": place + 1, "concept": i,
                    "importance": one.importance[i].mean, "low": one.importance[i].low, "high": one.importance[i].high,
                    "effect": float(one.effect[i]), "top_crops": [
                        {"id": images.ids[row], "top": int(top), "left": int(left)}
                        for row, (_, top, left) in zip(rows, boxes, strict=True)
                    ],
                }  # fmt: skip
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _print_plan(model, images, wanted, names, options, design, measure, as_json) -> None:
    import torch

    from salience.concepts.craft.crops import make_crops
    from salience.concepts.craft.estimator import nonnegative_layers

    pictures = torch.stack([images[i][0] for i in range(min(2, len(images)))])
    crops = make_crops(pictures[:1], patch_size=options["patch_size"], stride=options["stride"], kind=options["crops"])
    plan = {
        "images": len(images), "image_size": list(pictures[0].shape), "classes": wanted,
        "layer": options["layer"] or nonnegative_layers(model, pictures)[-1], "patch_size": crops.patch_size,
        "crops_per_image": len(crops), "passes_behind_the_layer_per_image": design * (options["n_concepts"] + 2),
        "images_to_measure_on": measure,
    }  # fmt: skip
    if as_json:
        typer.echo(json.dumps(plan))
        return
    say(f"images   {plan['images']:,} of {' x '.join(map(str, plan['image_size']))}")
    say(f"classes  {', '.join(class_name(each, names) for each in wanted)}\nlayer    {plan['layer']}")
    typer.echo(f"crops    {len(crops)} an image, of {crops.patch_size} x {crops.patch_size} pixels")
    typer.echo(
        f"weighing {plan['passes_behind_the_layer_per_image']:,} passes behind the layer an image\nnothing was written"
    )


def _print(found: list[ClassConcepts], names: list[str] | None, out: Path, page: Path | str, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"out": str(out), "report": str(page), "classes": [record(one, names) for one in found]}))
        return
    for one in found:
        if one.proof is not None:
            say(f"{class_name(one.class_id, names)}: {one.proof.words}.")
    typer.echo("")
    for one in found:
        _print_class(one, names)
    say(f"written: {out}\nreport:  {page}")


def _print_class(one: ClassConcepts, names: list[str] | None) -> None:
    from rich.console import Console
    from rich.table import Table

    gain = one.proof.over_random if one.proof else None
    measured = f"; better than random by {gain.mean:+.3f} ({gain.low:+.3f} … {gain.high:+.3f})" if gain else ""
    say(f"{class_name(one.class_id, names)}: {len(one.images)} images, measured on {len(one.measured)}{measured}")
    table = Table(box=None, pad_edge=False)
    for column in ("", "importance", "95 % interval", "speaks", "effect on the logit"):
        table.add_column(column, justify="right" if column else "left")
    for i in one.order[:8]:
        importance = one.importance[i]
        table.add_row(f"concept {i}", f"{importance.mean:.3f}", f"{importance.low:.3f} … {importance.high:.3f}",
                      "for" if one.effect[i] >= 0 else "against", f"{one.effect[i]:+.2f}")  # fmt: skip
    Console(width=100).print(table)
    for note in one.notes:
        say(f"note: {note}", err=True)
    typer.echo("")
