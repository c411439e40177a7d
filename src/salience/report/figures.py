"""Drawings that reports share: plain arrays onto given axes, in the style of the page.

Each function takes the axes first, so it fits the callable that `salience.report.figure` calls::

    figure(lambda ax: histogram(ax, {"raw": raw, "selected": chosen}, "log weight"), "Weights move right.")
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from salience.errors import InputError
from salience.report.render import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BINS = 60
_LINES = ("-", "--", "-.", ":")
Values = Sequence[float] | Sequence[int] | ndarray
Binned = tuple[Values, Values]


def histogram(ax: Axes, series: Mapping[str, Values | Binned], xlabel: str = "") -> None:
    """How values are distributed, each series as a share of its own total, over the same bins.

    Parameters
    ----------
    ax : matplotlib Axes
    series : mapping of str to values (n,) or to (counts (b,), edges (b + 1,))
        Raw values are binned here, so a million of them cost no more to show than sixty; those that are not
        finite are left out. A tuple is taken as counts and edges; where one series is binned, all share its
        edges and the end bins take what lies beyond.
    xlabel : str

    Raises
    ------
    InputError
        If a series has no finite value, counts do not fit their edges, or two binned series differ in edges.
    """
    binned = {name: _binned(name, values) for name, values in series.items() if isinstance(values, tuple)}
    raw = {name: _finite(name, values) for name, values in series.items() if not isinstance(values, tuple)}
    if not series:
        raise InputError("series is empty: a histogram needs at least one")
    edges = next((edges for _, edges in binned.values()), None)
    if edges is None:
        low, high = min(v.min() for v in raw.values()), max(v.max() for v in raw.values())
        edges = np.histogram_bin_edges(np.array([low, high]), bins=_BINS)
    for number, name in enumerate(series):
        if name in binned:
            counts, own = binned[name]
            if not np.array_equal(own, edges):
                raise InputError(f"series {name!r} has other edges than the first binned series")
        else:
            counts = np.histogram(np.clip(raw[name], edges[0], edges[-1]), bins=edges)[0].astype(np.float64)
        ax.stairs(counts / counts.sum(), edges, fill=True, color=f"C{number}", alpha=0.22)
        ax.stairs(
            counts / counts.sum(), edges, color=f"C{number}", linewidth=1.6, label=_label(name, ax),
            linestyle=_LINES[number % len(_LINES)],
        )  # fmt: skip
    _finish(ax, xlabel, "share", legend=len(series) > 1)
    ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    ax.set_ylim(bottom=0)


def bars(
    ax: Axes,
    labels: Sequence[str],
    values: Values,
    intervals: Sequence[tuple[float, float]] | None = None,
    highlight: Collection[str] | None = None,
    limit: float | None = None,
    xlabel: str = "",
) -> None:
    """Horizontal bars with their figures written beside them, the first on top.

    Parameters
    ----------
    ax : matplotlib Axes
    labels, values : sequences of length n
        A value that is not finite is written as a dash.
    intervals : sequence of (low, high), length n, optional
        Drawn as error bars; a pair that is not finite is left out.
    highlight : collection of str, optional
        Labels drawn in colour, the others muted; all in colour by default.
    limit : float, optional
        A bar that the values are to meet, drawn as a dashed line.
    xlabel : str

    Raises
    ------
    InputError
        If the lengths differ, or nothing is given.
    """
    _same_length("labels", labels, values=values, intervals=intervals)
    spans = [(math.nan, math.nan)] * len(labels) if intervals is None else list(intervals)
    ink, muted = ax.title.get_color(), ax.xaxis.label.get_color()
    for row, (name, value, span) in enumerate(zip(labels, values, spans)):
        strong = highlight is None or name in highlight
        known, spanned = math.isfinite(value), all(map(math.isfinite, span))
        if known:
            colour, alpha = ("C0", 1.0) if strong else (muted, 0.45)
            ax.barh(row, value, height=0.62, color=colour, alpha=alpha)
        if spanned:
            ax.plot(span, [row, row], color=ink, linewidth=1.2, solid_capstyle="butt", marker="|")
        end = max([0.0, *([value] if known else []), *(span if spanned else [])])
        ax.annotate(
            f"{value:.3g}".replace("-", "\u2212") if known else "–", (end, row), xytext=(6, 0),
            textcoords="offset points", va="center",
        )  # fmt: skip
    if limit is not None:
        ax.axvline(limit, color=ink, linestyle="--", linewidth=1.2)
    ax.axvline(0, color=ax.spines["bottom"].get_edgecolor(), linewidth=0.8)
    ax.set_yticks(range(len(labels)), [_label(name, ax) for name in labels])
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.margins(x=0.14)
    _finish(ax, xlabel, "", legend=False, grid="x")


def change(
    ax: Axes,
    labels: Sequence[str],
    before: Values,
    after: Values,
    names: tuple[str, str] = ("before", "after"),
    xlabel: str = "",
) -> None:
    """What each label had before and has after: two dots joined by a line, the first label on top.

    Parameters
    ----------
    ax : matplotlib Axes
    labels, before, after : sequences of length n
    names : (str, str)
        What the two dots are called in the legend.
    xlabel : str

    Raises
    ------
    InputError
        If the lengths differ, or nothing is given.
    """
    _same_length("labels", labels, before=before, after=after)
    rows, muted = np.arange(len(labels)), ax.xaxis.label.get_color()
    ax.hlines(rows, before, after, color=muted, alpha=0.5, linewidth=2)
    ax.plot(before, rows, "o", markersize=8, color=muted, label=_label(names[0], ax))
    ax.plot(after, rows, "o", markersize=8, color="C0", label=_label(names[1], ax))
    ax.set_yticks(rows, [_label(name, ax) for name in labels])
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.set_xlim(left=min(0.0, np.nanmin(before), np.nanmin(after)))
    _finish(ax, xlabel, "", legend=True, grid="x")


def curve(
    ax: Axes,
    x: Values,
    series: Mapping[str, Values],
    bands: Mapping[str, tuple[Values, Values]] | None = None,
    xlabel: str = "",
    ylabel: str = "",
) -> None:
    """Lines over a shared axis, told apart by colour and by dashes.

    Parameters
    ----------
    ax : matplotlib Axes
    x : sequence of length n
    series : mapping of str to a sequence of length n
    bands : mapping of str to (low, high), sequences of length n, optional
        Intervals shaded around the series of the same name.
    xlabel, ylabel : str

    Raises
    ------
    InputError
        If the lengths differ, nothing is given, or a band has no series.
    """
    _same_length("x", x, **{f"series {name!r}": values for name, values in series.items()})
    stray = [name for name in bands or {} if name not in series]
    if stray or not series:
        raise InputError(f"bands name no series: {stray}; there are: {list(series)}" if stray else "series is empty")
    for number, (name, values) in enumerate(series.items()):
        style = _LINES[number % len(_LINES)]
        ax.plot(x, values, color=f"C{number}", linestyle=style, label=_label(name, ax))
        if bands and name in bands:
            low, high = bands[name]
            _same_length("x", x, **{f"low band of {name!r}": low, f"high band of {name!r}": high})
            ax.fill_between(x, low, high, color=f"C{number}", alpha=0.18, linewidth=0)
    _finish(ax, xlabel, ylabel, legend=len(series) > 1)


def heat(ax: Axes, matrix: Float[ndarray, "rows columns"], rows: Sequence[str], columns: Sequence[str]) -> None:
    """A matrix as colours with a scale beside it; cells that have room for it also carry their figure.

    Parameters
    ----------
    ax : matplotlib Axes
    matrix : array (r, c)
    rows, columns : sequences of str, length r and c

    Raises
    ------
    InputError
        If the labels do not fit the matrix, or it holds no finite value.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    if matrix.shape != (len(rows), len(columns)):
        raise InputError(f"matrix has shape {matrix.shape}; the labels make it ({len(rows)}, {len(columns)})")
    if not np.isfinite(matrix).any():
        raise InputError("matrix holds no finite value")
    matrix = np.where(np.isfinite(matrix), matrix, np.nan)
    image = ax.imshow(matrix, aspect="auto", interpolation="nearest")
    ax.set_xticks(
        range(len(columns)),
        [_label(name, ax) for name in columns],
        rotation=45,
        ha="right",
        rotation_mode="anchor",
    )
    ax.set_yticks(range(len(rows)), [_label(name, ax) for name in rows])
    ax.spines[:].set_visible(False)
    width, height = ax.figure.get_size_inches()  # type: ignore[union-attr]
    if len(columns) <= 1.5 * width and len(rows) <= 4 * height:
        middle = (np.nanmin(matrix) + np.nanmax(matrix)) / 2
        for (row, column), value in np.ndenumerate(matrix):
            if math.isfinite(value):
                ink = "white" if value < middle else "black"
                ax.text(column, row, f"{value:.2g}", ha="center", va="center", color=ink)
            else:
                ax.text(column, row, "–", ha="center", va="center")
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.9)
    bar.outline.set_visible(False)


