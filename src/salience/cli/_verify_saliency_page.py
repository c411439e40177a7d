"""The report of `verify saliency`, from the plain data of its result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from salience.cli._explain_saliency_page import overlay

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from salience.features.study.trust import TrustReport
    from salience.model import ImageSet

_SHOWN = 5  # images in the report
_CURVES = 4  # methods drawn, beside the random map


def write_page(
    result: TrustReport,
    pictures: ImageSet,
    classes: Tensor,
    settings: Mapping[str, Any],
    agree: float | None,
    path: Path,
) -> None:
    """Write the page: verdict, table in plain words, maps, differences, curves, confidence."""
    from salience import report

    trusted = [one.method for one in result.verdicts if one.level == "yes"]
    label = f"{len(trusted)} of {len(result.verdicts)} explanations can be trusted here"
    detail = f"On {len(pictures):,} images: " + (
        ", ".join(trusted) if trusted else "none beats a random map throughout"
    )
    blocks: list[Any] = [report.verdict(label, detail + ".", bool(trusted))]
    facts: dict[str, Any] = {"images": len(pictures), "methods": len(result.verdicts)}
    facts["mean confidence"] = float(result.result.confidence["model"].mean())
    if agree is not None:
        facts["predictions that agree with the label"] = agree
    blocks.append(report.facts(facts))
    blocks += _verdicts(report, result)
    blocks += [
        report.heading("Images and their maps"),
        report.figure(
            _maps(result, pictures, classes), "Each image, what each method makes of it, and what needs no model."
        ),
    ]
    blocks += _differences(report, result)
    blocks += _curves(report, result)
    blocks += _confidence(report, result)
    if result.notes:
        blocks += [report.heading("Notes"), *(report.text(note) for note in result.notes)]
    blocks += [report.heading("How it was made"), report.code(json.dumps(settings, indent=1, ensure_ascii=False))]
    subtitle = f"Which explanation of {settings['model']} may be trusted"
    report.page("Can the maps be trusted?", blocks, path=path, subtitle=subtitle)


def _verdicts(report, result: TrustReport) -> list:
    asked = any(one.randomised == one.randomised for one in result.verdicts)
    rows = [
        (one.method, one.level, one.words, *([one.randomised] if asked else []))
        for one in result.verdicts
    ]  # fmt: skip
    rows += [
        (name, "control", "needs no model", *([one.randomised] if asked else []))
        for name, one in result.controls.items()
    ]  # fmt: skip
    columns = ("method", "trust it?", "in plain words", *(["same with random weights"] if asked else []))
    caption = (
        "Yes: the whole 95 % interval lies above random smooth maps by every measure, and the maps change when the "
        "weights are drawn anew. The last column is the rank correlation with maps of the same network with random "
        "weights: near 1 a map shows the picture and not what was learned."
    )
    align = ("left", "left", "left", *(["right"] if asked else []))
    return [report.heading("Verdicts"), report.table(columns, rows, caption, align=align)]


def _differences(report, result: TrustReport) -> list:
    from salience.report import figures

    blocks = [report.heading("Against random maps")]
    for measure in result.verdicts[0].means:
        found = [(one.method, one.over_random[measure]) for one in result.verdicts]
        blocks.append(
            report.figure(
                lambda ax, found=found, measure=measure: figures.bars(
                    ax, [name for name, _ in found], [gain[0] for _, gain in found],
                    [(gain[1], gain[2]) for _, gain in found], xlabel=f"{measure}: better than random by",
                ),
                f"{measure[0].upper() + measure[1:]}: the difference on the same images, turned so that right of 0 is "
                "better, with 95 % intervals.",
                height=1.4 + 0.3 * len(found),
            )
        )  # fmt: skip
    return blocks


def _curves(report, result: TrustReport) -> list:
    from salience.report import figures

    curves, blocks = result.result.curves, []
    shown = [one.method for one in result.verdicts[:_CURVES]] + ["random"]
    says = {
        "insertion": "Insertion: pixels come, the most important first. Higher is better.",
        "deletion": "Deletion: pixels go, the most important first. Lower is better.",
    }
    for mode, caption in says.items():
        series = {name: curves["model", name, mode] for name in shown if ("model", name, mode) in curves}
        if series:
            x = np.linspace(0, 1, len(next(iter(series.values()))))
            blocks.append(
                report.figure(
                    lambda ax, x=x, series=series: figures.curve(
                        ax, x, series, xlabel="share of the pixels", ylabel="probability of the class"
                    ),
                    caption,
                )
            )
    return [report.heading("Pixels in, pixels out"), *blocks] if blocks else []


def _confidence(report, result: TrustReport) -> list:
    if not result.confidence:
        return []
    rows = [
        (measure, value, "follows confidence: do not compare models by it" if abs(value) > 0.7 else "")
        for measure, value in result.confidence.items()
    ]
    return [
        report.heading("What the measures see of the model's confidence"),
        report.table(
            ("measure", "correlation over images", ""), rows,
            "A measure that follows how sure the model is ranks methods on one model and images; between models it "
            "tells which is more sure of itself.",
        ),
    ]  # fmt: skip


def _maps(result: TrustReport, pictures: ImageSet, classes: Tensor) -> Figure:
    from matplotlib.figure import Figure

    methods = [one.method for one in result.verdicts] + list(result.controls)
    rows = np.unique(np.linspace(0, len(pictures) - 1, min(len(pictures), _SHOWN)).round().astype(int)).tolist()
    figure = Figure(figsize=(1.05 * (len(methods) + 1) + 0.6, 1.2 * len(rows) + 0.5), layout="constrained")
    axes = figure.subplots(len(rows), len(methods) + 1, squeeze=False)
    for row, i in enumerate(rows):
        picture = pictures.picture(i)
        axes[row, 0].imshow(picture, cmap="gray" if picture.shape[2] == 1 else None)
        axes[row, 0].set_ylabel(_title(pictures, int(classes[i])), fontsize=8, rotation=0, ha="right", va="center")
        for column, method in enumerate(methods, 1):
            values = result.result.maps["model", method][i].numpy()
            # Grey for no importance: gradient methods give both signs, and their size is what matters here.
            axes[row, column].imshow(overlay(picture, np.abs(values) if values.min() < 0 else values))
            if row == 0:
                axes[row, column].set_title(method.replace(" ", "\n", 1), fontsize=8)
    for one in axes.flat:
        one.set_xticks([])
        one.set_yticks([])
        one.spines[:].set_visible(False)
    return figure


def _title(pictures: ImageSet, label: int) -> str:
    names = pictures.class_names
    name = names[label] if names is not None and label < len(names) else f"class {label}"
    return name if len(name) <= 14 else name[:13] + "…"
