"""Tasks from tables: one file per source task, or one table with a column that names the task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from salience.errors import DataError, InputError, NothingToDo, nearest
from salience.io.whole import is_text, numbers_of, read_whole, words_of


@dataclass
class Pool:
    """The rows of one task that can be used: inputs (n, d), labels (n,), and where they stand in `table`."""

    name: str
    inputs: Float[np.ndarray, "n d"]
    labels: Float[np.ndarray, " n"]
    rows: Int[np.ndarray, " n"]
    table: pa.Table

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class Tables:
    """Source tasks and the target over the same inputs.

    Attributes
    ----------
    sources : list of Pool
    target : Pool
    columns : list of str
        The inputs: columns of numbers that all tables have and that are not constant.
    classes : tuple of str or None
        The two classes that were made -1 and 1; None for labels that are numbers.
    counts : dict of str to int
        Rows read = used + incomplete, of the sources.
    notes : list of str
    """

    sources: list[Pool]
    target: Pool
    columns: list[str]
    classes: tuple[str, str] | None
    counts: dict[str, int]
    notes: list[str]


def read_tasks(
    sources: Sequence[Any], target: Any, label: str, *, task: str | None = None, positive: str | None = None
) -> Tables:
    """Read source tasks and the target.

    Inputs are standardised by the mean and deviation of all source rows. Rows that lack the label or an input are left
    out and counted.

    Parameters
    ----------
    sources : sequence of paths or tables
        One per task, named by its file; with `task`, any number of tables whose rows name their task.
    target : path or table
    label : str
        Column of labels: numbers, or words of two classes.
    task : str, optional
        Column of the sources that names the task of a row.
    positive : str, optional
        The class that becomes 1, all others -1.

    Raises
    ------
    InputError
        A column that is asked for does not exist, or there are more than two classes and `positive` is not given.
    DataError
        No column of numbers is shared by all tables, or labels are words here and numbers there.
    NothingToDo
        No source or no target row is complete.
    """
    named, notes = _named(sources, task)
    table, told = read_whole(target)
    notes += told
    both = [*named, ("the target", table)]
    for name, one in both:
        if label not in one.column_names:
            raise InputError(f"label {label!r} is no column of {name} ({nearest(label, one.column_names)})")
    columns = _columns(both, {label, task})
    left_out = sorted({name for _, one in both for name in one.column_names} - set(columns) - {label, task})
    if left_out:
        shown = ", ".join(left_out[:5]) + (", …" if len(left_out) > 5 else "")
        notes.append(f"{len(left_out)} columns are not used, as they hold text or are not in every table: {shown}")
    labels, classes = _labels([one for _, one in both], label, positive)
    pools = [_pool(name, one, columns, values) for (name, one), values in zip(both, labels)]
    counts = {"rows": sum(one.num_rows for _, one in named), "used": sum(map(len, pools[:-1]))}
    counts["incomplete"] = counts["rows"] - counts["used"]
    empty = [pool.name for pool in pools if not len(pool)]
    if "the target" in empty or len(empty) == len(pools) - 1:
        raise NothingToDo(f"no complete row in {'the target' if 'the target' in empty else 'any source'}")
    if empty:
        notes.append(f"{len(empty)} tasks have no complete row and are left out: {', '.join(empty[:5])}")
    *kept, goal = [pool for pool in pools if len(pool)]
    return Tables(kept, goal, _standardise(kept, goal, columns, notes), classes, counts, notes)


def _named(sources: Sequence[Any], task: str | None) -> tuple[list[tuple[str, pa.Table]], list[str]]:
    if not sources:
        raise InputError("there is no source: name a table for each task, or a table with a task column")
    read = [read_whole(source) for source in sources]
    notes = [note for _, told in read for note in told]
    if task is None:
        names = [Path(str(source)).name if isinstance(source, str | Path) else f"task {n}"
                 for n, source in enumerate(sources)]  # fmt: skip
        names = [name if names.count(name) == 1 else str(source) for name, source in zip(names, sources)]
        if len(set(names)) < len(names):
            raise InputError("the same source is given twice")
        return list(zip(names, (table for table, _ in read))), notes
    parts: dict[str, list[pa.Table]] = {}
    for table, _ in read:
        words = words_of(table, task, "task column")
        if any(word is None for word in words):
            raise DataError(f"task column {task!r} is empty in row {[w is None for w in words].index(True)}")
        for name in sorted(set(words)):
            parts.setdefault(name, []).append(table.filter(pa.array(words == name)))
    return [(name, pa.concat_tables(tables, promote_options="permissive")) for name, tables in parts.items()], notes


def _columns(tables: list[tuple[str, pa.Table]], other: set[str | None]) -> list[str]:
    first = tables[-1][1]
    found = [name for name in first.column_names if name not in other
             and all(name in one.column_names and not is_text(one[name]) for _, one in tables)]  # fmt: skip
    if not found:
        raise DataError("no column of numbers, besides the label, is in every table: encode words as numbers first")
    return found


def _labels(
    tables: list[pa.Table], label: str, positive: str | None
) -> tuple[list[Float[np.ndarray, " n"]], tuple[str, str] | None]:
    text = [is_text(table[label]) for table in tables]
    if positive is None and not any(text):
        return [numbers_of(table, label, "label") for table in tables], None
    if positive is None and not all(text):
        raise DataError(f"label {label!r} is words in some tables and numbers in others; --positive names one class")
    words = [words_of(table, label, "label") for table in tables]
    classes = sorted({word for one in words for word in one if word is not None})
    if positive is None and len(classes) != 2:
        raise InputError(f"label {label!r} has {len(classes)} classes ({', '.join(classes[:6])}); --positive names the "
                         "one that is told from the others")  # fmt: skip
    if positive is not None and positive not in classes:
        raise InputError(f"--positive {positive!r} is no class of {label!r} ({nearest(positive, classes)})")
    one = positive or classes[1]
    signs = [np.array([np.nan if word is None else 1.0 if word == one else -1.0 for word in part]) for part in words]
    return signs, (classes[0] if positive is None else f"not {one}", one)


def _pool(name: str, table: pa.Table, columns: list[str], labels: Float[np.ndarray, " n"]) -> Pool:
    inputs = np.column_stack([numbers_of(table, column) for column in columns])
    rows = np.flatnonzero(np.isfinite(inputs).all(axis=1) & np.isfinite(labels))
    return Pool(name, inputs[rows], labels[rows], rows, table)


def _standardise(sources: list[Pool], target: Pool, columns: list[str], notes: list[str]) -> list[str]:
    """Bring inputs to mean 0 and deviation 1 over all source rows, in place, without those that are constant there."""
    whole = np.concatenate([pool.inputs for pool in sources])
    spread = whole.std(axis=0)
    varies = spread > 1e-12 * np.abs(whole).max(axis=0)
    if not varies.any():
        raise DataError("every input is constant in the sources")
    if not varies.all():
        notes.append(f"{int((~varies).sum())} columns are constant in the sources and not used")
    middle = whole.mean(axis=0)
    for pool in [*sources, target]:
        pool.inputs = ((pool.inputs - middle) / np.where(varies, spread, 1.0))[:, varies]
    return [name for name, kept in zip(columns, varies) if kept]
