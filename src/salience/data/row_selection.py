"""Choose rows of a table, and measure the choice on rows held out: the work behind `salience select rows`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from salience.data.kmq.clustering import check_embeddings
from salience.data.kmq.quotas import class_quotas, take_first
from salience.data.kmq.selector import KMQSelector
from salience.data.row_baselines import kmeans_medoids
from salience.data.row_proof import FEWEST, RowProof, prove_rows
from salience.errors import DataError, InputError
from salience.io.encoding import encode
from salience.io.whole import Records, column_of, numbers_of, read_records, words_of
from salience.scores import Scores

METHODS = ("kmq", "gais", "medoids", "random")
_DRAWS = 5  # of the random baseline
_CLUSTERS = 512  # of kmq at most, or one for every four rows to choose
_CLASSES = 100
Progress = Callable[[str], None]


@dataclass(frozen=True)
class RowSelection:
    """What `select_rows` chose.

    Attributes
    ----------
    method : str
    records : Records
        The table as read.
    chosen : (b,) int64
        Rows of it, ascending.
    scores : Scores
        One number for each row that could be chosen, larger for likelier ones.
    held_out, without_label : int
        Rows that could not be chosen.
    proof : RowProof or None
        None where nothing was held out, or too little to measure on.
    settings : dict
        Parameters, as the manifest tells them.
    notes : list of str
    """

    method: str
    records: Records
    chosen: Int[np.ndarray, " b"]
    scores: Scores
    held_out: int
    without_label: int
    proof: RowProof | None
    settings: dict[str, Any]
    classes: list[tuple[str, int, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def equation(self) -> str:
        """What became of every record."""
        rest = len(self.scores) - len(self.chosen)
        return (
            f"{self.records.read:,} rows read = {len(self.chosen):,} selected + {rest:,} not selected + "
            f"{self.held_out:,} held out to measure on + {self.without_label:,} without a label + "
            f"{self.records.bad:,} unreadable"
        )

    def table(self) -> pa.Table:
        """The chosen rows, with their values as they stood in the file."""
        return self.records.raw.take(pa.array(self.chosen))

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "method": self.method, "read": self.records.read, "selected": len(self.chosen),
            "not_selected": len(self.scores) - len(self.chosen), "held_out": self.held_out,
            "without_label": self.without_label, "unreadable": self.records.bad,
            "proof": self.proof.as_dict() if self.proof else None, "notes": self.notes,
        }  # fmt: skip


def select_rows(
    data: Any, *, count: int | None = None, fraction: float | None = None, method: str = "kmq",
    label: str | None = None, quality: str | None = None, ignore: Sequence[str] = (), embeddings: Any = None,
    scores: Sequence[Scores] = (), draw: bool = False, compare: Sequence[str] = (), model: Any = None,
    hold_out: float = 0.25, random_state: int = 0, progress: Progress | None = None,
) -> RowSelection:  # fmt: skip
    """Choose rows of a table to train on.

    Parameters
    ----------
    data : table
        See `salience.io.whole.whole_table`.
    count, fraction : int or float
        Rows to choose, or their share of all rows.
    method : str
        One of `METHODS`; not used with `scores`.
    label : str, optional
        Column to be learnt. It is never part of the embedding. With it accuracy is measured, and every method but
        "kmq" and "medoids" keeps the shares of the classes, at least 2 rows of each. "gais" needs it.
    quality : str, optional
        Column of numbers, larger for better rows; "kmq" alone uses it.
    ignore : list of str
        Columns not to use, such as identifiers.
    embeddings : (n, d) array, path of a .npy file or name of a column of vectors, optional
        By default the columns as numbers, each scaled to variance 1.
    scores : sequence of Scores
        Choose by these instead of a method, with "file:row" as ids; several are combined by rank.
    draw : bool
        Draw rows with probability proportional to ``exp(score)`` in place of taking the largest scores.
    compare : list of str
        Further methods to measure beside random and medoids.
    model : KMQSelector or GAIS, optional
        The method with other settings than the defaults.
    hold_out : float
        Share of the rows that cannot be chosen and that the choice is measured on; 0 measures nothing.
    random_state : int
    progress : callable, optional
        Is told what is being done.

    Raises
    ------
    InputError, DataError, NothingToDo
    """
    tell = progress or (lambda message: None)
    _check(count, fraction, method, compare, scores, draw, hold_out, random_state)
    if label is None and "gais" in ((method, *compare) if not scores else compare):
        raise InputError("method gais learns the classes of the rows: name the column with --label (label=...)")
    tell("reading")
    records = read_records(data)
    notes, n = list(records.notes), len(records.ids)
    labels, known = _labels(records, label)
    if not known.all():
        notes.append(f"{int((~known).sum())} rows without a label were left out")
    rng = np.random.default_rng(random_state)
    order = rng.permutation(np.flatnonzero(known))
    held, pool = np.sort(order[: round(hold_out * len(order))]), np.sort(order[round(hold_out * len(order)) :])
    wanted = count if count is not None else max(1, round((fraction or 0) * n))
    if wanted > len(pool):
        raise InputError(f"{wanted:,} rows are more than the {len(pool):,} that can be chosen"
                         + (f" ({len(held):,} are held out to measure on)" if len(held) else ""))  # fmt: skip
    rows, more = _embedded(records, embeddings, [label, quality, *ignore], pool)
    notes += more
    good = None if quality is None else numbers_of(records.table, quality, "quality column")[pool]
    classes = None if labels is None else np.unique(labels[pool], return_inverse=True)
    task = _Pool(rows[pool], classes, good, wanted, random_state)
    name = "scores" if scores else method
    tell(f"choosing by {name}")
    if scores:
        first, *more_scores = scores
        combined = first.combine(*more_scores) if more_scores else first
        values = combined.aligned(records.ids.take(pa.array(pool)).to_pylist())
        chosen = task.by_scores(values, draw)
        described: dict[str, Any] = {"of": combined.provenance, "draw": draw}
    else:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            chosen, values, described = task.by_method(method, model)
        notes += dict.fromkeys(str(one.message) for one in told)
    proof = None
    if 0 < len(held) < FEWEST:
        notes.append(f"nothing was measured: {len(held)} held-out rows are too few")
    elif len(held):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            others = task.baselines(name, compare, tell)
        notes += [note for note in dict.fromkeys(str(one.message) for one in told) if note not in notes]
        tell("measuring on held-out rows")
        proof = prove_rows(
            name, task.rows, chosen, others, rows[held], labels=None if labels is None else labels[pool],
            held_labels=None if labels is None else labels[held], seed=random_state,
        )  # fmt: skip
    shares = [] if classes is None else [
        (str(word), int((classes[1] == code).sum()), int((classes[1][chosen] == code).sum()))
        for code, word in enumerate(classes[0])
    ]  # fmt: skip
    settings = {"method": name, "count": wanted, "label": label, "quality": quality, "ignore": list(ignore),
                "hold_out": hold_out, "random_state": random_state, **described}  # fmt: skip
    named = Scores(values, records.ids.take(pa.array(pool)), "sample", settings)
    return RowSelection(name, records, pool[chosen], named, len(held), int((~known).sum()), proof, settings, shares,
                        notes)  # fmt: skip


@dataclass
class _Pool:
    """The rows that can be chosen, and every way to choose `count` of them."""

    rows: Float[np.ndarray, "n d"]
    classes: tuple[np.ndarray, Int[np.ndarray, " n"]] | None
    quality: Float[np.ndarray, " n"] | None
    count: int
    seed: int

    def by_method(self, method: str, model: Any) -> tuple[Int[np.ndarray, " b"], np.ndarray, dict[str, Any]]:
        """Chosen rows, a number per row, and what is to be told of the settings."""
        if method == "random":
            noise = np.random.default_rng(self.seed + 1000).random(len(self.rows))
            return self._largest(noise), noise, {}
        if method == "medoids":
            chosen = kmeans_medoids(self.rows, self.count, random_state=self.seed)
            marks = np.zeros(len(self.rows))
            marks[chosen] = 1.0
            return chosen, marks, {}
        if method == "gais":
            return self._by_gais(model)
        selector = model or KMQSelector(n_clusters=max(1, min(_CLUSTERS, self.count // 4)), random_state=self.seed)
        chosen = selector.fit(self.rows).select(self.count, self.quality)
        return chosen, selector.log_weights(self.quality), {"clusters": len(selector.cluster_centers_)}

    def _by_gais(self, model: Any) -> tuple[Int[np.ndarray, " b"], np.ndarray, dict[str, Any]]:
        from salience.data import GAIS  # here, as it needs torch

        if self.classes is None:
            raise InputError("method gais needs a label")
        codes = self.classes[1]
        if model is None:
            model = GAIS(n_min=2 if self.count >= 2 * (codes.max() + 1) else 1, random_state=self.seed)
        chosen = model.fit(self.rows, codes).select(self.count)
        return chosen, model.scores_, {"graph": model.graph, "coverage": model.coverage, "epochs": len(model.losses_)}

    def baselines(self, name: str, compare: Sequence[str], tell: Progress) -> dict[str, list[Int[np.ndarray, " b"]]]:
        """Choices of equal size to measure `name` against, random first."""
        found = {"random": [self.random(draw) for draw in range(_DRAWS)]}
        for other in dict.fromkeys(("medoids", *compare)):
            if other not in (name, "random"):
                tell(f"choosing by {other} to compare")
                found["k-means medoids" if other == "medoids" else other] = [self.by_method(other, None)[0]]
        return found

    def by_scores(self, values: Float[np.ndarray, " n"], draw: bool) -> Int[np.ndarray, " b"]:
        """The largest, or a draw: the largest with Gumbel noise."""
        noise = np.random.default_rng(self.seed).gumbel(size=len(values)) if draw else 0.0
        return self._largest(values + noise)

    def random(self, draw: int) -> Int[np.ndarray, " b"]:
        """A random choice of equal size, stratified where there are classes."""
        return self._largest(np.random.default_rng([self.seed, draw]).random(len(self.rows)))

    def _largest(self, keys: Float[np.ndarray, " n"]) -> Int[np.ndarray, " b"]:
        if self.classes is None:
            return take_first(keys, np.zeros(len(keys), np.int64), np.array([self.count]))
        codes = self.classes[1]
        sizes = np.bincount(codes)
        # Two rows of each class, as far as there are so many to choose.
        least = 2 if self.count >= 2 * len(sizes) else 0
        return take_first(keys, codes, class_quotas(sizes, self.count, least))


def _labels(records: Records, label: str | None) -> tuple[np.ndarray | None, Bool[np.ndarray, " n"]]:
    if label is None:
        return None, np.ones(len(records.ids), dtype=bool)
    words = words_of(records.table, label, "label column")
    known = np.array([word is not None for word in words])
    kinds = len(set(words[known]))
    if not 2 <= kinds <= _CLASSES:
        raise DataError(
            f"label {label!r} has {kinds:,} different values; 2 to {_CLASSES} classes are needed (numbers to be "
            "predicted are no classes: leave --label out, and coverage is measured)"
        )
    return np.where(known, words, "").astype(str), known


def _embedded(
    records: Records, embeddings: Any, without: Sequence[str | None], pool: Int[np.ndarray, " m"]
) -> tuple[Float[np.ndarray, "n d"], list[str]]:
    """Every row as numbers, scaled by the pool: held-out rows must not be looked at."""
    table, n = records.table, len(records.ids)
    for name in without:
        if name is not None:
            column_of(table, name, "column")
    notes: list[str] = []
    if isinstance(embeddings, str) and embeddings in table.column_names:
        try:
            rows = np.array(table[embeddings].to_pylist(), dtype=np.float32)
        except (TypeError, ValueError):
            raise DataError(f"column {embeddings!r} does not hold vectors of one length") from None
    elif embeddings is not None:
        rows = _matrix(embeddings, n)
    else:
        columns = [name for name in table.column_names if name not in without]
        coded = encode(table, columns, pool)
        notes, spread = coded.notes, coded.rows[pool].std(axis=0)
        varies = spread > 0
        if not varies.any():
            raise DataError("every column is constant: there is nothing to choose by")
        if not varies.all():
            notes.append(f"{int((~varies).sum())} constant columns were left out")
        rows = (coded.rows[:, varies] - coded.rows[pool][:, varies].mean(axis=0)) / spread[varies]
    return check_embeddings(rows), notes


def _matrix(embeddings: Any, n: int) -> np.ndarray:
    rows = embeddings
    if isinstance(embeddings, str | os.PathLike):
        try:
            rows = np.load(embeddings, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(
                f"embeddings {os.fspath(embeddings)!r} is neither a column nor a readable .npy file: {error}"
            ) from error
    rows = np.asarray(rows)
    if rows.ndim != 2 or len(rows) != n:
        raise DataError(f"embeddings have shape {rows.shape}; the table has {n:,} rows")
    return rows


def _check(count, fraction, method, compare, scores, draw, hold_out, random_state) -> None:
    if (count is None) == (fraction is None):
        raise InputError("give either a count or a fraction")
    if count is not None and count < 1:
        raise InputError(f"count must be at least 1, not {count}")
    if fraction is not None and not 0 < fraction <= 1:
        raise InputError(f"fraction must lie in (0, 1], not {fraction}")
    for name in (method, *compare):
        if name not in METHODS:
            raise InputError(f"method must be one of {', '.join(METHODS)}, not {name!r}")
    if draw and not scores:
        raise InputError("draw goes with scores: methods draw by their own rule")
    if not 0 <= hold_out < 1:
        raise InputError(f"hold_out must lie in [0, 1), not {hold_out}")
    if random_state < 0:
        raise InputError(f"random_state must be 0 or larger, not {random_state}")
