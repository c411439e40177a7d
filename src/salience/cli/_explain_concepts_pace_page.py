"""Patches and the report of `explain concepts --method pace`, from the plain data of its result."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from salience.cli._concept_pages import bare, save_strip

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from salience.concepts.pace.explain import PaceFound
    from salience.io import Output
    from salience.model import ImageSet

_SIDE = 48  # pixels of a patch in a strip
_CONCEPTS, _IMAGES, _MAPS = 12, 6, 3  # on the page: concepts, images, and maps of an image
_LEAST = 0.01  # of a concept in an image, to have a map


def write_crops(folder: Output, found: PaceFound, images: ImageSet) -> None:
    """Write ``crops/conceptNN.png``: the patches nearest to a concept, in a row."""
    for k in range(len(found.patches)):
        save_strip(folder.file(f"crops/concept{k:02d}.png"), _cuts(found, k, images), _SIDE, smooth=False)


def write_page(
    found: PaceFound, images: ImageSet, names: list[str] | None, settings: Mapping[str, Any], path: Path
) -> None:
    """Write the page: what was measured, then the concepts of the data set, of images, and of their patches."""
    from salience import report
    from salience.cli._explain_concepts_pace import speaks_for
    from salience.cli.explain_concepts import class_name
    from salience.report import figures

    proof, pace = found.proof, found.pace
    label = "its concepts tell what the model predicts" if proof.better else "no better than random here"
    order = [int(k) for k in pace.weights_.argsort(descending=True)]
    shown, speaks = order[:_CONCEPTS], speaks_for(found, names)
    rows = [(which, *(f"{proof.values[m][which].mean():.3f}" for m in ("PACE", "k-means", "random")),
             *(f"{gain.mean:+.3f} ({gain.low:+.3f} … {gain.high:+.3f})" for gain in
               (proof.over_kmeans[which], proof.over_random[which])))
            for which in ("faithfulness", "stability", "sparsity")]  # fmt: skip
    chosen = _spread(found.predicted)
    blocks: list[Any] = [
        report.verdict(label, f"On {len(found.measured)} held-out images: {proof.words}", proof.better),
        report.table(
            ("measure", "PACE", "k-means", "random", "better than k-means by", "better than random by"), rows,
            "Faithfulness: share of the model's predictions that a logistic regression, fitted on the other images, tells "
            "from an image's concepts alone. Stability: how far the concepts of an image move when it is mirrored, "
            "cropped, blurred and changed in colour, relative to their size; lower is better. Sparsity: share of "
            "concepts that an image hardly holds. K-means: histogram of hard clusters of the same patches. Differences "
            "with 95 % intervals, above 0 where PACE is better. Random concepts hardly move, whatever the image: all are "
            "nearly even.",
            align=("left", *["right"] * 5),
        ),
        report.heading("The data set: concepts"),
        report.figure(
            _gallery(found, shown, speaks, images),
            f"The {len(shown)} concepts that most attention falls on, as the patches nearest to each, with the share of "
            "the attention and the class that the concept speaks for most.",
        ),
        report.figure(
            lambda ax: figures.bars(ax, [f"concept {k} ({speaks[k]})" for k in order],
                                    [float(pace.weights_[k]) for k in order], xlabel="share of the attention"),
            "How much of the attention falls on each concept.", height=1.0 + 0.28 * len(order),
        ),
        report.heading("Images and their patches"),
        report.figure(
            _images(found, chosen, images),
            "Held-out images, the concepts that each holds most of, and where these are (brighter is surer; one that an image hardly holds has no "
            "map). "
            + "Predicted: " + "; ".join(f"image {i + 1} as {class_name(int(found.predicted[row]), names)}"
                        for i, row in enumerate(chosen)) + ".",
        ),
        *(report.text(f"Note: {note}") for note in found.notes),
        report.heading("How it was made"),
        report.facts({"images that concepts were found in": len(found.learned), "held-out images": len(found.measured),
                      "patches of an image": f"{found.grid[0]} x {found.grid[1]}", "concepts": pace.n_concepts}),
        report.code(json.dumps(settings, indent=1, ensure_ascii=False)),
    ]  # fmt: skip
    subtitle = f"What {settings['model']} sees in {len(images):,} images, at block {settings['layer']}"
    report.page("Concepts", blocks, path=path, subtitle=subtitle)


def _spread(predicted: np.ndarray) -> list[int]:
    """A few images, of different classes as far as there are."""
    rounds: dict[int, int] = {}
    places = []
    for row, label in enumerate(predicted.tolist()):
        rounds[label] = rounds.get(label, -1) + 1
        places.append((rounds[label], row))
    return [row for _, row in sorted(places)[:_IMAGES]]


def _cuts(found: PaceFound, k: int, images: ImageSet) -> list[np.ndarray]:
    """The patches nearest to a concept, as they are in the pictures."""
    (rows, columns), cuts = found.grid, []
    for row, patch in found.patches[k].tolist():
        picture = images.picture(row)
        high, wide = picture.shape[0] // rows, picture.shape[1] // columns
        top, left = patch // columns * high, patch % columns * wide
        cuts.append(picture[top : top + high, left : left + wide])
    return cuts


def _gallery(found: PaceFound, shown: Sequence[int], speaks: list[str], images: ImageSet) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 0.62 * len(shown) + 0.1), layout="constrained")
    axes = figure.subplots(len(shown), found.patches.shape[1], squeeze=False)
    for row, k in zip(axes, shown, strict=True):
        share = float(found.pace.weights_[k])
        row[0].set_ylabel(f"concept {k}\n{share:.0%}, {speaks[k]}", fontsize=8, rotation=0, ha="right", va="center")
        for axis, cut in zip(row, _cuts(found, k, images), strict=False):
            axis.imshow(cut, cmap="gray", vmin=0, vmax=255)
    return bare(figure)


def _images(found: PaceFound, chosen: Sequence[int], images: ImageSet) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 1.5 * len(chosen)), layout="constrained")
    axes = figure.subplots(len(chosen), 2 + _MAPS, squeeze=False, width_ratios=(1, 1.4, *[1] * _MAPS))
    for place, (row, i) in enumerate(zip(axes, chosen, strict=True)):
        picture, theta = images.picture(int(found.measured[i])), found.explained.theta[i].cpu().numpy()
        top = [int(k) for k in np.argsort(-theta, kind="stable")[:_MAPS]]
        row[0].imshow(picture, cmap="gray", vmin=0, vmax=255)
        row[0].set_ylabel(f"image {place + 1}", fontsize=8)
        row[1].barh(range(len(top))[::-1], theta[top], color="C0")
        row[1].set_xlim(0, 1)
        for bar, k in enumerate(top):
            row[1].text(0.02, len(top) - 1 - bar, f"concept {k}: {theta[k]:.0%}", fontsize=7, va="center")
        for axis, k in zip(row[2:], (k for k in top if theta[k] >= _LEAST), strict=False):
            phi = found.explained.phi[i, :, k].cpu().numpy().reshape(found.grid)
            scale = picture.shape[0] // found.grid[0], picture.shape[1] // found.grid[1]
            large = np.kron(phi, np.ones(scale))
            axis.imshow(_painted(picture[: large.shape[0], : large.shape[1]], large))
            axis.set_title(f"concept {k}", fontsize=7)
    return bare(figure)


def _painted(picture: np.ndarray, phi: np.ndarray) -> np.ndarray:
    """The picture in grey, with a patch the more in colour the surer it shows the concept; from 0 to 1 in all maps."""
    from matplotlib import colormaps

    grey = picture.astype(np.float64).mean(2, keepdims=True).repeat(3, 2) / 255
    opacity = 0.15 + 0.7 * phi[..., None]
    return opacity * colormaps["inferno"](phi)[..., :3] + (1 - opacity) * grey
