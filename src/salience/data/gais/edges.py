"""What a graph is here: weighted edges j -> i, and batches of rows with the edges among them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, Int


class Edges(NamedTuple):
    """Weighted edges with a self loop on every node.

    Attributes
    ----------
    index : (2, e) int64
        Row 0 holds the source j, row 1 the target i.
    weight : (e,) float32
        In (0, 1]; 1 for self loops.
    """

    index: Int[np.ndarray, "2 e"]  # type: ignore[assignment]  # a tuple has a method of that name
    weight: Float[np.ndarray, " e"]

    @classmethod
    def of(cls, index: Int[np.ndarray, "2 e"], weight: Float[np.ndarray, " e"], n: int) -> Edges:
        """Edges between different nodes, with the self loops of all n nodes added."""
        loops = np.tile(np.arange(n), (2, 1))
        return cls(np.concatenate([index, loops], axis=1), np.concatenate([weight, np.ones(n)]).astype(np.float32))


class GraphBatch(NamedTuple):
    """Rows of the table, and the edges among them in numbers 0..m-1."""

    rows: Int[np.ndarray, " m"]
    edges: Edges


class Graph(Protocol):
    """A graph that comes in batches, in several rounds; each round holds every row once."""

    def batches(self, number: int) -> Iterator[GraphBatch]:
        """The batches of one round; the same ones at every call."""
