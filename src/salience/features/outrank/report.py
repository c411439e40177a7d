"""The result of a ranking: scores of columns, combinations and pairs, and what they say together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Float
from scipy.cluster.hierarchy import fcluster, leaves_list, linkage
from scipy.spatial.distance import squareform

from salience.errors import InputError, NothingToDo
from salience.features.outrank.batches import BatchScores
from salience.features.outrank.columns import CONTROL, NOISE
from salience.io.lines import Bad
from salience.scores import Scores

JOIN = " AND "
Aggregate = Literal["median", "mean", "sum"]


@dataclass
class RankReport:
    """Scores of the columns of a table, largest first, and the state of its data.

    Attributes
    ----------
    singles : pa.Table
        One row per column, combination and control (`kind`): `feature`, `score` (median over batches, nats), `low` and
        `high` (its quartiles over batches), `normalised` (smallest 0, the label's own entropy 1), `plain` (plain mutual
        information), `entropy`, `batches`.
    pairs : pa.Table
        `a`, `b`, `score` of every pair of columns scored against each other, largest first, and `batches`.
    aggregated : pa.Table
        `feature` and the median `score` of all combinations with it.
    quality : pa.Table
        One row per column: coverage in percent, distinct values, bytes a value, rare values, range.
    rows : pa.Table
        One row per value of the label: how the rows with it look.
    counts : dict of str to int
        What became of every record; `equation` writes it out.
    warnings : list of str
    sample, held : pa.Table
        A sample of the rows that were scored, and of those held out (None without).
    """

    label: str
    label_entropy: float
    features: list[str]
    singles: pa.Table
    pairs: pa.Table
    aggregated: pa.Table
    quality: pa.Table
    rows: pa.Table
    counts: dict[str, int]
    warnings: list[str]
    settings: dict[str, Any]
    batches: int
    exist: tuple[int, int]  # pairs and combinations that there are
    sample: pa.Table = field(repr=False)
    held: pa.Table | None = field(repr=False)
    bad: list[tuple[str, Bad]] = field(repr=False)

    @classmethod
    def build(
        cls, scores: BatchScores, *, features: list[str], columns: list[str], label: str, **others: Any
    ) -> RankReport:
        """From the scores of all batches."""
        found = scores.singles()
        low, middle, high = np.quantile(found[:, 0], [0.25, 0.5, 0.75], axis=0)
        plain, entropies = np.median(found[:, 1:], axis=0)
        own = scores.target_entropy()
        singles = [
            {"feature": name, "kind": "control" if name.startswith(CONTROL) and name not in features else "column",
             "score": middle[at], "low": low[at], "high": high[at], "plain": plain[at], "entropy": entropies[at],
             "batches": scores.batches}
            for at, name in enumerate(columns)
        ]  # fmt: skip
        for members, (score, batches) in scores.combinations().items():
            name = JOIN.join(features[at] for at in members)
            singles.append({"feature": name, "kind": "combination", "score": score, "low": None, "high": None,
                            "plain": None, "entropy": None, "batches": batches})  # fmt: skip
        least = min(each["score"] for each in singles)
        for each in singles:
            each["normalised"] = (each["score"] - least) / (own - least)
        pairs = [
            {"a": features[a], "b": features[b], "score": score, "batches": batches}
            for (a, b), (score, batches) in scores.pairs().items()
        ]
        return cls(
            label, own, features, _sorted(singles, _SINGLES), _sorted(pairs, _PAIRS), _aggregated(scores, features),
            batches=scores.batches, exist=scores.exist(), **others,
        )  # fmt: skip

    @property
    def equation(self) -> str:
        """What became of every record."""
        counts = dict(self.counts)
        names = {"held_out": "held out", "not_scored": "not scored", "passed_over": "passed over"}
        parts = [f"{counts[name]:,} {names.get(name, name)}" for name in counts if name != "read"]
        return f"{counts['read']:,} records read = {' + '.join(parts)}"

    def scores(self) -> Scores:
        """The columns' scores, to save or to hand on."""
        kept = [row for row in self.singles.to_pylist() if row["kind"] == "column"]
        provenance = {"method": "outrank", "parameters": self.settings, "counts": self.counts}
        return Scores([row["score"] for row in kept], [row["feature"] for row in kept], "feature", provenance)

    def noise(self) -> float:
        """The largest score of a control that is noise.

        Raises
        ------
        InputError
            The ranking was made without controls.
        """
        noise = [
            row["score"] for row in self.singles.to_pylist() if row["kind"] == "control" and row["feature"] in NOISE
        ]
        if not noise:
            raise InputError("the ranking has no controls: make it with controls=True")
        return max(noise)

    def select(self, k: int | None = None, above_controls: bool = True) -> list[str]:
        """The best columns, best first.

        Parameters
        ----------
        k : int, optional
            At most so many.
        above_controls : bool
            Only those that score above every control that is noise.

        Raises
        ------
        InputError
            `k` is below 1, or there are no controls to compare with.
        NothingToDo
            No column is above the controls.
        """
        if k is not None and k < 1:
            raise InputError(f"k must be at least 1, not {k!r}")
        least = self.noise() if above_controls else -np.inf
        chosen = [
            row["feature"] for row in self.singles.to_pylist() if row["kind"] == "column" and row["score"] > least
        ]
        if not chosen:
            raise NothingToDo(f"no column tells more about {self.label!r} than noise does")
        return chosen[:k]

    def three_mr(self, alpha: float = 1.0, beta: float = 1.0, agg: Aggregate = "median") -> list[str]:
        """Columns in the order in which each next one is relevant, not redundant, and in relation with those before.

            next f = argmax  rel(f) - alpha agg_{g chosen} red(g, f) + beta agg_{g chosen} relat(g, f)

        rel is the score of f, red that of the pair (g, f), relat that of the combination ``g AND f`` (0 where there is
        none); each is scaled to 0..1. The first column is the most relevant one; of equals the first in the table.

        Raises
        ------
        InputError
            The ranking was made without all pairs, or a parameter is unknown.
        """
        reduce = {"median": np.median, "mean": np.mean, "sum": np.sum}.get(agg)
        if reduce is None:
            raise InputError(f"agg must be 'median', 'mean' or 'sum', not {agg!r}")
        index = {name: at for at, name in enumerate(self.features)}
        relevance = np.zeros(len(index))
        relation = np.zeros((len(index), len(index)))
        found = []
        for row in self.singles.to_pylist():
            members = [index[name] for name in row["feature"].split(JOIN) if name in index]
            if row["kind"] == "column":
                relevance[index[row["feature"]]] = row["score"]
            elif row["kind"] == "combination" and len(members) == 2:
                found.append((*members, row["score"]))
        if found:
            _fill(relation, found)
        return [
            self.features[at] for at in _greedy(_scaled(relevance), self._redundancy(), relation, alpha, beta, reduce)
        ]

    def clusters(self, threshold: float = 0.5) -> list[list[str]]:
        """Groups of columns that tell the same, by complete linkage of ``1 - redundancy``, largest group first.

        Redundancy is a pair's score over the smaller of the two columns' entropies, within 0..1.
        """
        tree, names = self.tree()
        groups: dict[int, list[str]] = {}
        for name, group in zip(names, fcluster(tree, 1 - threshold, "distance")):
            groups.setdefault(int(group), []).append(name)
        return sorted(groups.values(), key=lambda group: (-len(group), group))

    def tree(self, columns: Sequence[str] | None = None) -> tuple[Float[np.ndarray, "merges 4"], list[str]]:
        """Complete linkage of columns by ``1 - redundancy`` (as scipy's `linkage`), and their names in its order."""
        names = list(self.features if columns is None else columns)
        if len(names) < 2:
            raise InputError("there are fewer than two columns to compare")
        distance = 1 - self.redundancy(names)
        np.fill_diagonal(distance, 0)
        return linkage(squareform(distance, checks=False), "complete", optimal_ordering=len(names) <= 500), names

    def redundancy(self, columns: Sequence[str]) -> Float[np.ndarray, "columns columns"]:
        """Score of each pair over the smaller of the two entropies, within 0..1; 0 where a pair was not scored."""
        self._need_pairs()
        index = {name: at for at, name in enumerate(columns)}
        entropy = {row["feature"]: row["entropy"] for row in self.singles.to_pylist() if row["kind"] == "column"}
        shares = np.eye(len(index))
        for row in self.pairs.to_pylist():
            if row["a"] in index and row["b"] in index:
                smaller = min(entropy[row["a"]], entropy[row["b"]])
                share = min(max(row["score"] / smaller, 0.0), 1.0) if smaller > 0 else 0.0
                shares[index[row["a"]], index[row["b"]]] = shares[index[row["b"]], index[row["a"]]] = share
        return shares

    def _redundancy(self) -> Float[np.ndarray, "columns columns"]:
        self._need_pairs()
        index = {name: at for at, name in enumerate(self.features)}
        matrix = np.zeros((len(index), len(index)))
        _fill(matrix, [(index[row["a"]], index[row["b"]], row["score"]) for row in self.pairs.to_pylist()])
        return matrix

    def _need_pairs(self) -> None:
        if not self.pairs.num_rows:
            raise InputError("the ranking has no pairs of columns: make it with pairs='all' (--pairs all)")


