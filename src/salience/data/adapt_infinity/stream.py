"""Choose rows of tables that arrive one after another: the work behind `salience select stream`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from salience.data.adapt_infinity.selector import AdaptSelector, Signals, StreamStep
from salience.data.lasso_task_selection.tables import together
from salience.data.row_proof import FEWEST, RowProof, prove_rows
from salience.errors import DataError, InputError
from salience.io.encoding import encode
from salience.io.whole import column_of, numbers_of, read_records, words_of
from salience.scores import Scores

_DRAWS = 5  # of random replay
_CLASSES = 100


@dataclass(frozen=True)
class StreamSelection:
    """What `select_stream` chose, round by round.

    Attributes
    ----------
    names : list of str
        The data sets in the order in which they arrived.
    rounds : list of StreamStep
        With rows of `table` in place of ids.
    table : pa.Table
        All rows of the pool and the data sets, as they stand in the files.
    ids : (n,) str
    proof : RowProof or None
    counts : dict of str to int
    settings : dict
    notes : list of str
    """

    names: list[str]
    rounds: list[StreamStep]
    table: pa.Table
    ids: np.ndarray
    proof: RowProof | None
    counts: dict[str, int]
    settings: dict[str, Any]
    notes: list[str]

    def chosen(self, number: int) -> pa.Table:
        """Rows to train on in a round, from 0, as they stood in the file."""
        return self.table.take(pa.array(self.rounds[number].chosen.astype(np.int64)))

    def pool(self) -> pa.Table:
        """Rows kept after the last round."""
        return self.table.take(pa.array(self.rounds[-1].pool.astype(np.int64)))

    @property
    def scores(self) -> Scores:
        """In how many rounds each row was chosen."""
        seen = np.unique(np.concatenate([step.seen for step in self.rounds]).astype(np.int64))
        chosen = np.concatenate([step.chosen for step in self.rounds]).astype(np.int64)
        times = np.bincount(chosen, minlength=len(self.ids))
        return Scores(times[seen], self.ids[seen], "sample", {"method": "adapt-infinity", **self.settings})

    @property
    def equation(self) -> str:
        """What became of every row."""
        counts = self.counts
        return (
            f"{counts['read']:,} rows read = {counts['pool']:,} in the pool + {counts['pruned']:,} pruned + "
            f"{counts['dropped']:,} without a vector or a score + {counts['held out']:,} held out to measure on + "
            f"{counts['without a label']:,} without a label + {counts['unreadable']:,} unreadable"
        )

    def round_rows(self) -> list[dict[str, Any]]:
        """One row per round, as plain data."""
        found, before = [], self.counts["earlier pool"]
        for number, (name, step) in enumerate(zip(self.names, self.rounds), 1):
            new = set(step.seen[before:])
            found.append({
                "round": number, "data set": name, "arrived": len(step.seen) - before, "from": len(step.seen),
                "chosen": len(step.chosen), "of them new": sum(one in new for one in step.chosen),
                "pruned": len(step.pruned), "dropped": len(step.dropped), "pool after": len(step.pool),
            })  # fmt: skip
            before = len(step.pool)
        return found

    def cluster_rows(self) -> list[dict[str, Any]]:
        """One row per cluster and round: rows, rows drawn and kept, the score that was taken, entropies in bits."""
        return [
            {"round": number, "cluster": cluster, "rows": one.size, "chosen": one.chosen, "kept": one.kept,
             "score": one.scorer or "none", **{f"entropy of {name}": value for name, value in one.entropies.items()}}
            for number, step in enumerate(self.rounds, 1) for cluster, one in enumerate(step.clusters) if one.size
        ]  # fmt: skip


def select_stream(
    data_sets: Sequence[Any], budget: int, *, vectors: str | None = None, embeddings: str | None = None,
    scores: Sequence[str] = (), label: str | None = None, ignore: Sequence[str] = (), n_clusters: int = 10,
    pool_limit: int | None = None, pool: Any = None, hold_out: float = 0.25, random_state: int = 0,
    progress: Callable[[str], object] | None = None,
) -> StreamSelection:  # fmt: skip
    """Choose rows to train on whenever a data set arrives, and keep a pool of the earlier ones: `AdaptSelector`.

    Vectors and scores are taken as the tables give them. In the method they are those of the model of the round
    before; to have them so, give one data set at a time, and `pool` with what the trained model says of the rows kept.

    Parameters
    ----------
    data_sets : sequence of tables
        In the order in which they arrive; see `salience.io.whole.whole_table`.
    budget : int
        Rows to choose in every round.
    vectors : str, optional
        Column of gradient vectors, which the clusters are made of; `embeddings` by default.
    embeddings : str, optional
        Column of embeddings, for redundancy; by default all columns as numbers, without those that other parameters
        name, each scaled to variance 1 over all rows.
    scores : sequence of str
        Columns of numbers; the one that tells most is taken in each cluster. None: rows are drawn uniformly.
    label : str, optional
        Column to be learnt, by which the choice is measured.
    ignore : sequence of str
        Columns not to use.
    n_clusters, pool_limit, random_state
        See `AdaptSelector`.
    pool : table, optional
        Rows that an earlier run has kept.
    hold_out : float
        Share of the smallest data set; as many rows of each are kept out to measure on. 0 measures nothing.
    progress : callable, optional
        Is told what is being done.

    Returns
    -------
    StreamSelection
        Measured by simple learners (1-nearest-neighbour, logistic regression) of the embeddings, trained once on the
        choices of all rounds together, against as many random rows of the pool and of the newest data set. They
        cannot forget: what is measured is the choice, not the training.

    Raises
    ------
    InputError, DataError, NothingToDo
    """
    tell = progress or (lambda message: None)
    if not data_sets:
        raise InputError("there is no data set: name a table for each, in the order in which they arrive")
    if not 0 <= hold_out < 1:
        raise InputError(f"hold_out must lie in [0, 1), not {hold_out}")
    selector = AdaptSelector(n_clusters=n_clusters, budget=budget, pool_limit=pool_limit, random_state=random_state)
    tell("reading")
    table, raw, ids, sets, names, counts, notes = _read(data_sets, pool)
    labels, known = _labels(table, label)
    used = [name for name in (label, vectors, embeddings, *scores, *ignore) if name is not None]
    gradients = None if vectors is None else _vectors(table, vectors)
    semantic = _embedded(table, embeddings, used, gradients, known, notes)
    labelled_only = semantic is gradients  # then there is nothing to measure by
    clustered = semantic if gradients is None else gradients
    values = {name: numbers_of(table, name, "score") for name in scores}
    held = _held_out(sets, known, hold_out, random_state)
    free = known & ~np.isin(np.arange(len(sets)), held)

    def measure(at: np.ndarray) -> Signals:
        rows = at.astype(np.int64)
        return Signals(clustered[rows], {name: value[rows] for name, value in values.items()}, semantic[rows])

    selector.start(np.flatnonzero(free & (sets < 0)).tolist())
    counts["earlier pool"] = len(selector.pool)
    rounds = []
    for number, name in enumerate(names):
        tell(f"choosing: {name}")
        rounds.append(selector.step(np.flatnonzero(free & (sets == number)).tolist(), measure))
    if not scores:
        notes.append("without scores rows are drawn uniformly inside clusters")
    counts |= {"pool": len(selector.pool), "pruned": sum(len(step.pruned) for step in rounds),
               "dropped": sum(len(step.dropped) for step in rounds), "held out": len(held),
               "without a label": int((~known).sum())}  # fmt: skip
    proof = None
    if labelled_only:
        notes.append("nothing was measured: gradient vectors know the label; a column of embeddings can be measured by")
    elif hold_out and len(held) < FEWEST:
        notes.append(f"nothing was measured: {len(held)} held-out rows are too few")
    elif len(held):
        tell("measuring on held-out rows")
        proof = _proof(rounds, semantic, labels, held, sets, random_state)
    settings = {
        "budget": budget, "clusters": n_clusters, "pool_limit": pool_limit, "vectors": vectors,
        "embeddings": embeddings, "scores": list(scores), "label": label, "ignore": list(ignore),
        "hold_out": hold_out, "random_state": random_state,
    }  # fmt: skip
    return StreamSelection(names, rounds, raw, ids, proof, counts, settings, notes)


def _read(
    data_sets: Sequence[Any], pool: Any
) -> tuple[pa.Table, pa.Table, np.ndarray, Int[np.ndarray, " n"], list[str], dict[str, int], list[str]]:
    """All rows in one table (as numbers, and as they stand in the files), their ids, which data set each belongs to
    (-1: the earlier pool), names, counts and notes."""
    sources = [*([] if pool is None else [pool]), *data_sets]
    found = [read_records(source) for source in sources]
    first = 0 if pool is None else -1
    paths = [str(source) if isinstance(source, str | os.PathLike) else f"data set {number}"
             for number, source in enumerate(sources, first + 1)]  # fmt: skip
    names = [os.path.basename(path) or path for path in paths]
    if len(set(names)) < len(names):
        names = paths
    if len(set(names)) < len(names):
        raise InputError("the same data set is given twice")
    ids = np.concatenate([
        np.array([f"{name}:{one.rpartition(':')[2]}" if one.count(":") == 1 else f"{name}/{one}"
                  for one in records.ids.to_pylist()], dtype=object)
        for name, records in zip(names, found)
    ])  # fmt: skip
    sets = np.repeat(np.arange(first, first + len(found)), [len(records.ids) for records in found])
    counts = {"read": sum(records.read for records in found), "unreadable": sum(records.bad for records in found)}
    return (
        together([records.table for records in found], "the data sets"),
        together([records.raw for records in found], "the data sets"),
        ids, sets, names[-first:], counts, [note for records in found for note in records.notes],
    )  # fmt: skip


def _labels(table: pa.Table, label: str | None) -> tuple[np.ndarray | None, np.ndarray]:
    if label is None:
        return None, np.ones(len(table), dtype=bool)
    words = words_of(table, label, "label column")
    known = np.array([word is not None for word in words])
    kinds = len(set(words[known]))
    if not 2 <= kinds <= _CLASSES:
        raise DataError(f"label {label!r} has {kinds:,} different values; 2 to {_CLASSES} classes are needed")
    return np.where(known, words, "").astype(str), known


def _embedded(
    table: pa.Table, embeddings: str | None, used: list[str], gradients: np.ndarray | None, known: np.ndarray,
    notes: list[str],
) -> Float[np.ndarray, "n d"]:  # fmt: skip
    """The column of embeddings, else the columns that are not used otherwise, else the gradient vectors."""
    if embeddings is not None:
        return _vectors(table, embeddings)
    for name in used:
        column_of(table, name)
    columns = [name for name in table.column_names if name not in used]
    if not columns and gradients is not None:
        return gradients
    if not columns:
        raise InputError("there is no column to tell rows by: give a column of vectors or of embeddings")
    coded = encode(table, columns, np.flatnonzero(known))
    notes += coded.notes
    spread = coded.rows.std(axis=0)
    if not (spread > 0).any():
        raise DataError("every column is constant: there is nothing to choose by")
    return (coded.rows[:, spread > 0] - coded.rows[:, spread > 0].mean(axis=0)) / spread[spread > 0]


def _vectors(table: pa.Table, name: str) -> Float[np.ndarray, "n d"]:
    """A column of vectors as a matrix; NaN for a row without one."""
    column = column_of(table, name, "column of vectors").to_pylist()
    first = next((one for one in column if one is not None), None)
    if not isinstance(first, list | tuple) or not first:
        raise DataError(f"column {name!r} holds {first!r}; vectors (lists of numbers) are needed, as in a Parquet file")
    missing = [np.nan] * len(first)
    try:
        return np.array([missing if one is None else one for one in column], dtype=np.float32)
    except (TypeError, ValueError):
        raise DataError(f"column {name!r} does not hold vectors of one length") from None


def _held_out(sets: Int[np.ndarray, " n"], known: np.ndarray, share: float, seed: int) -> Int[np.ndarray, " h"]:
    """Equally many rows of every data set, none of the earlier pool."""
    numbers = range(int(sets.max()) + 1)
    rows = [np.flatnonzero(known & (sets == number)) for number in numbers]
    each = round(share * min(map(len, rows)))
    drawn = [np.random.default_rng([seed, number]).permutation(mine)[:each] for number, mine in zip(numbers, rows)]
    return np.sort(np.concatenate(drawn)).astype(np.int64)


def _proof(
    rounds: list[StreamStep], rows: Float[np.ndarray, "n d"], labels: np.ndarray | None, held: Int[np.ndarray, " h"],
    sets: Int[np.ndarray, " n"], seed: int,
) -> RowProof | None:  # fmt: skip
    """The choices of all rounds together against as many random rows, round by round."""
    held = held[np.isfinite(rows[held]).all(axis=1)]
    newest: list[np.ndarray] = []
    replay: list[list[np.ndarray]] = [[] for _ in range(_DRAWS)]
    for number, step in enumerate(rounds):
        usable = step.seen[step.labels >= 0].astype(np.int64)
        arrived = usable[sets[usable] == number] if (sets[usable] == number).any() else usable
        for draw in range(_DRAWS):
            rng = np.random.default_rng([seed, number, draw])
            replay[draw].append(rng.choice(usable, len(step.chosen), replace=False))
        newest.append(np.resize(np.random.default_rng([seed, number]).permutation(arrived), len(step.chosen)))
    return prove_rows(
        "adapt-infinity", rows, np.concatenate([step.chosen for step in rounds]).astype(np.int64),
        {"random": [np.concatenate(parts) for parts in replay], "newest data set": [np.concatenate(newest)]},
        rows[held], labels=labels, held_labels=None if labels is None else labels[held], seed=seed,
    )  # fmt: skip
