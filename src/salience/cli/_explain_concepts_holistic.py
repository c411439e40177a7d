"""`salience explain concepts --method holistic-concepts`: what is run, written and printed."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from salience.cli._say import say
from salience.cli.explain_concepts import Request, class_name
from salience.cli.explain_saliency import _bars
from salience.errors import InputError, nearest

if TYPE_CHECKING:
    from salience.concepts.holistic.explain import ClassView, HolisticConcepts
    from salience.model import ImageSet


def run(asked: Request) -> None:
    """Find concepts that the classes share, measure both halves, group the images, and write the folder."""
    from salience.cli._explain_concepts_holistic_page import write_crops, write_page
    from salience.concepts.holistic.explain import explain_strategies
    from salience.io import Output

    given = {"extractor": "nmf", "importance": "gradient_input", "clusters": None, **asked.given}
    _check(given)
    if asked.dry_run:
        _print_plan(asked, given)
        return
    with Output(asked.out, asked.overwrite, [asked.source, *asked.image_sources], folder=True) as folder:
        with _bars() as advance:
            found = explain_strategies(
                asked.model, asked.images, asked.classes, extractor=given["extractor"], method=given["importance"],
                layer=asked.layer, n_concepts=asked.n_concepts, n_clusters=given["clusters"], measure=asked.measure,
                batch_size=asked.batch_size, random_state=asked.seed, progress=advance,
            )  # fmt: skip
        _write_tensors(folder, found)
        _write_lines(folder, found, asked.images, asked.names)
        write_crops(folder, found, asked.images)
        settings = {**asked.settings, "method": "holistic-concepts", "layer": found.concepts.layer, **given,
                    "clusters": len(found.graph.nodes)}  # fmt: skip
        page = asked.report or f"{asked.out}/report.html"
        write_page(found, asked.images, asked.names, settings, asked.report or folder.file("report.html"))
        folder.commit({**settings, "counts": {"images": len(asked.images), "classes": len(asked.classes)}})
    _print(found, asked.names, asked.out, page, asked.as_json)


def _check(given: dict[str, Any]) -> None:
    from salience.concepts.attributions import METHODS
    from salience.concepts.holistic.explain import EXTRACTORS

    for name, known in (("extractor", EXTRACTORS), ("importance", METHODS)):
        if given[name] not in known:
            raise InputError(f"--{name}: there is no {given[name]!r}; {nearest(given[name], known)}")
    if given["clusters"] is not None and given["clusters"] < 1:
        raise InputError(f"--clusters: got {given['clusters']}; it must be at least 1")


def record(found: HolisticConcepts, names: list[str] | None) -> dict[str, Any]:
    """What was measured, as plain data."""
    graph = found.graph
    return {
        "layer": found.concepts.layer, "extractor": found.extractor, "importance": found.method,
        "extractors": {name: None if report is None else _finite(dataclasses.asdict(report))
                       for name, report in found.extraction.items()},
        "classes": [_class_record(view, names) for view in found.classes],
        "strategies": strategies(found, names),
        "edges": [[i, j, distance] for i, j, distance in graph.edges],
        "prevalence": graph.prevalence.tolist(), "reliability": [_known(value) for value in graph.reliability],
        "notes": found.notes,
    }  # fmt: skip


def _class_record(view: ClassView, names: list[str] | None) -> dict[str, Any]:
    proof = view.proof
    return {
        "class": view.class_id, "name": class_name(view.class_id, names), "images": len(view.images),
        "learned_from": len(view.learned), "measured": len(view.measured), "prediction_kept": view.agreement,
        "verdict": proof.words, "better_than_random": proof.better, "over_random": list(proof.over_random[:3]),
        "heuristic": proof.heuristic, "over_heuristic": list(proof.over_heuristic[:3]),
        "random_orders_beaten": proof.beaten,
        "concepts": [{"concept": int(i), "importance": list(view.importance[i][:3])} for i in view.order],
        "faithfulness": {name: dict(zip(("deletion", "insertion", "mu_fidelity"), values, strict=True))
                         for name, values in view.faithfulness.items()},
    }  # fmt: skip


def strategies(found: HolisticConcepts, names: list[str] | None) -> list[dict[str, Any]]:
    """The clusters: size, dominant concepts, how often they are right; which classes they are predicted and labelled."""
    lines = []
    for node in found.graph.nodes:
        line = {"images": len(node.images), "share": node.share, "concepts": node.concepts,
                "correct": _known(node.accuracy)}  # fmt: skip
        for kind, classes in (("predicted", found.predicted), ("labelled", found.labels)):
            if classes is not None:
                line[kind] = {class_name(view.class_id, names): int((classes[node.images] == view.class_id).sum())
                              for view in found.classes}  # fmt: skip
        lines.append(line)
    return lines


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {name: _known(value) if isinstance(value, float) else value for name, value in values.items()}


def _write_tensors(folder: Any, found: HolisticConcepts) -> None:
    """The dictionary, and for the images of the graph their rows, importances, strategies and places."""
    import torch
    from safetensors.torch import save_file

    save_file({
        "dictionary": found.concepts.extractor.components_.contiguous(), "rows": torch.from_numpy(found.rows.copy()),
        "importance": torch.from_numpy(found.local.copy()), "predicted": torch.from_numpy(found.predicted.copy()),
        "strategy": torch.from_numpy(found.graph.labels.copy()), "layout": torch.from_numpy(found.graph.layout.copy()),
    }, folder.file("concepts.safetensors"), metadata={"rows": "of the images, in the order that they were read"})  # fmt: skip


def _write_lines(folder: Any, found: HolisticConcepts, images: ImageSet, names: list[str] | None) -> None:
    graph = found.graph
    with open(folder.file("concepts.jsonl"), "w", encoding="utf-8") as file:
        for view in found.classes:
            for place, i in enumerate(view.order.tolist()):
                importance = view.importance[i]
                file.write(json.dumps({
                    "class": view.class_id, "name": class_name(view.class_id, names), "place": place + 1, "concept": i,
                    "importance": importance.mean, "low": importance.low, "high": importance.high,
                    "prevalence": float(graph.prevalence[i]), "reliability": _known(graph.reliability[i]),
                    "top_crops": [{"id": images.ids[row], "top": int(top), "left": int(left)}
                                  for row, top, left in view.crops[i]],
                }, ensure_ascii=False) + "\n")  # fmt: skip
    with open(folder.file("strategies.jsonl"), "w", encoding="utf-8") as file:
        for node, line in zip(graph.nodes, strategies(found, names), strict=True):
            ids = [images.ids[row] for row in found.rows[node.images]]
            file.write(json.dumps({**line, "ids": ids}, ensure_ascii=False) + "\n")
    with open(folder.file("measures.json"), "w", encoding="utf-8") as file:
        json.dump(record(found, names), file, ensure_ascii=False, indent=1)


def _print_plan(asked: Request, given: dict[str, Any]) -> None:
    import torch

    from salience.concepts.holistic.explain import layer_of

    pictures = torch.stack([asked.images[i][0] for i in range(min(2, len(asked.images)))])
    plan = {
        "images": len(asked.images), "image_size": list(pictures[0].shape), "classes": asked.classes,
        "layer": asked.layer or layer_of(asked.model, pictures, given["extractor"]), **given,
        "images_to_measure_on": asked.measure,
    }  # fmt: skip
    if asked.as_json:
        typer.echo(json.dumps(plan))
        return
    say(f"images      {plan['images']:,} of {' x '.join(map(str, plan['image_size']))}")
    say(
        f"classes     {', '.join(class_name(each, asked.names) for each in asked.classes)}\nlayer       {plan['layer']}"
    )
    typer.echo(f"extractor   {given['extractor']}, {asked.n_concepts} concepts\nimportance  {given['importance']}")
    typer.echo("nothing was written")


def _print(found: HolisticConcepts, names: list[str] | None, out: Path, page: Path | str, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"out": str(out), "report": str(page), **record(found, names)}))
        return
    for view in found.classes:
        say(f"{class_name(view.class_id, names)}: {view.proof.words}.")
    typer.echo("")
    for view in found.classes:
        _print_class(found, view, names)
    _print_strategies(found, names)
    for note in found.notes:
        say(f"note: {note}", err=True)
    say(f"written: {out}\nreport:  {page}")


def _print_class(found: HolisticConcepts, view: ClassView, names: list[str] | None) -> None:
    gain = view.proof.over_random
    say(f"{class_name(view.class_id, names)}: {len(view.images)} images, measured on {len(view.measured)}; better than "
        f"random by {gain.mean:+.3f} ({gain.low:+.3f} … {gain.high:+.3f})")  # fmt: skip
    rows = [(f"concept {i}", f"{each.mean:+.3f}", f"{each.low:+.3f} … {each.high:+.3f}")
            for i, each in ((i, view.importance[i]) for i in view.order[:8])]  # fmt: skip
    _print_table(("", found.method, "95 % interval"), rows)


def _print_strategies(found: HolisticConcepts, names: list[str] | None) -> None:
    lines = strategies(found, names)
    say(f"strategies of {len(found.rows)} images")
    kinds = [kind for kind in ("predicted", "labelled") if kind in lines[0]]
    _print_table(("", "images", "right", "concepts", *kinds), [
        (f"strategy {i + 1}", str(line["images"]), "–" if line["correct"] is None else f"{line['correct']:.0%}",
         " + ".join(map(str, line["concepts"])) or "–",
         *(", ".join(f"{name} {count}" for name, count in line[kind].items()) for kind in kinds))
        for i, line in enumerate(lines)
    ])  # fmt: skip


def _print_table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(
            column, justify="right" if column and column not in ("concepts", "predicted", "labelled") else "left"
        )
    for row in rows:
        table.add_row(*map(Text, row))
    Console(width=120).print(table)
    typer.echo("")
