"""Stratified mini-batches, and the similarity graph of one: distances are only ever taken inside a batch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int
from scipy.spatial.distance import pdist, squareform

from salience.data.gais.edges import Edges, GraphBatch

_KEPT = 10_000  # rows of a table whose batches are kept for the next epoch: some 20 MB a round


def stratified_batches(
    y: Int[np.ndarray, " n"], batch_size: int, rng: np.random.Generator
) -> list[Int[np.ndarray, " m"]]:
    """Cut all rows into batches of nearly equal size, in each of which every class has its share to within one row.

    Parameters
    ----------
    y : (n,) int
        Class codes from 0 on.
    batch_size : int
        Largest size of a batch.
    rng : numpy.random.Generator

    Returns
    -------
    list of (m,) int64
        Every row is in one of them.

    Notes
    -----
    Source: arXiv 2502.20293, abstract (stratified mini-batches); how rows are dealt out is reconstructed.
    """
    order = np.lexsort((rng.random(len(y)), y))  # classes one after the other, each shuffled
    sizes = np.bincount(y)
    place = np.arange(len(y)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    # Spread each class evenly over [0, 1): a stretch of that line then holds each class in proportion.
    along = (place + rng.random(len(sizes))[y[order]]) / sizes[y[order]]
    return np.array_split(order[np.argsort(along, kind="stable")], -(-len(y) // batch_size))


def minibatch_edges(
    x: Float[np.ndarray, "m d"], *, theta_s: float = 0.9, theta_r: float = 0.3, rng: np.random.Generator
) -> Edges:
    """The graph of one batch: the most similar pairs, less those that a random mask takes away.

        s_ij = 1 / (1 + ||x_i - x_j||),      i - j an edge if  s_ij >= quantile_theta_s(s)  and  u_ij >= theta_r

    with u_ij uniform in [0, 1). Undirected, weight s_ij, self loops of weight 1 added.

    Parameters
    ----------
    x : (m, d) float
        Rows of the batch, standardised.
    theta_s : float
        Quantile of the similarities in the batch that an edge has to reach.
    theta_r : float
        Probability to take a pair away.
    rng : numpy.random.Generator

    Returns
    -------
    Edges
        Both directions of every pair.

    Notes
    -----
    Source: arXiv 2412.19201, abstract (random mask and similarity threshold); the similarity and the numbers are
    reconstructed.
    """
    similarity = 1.0 / (1.0 + pdist(x))
    if not len(similarity):
        return Edges.of(np.empty((2, 0), np.int64), np.empty(0), len(x))
    kept = (similarity >= np.quantile(similarity, theta_s)) & (rng.random(len(similarity)) >= theta_r)
    target, source = np.nonzero(squareform(kept))
    return Edges.of(np.stack([source, target]), squareform(similarity)[target, source], len(x))


class MiniBatchGraph:
    """Rounds of stratified batches with a graph of their own; the same round is the same batches and edges each time.

    Above 10,000 rows they are made anew whenever they are asked for: nothing but the table is held.

    Parameters
    ----------
    x : (n, d) float32
    y : (n,) int
    batch_size, theta_s, theta_r
        See `stratified_batches` and `minibatch_edges`.
    seed : int
    """

    def __init__(
        self, x: Float[np.ndarray, "n d"], y: Int[np.ndarray, " n"], *, batch_size: int, theta_s: float,
        theta_r: float, seed: int,
    ) -> None:  # fmt: skip
        self.x, self.y, self.batch_size = x, y, batch_size
        self.theta_s, self.theta_r, self.seed = theta_s, theta_r, seed
        self.kept: dict[int, list[GraphBatch]] = {}

    def batches(self, number: int) -> Iterator[GraphBatch]:
        """The batches of one round, with their edges."""
        if len(self.x) > _KEPT:
            yield from self._made(number)
            return
        if number not in self.kept:
            self.kept[number] = list(self._made(number))
        yield from self.kept[number]

    def _made(self, number: int) -> Iterator[GraphBatch]:
        rng = np.random.default_rng([self.seed, number])
        for rows in stratified_batches(self.y, self.batch_size, rng):
            yield GraphBatch(rows, minibatch_edges(self.x[rows], theta_s=self.theta_s, theta_r=self.theta_r, rng=rng))