def order_of(tree: Float[np.ndarray, "merges 4"]) -> list[int]:
    """Leaves of a tree from one end to the other."""
    return [int(leaf) for leaf in leaves_list(tree)]


_SINGLES = pa.schema(
    [("feature", pa.string()), ("kind", pa.string())]
    + [(name, pa.float64()) for name in ("score", "low", "high", "normalised", "plain", "entropy")]
    + [("batches", pa.int64())]
)
_PAIRS = pa.schema([("a", pa.string()), ("b", pa.string()), ("score", pa.float64()), ("batches", pa.int64())])
_AGGREGATED = pa.schema([("feature", pa.string()), ("score", pa.float64()), ("combinations", pa.int64())])


def _sorted(rows: list[Mapping[str, Any]] | list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pylist(sorted(rows, key=lambda row: -row["score"]), schema)


def _aggregated(scores: BatchScores, features: list[str]) -> pa.Table:
    found: dict[str, list[float]] = {}
    for members, (score, _) in scores.combinations().items():
        for at in members:
            found.setdefault(features[at], []).append(score)
    rows = [{"feature": name, "score": float(np.median(values)), "combinations": len(values)}
            for name, values in found.items()]  # fmt: skip
    return _sorted(rows, _AGGREGATED)


def _fill(matrix: np.ndarray, entries: list[tuple[int, int, float]]) -> None:
    """Put scaled scores of pairs into a symmetric matrix."""
    scaled = _scaled(np.array([score for _, _, score in entries]))
    for (a, b, _), value in zip(entries, scaled.tolist()):
        matrix[a, b] = matrix[b, a] = value


def _scaled(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    span = np.ptp(values)
    return (values - values.min()) / span if span > 0 else np.zeros_like(values)


def _greedy(relevance, redundancy, relation, alpha, beta, reduce) -> list[int]:
    chosen, left = [int(np.argmax(relevance))], np.ones(len(relevance), bool)
    left[chosen[0]] = False
    while left.any():
        gain = relevance - alpha * reduce(redundancy[chosen], axis=0) + beta * reduce(relation[chosen], axis=0)
        chosen.append(int(np.argmax(np.where(left, gain, -np.inf))))
        left[chosen[-1]] = False
    return chosen
