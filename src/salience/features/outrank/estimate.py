"""What a ranking will cost, measured on the first batch of rows: for `rank table --dry-run`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from salience.errors import NothingToDo
from salience.features.outrank.batches import BatchScores
from salience.features.outrank.columns import controls, encode
from salience.features.outrank.quality import ColumnQuality
from salience.features.outrank.ranking import check_options, features_of
from salience.features.outrank.rows import WINDOW_BATCHES
from salience.io import TableReader, available_cores
from salience.io.lines import open_parquet

_BASE_BYTES = 200_000_000
_COPIES = 4  # of a window: as it was read, joined, as texts of its values, and on its way
_COUNTER_BYTES = 1 << 20  # of the values of a column


def estimate_ranking(
    source: Any, label: str, *, order: int = 1, pairs: str = "target", combination_budget: int = 1 << 15,
    batch_rows: int = 1 << 14, subsample: int = 1, shuffle: str = "window", with_controls: bool = False,
    bins: int | None = None, missing: Sequence[str] = (), columns: Sequence[str] | None = None, hold_out: float = 0.0,
    shifts: int = 1, max_bad: float = 0.01, workers: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Rows, batches, peak memory and time of `rank_table` with these options, from a timed batch; writes nothing.

    Returns
    -------
    dict
        files, bytes, columns, passes, workers, peak_bytes; and rows, batches, seconds, which are None where compressed
        text does not tell before it is read. `rows_known` says whether `rows` is exact.

    Raises
    ------
    InputError, DataError, NothingToDo
        As `rank_table` would, as far as the first rows tell.
    """
    check_options(order, pairs, combination_budget, batch_rows, subsample, shuffle, bins, hold_out, shifts, max_bad,
                  workers)  # fmt: skip
    chosen = None if columns is None else [*(name for name in columns if name != label), label]
    features = features_of(TableReader(source, chosen), label, order, with_controls)
    whole = TableReader(source)  # all columns: the width of a row tells how many there are
    began = time.perf_counter()
    table = _first_rows(whole, batch_rows)
    reading = (time.perf_counter() - began) / table.num_rows

    def score() -> None:
        coded = [encode(name, table[name]) for name in [*features, label]]
        for each in coded:
            ColumnQuality(tuple(missing)).add(each)
        y = coded.pop()
        codes = [(each.codes, len(each.values)) for each in coded]
        if with_controls:
            codes += controls(np.random.default_rng(0), coded, y)
        scores = BatchScores(len(codes), len(features), order=order, all_pairs=pairs == "all",
                             budget=combination_budget, shifts=shifts)  # fmt: skip
        scores.add(np.stack([each for each, _ in codes]), np.array([size for _, size in codes]), y.codes, len(y.values))

    score()  # compiles, too
    began = time.perf_counter()
    score()
    scoring = (time.perf_counter() - began) / table.num_rows
    rows, known = _rows(whole, table)
    workers = workers or available_cores()
    kept = None if rows is None else rows // subsample
    passes = 2 if shuffle == "global" else 1  # the second one over temporary files
    window = WINDOW_BATCHES * batch_rows if kept is None else min(WINDOW_BATCHES * batch_rows, kept)
    width = table.nbytes / table.num_rows * (len(features) + 1) / table.num_columns
    peak = _BASE_BYTES + window * (_COPIES * width + 4 * len(features)) + _COUNTER_BYTES * len(features)
    return {
        "files": len(whole.sources), "bytes": whole.bytes, "columns": len(features), "rows": rows, "rows_known": known,
        "batches": None if kept is None else max(1, round(kept * (1 - hold_out) / batch_rows)), "passes": passes,
        "workers": workers,
        "peak_bytes": round(peak),
        "seconds": None if rows is None or kept is None else rows * reading * passes + kept * scoring / workers,
    }  # fmt: skip


def _first_rows(reader: TableReader, count: int) -> pa.Table:
    parts: list[pa.Table] = []
    for batch in reader:
        parts.append(batch.table)
        if sum(len(part) for part in parts) >= count:
            break
    table = pa.concat_tables(parts, promote_options="permissive") if parts else None
    if table is None or not table.num_rows:
        raise NothingToDo("the table holds no row")
    return table.slice(0, count)


def _rows(reader: TableReader, table: pa.Table) -> tuple[int | None, bool]:
    """Rows of all sources, and whether that is more than an estimate by the width of the first ones."""
    if any(source.compression for source in reader.sources):
        return None, False
    total, known = 0, True
    for source in reader.sources:
        if source.table is not None:
            total += source.table.num_rows
        elif source.format == "parquet":
            with open_parquet(source) as file:
                total += file.metadata.num_rows
        else:
            texts = sum(pc.sum(pc.binary_length(column)).as_py() or 0 for column in table.columns)
            total += round(source.size / (texts / table.num_rows + table.num_columns))  # commas and line ends
            known = False
    return total, known
