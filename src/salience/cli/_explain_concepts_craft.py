"""`salience explain concepts --method craft`: what is run, written and printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from salience.cli._say import say
from salience.cli.explain_concepts import Request, class_name
from salience.cli.explain_saliency import _bars
from salience.errors import InputError

if TYPE_CHECKING:
    from salience.concepts.craft.explain import ClassConcepts
    from salience.model import ImageSet


def run(asked: Request) -> None:
    """Find concepts of each class, measure them, and write the folder."""
    from salience.cli._explain_concepts_craft_page import write_crops, write_page
    from salience.concepts.craft.estimator import Craft
    from salience.concepts.craft.explain import explain_classes
    from salience.io import Output

    given, images, names = asked.given, asked.images, asked.names
    design, refine = given.get("design", 32), given.get("refine", 1)
    if min(design, given.get("patch_size", 2)) < 2 or refine < 0:
        raise InputError("--design and --patch-size must be at least 2, --refine at least 0")
    options = {"layer": asked.layer, "n_concepts": asked.n_concepts, "patch_size": given.get("patch_size"),
               "stride": given.get("stride"), "crops": given.get("crops", "grid"), "batch_size": asked.batch_size,
               "random_state": asked.seed}  # fmt: skip
    if asked.dry_run:
        _print_plan(asked, options, design)
        return
    with Output(asked.out, asked.overwrite, [asked.source, *asked.image_sources], folder=True) as folder:
        with _bars() as advance:
            found = explain_classes(
                asked.model, images, asked.classes, Craft(**options), n_design=design, measure=asked.measure,
                refine=refine, earlier_layer=given.get("earlier_layer"), random_state=asked.seed, progress=advance,
            )  # fmt: skip
        _write_tensors(folder, found)
        _write_lines(folder, found, images, names)
        write_crops(folder, found, images)
        crops = {"stride": options["stride"], "crops": options["crops"], "patch_size": found[0].craft.crops_.patch_size}
        settings = {**asked.settings, "method": "craft", "layer": found[0].craft.layer_, **crops, "design": design,
                    "refine": refine}  # fmt: skip
        page = asked.report or f"{asked.out}/report.html"
        write_page(found, images, names, settings, asked.report or folder.file("report.html"))
        folder.commit({**settings, "counts": {"images": len(images), "classes": len(asked.classes)}})
    _print(found, names, asked.out, page, asked.as_json)


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

    tensors: dict[str, torch.Tensor] = {}
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
            for place, i in enumerate(one.order.tolist()):
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


def _print_plan(asked: Request, options: dict[str, Any], design: int) -> None:
    import torch

    from salience.concepts.craft.crops import make_crops
    from salience.concepts.craft.estimator import nonnegative_layers

    pictures = torch.stack([asked.images[i][0] for i in range(min(2, len(asked.images)))])
    crops = make_crops(pictures[:1], patch_size=options["patch_size"], stride=options["stride"], kind=options["crops"])
    plan: dict[str, Any] = {
        "images": len(asked.images), "image_size": list(pictures[0].shape), "classes": asked.classes,
        "layer": asked.layer or nonnegative_layers(asked.model, pictures)[-1], "patch_size": crops.patch_size,
        "crops_per_image": len(crops), "passes_behind_the_layer_per_image": design * (asked.n_concepts + 2),
        "images_to_measure_on": asked.measure,
    }  # fmt: skip
    if asked.as_json:
        typer.echo(json.dumps(plan))
        return
    say(f"images   {plan['images']:,} of {' x '.join(map(str, plan['image_size']))}")
    say(f"classes  {', '.join(class_name(each, asked.names) for each in asked.classes)}\nlayer    {plan['layer']}")
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
