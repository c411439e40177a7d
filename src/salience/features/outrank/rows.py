"""Rows of a table on their way to the batches: counted, thinned, held out, sampled, and shuffled by keys.

Every draw is a function of (seed, file, row), so that neither workers nor the engine change it.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float

from salience.errors import DataError
from salience.features.outrank.columns import as_text, encode, is_missing
from salience.io import TableReader, Tally, uniform

Shuffle = Literal["window", "global", "none"]
WINDOW_BATCHES = 4
_PART_BYTES = 16 << 20  # of the inputs, that one part of a global shuffle should hold
_MOST_PARTS = 512
_KEY, _HELD, _SAMPLE = "\0key", "\0held", "\0sample"  # columns of the draws, while rows lie on disk


class Rows(NamedTuple):
    """Some rows and what was drawn for them.

    Attributes
    ----------
    table : pa.Table, n rows
    key : (n,) float64
        Place in a shuffle, in (0, 1).
    held : (n,) bool
        Whether the row is held out of scoring.
    sample : (n,) float64
        The rows with the smallest are a random sample.
    """

    table: pa.Table
    key: Float[np.ndarray, " n"]
    held: Bool[np.ndarray, " n"]
    sample: Float[np.ndarray, " n"]

    def slice(self, start: int, stop: int) -> Rows:
        """Rows start … stop - 1."""
        return Rows(
            self.table.slice(start, stop - start), self.key[start:stop], self.held[start:stop],
            self.sample[start:stop],
        )  # fmt: skip

    def take(self, where: np.ndarray) -> Rows:
        """Rows at given places, or where a mask holds."""
        rows = self.table.filter(pa.array(where)) if where.dtype == bool else self.table.take(pa.array(where))
        return Rows(rows, self.key[where], self.held[where], self.sample[where])

    @classmethod
    def joined(cls, parts: list[Rows]) -> Rows:
        """One after the other.

        Raises
        ------
        DataError
            A column has different types in two files.
        """
        if len(parts) == 1:
            return parts[0]
        try:
            table = pa.concat_tables([part.table for part in parts], promote_options="permissive")
        except (pa.ArrowException, TypeError) as error:
            raise DataError(f"the inputs have a column of different types: {error}") from error
        return cls(table, *(np.concatenate([part[at] for part in parts]) for at in (1, 2, 3)))


class Kept:
    """The rows of a reader that count: every `subsample`-th one, and of these those that have a label.

    Attributes
    ----------
    tally : Tally
    passed_over : int
        Rows left out by `subsample`.
    unlabelled : int
        Rows whose label is missing.
    """

    def __init__(
        self, reader: TableReader, label: str, missing: tuple[str, ...], subsample: int, hold_out: float,
        max_bad: float, seed: int,
    ) -> None:  # fmt: skip
        self.tally, self.passed_over, self.unlabelled = Tally(), 0, 0
        self._reader, self._label, self._missing = reader, label, missing
        self._subsample, self._hold_out, self._max_bad, self._seed = subsample, hold_out, max_bad, seed

    def __iter__(self) -> Iterator[Rows]:
        for batch in self._reader:
            self.tally.add(batch, self._max_bad)
            table, rows = batch.table, batch.rows
            if self._subsample > 1:
                wanted = (rows + 1) % self._subsample == 0
                self.passed_over += int((~wanted).sum())
                table, rows = table.filter(pa.array(wanted)), rows[wanted]
            if not len(rows):
                continue
            label = encode(self._label, table[self._label])
            gone = is_missing(label.values, as_text(label.values), self._missing)
            if gone.any():
                labelled = ~gone[label.codes]
                self.unlabelled += int((~labelled).sum())
                table, rows = table.filter(pa.array(labelled)), rows[labelled]
            key, held, sample = (
                uniform(self._seed, purpose, batch.source.file_id, rows)
                for purpose in ("shuffle", "hold-out", "sample")
            )
            if len(rows):
                yield Rows(table, key, held < self._hold_out, sample)


def windows(rows: Iterable[Rows], size: int) -> Iterator[Rows]:
    """Cut rows, in their order, into windows of `size` rows that are not held out (the last one may have fewer)."""
    waiting: list[Rows] = []
    count = 0
    for part in rows:
        while count + int((~part.held).sum()) >= size:
            end = int(np.flatnonzero(~part.held)[size - count - 1]) + 1
            yield Rows.joined([*waiting, part.slice(0, end)])
            waiting, count, part = [], 0, part.slice(end, len(part.key))
        if len(part.key):
            waiting.append(part)
            count += int((~part.held).sum())
    if waiting:
        yield Rows.joined(waiting)


def sorted_by_key(rows: Iterable[Rows], size: int, total_bytes: int) -> Iterator[Rows]:
    """All rows in the order of their keys, by way of files in the temporary folder: memory holds one part of them."""
    count = min(max(1, math.ceil(total_bytes / _PART_BYTES)), _MOST_PARTS) if total_bytes else 64  # 0: a stream
    with tempfile.TemporaryDirectory(prefix="salience-shuffle-") as name:
        paths = [Path(name) / f"{part}.arrow" for part in range(count)]
        writers: dict[int, pa.RecordBatchFileWriter] = {}
        try:
            for window in windows(rows, size):
                part_of = np.minimum((window.key * count).astype(np.int64), count - 1)
                for part in np.unique(part_of).tolist():
                    table = _with_draws(window.take(part_of == part))
                    if part not in writers:
                        writers[part] = pa.ipc.new_file(paths[part], table.schema)
                    try:
                        writers[part].write_table(table)
                    except pa.ArrowInvalid as error:  # another schema than the first
                        raise DataError(f"the inputs have a column of different types: {error}") from error
        finally:
            for writer in writers.values():
                writer.close()
        for part in sorted(writers):
            with pa.ipc.open_file(paths[part]) as file:
                found = _without_draws(file.read_all())
            yield found.take(np.argsort(found.key, kind="stable"))


class KeyedSample:
    """The `size` rows with the smallest sampling keys: a random sample of a stream, whatever order it comes in."""

    def __init__(self, size: int) -> None:
        self._size, self._parts, self._count, self._limit = size, [], 0, math.inf  # type: ignore[var-annotated]

    def offer(self, rows: Rows, which: Bool[np.ndarray, " n"]) -> None:
        """Take in those of the rows where `which` holds that may belong to the sample."""
        wanted = which & (rows.sample < self._limit)
        if wanted.sum() > self._size:
            wanted &= rows.sample <= np.partition(rows.sample[wanted], self._size - 1)[self._size - 1]
        if not wanted.any():
            return
        self._parts.append(rows.take(wanted))
        self._count += int(wanted.sum())
        if self._count > 1.25 * self._size:
            self._parts = [self.rows()]
            self._count = self._size
        if self._count >= self._size:
            self._limit = float(
                np.partition(np.concatenate([p.sample for p in self._parts]), self._size - 1)[self._size - 1]
            )

    def rows(self) -> Rows:
        """The sample, in the order of its keys."""
        whole = Rows.joined(self._parts)
        return whole.take(np.argsort(whole.sample, kind="stable")[: self._size])

    def __len__(self) -> int:
        return min(self._count, self._size)


def _with_draws(rows: Rows) -> pa.Table:
    table = rows.table
    for name, values in ((_KEY, rows.key), (_HELD, rows.held), (_SAMPLE, rows.sample)):
        table = table.append_column(name, pa.array(values))
    return table


def _without_draws(table: pa.Table) -> Rows:
    key, held, sample = (table[name].to_numpy() for name in (_KEY, _HELD, _SAMPLE))
    return Rows(table.drop_columns([_KEY, _HELD, _SAMPLE]), key, held, sample)