def dendrogram(
    ax: Axes, tree: Float[ndarray, "merges 4"], names: Sequence[str], xlabel: str = "", limit: float | None = None
) -> None:
    """A tree of merges, leaves on the left and named, distances to the right.

    Parameters
    ----------
    ax : matplotlib Axes
    tree : array (n - 1, 4)
        As `scipy.cluster.hierarchy.linkage` gives it.
    names : sequence of str, length n
    xlabel : str
    limit : float, optional
        A distance to mark with a dashed line; what merges below it is drawn in colour.

    Raises
    ------
    InputError
        If the names do not fit the tree.
    """
    from scipy.cluster import hierarchy

    if len(names) != len(tree) + 1:
        raise InputError(f"{len(names)} names do not fit a tree of {len(tree)} merges")
    drawn = hierarchy.dendrogram(tree, no_plot=True)
    ink, muted = ax.title.get_color(), ax.xaxis.label.get_color()
    for places, distances in zip(drawn["icoord"], drawn["dcoord"]):
        near = limit is not None and max(distances) < limit
        ax.plot(distances, np.array(places) / 10 - 0.5, color="C0" if near else muted, linewidth=2 if near else 1.2)
    ax.set_yticks(range(len(names)), [_label(names[leaf], ax) for leaf in drawn["leaves"]])
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlim(left=0)
    if limit is not None:
        ax.axvline(limit, color=ink, linestyle="--", linewidth=1.2)
    _finish(ax, xlabel, "", legend=False, grid="x")


