"""Crops and the report of `explain concepts`, from the plain data of its result."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from salience.cli._concept_pages import bare, class_verdict, save_strip

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from salience.concepts.craft.estimator import Craft
    from salience.concepts.craft.explain import ClassConcepts
    from salience.io import Output
    from salience.model import ImageSet

_CONCEPTS, _CROPS, _MAPS = 6, 6, 3  # of a class on the page


def write_crops(folder: Output, found: Sequence[ClassConcepts], images: ImageSet) -> None:
    """Write ``crops/CLASS-CONCEPT.png``: the crops that hold most of a concept, in a row."""
    for one in found:
        for i in map(int, one.order):
            cuts = _cuts(one, one.craft, one.top_crops[i], images)
            if cuts:
                save_strip(folder.file(f"crops/class{one.class_id}-concept{i:02d}.png"), cuts)


def write_page(
    found: Sequence[ClassConcepts], images: ImageSet, names: list[str] | None, settings: Mapping[str, Any], path: Path
) -> None:
    """Write the page: the verdict, then for each class its concepts, how much they matter, and the measurement."""
    from salience import report
    from salience.cli.explain_concepts import class_name

    proofs = {class_name(one.class_id, names): one.proof for one in found if one.proof is not None}
    blocks: list[Any] = [class_verdict(report, proofs)]
    for one in found:
        blocks += _class_blocks(report, one, images, class_name(one.class_id, names))
    blocks += [report.heading("How it was made"), report.code(json.dumps(settings, indent=1, ensure_ascii=False))]
    subtitle = f"What {settings['model']} sees, at {settings['layer']}, in {len(images):,} images"
    report.page("Concepts", blocks, path=path, subtitle=subtitle)


def _class_blocks(report: Any, one: ClassConcepts, images: ImageSet, name: str) -> list[Any]:
    from salience.report import figures

    shown = [int(i) for i in one.order[:_CONCEPTS] if len(one.top_crops[int(i)])]
    labels = [f"concept {i} ({'for' if one.effect[i] >= 0 else 'against'})" for i in one.order]
    intervals = [one.importance[i] for i in one.order]
    blocks = [
        report.heading(name[:1].upper() + name[1:]),
        report.facts({
            "images predicted as it": len(one.images), "of these held out to measure on": len(one.measured),
            "activations left out by the concepts": f"{one.relative_error:.0%}",
            "predictions that survive being written in concepts": f"{one.agreement:.0%}",
        }),
        report.figure(
            _gallery(one, shown, images),
            f"The {len(shown)} most important concepts, a row each. Left: the crops that hold most of it, one an image. "
            "Right: where it is in the images of the first crops (Grad-CAM of the concept by implicit differentiation; "
            "brighter is more; grey alone where the image as a whole holds none of it). Beside it its share of the "
            "logit's variance with a 95 % interval, and whether it speaks for the class or against it.",
        ),
        report.figure(
            lambda ax: figures.bars(ax, labels, [each.mean for each in intervals],
                                    [(each.low, each.high) for each in intervals], xlabel="total Sobol index"),
            "How much each concept matters: the share of the variance of the class's logit, when codes are turned down "
            "at random, that is lost without it. Mean over images with a 95 % interval that also holds the error of the "
            "designs. The index has no sign: a concept against the class counts like one for it.",
            height=1.0 + 0.3 * len(labels),
        ),
    ]  # fmt: skip
    if one.proof is not None:
        blocks += _proof_blocks(report, figures, one)
    for i, parts in one.parts.items():
        blocks.append(report.figure(
            _parts(one, parts, images),
            f"What concept {i} is made of: its crops (upper tenth), factorised again at {parts.layer_}, where the network "
            "still tells apart what it later treats alike.",
        ))  # fmt: skip
    return [*blocks, *(report.text(f"Note: {note}") for note in one.notes)]


def _proof_blocks(report: Any, figures: Any, one: ClassConcepts) -> list[Any]:
    from salience.concepts.craft.explain import RANDOM_ORDERS

    proof = one.proof
    assert proof is not None
    order = ("Sobol", proof.heuristic, "random")
    rows = [(name, *(float(o.area(which).mean()) for which in ("deletion", "insertion", "logit_deletion")))
            for name, o in proof.orders.items()]  # fmt: skip

    def drawn(which: str) -> Any:
        series = {name: getattr(proof.orders[name], which) for name in order}
        x = proof.orders["Sobol"].changed
        return lambda ax: figures.curve(ax, x, {name: scores.mean(0) for name, scores in series.items()},
                                        xlabel="share of the concepts", ylabel="probability of the class")  # fmt: skip

    gains = [("random orders", proof.over_random), (proof.heuristic, proof.over_heuristic)]
    return [
        report.table(
            ("Sobol against", "better by", "95 % interval"),
            [(name, f"{g.mean:+.3f}", f"{g.low:+.3f} … {g.high:+.3f}") for name, g in gains],
            f"Area under insertion minus area under deletion, on {len(one.measured)} held-out images. Of {RANDOM_ORDERS} random "
            f"orders it beats {proof.beaten:.0%}.",
            align=("left", "right", "right"),
        ),
        report.figure(drawn("deletion"), "Concepts out, the most important first. Lower is better.", height=2.4),
        report.figure(drawn("insertion"), "Concepts in, the most important first. Higher is better.", height=2.4),
        report.table(
            ("order", "area under deletion", "area under insertion", "area under deletion of the logit"), rows,
            "Sobol indices have no sign, so they also take out early what speaks against the class: of the raw logit "
            "a signed order deletes better.",
        ),
    ]  # fmt: skip


def _cuts(one: ClassConcepts, craft: Craft, chosen: np.ndarray, images: ImageSet) -> list[np.ndarray]:
    """Crops as they are in the pictures, (side, side, channel)."""
    side, cuts = craft.crops_.patch_size, []
    for image, top, left in craft.crops_.boxes[chosen]:
        picture = images.picture(int(one.learned[one.craft.kept_][image]))
        cuts.append(picture[top : top + side, left : left + side])
    return cuts


def _gallery(one: ClassConcepts, shown: Sequence[int], images: ImageSet) -> Figure:
    from matplotlib.figure import Figure

    from salience.cli._explain_saliency_page import overlay

    figure = Figure(figsize=(8.6, 0.72 * max(1, len(shown)) + 0.1), layout="constrained")
    axes = figure.subplots(max(1, len(shown)), _CROPS + 2 * _MAPS, squeeze=False)
    for row, i in zip(axes, shown, strict=False):
        importance = one.importance[i]
        row[0].set_ylabel(
            f"concept {i}\n{importance.mean:.2f} ({importance.low:.2f} … {importance.high:.2f})\n"
            f"{'for' if one.effect[i] >= 0 else 'against'} the class",
            fontsize=8, rotation=0, ha="right", va="center",
        )  # fmt: skip
        crops = one.top_crops[i]
        for axis, cut in zip(row[:_CROPS], _cuts(one, one.craft, crops[:_CROPS], images), strict=False):
            axis.imshow(cut, cmap="gray")
        for place, crop in enumerate(crops[:_MAPS]):
            picture = images.picture(int(one.learned[one.craft.kept_][one.craft.crops_.boxes[crop, 0]]))
            row[_CROPS + 2 * place].imshow(picture, cmap="gray")
            row[_CROPS + 2 * place + 1].imshow(overlay(picture, one.maps[i][place].numpy()))
    return bare(figure)


def _parts(one: ClassConcepts, parts: Craft, images: ImageSet) -> Figure:
    from matplotlib.figure import Figure

    from salience.concepts.craft.explain import top_crops

    given = (parts.crop_codes_ * parts.components_.norm(dim=1)).sum(0)
    order = given.argsort(descending=True).tolist()
    figure = Figure(figsize=(8.6, 0.72 * len(order) + 0.1), layout="constrained")
    axes = figure.subplots(len(order), 8, squeeze=False)
    for row, i in zip(axes, order, strict=True):
        row[0].set_ylabel(
            f"part {i}\n{float(given[i] / given.sum()):.0%}", fontsize=8, rotation=0, ha="right", va="center"
        )
        for axis, cut in zip(row, _cuts(one, parts, top_crops(parts, i), images), strict=False):
            axis.imshow(cut, cmap="gray")
    return bare(figure)
