"""The report of `explain complexity`, from the plain data of its result."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from salience.concepts.complexity.findings import ComplexityReport, RankCorrelation
    from salience.model import ImageSet

_SHOWN, _PICTURES = 5, 8  # simplest and most complex features on the page, images of each


def write_page(
    found: ComplexityReport,
    images: ImageSet,
    tops: Mapping[int, Sequence[int]],
    settings: Mapping[str, Any],
    path: Path,
) -> None:
    """Write the page: the verdict with its control, then features, layers, flow, and training where it was seen."""
    from salience import report
    from salience.cli.explain_complexity import words

    good, label, detail = words(found)
    live = found.complexity.live
    blocks: list[Any] = [
        report.verdict(label, detail, good),
        report.facts({
            "features": int(live.sum()), "dead features, left out": found.complexity.dead,
            "that the last layer tells (R² above 0.5)": int(found.readable.sum()),
            "mean complexity": float(found.complexity.score[live].mean()),
            "mean complexity of shuffled features": float(found.shuffled.score[found.shuffled.live].mean()),
            "predictions that survive being written in features": f"{found.agreement:.0%}",
        }),
        report.figure(lambda ax: _scatter(ax, found, found.importance.absolute, "importance (of the logit)"),
                      "Each feature: how complex it is, and how much it matters. Grey ones cannot be read from the last "
                      "layer either: such rare features get a high complexity and a low importance for free."),
        report.table(("complexity against", "rank correlation", "95 % interval", "features"),
                     [_row(name, one) for name, one in found.correlations.items()],
                     "Spearman's correlation over features, with a bootstrap interval over them.",
                     align=("left", "right", "right", "right")),
        report.heading("Simple and complex features"),
        report.figure(_gallery(found, images, tops),
                      f"The {_SHOWN} simplest features (above) and the {_SHOWN} most complex ones that the last layer tells "
                      "(below), with the images that hold most of each."),
        report.figure(lambda ax: _decoded(ax, found),
                      "How much of a feature a linear decoder reads from each layer, on images that it did not learn from: "
                      "the simplest tenth, the most complex tenth, all, and shuffled ones."),
    ]  # fmt: skip
    blocks += _flow(report, found) + _companions(report, found) + _training(report, found)
    blocks += [report.text(f"Note: {note}") for note in found.notes]
    blocks += [report.heading("How it was made"), report.code(json.dumps(settings, indent=1, ensure_ascii=False))]
    subtitle = f"{int(live.sum())} features of {settings['model']} on {len(images):,} images"
    report.page("Complexity of features", blocks, path=path, subtitle=subtitle)


def extremes(found: ComplexityReport) -> dict[str, np.ndarray]:
    """The simplest and the most complex tenth of the live features."""
    order = found.order
    few = max(1, len(order) // 10)
    return {"simplest tenth": order[:few], "most complex tenth": order[-few:]}


def _row(name: str, one: RankCorrelation) -> tuple[str, str, str, str]:
    return name, f"{one.value:+.2f}", f"{one.low:+.2f} … {one.high:+.2f}", str(one.n)


def _scatter(ax: Axes, found: ComplexityReport, values: np.ndarray, ylabel: str) -> None:
    lost = found.complexity.live & ~found.readable
    muted = ax.xaxis.label.get_color()
    for rows, colour, name in ((found.readable, "C0", "readable at the end"), (lost, muted, "not readable")):
        if rows.any():
            ax.scatter(found.complexity.score[rows], values[rows], s=16, color=colour, label=name, alpha=0.8)
    ax.set_xlabel("complexity: 0 readable everywhere, 1 nowhere")
    ax.set_ylabel(ylabel)
    ax.set_xlim(0, 1.02)
    ax.set_ylim(bottom=0)
    ax.legend(loc="upper right")


def _decoded(ax: Axes, found: ComplexityReport) -> None:
    from salience.report import figures

    steps, live = found.complexity, found.complexity.live
    series = {name: steps.information[:, rows].mean(1) for name, rows in extremes(found).items()}
    series["all"] = steps.information[:, live].mean(1)
    series["shuffled"] = found.shuffled.information[:, found.shuffled.live].mean(1)
    figures.curve(ax, np.arange(len(steps.names)), series, ylabel="share of the feature that is read")
    _name_steps(ax, steps.names)


def _name_steps(ax: Axes, names: Sequence[str]) -> None:
    short = [name if len(name) <= 18 else f"…{name[-17:]}" for name in names]
    ax.set_xticks(np.arange(len(names)), short, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_ylim(0, 1.02)


def _gallery(found: ComplexityReport, images: ImageSet, tops: Mapping[int, Sequence[int]]) -> Figure:
    from matplotlib.figure import Figure

    told = [i for i in found.order if found.readable[i] and len(tops[int(i)])] or list(found.order)
    few = min(_SHOWN, max(1, len(told) // 2))
    shown = [*told[:few], *told[::-1][:few]]
    figure = Figure(figsize=(8.6, 0.78 * len(shown) + 0.1), layout="constrained")
    axes = figure.subplots(len(shown), _PICTURES, squeeze=False)
    for row, i in zip(axes, shown, strict=True):
        row[0].set_ylabel(
            f"feature {i}\nK {found.complexity.score[i]:.2f}, moves the logit {found.importance.absolute[i]:.2f}",
            fontsize=8, rotation=0, ha="right", va="center",
        )  # fmt: skip
        for axis, image in zip(row, tops[int(i)], strict=False):
            axis.imshow(images.picture(image), cmap="gray")
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    return figure


def _flow(report: Any, found: ComplexityReport) -> list[Any]:
    from salience.report import figures

    if not found.flow:
        return [
            report.heading("Flow"),
            report.text("The network has no residual blocks, so there are no two paths to compare."),
        ]
    blocks: list[Any] = [report.heading("Flow")]
    said = {"cka": "likeness (linear CKA)", "information": "share of the feature that is read"}
    for measure, flow in found.flow.items():
        series = {
            f"{name.split()[0].replace('most', 'complex')}, {path}": np.nanmean(getattr(flow, path)[:, rows], 1)
            for name, rows in extremes(found).items() for path in ("skip", "branch")
        }  # fmt: skip

        def draw(ax: Axes, flow: Any = flow, series: Any = series, measure: str = measure) -> None:
            figures.curve(ax, np.arange(len(flow.blocks)), series, ylabel=said[measure])
            _name_steps(ax, flow.blocks)
            ax.set_ylim(bottom=0, top=None, auto=True)

        blocks.append(report.figure(draw, f"{said[measure][0].upper()}{said[measure][1:]}: features and what goes around "
                                          "(skip) and through (branch) each residual block."))  # fmt: skip
    return blocks


def _companions(report: Any, found: ComplexityReport) -> list[Any]:
    from salience.concepts.complexity.findings import rank_correlation
    from salience.report import figures

    live = found.complexity.live
    rows = []
    for name, values in found.companions.items():
        own = live & np.isfinite(values)
        rows.append(_row(name, rank_correlation(found.complexity.score[own], values[own])))
    counts, share = found.support
    return [
        report.heading("What goes with complexity"),
        report.table(("complexity against", "rank correlation", "95 % interval", "features"), rows,
                     "Redundancy: how much of a feature half of the neurons tell. Localisation: whether few neurons carry it. "
                     "Share of images: how many hold any of it.", align=("left", "right", "right", "right")),
        report.figure(lambda ax: figures.curve(ax, counts, {"": share}, xlabel="features kept, the most important first",
                                               ylabel="predictions kept"),
                      "How many predictions are the same with only the most important features: what the many others "
                      "carry together is what is missing.", height=2.4),
    ]  # fmt: skip


def _training(report: Any, found: ComplexityReport) -> list[Any]:
    from salience.report import figures

    if found.time is None:
        return [
            report.heading("Training"),
            report.text("No checkpoints were given, so when features are learned was not measured."),
        ]
    time, epochs = found.time, found.epochs
    names = [Path(name).stem for name in time.names]
    live = [rows[time.live[rows]] for rows in extremes(found).values()]
    series = {name: time.information[:, rows].mean(1) for name, rows in zip(extremes(found), live, strict=True)}

    def decoded(ax: Axes) -> None:
        figures.curve(ax, np.arange(len(names)), series, ylabel="share of the feature that is read")
        _name_steps(ax, names)

    def complexity(ax: Axes) -> None:
        means = {"all features": [one.mean for one in epochs], "top 1 % by importance": [one.top for one in epochs]}
        figures.curve(ax, np.arange(len(names)), means, ylabel="complexity")
        _name_steps(ax, names)

    return [
        report.heading("Training"),
        report.figure(decoded, "Features of the finished network, read from the last layer of each checkpoint."),
        report.figure(lambda ax: _scatter(ax, found, time.score, "time to decode"),
                      "Each feature: how complex it is, and how late it can be read."),
        report.figure(complexity, "Another experiment: features learned anew at each checkpoint, and how complex those are."),
        report.table(("checkpoint", "complexity against importance", "95 % interval", "features", "same predictions"),
                     [(name, *_row("", one.against_importance)[1:], f"{one.agreement:.0%}")
                      for name, one in zip(names, epochs, strict=True)],
                     "Features learned anew at each checkpoint.", align=("left", *["right"] * 4)),
    ]  # fmt: skip