def _label(name: object, ax: Axes, share: float = 0.4) -> str:
    """A name on one line, hidden characters shown, cut in the middle to a share of the figure's width."""
    line = visible(" ".join(str(name).split()))
    most = int(share * 14 * ax.figure.get_figwidth())  # type: ignore[union-attr]
    return line if len(line) <= most else f"{line[: most // 2]}…{line[-(most - most // 2 - 1) :]}"


def _finish(ax: Axes, xlabel: str, ylabel: str, legend: bool, grid: str = "y") -> None:
    ax.set_xlabel(_label(xlabel, ax, 0.9), loc="right")  # grows over the labels on the left, not off the edge
    ax.set_ylabel(_label(ylabel, ax, 0.6))
    ax.grid(axis=grid, linewidth=0.8)  # type: ignore[arg-type]
    if legend:
        handles, names = ax.get_legend_handles_labels()
        wide = ax.figure.get_figwidth() > 5  # type: ignore[union-attr]
        ax.legend(
            handles,
            names,
            loc="lower right",
            bbox_to_anchor=(1, 1),
            ncols=len(names) if len(names) < 3 or (wide and len(names) < 5) else 2,
            borderaxespad=0.2,
        )


def _finite(name: str, values: Values) -> Float[ndarray, " n"]:
    array = np.asarray(values, dtype=np.float64).ravel()
    array = array[np.isfinite(array)]
    if not array.size:
        raise InputError(f"series {name!r} has no finite value: there is nothing to draw")
    return array


def _binned(name: str, pair: Binned) -> tuple[Float[ndarray, " b"], Float[ndarray, " b+1"]]:
    if len(pair) != 2:
        raise InputError(f"series {name!r} is a tuple of {len(pair)}; give an array, or (counts, edges)")
    counts, edges = (np.asarray(part, dtype=np.float64) for part in pair)
    rising = edges.ndim == 1 and bool((np.diff(edges) > 0).all())
    if counts.ndim != 1 or not rising or len(edges) != len(counts) + 1 or (counts < 0).any() or not counts.sum() > 0:
        raise InputError(
            f"series {name!r}: {counts.shape} counts and {edges.shape} edges do not make a histogram; "
            "give counts >= 0, not all zero, and one more edge than counts, rising"
        )
    return counts, edges


def _same_length(of: str, reference: Sequence[object] | ndarray, **others: Sequence[object] | ndarray | None) -> None:
    if not len(reference):
        raise InputError(f"{of} is empty: there is nothing to draw")
    for name, values in others.items():
        if values is not None and len(values) != len(reference):
            raise InputError(f"{name} has length {len(values)}; {of} has length {len(reference)}")
