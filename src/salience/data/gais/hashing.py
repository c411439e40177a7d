"""Similarity graphs by locality-sensitive hashing: random hyperplanes at one level, at several, or in several views."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int

from salience.data.gais.edges import Edges, GraphBatch

_CELLS = 1 << 20  # pairs that are compared at once
_BLOCK = 4096  # rows of a batch: a table with no more is one graph


def lsh_edges(
    x: Float[np.ndarray, "n d"], *, n_tables: int = 8, levels: Sequence[int] = (8,), n_views: int = 1, cap: int = 64,
    max_neighbors: int = 32, seed: int = 0,
) -> Edges:  # fmt: skip
    r"""Graph of the rows that hash alike.

        code_t(x) = sign bits of R_t (x - mean),   entries of R_t from N(0, 1)
        w_ij = mean over tables t of  sum_l 2^l [first b_l bits of code_t agree] / sum_l 2^l

    Two rows at an angle phi agree in b bits with probability ``(1 - phi / pi)^b``. One level is SL-LSH: the share of
    tables in which they collide. Several levels are ML-LSH: codes are nested, and finer collisions count more. Several
    views are MV-LSH: the tables are shared out over random halves of the features.

    Parameters
    ----------
    x : (n, d) float
        Standardised.
    n_tables : int
        In all views together.
    levels : sequence of int
        Bits b_l of each level, ascending; 32 at most.
    n_views : int
        Each sees ``ceil(d / 2)`` features drawn at random; 1 sees all.
    cap : int
        In a bucket with more rows, candidates are only the rows of a part of at most so many.
    max_neighbors : int
        Sources j of the edges into a row i: its heaviest ones, chance deciding between equal ones.
    seed : int

    Returns
    -------
    Edges
        Not symmetric, as each row keeps its own heaviest.

    Notes
    -----
    Source: arXiv 2502.20293, abstract (random projections; single-level, multi-level, multi-view); weights, sizes and
    caps are reconstructed. A bucket above the cap is cut into parts in place of leaving rows out, since most rows of a
    large table would have no neighbour otherwise.
    """
    rng = np.random.default_rng(seed)
    codes = hash_codes(x, n_tables=n_tables, bits=max(levels), n_views=n_views, rng=rng)
    ids, weights = _neighbours(codes, levels, cap, max_neighbors, rng)
    target, at = np.nonzero(ids >= 0)
    return Edges.of(np.stack([ids[target, at].astype(np.int64), target]), weights[target, at], len(x))


def hash_codes(
    x: Float[np.ndarray, "n d"], *, n_tables: int, bits: int, n_views: int = 1, rng: np.random.Generator
) -> Int[np.ndarray, "n tables"]:
    """Sign bits of every row against random hyperplanes through the mean, one code per table.

    Parameters
    ----------
    x : (n, d) float
    n_tables, bits, n_views : int
        Table t looks at the features of view ``t mod n_views``.
    rng : numpy.random.Generator

    Returns
    -------
    (n, n_tables) uint16 or uint32
        The first hyperplane gives the highest bit.
    """
    d = x.shape[1]
    views = [rng.choice(d, -(-d // 2), replace=False) if n_views > 1 else np.arange(d) for _ in range(n_views)]
    centred = x - x.mean(axis=0, dtype=np.float64).astype(x.dtype)
    codes = np.zeros((len(x), n_tables), np.uint16 if bits <= 16 else np.uint32)
    for table in range(n_tables):
        features = views[table % n_views]
        signs = centred[:, features] @ rng.normal(size=(len(features), bits)).astype(x.dtype) > 0
        for bit in range(bits):
            codes[:, table] |= signs[:, bit].astype(codes.dtype) << (bits - 1 - bit)
    return codes


class HashGraph:
    """The graph of `lsh_edges`, in batches of rows that stand side by side in one table's order of codes.

    A table of up to 4,096 rows is one batch; of a larger one edges between batches are left out, other ones in each
    round, as every round goes by another table.

    Parameters
    ----------
    x : (n, d) float32
    seed : int
    **options
        Of `lsh_edges`.
    """

    def __init__(
        self, x: Float[np.ndarray, "n d"], *, n_tables: int, levels: Sequence[int], n_views: int, cap: int,
        max_neighbors: int, seed: int,
    ) -> None:  # fmt: skip
        rng = np.random.default_rng(seed)
        self.codes = hash_codes(x, n_tables=n_tables, bits=max(levels), n_views=n_views, rng=rng)
        self.ids, self.weights = _neighbours(self.codes, levels, cap, max_neighbors, rng)
        self.seed = seed

    def rounds(self, wanted: int) -> int:
        """Rounds to go through: all are the same where the table is one batch."""
        return wanted if len(self.codes) > _BLOCK else 1

    def batches(self, number: int) -> Iterator[GraphBatch]:
        """The batches of one round, with the edges inside them."""
        n, tables = self.codes.shape
        chance = np.random.default_rng([self.seed, number]).random((n,))
        order = np.lexsort((chance, self.codes[:, number % tables])) if n > _BLOCK else np.arange(n)
        place = np.full(n + 1, -1)  # the last entry stands for no neighbour
        for rows in np.array_split(order, -(-n // _BLOCK)):
            place[rows] = np.arange(len(rows))
            sources = place[self.ids[rows]]
            target, at = np.nonzero(sources >= 0)
            edges = Edges.of(np.stack([sources[target, at], target]), self.weights[rows][target, at], len(rows))
            place[rows] = -1
            yield GraphBatch(rows, edges)


def _neighbours(
    codes: Int[np.ndarray, "n tables"], levels: Sequence[int], cap: int, k: int, rng: np.random.Generator
) -> tuple[Int[np.ndarray, "n k"], Float[np.ndarray, "n k"]]:
    """The k heaviest neighbours of every row and their weights; -1 and 0 where a row has fewer.

    A candidate is one whole number: its weight, then random bits that decide between equal weights, then its row. It is
    the same in whatever table the pair meets, so that sorting brings duplicates together.
    """
    best = np.zeros((len(codes), k), np.int64)
    for table in range(codes.shape[1]):
        for members in _groups(codes[:, table], max(levels) - min(levels), cap, rng):
            agreement = _agreement(codes[members], levels)
            agreement[(members[:, :, None] == members[:, None, :]) | (members < 0)[:, None, :]] = 0
            pair = (members[:, :, None] ^ members[:, None, :]) * 0x9E3779B1
            keys = (agreement.astype(np.int64) << 48) | (((pair >> 8) & 0xFFFF) << 32) | members[:, None, :]
            keys[agreement == 0] = 0
            real = members >= 0
            rows = members[real]
            both = np.sort(np.concatenate([best[rows], keys[real]], axis=1), axis=1)
            both[:, 1:][both[:, 1:] == both[:, :-1]] = 0
            both.sort(axis=1)
            best[rows] = both[:, -k:]
    weights = (best >> 48) / (codes.shape[1] * (2 ** len(levels) - 1))
    return np.where(best > 0, best & 0xFFFFFFFF, -1).astype(np.int32), weights.astype(np.float32)


def _agreement(codes: Int[np.ndarray, "g m tables"], levels: Sequence[int]) -> Int[np.ndarray, "g m m"]:
    """Sum over tables and levels of 2^l where the first bits agree, for all pairs within each group."""
    groups, size, tables = codes.shape
    found = np.zeros((groups, size, size), np.int16)
    for table in range(tables):
        differing = codes[:, :, None, table] ^ codes[:, None, :, table]
        for level, bits in enumerate(levels):
            found += ((differing >> (max(levels) - bits)) == 0).astype(np.int16) << level
    return found


def _groups(
    code: Int[np.ndarray, " n"], finer: int, cap: int, rng: np.random.Generator
) -> Iterator[Int[np.ndarray, "g m"]]:
    """Rows of one bucket of the coarsest level, at most `cap` at a time, padded with -1; single rows are left out.

    Inside a bucket rows stand in the order of their full code from a random start, so that a cut parts few of those
    that agree on finer levels.
    """
    n = len(code)
    order = np.lexsort((rng.random(n), code))
    bucket = code[order] >> finer
    starts = np.flatnonzero(np.concatenate([[True], bucket[1:] != bucket[:-1]]))
    sizes = np.diff(np.append(starts, n))
    parts = -(-sizes // cap)
    which = np.repeat(np.arange(len(sizes)), sizes)  # bucket of every row
    turn = (np.arange(n) - starts[which] + rng.integers(0, sizes)[which]) % sizes[which]
    part = turn * parts[which] // sizes[which] + (np.cumsum(parts) - parts)[which]
    by_part = order[np.argsort(part, kind="stable")]
    counts = np.bincount(part)
    first = np.cumsum(counts) - counts
    by_size = np.argsort(counts, kind="stable")
    by_size = by_size[counts[by_size] > 1]
    at = 0
    while at < len(by_size):  # groups of about one size together: little is padded
        width = int(counts[by_size[min(len(by_size) - 1, at + _CELLS // cap**2)]])
        chosen = by_size[at : at + max(1, _CELLS // width**2)]
        chosen = chosen[counts[chosen] <= width]
        column = np.arange(width)
        members = by_part[np.minimum(first[chosen, None] + column, n - 1)]
        yield np.where(column < counts[chosen, None], members, -1)
        at += len(chosen)
