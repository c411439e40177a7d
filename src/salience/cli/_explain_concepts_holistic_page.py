"""Crops and the report of `explain concepts --method holistic-concepts`, from the plain data of its result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from salience.cli._concept_pages import bare, class_verdict, save_strip

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from salience.concepts.holistic.explain import ClassView, HolisticConcepts
    from salience.io import Output
    from salience.model import ImageSet

_CONCEPTS, _CROPS, _MAPS = 6, 6, 3  # of a class on the page
_EXAMPLES = 8  # images of a strategy
_WORDS = {
    "relative_l2": "left out", "sparsity": "zeros", "stability": "unsteady", "w1": "W1", "frechet": "Fréchet",
    "ood": "off the data", "agreement": "predictions kept",
}  # fmt: skip


def write_crops(folder: Output, found: HolisticConcepts, images: ImageSet) -> None:
    """Write ``crops/CLASS-CONCEPT.png``: where most of a concept is, in a row."""
    for view in found.classes:
        for i in map(int, view.order):
            cuts = _cuts(view.crops[i], found.side, images)
            if cuts:
                save_strip(folder.file(f"crops/class{view.class_id}-concept{i:02d}.png"), cuts)


def write_page(
    found: HolisticConcepts, images: ImageSet, names: list[str] | None, settings: Mapping[str, Any], path: Path
) -> None:
    """Write the page: verdict, strategies, each class, extractors beside one another."""
    from salience import report
    from salience.cli.explain_concepts import class_name

    called = {view.class_id: class_name(view.class_id, names) for view in found.classes}
    proofs = {called[view.class_id]: view.proof for view in found.classes}
    blocks: list[Any] = [class_verdict(report, proofs), *_graph_blocks(report, found, images, called)]
    for view in found.classes:
        blocks += _class_blocks(report, found, view, images, called[view.class_id])
    blocks += _extractor_blocks(report, found)
    blocks += [report.text(f"Note: {note}") for note in found.notes]
    blocks += [report.heading("How it was made"), report.code(json.dumps(settings, indent=1, ensure_ascii=False))]
    subtitle = f"What {settings['model']} sees, at {settings['layer']}, in {len(images):,} images"
    report.page("Concepts", blocks, path=path, subtitle=subtitle)


def _graph_blocks(report: Any, found: HolisticConcepts, images: ImageSet, called: dict[int, str]) -> list[Any]:
    from salience.concepts import draw_graph

    graph = found.graph
    kinds = {"predicted": found.predicted, "labelled": found.labels}
    counted = [(f"{kind} {name}", classes == each) for kind, classes in kinds.items() if classes is not None
               for each, name in called.items()]  # fmt: skip
    rows = [
        (i + 1, len(node.images), None if np.isnan(node.accuracy) else f"{node.accuracy:.0%}",
         " + ".join(f"c{c}" for c in node.concepts) or None, *(int(is_it[node.images].sum()) for _, is_it in counted))
        for i, node in enumerate(graph.nodes)
    ]  # fmt: skip
    columns = ["strategy", "images", "right", "concepts", *(name for name, _ in counted)]
    align = ["left", "right", "right", "left", *("right" for _ in counted)]
    titles = " and ".join(called.values())
    return [
        report.heading(f"Strategies behind {titles}"),
        report.figure(
            lambda ax: draw_graph(ax, graph, [f"c{i}" for i in range(found.local.shape[1])]),
            "Images that are decided by the same concepts. A dot is an image, placed by how much each concept adds to "
            "the class that it is predicted as; a disc is a strategy; a line joins it to the one most like it.",
            height=4.2,
        ),
        report.table(columns, rows, "The strategies, the largest first.", align=align),
        report.figure(_examples(found, images), "Images nearest to the middle of each strategy, a row each."),
        report.table(
            ("concept", "prevalence", "reliability"),
            [(f"c{i}", f"{graph.prevalence[i]:.0%}",
              None if np.isnan(graph.reliability[i]) else f"{graph.reliability[i]:.0%}")
             for i in np.argsort(-graph.prevalence, kind="stable") if graph.prevalence[i] > 0],
            "Prevalence: the share of images that the concept decides most. Reliability: how many of these are right.",
            align=("left", "right", "right"),
        ),
    ]  # fmt: skip


def _class_blocks(report: Any, found: HolisticConcepts, view: ClassView, images: ImageSet, name: str) -> list[Any]:
    from salience.report import figures

    shown = [int(i) for i in view.order[:_CONCEPTS] if len(view.crops[int(i)])]
    intervals = [view.importance[i] for i in view.order]
    proof = view.proof
    blocks = [
        report.heading(name[:1].upper() + name[1:]),
        report.facts({
            "images predicted as it": len(view.images), "of these held out to measure on": len(view.measured),
            "predictions that survive being written in concepts": f"{view.agreement:.0%}",
        }),
    ]  # fmt: skip
    if shown:
        blocks.append(report.figure(
            _gallery(found, view, shown, images),
            f"The {len(shown)} most important concepts, a row each. Left: where most of it is, one place an image. Right: "
            "its code over the images of the first of these (brighter is more). Beside it its importance with a 95 % "
            "interval; below 0 it speaks against the class.",
        ))  # fmt: skip
    changed, judged = proof.orders[found.method].changed, (found.method, proof.heuristic, "random")

    def drawn(which: str) -> Any:
        series = {each: getattr(proof.orders[each], which).mean(0) for each in judged}
        return lambda ax: figures.curve(ax, changed, series, xlabel="share of the concepts",
                                        ylabel="probability of the class")  # fmt: skip

    return [
        *blocks,
        report.figure(
            lambda ax: figures.bars(ax, [f"concept {i}" for i in view.order], [each.mean for each in intervals],
                                    [(each.low, each.high) for each in intervals], xlabel=found.method),
            "How much each concept matters to the class: mean over its images with a 95 % interval.",
            height=1.0 + 0.3 * len(intervals),
        ),
        report.figure(drawn("deletion"), "Concepts out, the most important first. Lower is better.", height=2.4),
        report.figure(drawn("insertion"), "Concepts in, the most important first. Higher is better.", height=2.4),
        report.table(
            ("importance", "C-deletion", "C-insertion", "muFidelity"),
            [(each, *(f"{value:.3f}" for value in values)) for each, values in view.faithfulness.items()],
            f"Of each held-out image's own importances: area under the logit while concepts go (lower is better) and come "
            f"(higher is better), and rank correlation with what sets of concepts are worth; on {len(view.measured)} "
            "images.",
            align=("left", "right", "right", "right"),
        ),
    ]  # fmt: skip


def _extractor_blocks(report: Any, found: HolisticConcepts) -> list[Any]:
    rows = []
    for name, one in found.extraction.items():
        values = [None if one is None else f"{getattr(one, each):.3f}" for each in _WORDS]
        rows.append((f"{name} (used here)" if name == found.extractor else name, *values))
    return [
        report.heading("Extractors"),
        report.table(
            ("extractor", *_WORDS.values()), rows,
            "All fitted on the same activations and measured on held-out images. Left out: share of the activations' "
            "norm; lower is better. Zeros: share of the codes. Unsteady: cosine distance of matched concepts between "
            "four parts of the data; lower is better. W1, Fréchet: distance of what concepts write to real activations; "
            "lower is better. Off the data: how much farther from its fifth neighbour; about 0 is best. Predictions "
            "kept: when the network reads what concepts write, which is the network that importances are of.",
            align=("left", *("right" for _ in _WORDS)),
        ),
    ]  # fmt: skip


def _cuts(places: np.ndarray, side: int, images: ImageSet) -> list[np.ndarray]:
    """Crops as they are in the pictures, (side, side, channel)."""
    return [images.picture(int(row))[top : top + side, left : left + side] for row, top, left in places]


def _gallery(found: HolisticConcepts, view: ClassView, shown: list[int], images: ImageSet) -> Figure:
    from matplotlib.figure import Figure

    from salience.cli._explain_saliency_page import overlay

    figure = Figure(figsize=(8.6, 0.72 * len(shown) + 0.1), layout="constrained")
    axes = figure.subplots(len(shown), _CROPS + 2 * _MAPS, squeeze=False)
    for row, i in zip(axes, shown, strict=True):
        each = view.importance[i]
        row[0].set_ylabel(f"concept {i}\n{each.mean:+.3g} ({each.low:+.3g} … {each.high:+.3g})", fontsize=8, rotation=0,
                          ha="right", va="center")  # fmt: skip
        for axis, cut in zip(row[:_CROPS], _cuts(view.crops[i][:_CROPS], found.side, images), strict=False):
            axis.imshow(cut, cmap="gray")
        for place, heat in enumerate(view.maps[i][:_MAPS]):
            picture = images.picture(int(view.crops[i][place][0]))
            row[_CROPS + 2 * place].imshow(picture, cmap="gray")
            row[_CROPS + 2 * place + 1].imshow(overlay(picture, heat.numpy()))
    return bare(figure)


def _examples(found: HolisticConcepts, images: ImageSet) -> Figure:
    from matplotlib.figure import Figure

    graph = found.graph
    lengths = np.maximum(np.linalg.norm(found.local, axis=1, keepdims=True), 1e-300)
    figure = Figure(figsize=(8.6, 0.8 * len(graph.nodes) + 0.1), layout="constrained")
    axes = figure.subplots(len(graph.nodes), _EXAMPLES, squeeze=False)
    for number, (row, node) in enumerate(zip(axes, graph.nodes, strict=True)):
        far = np.linalg.norm(found.local[node.images] / lengths[node.images] - graph.centers[number], axis=1)
        concepts = " + ".join(f"c{i}" for i in node.concepts)
        row[0].set_ylabel(f"strategy {number + 1}\n{concepts}", fontsize=8, rotation=0, ha="right", va="center")
        for axis, i in zip(row, node.images[np.argsort(far, kind="stable")], strict=False):
            axis.imshow(images.picture(int(found.rows[i])), cmap="gray")
    return bare(figure)
