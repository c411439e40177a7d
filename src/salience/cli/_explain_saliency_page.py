"""Overlays and the report of `explain saliency`, from the plain data of its result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from salience.features.explain import Explained
    from salience.io import Output
    from salience.model import ImageSet

_SHOWN = 8  # images in the report
_SIDE = 256  # pixels at least of an overlay's longer side


def write_overlays(folder: Output, result: Explained, images: ImageSet, count: int) -> None:
    """Write ``overlays/ROW-METHOD.png`` of images spread evenly over the rows."""
    from PIL import Image

    for i in _spread(len(images), count):
        picture = images.picture(i)
        for name, maps in result.maps.items():
            mixed = Image.fromarray(overlay(picture, maps[i].numpy()))
            factor = -(-_SIDE // max(mixed.size))
            if factor > 1:  # small images are enlarged, pixel by pixel, so that one sees something
                mixed = mixed.resize((mixed.width * factor, mixed.height * factor), Image.Resampling.NEAREST)
            mixed.save(folder.file(f"overlays/{i:06d}-{name}.png"))


def overlay(picture: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The picture in grey with its map in colour: the larger a value, the less grey shows through."""
    from matplotlib import colormaps

    low, span = values.min(), np.ptp(values)
    scaled = (values - low) / span if span > 0 else np.zeros_like(values)
    grey = picture.astype(np.float64).mean(2, keepdims=True).repeat(3, 2) / 255
    colour = colormaps["inferno"](scaled)[..., :3]
    opacity = 0.25 + 0.6 * scaled[..., None]
    return np.round(255 * (opacity * colour + (1 - opacity) * grey)).astype(np.uint8)


def write_page(result: Explained, images: ImageSet, settings: Mapping[str, Any], path: Path) -> None:
    """Write the page: verdicts, images with their maps, curves, where each method looked."""
    from salience import report

    blocks: list[Any] = []
    if result.proofs:
        better = [name for name, proof in result.proofs.items() if proof.better]
        label = f"{len(better)} of {len(result.proofs)} methods beat random maps"
        if len(result.proofs) == 1:
            label = "better than random" if better else "no better than random here"
        detail = "; ".join(f"{name}: {proof.words}" for name, proof in result.proofs.items())
        blocks.append(report.verdict(label, detail, bool(better)))
    else:
        blocks.append(report.verdict("not measured", "--measure 0: nothing is known of these maps' worth", None))
    facts: dict[str, Any] = {"images": len(images), "measured on": len(result.measured), "methods": len(result.maps)}
    if images.labels is not None:
        facts["predictions that agree with the label"] = float((result.predicted == images.labels).double().mean())
    blocks.append(report.facts(facts))
    if result.proofs:
        blocks += _verdicts(report, result)
    blocks += [
        report.heading("Images and their maps"),
        report.figure(
            _maps(result, images),
            "Each image, and what each method makes of it; brighter matters more. Beside it the class explained, its "
            "probability, and the label where it is another one.",
        ),
    ]
    if result.runs:
        blocks += _curves(report, result)
    rows = [(name, ", ".join(where) or "the image itself") for name, where in result.layers.items()]
    blocks += [report.heading("Where each method looked"), report.table(("method", "layers"), rows)]
    if result.notes:
        blocks += [report.heading("Notes"), *(report.text(note) for note in result.notes)]
    blocks += [report.heading("How it was made"), report.code(json.dumps(settings, indent=1, ensure_ascii=False))]
    subtitle = f"Where {settings['model']} looks in {len(images):,} images"
    report.page("Saliency maps", blocks, path=path, subtitle=subtitle)


def _verdicts(report, result: Explained) -> list:
    from salience.report import figures

    columns = ("method", "in plain words", "better than random by", "than heuristic by", "same with random weights")
    rows = [
        (name, proof.words, f"{proof.over_random.mean:+.3f}", f"{proof.over_heuristic.mean:+.3f}",
         proof.randomised)
        for name, proof in result.proofs.items()
    ]  # fmt: skip
    proofs = list(result.proofs.values())
    bars = [(f"{proof.method} over random", proof.over_random) for proof in proofs]
    bars += [(f"{proof.method} over {proof.heuristic}", proof.over_heuristic) for proof in proofs]
    return [
        report.heading("Which map can be trusted here"),
        report.table(
            columns, rows,
            "The score is the area under insertion minus that under deletion. The last column is the rank correlation "
            "with maps of the same network with random weights: near 0 the map depends on what was learned, near 1 it "
            "does not.",
            align=("left", "left", "right", "right", "right"),
        ),
        report.figure(
            lambda ax: figures.bars(
                ax, [name for name, _ in bars], [one.mean for _, one in bars], [(one.low, one.high) for _, one in bars],
                xlabel="difference of the score",
            ),
            f"Differences on the same {len(result.measured)} images, with 95 % intervals; right of 0 is better.",
            height=1.0 + 0.32 * len(bars),
        ),
    ]  # fmt: skip


def _curves(report, result: Explained) -> list:
    from salience.report import figures

    def drawn(which: str):
        parts = {name: getattr(run, which) for name, run in result.runs.items()}
        x = next(iter(parts.values())).changed
        series = {name: part.scores.mean(0) for name, part in parts.items()}
        return lambda ax: figures.curve(ax, x, series, xlabel="share of the pixels", ylabel="probability of the class")

    return [
        report.heading("Pixels in, pixels out"),
        report.figure(drawn("insertion"), "Insertion: pixels are put into the blurred image, the most important first. Higher is better."),
        report.figure(drawn("deletion"), "Deletion: pixels are blurred away, the most important first. Lower is better."),
    ]  # fmt: skip


def _maps(result: Explained, images: ImageSet) -> Figure:
    from matplotlib.figure import Figure

    rows, names = _spread(len(images), _SHOWN), list(result.maps)
    figure = Figure(figsize=(1.6 * (len(names) + 1) + 1.2, 1.7 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(names) + 1, squeeze=False)
    for row, i in enumerate(rows):
        picture = images.picture(i)
        axes[row, 0].imshow(picture, cmap="gray" if picture.shape[2] == 1 else None)
        axes[row, 0].set_ylabel(_title(result, images, i), fontsize=8, rotation=0, ha="right", va="center")
        for column, name in enumerate(names, 1):
            axes[row, column].imshow(overlay(picture, result.maps[name][i].numpy()))
            if row == 0:
                axes[row, column].set_title(name.replace("integrated-", "integrated-\n"), fontsize=9)
    for one in axes.flat:
        one.set_xticks([])
        one.set_yticks([])
        one.spines[:].set_visible(False)
    return figure


def _title(result: Explained, images: ImageSet, i: int) -> str:
    lines = [_class_name(images, int(result.classes[i])), f"p = {float(result.probabilities[i]):.2f}"]
    if images.labels is not None and int(images.labels[i]) != int(result.classes[i]):
        lines.append(f"({_class_name(images, int(images.labels[i]))})")
    return "\n".join(lines)


def _class_name(images: ImageSet, number: int) -> str:
    names = images.class_names
    name = names[number] if names is not None and number < len(names) else f"class {number}"
    return name if len(name) <= 18 else f"{name[:17]}…"


def _spread(count: int, wanted: int) -> list[int]:
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(int)).tolist() if wanted else []
