"""Rank the columns of a table of any size by how much they tell about a label, in one pass.

Rows go to batches of `batch_rows` (in an order shuffled by keys), every column is scored in every batch by
cardinality-aware mutual information (`ca_mutual_info`), and its score is the median over the batches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import numpy as np
import pyarrow as pa

from salience.errors import DataError, InputError, NothingToDo, nearest
from salience.features.outrank.batches import BatchScores
from salience.features.outrank.columns import CONTROL, CONTROLS, Bins, Coded, controls, encode
from salience.features.outrank.quality import ColumnQuality, medians, row_quality
from salience.features.outrank.report import RankReport
from salience.features.outrank.rows import WINDOW_BATCHES, Kept, KeyedSample, Rows, Shuffle, sorted_by_key, windows
from salience.io import TableReader, available_cores

SAMPLE_ROWS = 10_000
LAST_ROWS = 1024  # the last, short batch is scored if it has more
# Texts that stand for nothing in the tables that people have; the reference knows the first two.
MISSING = ("", "{}", "nan", "NaN", "NA", "N/A", "null", "NULL", "?")
_BY_CHANCE = 1e-6  # a batch of one class is no accident if chance gives it more rarely
_LOST = 0.1  # share of the label's entropy that may lie between windows before we warn


def rank_table(
    source: Any, label: str, *, order: int = 1, pairs: str = "target", combination_budget: int = 1 << 15,
    batch_rows: int = 1 << 14, subsample: int = 1, shuffle: Shuffle = "window", controls: bool = False,
    bins: int | None = None, missing: Sequence[str] = MISSING, columns: Sequence[str] | None = None,
    hold_out: float = 0.0, shifts: int = 1, max_bad: float = 0.01, random_state: int = 0, workers: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> RankReport:  # fmt: skip
    """Rank the columns of a table by what they tell about a label, more than noise of their cardinality would.

    Parameters
    ----------
    source : str, path, table or a list of them
        CSV and Parquet files, globs, directories; anything with the Arrow stream protocol (see `TableReader`).
    label : str
        Column that the others are ranked by. Rows where it is missing are counted and left out.
    order : int
        Also score all combinations of this many columns, named ``a AND b``.
    pairs : {"target", "all"}
        "all" also scores every column against every other, for `RankReport.three_mr` and `RankReport.clusters`.
    combination_budget : int
        Combinations, and pairs, scored in a batch at most; those scored least often come first.
    batch_rows : int
    subsample : int
        Keep every so-manieth row of a file.
    shuffle : {"window", "global", "none"}
        "window" shuffles rows over a few batches; "global" over the whole table, by way of temporary files, for files
        sorted by something that goes with the label; "none" keeps their order, as the reference does.
    controls : bool
        Rank noise of several cardinalities, and a copy of the label, along with the columns.
    bins : int, optional
        Put numeric columns whose values are nearly all distinct into so many quantile bins (by the first window).
    missing : sequence of str
        Texts that count as missing, blanks around them or not; null and NaN always do. Missing is a value like others
        for the scores.
    columns : sequence of str, optional
        Rank these only.
    hold_out : float
        Share of the rows to keep out of all scores (not out of the report of quality), to measure on.
    shifts : int
        Spoofed columns whose mean is subtracted (1 in the reference).
    max_bad : float
        Largest share of unreadable records to put up with; 0 stops at the first.
    random_state : int
        Seed of the shuffle, the hold-out, the sample and the controls.
    workers : int, optional
        Threads; all cores by default. Changes no figure.
    progress : callable, optional
        Called with the rows taken in so far.

    Raises
    ------
    InputError
        A parameter is out of range, or names columns that cannot be told from combinations or controls.
    DataError
        The label is missing, constant or different in nearly every row; a file or a column cannot be used; batches
        hold one class only, because the file is sorted by the label.
    NothingToDo
        No row, or no column besides the label.
    """
    missing = tuple(dict.fromkeys(text.strip() for text in missing))
    check_options(
        order, pairs, combination_budget, batch_rows, subsample, shuffle, bins, hold_out, shifts, max_bad, workers
    )
    reader = TableReader(source, None if columns is None else [*(name for name in columns if name != label), label])
    features = features_of(reader, label, order, controls)
    kept = Kept(reader, label, missing, subsample, hold_out, max_bad, random_state)
    threads = available_cores() if workers is None else workers
    with ThreadPoolExecutor(threads) if threads > 1 else contextlib.nullcontext() as pool:
        run = _Run(features, label, controls, bins, missing, batch_rows, shuffle, random_state, pool)
        run.scores = BatchScores(
            len(run.columns), len(features), order=order, all_pairs=pairs == "all", budget=combination_budget,
            shifts=shifts, pool=pool,
        )  # fmt: skip
        rows = iter(kept)
        if shuffle == "global":
            rows = sorted_by_key(rows, WINDOW_BATCHES * batch_rows, reader.bytes)
        for window in windows(rows, WINDOW_BATCHES * batch_rows):
            run.add(window)
            del window  # its memory is the next one's
            if progress is not None:
                progress(run.seen)
        kept.tally.check(max_bad, "table")
        run.finish()
    settings = {
        "label": label, "order": order, "pairs": pairs, "combination_budget": combination_budget,
        "batch_rows": batch_rows, "subsample": subsample, "shuffle": shuffle, "controls": controls, "bins": bins,
        "missing": list(missing), "hold_out": hold_out, "shifts": shifts, "max_bad": max_bad, "seed": random_state,
    }  # fmt: skip
    return _report(run, kept, settings)


class _Run:
    """What one pass over a table gathers."""

    scores: BatchScores

    def __init__(self, features, label, with_controls, bins, missing, batch_rows, shuffle, seed, pool) -> None:
        self.features, self.label, self.missing, self.seed = features, label, missing, seed
        self.columns = [*features, *(CONTROLS if with_controls else ())]
        self.with_controls, self.bins, self.shuffle = with_controls, bins, shuffle
        self.map = map if pool is None else pool.map
        self.batch_rows = batch_rows
        self.quality = {name: ColumnQuality(missing) for name in [*features, label]}
        self.binned: dict[str, Bins | None] = {}
        self.sample, self.held = KeyedSample(SAMPLE_ROWS), KeyedSample(SAMPLE_ROWS)
        self.class_counts: dict[Any, int] = {}  # of the label, after binning
        self.windows = self.seen = self.held_out = self.not_scored = self.constant_batches = self.constant_rows = 0
        self.within = 0.0  # sum over windows of rows times the label's entropy there
        self.warnings: list[str] = []

    def add(self, window: Rows) -> None:
        """Take in a window: quality of all its rows, scores of those that are not held out."""
        self.sample.offer(window, ~window.held)
        self.held.offer(window, window.held)
        self.seen += len(window.key)
        self.held_out += int(window.held.sum())
        names = [*self.features, self.label]
        coded = list(self.map(lambda name: self._coded(name, window.table[name]), names))
        self.windows += 1
        order = np.flatnonzero(~window.held)
        if self.shuffle != "none":
            order = order[np.argsort(window.key[order], kind="stable")]
        if not len(order):
            return
        label = coded.pop()
        self._count_classes(label, order)
        codes = [(column.codes, len(column.values)) for column in coded]
        if self.with_controls:
            codes += controls(np.random.default_rng((self.seed, self.windows)), coded, label)
        below = np.array([size for _, size in codes])
        for start in range(0, len(order), self.batch_rows):
            rows = order[start : start + self.batch_rows]
            smallest = min(LAST_ROWS, self.batch_rows // 2)
            if len(rows) < self.batch_rows and len(rows) <= smallest and self.scores.batches:
                self.not_scored += len(rows)
                continue
            y = label.codes[rows]
            if (y == y[0]).all():
                self.constant_batches += 1
                self.constant_rows = max(self.constant_rows, len(rows))
                self.not_scored += len(rows)
                continue
            batch = np.empty((len(codes), len(rows)), np.uint32)
            for at, (column, _) in enumerate(codes):
                np.take(column, rows, out=batch[at], mode="clip")  # "raise" would go by way of a buffer
            self.scores.add(batch, below, y, len(label.values))
        self._check_classes()

    def _coded(self, name: str, column: pa.ChunkedArray) -> Coded:
        coded, quality = encode(name, column), self.quality[name]
        quality.add(coded)
        if self.bins is None:
            return coded
        if name not in self.binned:
            many = quality.numeric and quality.share_distinct > 0.5
            self.binned[name] = Bins(coded, self.bins, self.missing) if many else None
        found = self.binned[name]
        return coded if found is None else found(coded)

    def _count_classes(self, label: Coded, order: np.ndarray) -> None:
        counts = np.bincount(label.codes[order], minlength=len(label.values))
        for value, count in zip(label.values.to_pylist(), counts.tolist()):
            if count:
                self.class_counts[value] = self.class_counts.get(value, 0) + count
        self.within += _entropy(counts) * counts.sum()
        if len(self.class_counts) > 0.5 * sum(self.class_counts.values()) and sum(self.class_counts.values()) > 2:
            raise DataError(
                f"label {self.label!r} has {len(self.class_counts):,} different values in "
                f"{sum(self.class_counts.values()):,} rows: nothing repeats, so nothing can be learnt of it; name "
                "another column, or give bins for a label of numbers"
            )

    def _check_classes(self) -> None:
        """Batches of one class, while the label has several: the file is sorted by it."""
        counts = np.array(list(self.class_counts.values()))
        if self.constant_batches and len(counts) > 1:
            chance = (counts.max() / counts.sum()) ** self.constant_rows
            if chance < _BY_CHANCE:
                raise DataError(
                    f"{self.constant_batches} of {self.constant_batches + self.scores.batches} batches hold one value "
                    f"of the label {self.label!r} only: the rows are sorted by it. Pass --shuffle global "
                    "(shuffle='global') to shuffle the whole table"
                )

    def finish(self) -> None:
        """Check that something was scored, and note what a reader must know."""
        if not self.seen:
            raise NothingToDo(f"the table holds no row with a value of the label {self.label!r}")
        if not self.class_counts:
            raise NothingToDo("every row is held out")
        if len(self.class_counts) == 1:
            raise DataError(f"label {self.label!r} has one value in all rows: {next(iter(self.class_counts))!r}")
        if not self.scores.batches:
            raise DataError(f"no batch holds two values of the label {self.label!r}; larger batches may")
        if self.constant_batches:
            self.warnings.append(
                f"{self.constant_batches} batches hold one value of the label only and were not scored: the other "
                "values are rare; larger batches (--batch-rows) would hold some of them"
            )
        if self.scores.batches == 1:
            self.warnings.append("all rows fit into one batch: scores are of that batch, not a median over several")
        whole = _entropy(np.array(list(self.class_counts.values())))
        between = 1 - self.within / (sum(self.class_counts.values()) * whole)
        if self.shuffle == "window" and self.windows > 1 and between > _LOST:
            self.warnings.append(
                f"{between:.0%} of what there is to know of the label follows from the place in the file: the rows are "
                "in some order that goes with it, and scores come out too low. Pass --shuffle global"
            )


def check_options(
    order, pairs, budget, batch_rows, subsample, shuffle, bins, hold_out, shifts, max_bad, workers
) -> None:
    """Raise an `InputError` for an option of `rank_table` that is out of range."""
    for name, value, least in (
        ("order", order, 1), ("combination_budget", budget, 1), ("batch_rows", batch_rows, 2),
        ("subsample", subsample, 1), ("shifts", shifts, 1), ("bins", 2 if bins is None else bins, 2),
        ("workers", 1 if workers is None else workers, 1),
    ):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise InputError(f"{name} must be a whole number of at least {least}, not {value!r}")
    if pairs not in ("target", "all"):
        raise InputError(f"pairs must be 'target' or 'all', not {pairs!r}")
    if shuffle not in get_args(Shuffle):
        raise InputError(f"shuffle must be one of {', '.join(map(repr, get_args(Shuffle)))}, not {shuffle!r}")
    if not 0 <= hold_out < 1:
        raise InputError(f"hold_out must be a share of the rows in 0..1, without 1, not {hold_out!r}")
    if not 0 <= max_bad <= 1:
        raise InputError(f"max_bad must be a share in 0..1, not {max_bad!r}")


def features_of(reader: TableReader, label: str, order: int, with_controls: bool) -> list[str]:
    """The columns to rank: all but the label, whose names can be told from combinations and controls."""
    if label not in reader.columns:
        where = reader.sources[0].path or "the table"
        raise DataError(f"{where} has no column {label!r} to rank by ({nearest(label, reader.columns)})")
    features = [name for name in reader.columns if name != label]
    if not features:
        raise NothingToDo(f"the table has no column besides the label {label!r}")
    if order > len(features):
        raise InputError(f"order is {order}, but there are only {len(features)} columns to combine")
    clash = [
        name for name in features if (order > 1 and " AND " in name) or (with_controls and name.startswith(CONTROL))
    ]
    if clash:
        raise InputError(f"column {clash[0]!r} cannot be told from a combination or a control: rename it")
    return features


def _entropy(counts: np.ndarray) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _report(run: _Run, kept: Kept, settings: dict[str, Any]) -> RankReport:
    summaries = {name: quality.summary() for name, quality in run.quality.items()}
    sample = run.sample.rows()
    middle = medians(sample.table, run.missing)
    binned = {name: bins is not None and bins.edges is not None for name, bins in run.binned.items()}
    if any(binned.values()):
        names = ", ".join(name for name, value in binned.items() if value)
        run.warnings.append(f"numeric columns with nearly all values distinct were put into {run.bins} bins: {names}")
    alike = [
        name for name in run.features
        if run.bins is None and run.quality[name].numeric and run.quality[name].share_distinct > 0.5
    ]  # fmt: skip
    if alike:
        run.warnings.append(
            f"numeric columns with nearly all values distinct tell nothing as categories: {', '.join(alike)}; pass "
            "bins=16 (--bins 16) to score them in quantile bins"
        )
    rows = [
        {"column": name, **{k: v for k, v in summary.items() if k not in ("min", "max")}, "min": summary["min"],
         "median": middle[name] if run.quality[name].numeric else None, "max": summary["max"],
         "binned": binned.get(name, False)}
        for name, summary in summaries.items()
    ]  # fmt: skip
    return RankReport.build(
        run.scores, features=run.features, columns=run.columns, label=run.label,
        quality=pa.Table.from_pylist(rows), rows=row_quality(sample.table, run.label, run.missing),
        counts={
            "read": kept.tally.read, "scored": run.scores.rows, "held_out": run.held_out,
            "not_scored": run.not_scored, "passed_over": kept.passed_over, "unlabelled": kept.unlabelled,
            "blank": kept.tally.blank, "quarantined": len(kept.tally.bad),
        },
        bad=kept.tally.bad, warnings=run.warnings, settings=settings,
        sample=sample.table, held=run.held.rows().table if len(run.held) else None,
    )  # fmt: skip
