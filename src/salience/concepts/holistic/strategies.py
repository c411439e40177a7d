"""The strategies behind a class: images that are decided by the same concepts.

Source: Fel et al., NeurIPS 2023 (arXiv 2306.07304), section 5, from memory; prevalence and reliability as we remember
them, the length of importances, the choice of the number of clusters and the layout are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score

from salience.errors import InputError
from salience.measure._checks import finite, truths

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST = 8  # clusters that are tried
_NAMED = 3  # dominant concepts of a strategy


@dataclass(frozen=True)
class Strategy:
    """A cluster of images.

    Attributes
    ----------
    images : integer array
        Its rows.
    concepts : list of int
        Its most important concepts, the first most; none of no or negative importance.
    share : float
        Of the images.
    accuracy : float
        Share of its images that are classified correctly; NaN where that is not known.
    place : array (2,)
        Where it is drawn.
    """

    images: Int[np.ndarray, " m"]
    concepts: list[int]
    share: float
    accuracy: float
    place: Float[np.ndarray, 2]


@dataclass(frozen=True)
class StrategyGraph:
    """Strategies, which of them are alike, and how each concept does.

    Attributes
    ----------
    nodes : list of Strategy
        The largest first.
    edges : list of (int, int, float)
        Each strategy and the one nearest to it, with the distance of their centres; no edge twice.
    labels : integer array (n,)
        The node of each image.
    centers : array (nodes, k)
        Mean importance of unit length.
    prevalence : array (k,)
        Share of the images whose most important concept it is.
    reliability : array (k,)
        Share of those images that are classified correctly; NaN of a concept that is nowhere the most important, or
        where that is not known.
    layout : array (n, 2)
        Where each image is drawn: its first two principal components.
    """

    nodes: list[Strategy]
    edges: list[tuple[int, int, float]]
    labels: Int[np.ndarray, " n"]
    centers: Float[np.ndarray, "nodes k"]
    prevalence: Float[np.ndarray, " k"]
    reliability: Float[np.ndarray, " k"]
    layout: Float[np.ndarray, "n 2"]


def strategy_graph(
    importance: Float[np.ndarray, "n k"],
    correct: Bool[np.ndarray, " n"] | ArrayLike | None = None,
    *,
    n_clusters: int | None = 5,
    random_state: int = 0,
) -> StrategyGraph:
    """Cluster images by what decides them.

        phi / |phi|  ->  k-means;    an edge from each cluster to the nearest other

    Parameters
    ----------
    importance : array (n, k)
        Local importances, of `concept_importance`: not codes, which also hold what the class does not read.
    correct : boolean array (n,), optional
        Whether each image is classified correctly.
    n_clusters : int or None
        None takes the number, from 2 to 8, with the largest mean silhouette.
    random_state : int

    Raises
    ------
    InputError
        Importance that is not finite, or more clusters than images that differ.
    """
    phi = finite("importance", importance, 2)
    n, k = phi.shape
    right = None if correct is None else truths("correct", correct, (n,))
    directions, different = _unit(phi), count_different(phi)
    if n_clusters is None:
        n_clusters = _best_number(directions, different, random_state)
    if isinstance(n_clusters, bool) or not 1 <= n_clusters <= different:
        raise InputError(f"n_clusters: got {n_clusters}; {n} images with {different} different importances allow "
                         f"1..{different}")  # fmt: skip
    raw = _clusters(directions, n_clusters, random_state)
    order = np.argsort(-np.bincount(raw), kind="stable")
    labels = np.argsort(order)[raw]
    centers = np.stack([directions[labels == i].mean(0) for i in range(n_clusters)])
    layout = _plane(directions)
    nodes = [_strategy(np.flatnonzero(labels == i), centers[i], right, layout) for i in range(n_clusters)]
    first = phi.argmax(1)
    reliability = np.full(k, math.nan)
    if right is not None:
        for i in np.unique(first):
            reliability[i] = right[first == i].mean()
    return StrategyGraph(nodes, _edges(centers), labels, centers, np.bincount(first, minlength=k) / n, reliability,
                         layout)  # fmt: skip


def count_different(importance: Float[np.ndarray, "n k"]) -> int:
    """How many images differ in the direction of their importances, rounding in single precision aside."""
    return len(np.unique(_unit(importance).round(5), axis=0))


def _unit(phi: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n k"]:
    return phi / np.maximum(np.linalg.norm(phi, axis=1, keepdims=True), 1e-300)


def _clusters(directions: np.ndarray, count: int, random_state: int) -> Int[np.ndarray, " n"]:
    return KMeans(count, n_init=10, random_state=random_state).fit_predict(directions)


def _best_number(directions: np.ndarray, different: int, random_state: int) -> int:
    scores = {count: silhouette_score(directions, _clusters(directions, count, random_state))
              for count in range(2, min(_MOST, different, len(directions) - 1) + 1)}  # fmt: skip
    return max(scores, key=lambda count: scores[count]) if scores else 1


def _strategy(rows: np.ndarray, center: np.ndarray, right: np.ndarray | None, layout: np.ndarray) -> Strategy:
    ranked = np.argsort(-center, kind="stable")[:_NAMED]
    return Strategy(
        images=rows, concepts=[int(i) for i in ranked if center[i] > 0], share=len(rows) / len(layout),
        accuracy=math.nan if right is None else float(right[rows].mean()), place=layout[rows].mean(0),
    )  # fmt: skip


def _edges(centers: np.ndarray) -> list[tuple[int, int, float]]:
    distances = cdist(centers, centers)
    np.fill_diagonal(distances, np.inf)
    if len(centers) < 2:
        return []
    pairs = {tuple(sorted((i, int(distances[i].argmin())))) for i in range(len(centers))}
    return [(i, j, float(distances[i, j])) for i, j in sorted(pairs)]


def _plane(directions: np.ndarray) -> Float[np.ndarray, "n 2"]:
    if len(directions) < 2 or not np.ptp(directions, axis=0).any():
        return np.zeros((len(directions), 2))
    parts = PCA(min(2, *directions.shape)).fit_transform(directions)
    return np.pad(parts, ((0, 0), (0, 2 - parts.shape[1])))


def draw_graph(ax: Axes, graph: StrategyGraph, names: list[str] | None = None) -> None:
    """Draw images as points, strategies as numbered discs, and which are alike; below, their dominant concepts.

    Parameters
    ----------
    ax : matplotlib Axes
    graph : StrategyGraph
    names : list of str, optional
        Of the concepts.
    """
    for i, node in enumerate(graph.nodes):
        ax.scatter(
            graph.layout[node.images, 0], graph.layout[node.images, 1], s=10, alpha=0.45, color=f"C{i}", linewidths=0
        )
    for i, j, _ in graph.edges:
        ax.plot(*np.stack([graph.nodes[i].place, graph.nodes[j].place]).T, color="0.5", linewidth=1.2, zorder=2)
    for i, node in enumerate(graph.nodes):
        called = " + ".join(names[c] if names else str(c) for c in node.concepts) or "nothing for it"
        right = "" if math.isnan(node.accuracy) else f", {node.accuracy:.0%} right"
        ax.scatter(node.place[0], node.place[1], s=160, color=f"C{i}", edgecolors="white", zorder=3,
                   label=f"{i + 1}: {called}, {node.share:.0%} of the images{right}")  # fmt: skip
        ax.annotate(
            str(i + 1), (node.place[0], node.place[1]), ha="center", va="center", fontsize=8, color="white", zorder=4
        )
    ax.set_xticks([])
    ax.set_yticks([])
    ax.margins(0.08)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), frameon=False, fontsize=8, markerscale=0.6)
