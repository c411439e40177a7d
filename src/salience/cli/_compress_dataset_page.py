"""The report of `compress dataset`, from plain data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from salience.cli._students import StudentComparison

_CLASSES, _EACH = 10, 2


def write_page(
    path: Path, out: str, facts: dict[str, Any], comparison: StudentComparison, shown: dict[str, Any], told: list[str]
) -> None:
    """Write the page: what students learn first, then the images."""
    from salience import report
    from salience.cli._measured import comparison_blocks, sentence
    from salience.cli.compress_dataset import DISTILLED, RANDOM, UNREFINED

    students = max(map(len, comparison.draws.values()))
    first, *measured = comparison_blocks(comparison, DISTILLED, RANDOM)
    words = sentence(comparison, DISTILLED, UNREFINED)
    blocks: list[Any] = [
        first,
        report.text(words[0].upper() + words[1:] + "."),
        *measured,
        report.text(
            f"Every set of images trained {students} students from scratch, with the same number of images, views and "
            f"steps; the figures are their means on {comparison.examples} held-out images. Intervals of differences hold "
            "both images and students to be drawn at random. If the teacher was trained on the held-out images as well, "
            "its labels know them a little, for all sets alike."
        ),
        report.heading("What the images look like"),
        report.figure(
            draw_images(shown),
            "By class: random real images, the chosen patches, which of their pixels are critical and stay (the others "
            "are dimmed), and the distilled images.",
        ),
        report.heading("What was written"),
        report.facts(
            {
                "images read": facts["read"],
                "images written": facts["images"],
                "kB of images": facts["bytes_images"] / 1e3,
                f"kB of labels ({facts['labels']}, {facts['views']} views)": facts["bytes_labels"] / 1e3,
                "kB that soft labels would take": facts["bytes_soft_labels"] / 1e3,
            }
        ),
        report.heading("How to train on it"),
        report.code(
            "from salience.data import DistilledSet, train_student\n\n"
            f"small = DistilledSet.load({Path(out).name!r})\n"
            "train_student(network, small.x, small.y, small.labels, generator=torch.Generator().manual_seed(0))"
        ),
    ]
    if told:
        blocks += [report.heading("Notes"), *(report.text(note) for note in told)]
    subtitle = f"nrr-dd, {facts['ipc']} image{'s' * (facts['ipc'] > 1)} for each of {facts['classes']} classes"
    report.page(f"Distilled images: {Path(out).name}", blocks, path=path, subtitle=subtitle)


def draw_images(shown: dict[str, Any]) -> Figure:
    """Up to two images of each of ten classes: random real, patches, critical pixels, distilled."""
    from matplotlib.figure import Figure

    names: list[str] = shown["names"]
    classes = list(dict.fromkeys(names))[:_CLASSES]
    critical = shown["critical"][..., None]
    dimmed = (shown["before"] * np.where(critical, 1.0, 0.25)).astype(np.uint8)
    parts = {
        "random real": shown["random"],
        "patches": shown["before"],
        "critical": dimmed,
        "distilled": shown["after"],
    }
    each = min(_EACH, max(map(names.count, classes)))
    figure = Figure(figsize=(1.0 + 0.85 * each * len(parts), 0.4 + 0.85 * len(classes)), layout="constrained")
    axes = figure.subplots(len(classes), each * len(parts), squeeze=False)
    for row, name in enumerate(classes):
        rows = [at for at, own in enumerate(names) if own == name][:each]
        for column, (title, images) in enumerate(parts.items()):
            for number in range(each):
                ax = axes[row, column * each + number]
                ax.set_axis_off()
                if number < len(rows):
                    image = images[rows[number]]
                    ax.imshow(image[..., 0] if image.shape[2] == 1 else image, cmap="gray", vmin=0, vmax=255)
                if row == 0 and number == 0:
                    ax.set_title(title, fontsize=8, loc="left")
        axes[row, 0].text(-0.15, 0.5, name, transform=axes[row, 0].transAxes, ha="right", va="center", fontsize=8)
    return figure
