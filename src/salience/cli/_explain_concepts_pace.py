"""`salience explain concepts --method pace`: what is run, written and printed."""

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
    from salience.concepts.pace.explain import PaceFound

_WIDE, _REDUCED = 64, 25  # embeddings of more dimensions are reduced to so many, as in the authors' code


def run(asked: Request) -> None:
    """Find the concepts, measure them, and write the folder."""
    from salience.cli._explain_concepts_pace_page import write_crops, write_page
    from salience.concepts.pace.estimator import PACE
    from salience.concepts.pace.explain import explain_images
    from salience.io import Output

    config = getattr(asked.model, "config", None)
    if config is None:
        raise InputError(f"--method: pace explains vision transformers of the transformers library, not "
                         f"{type(asked.model).__name__}; for other networks take craft or holistic-concepts")  # fmt: skip
    layer, reduce_dim = _block(asked.layer), asked.given.get("reduce_dim")
    width = int(getattr(config, "hidden_size", 0) or 0)
    if reduce_dim is None and width > _WIDE:
        reduce_dim = _REDUCED
    if asked.dry_run:
        _print_plan(asked, layer, reduce_dim)
        return
    pace = PACE(n_concepts=asked.n_concepts, reduce_dim=reduce_dim, random_state=asked.seed)
    with Output(asked.out, asked.overwrite, [asked.source, *asked.image_sources], folder=True) as folder:
        with _bars() as advance:
            found = explain_images(
                asked.model, asked.images, pace, classes=asked.classes, layer=layer, measure=asked.measure,
                batch_size=asked.batch_size, random_state=asked.seed, progress=advance,
            )  # fmt: skip
        _write_tensors(folder, found)
        _write_lines(folder, found, asked)
        write_crops(folder, found, asked.images)
        settings = {**asked.settings, "method": "pace", "layer": layer, "reduce_dim": reduce_dim}
        page = asked.report or f"{asked.out}/report.html"
        write_page(found, asked.images, asked.names, settings, asked.report or folder.file("report.html"))
        folder.commit({**settings, "counts": {"images": len(asked.images), "learned_from": len(found.learned),
                                              "measured": len(found.measured)}})  # fmt: skip
    _print(found, asked, page)


def _block(layer: str | None) -> int:
    try:
        return -1 if layer is None else int(layer)
    except ValueError:
        raise InputError(f"--layer: got {layer!r}; for pace it is the number of a block, and -1 the last") from None


def speaks_for(found: PaceFound, names: list[str] | None) -> list[str]:
    """The class that each concept raises most, above the mean of all."""
    heads = found.pace.heads_ - found.pace.heads_.mean(0)
    return [class_name(int(row.argmax()), names) for row in heads]


def record(found: PaceFound, names: list[str] | None) -> dict[str, Any]:
    """What was found and measured, as plain data."""
    proof, pace = found.proof, found.pace
    return {
        "verdict": proof.words, "better_than_random": proof.better, "learned_from": len(found.learned),
        "measured": len(found.measured), "n_concepts": pace.n_concepts,
        "measures": {name: {which: float(v.mean()) for which, v in one.items()} for name, one in proof.values.items()},
        "over_random": {which: list(gain[:3]) for which, gain in proof.over_random.items()},
        "over_kmeans": {which: list(gain[:3]) for which, gain in proof.over_kmeans.items()},
        "bound": pace.bounds_[-1], "reseeded": pace.reseeded_, "notes": found.notes,
        "concepts": [{"concept": k, "share": float(share), "speaks_for": name} for k, (share, name) in
                     enumerate(zip(pace.weights_, speaks_for(found, names), strict=True))],
    }  # fmt: skip


def _write_tensors(folder: Any, found: PaceFound) -> None:
    """The model of the concepts, and what it says of the measured images."""
    from safetensors.torch import save_file

    pace, explained = found.pace, found.explained
    tensors = {name: getattr(pace, f"{name}_") for name in
               ("means", "covariances", "weights", "heads", "beta", "offset", "scale", "rotation")}  # fmt: skip
    tensors |= {"theta": explained.theta, "gamma": explained.gamma, "phi": explained.phi}
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items() if value is not None},
              folder.file("concepts.safetensors"), metadata={"theta": "rows of images.jsonl"})  # fmt: skip


def _write_lines(folder: Any, found: PaceFound, asked: Request) -> None:
    ids, names = asked.images.ids, asked.names
    speaks = speaks_for(found, names)
    with open(folder.file("concepts.jsonl"), "w", encoding="utf-8") as file:
        for k in found.pace.weights_.argsort(descending=True).tolist():
            line = {
                "concept": k, "share": float(found.pace.weights_[k]), "speaks_for": speaks[k],
                "nearest_patches": [{"id": ids[row], "patch": patch} for row, patch in found.patches[k].tolist()],
            }  # fmt: skip
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    with open(folder.file("images.jsonl"), "w", encoding="utf-8") as file:
        for row, predicted, theta in zip(found.measured, found.predicted, found.explained.theta, strict=True):
            line = {"id": ids[row], "predicted": class_name(int(predicted), names), "theta": theta.tolist()}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _print_plan(asked: Request, layer: int, reduce_dim: int | None) -> None:
    shape = list(asked.images[0][0].shape)
    plan = {"images": len(asked.images), "image_size": shape, "classes": asked.classes, "block": layer,
            "n_concepts": asked.n_concepts, "reduce_dim": reduce_dim, "passes": 2 * len(asked.images),
            "images_to_measure_on": asked.measure}  # fmt: skip
    if asked.as_json:
        typer.echo(json.dumps(plan))
        return
    say(f"images   {plan['images']:,} of {' x '.join(map(str, shape))}\nblock    {layer}")
    typer.echo(f"concepts {asked.n_concepts}, in {reduce_dim or 'all'} dimensions")
    typer.echo(f"passes   {plan['passes']:,} through the model: each image and its perturbed twin\nnothing was written")


def _print(found: PaceFound, asked: Request, page: Path | str) -> None:
    if asked.as_json:
        typer.echo(json.dumps({"out": str(asked.out), "report": str(page), **record(found, asked.names)}))
        return
    from rich.console import Console
    from rich.table import Table

    proof = found.proof
    say(f"{proof.words}.\n")
    table = Table(box=None, pad_edge=False)
    for column in (f"on {len(found.measured)} held-out images", "PACE", "k-means", "random"):
        table.add_column(column, justify="left" if column.startswith("on") else "right")
    for which, better in (("faithfulness", "higher"), ("stability", "lower"), ("sparsity", "higher")):
        table.add_row(f"{which} ({better} is better)",
                      *(f"{proof.values[name][which].mean():.3f}" for name in ("PACE", "k-means", "random")))  # fmt: skip
    Console(width=100).print(table)
    typer.echo("")
    speaks, weights = speaks_for(found, asked.names), found.pace.weights_
    for k in weights.argsort(descending=True).tolist()[:8]:
        say(f"concept {k}: {float(weights[k]):.0%} of the attention, speaks for {speaks[k]}")
    for note in found.notes:
        say(f"note: {note}", err=True)
    say(f"\nwritten: {asked.out}\nreport:  {page}")
