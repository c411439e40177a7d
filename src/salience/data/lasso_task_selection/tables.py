"""Tasks from tables: one file per source task, or one table with a column that names the task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int

from salience.errors import DataError, InputError, NothingToDo, nearest
from salience.io.corpus import find_sources
from salience.io.whole import Records, is_text, numbers_of, read_records, words_of


@dataclass
class Pool:
    """The rows of one task that can be used: inputs (n, d), labels (n,), and where they stand in `raw`.

    `raw` is the whole table with its values as they stand in the file, to write them again.
    """

    name: str
    inputs: Float[np.ndarray, "n d"]
    labels: Float[np.ndarray, " n"]
    rows: Int[np.ndarray, " n"]
    raw: pa.Table

    def __len__(self) -> int:
        return len(self.labels)


class Part(NamedTuple):
    """One task as it was read: columns of numbers as numbers, and the same rows as they stand in the file."""

    name: str
    table: pa.Table
    raw: pa.Table


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
        Rows read = used + incomplete + unreadable + equal to a row of the target, of the sources.
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
    out and counted, and so are source rows that are equal to a row of the target (in inputs, label and the words that
    both tables have): held-out rows would be learned from otherwise.

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
        A column that is asked for does not exist, the target is one of the sources, a source has a column ``task`` that
        does not name its tasks, or there are more than two classes and `positive` is not given.
    DataError
        No column of numbers is shared by all tables, labels are words here and numbers there, or a column holds words
        in one source and numbers in another, so that chosen rows do not fit in one table.
    NothingToDo
        No source or no target row is complete.
    """
    _apart(sources, target)
    named, read, bad, notes = _named(sources, task)
    ours = read_records(target)
    notes += ours.notes
    for part in named:
        if task != "task" and "task" in part.raw.column_names:
            raise InputError(f"{part.name} has a column 'task' already, which is where chosen rows name their task: "
                             "name tasks by it (--task task), or give it another name")  # fmt: skip
    both = [*named, Part("the target", ours.table, ours.raw)]
    for part in both:
        if label not in part.table.column_names:
            raise InputError(f"label {label!r} is no column of {part.name} ({nearest(label, part.table.column_names)})")
    together([part.raw.slice(0, 0) for part in named], "the sources")
    columns = _columns(both, {label, task})
    left_out = sorted({name for part in both for name in part.table.column_names} - set(columns) - {label, task})
    if left_out:
        shown = ", ".join(left_out[:5]) + (", …" if len(left_out) > 5 else "")
        notes.append(f"{len(left_out)} columns are not used, as they hold text or are not in every table: {shown}")
    labels, classes = _labels([part.table for part in both], label, positive)
    pools = [_pool(part, columns, values) for part, values in zip(both, labels)]
    complete = sum(map(len, pools[:-1]))
    _leave_out_target(pools, both, [name for name in left_out if all(name in one.table.column_names for one in both)])
    used = sum(map(len, pools[:-1]))
    counts = {"rows": read, "used": used, "incomplete": read - bad - complete, "unreadable": bad,
              "in the target": complete - used}  # fmt: skip
    if complete > used:
        notes.append(f"{complete - used:,} source rows are equal to a row of the target and left out")
    empty = [pool.name for pool in pools if not len(pool)]
    if "the target" in empty or len(empty) == len(pools) - 1:
        raise NothingToDo(f"no complete row in {'the target' if 'the target' in empty else 'any source'}")
    if empty:
        notes.append(f"{len(empty)} tasks have no complete row and are left out: {', '.join(empty[:5])}")
    *kept, goal = [pool for pool in pools if len(pool)]
    return Tables(kept, goal, _standardise(kept, goal, columns, notes), classes, counts, notes)


def together(tables: Sequence[pa.Table], what: str) -> pa.Table:
    """One table of several, or an error that names the column that does not fit."""
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        for name in dict.fromkeys(name for table in tables for name in table.column_names):
            kinds = list(dict.fromkeys(table.schema.field(name).type for table in tables if name in table.column_names))
            try:
                pa.unify_schemas([pa.schema([(name, kind)]) for kind in kinds], promote_options="permissive")
            except pa.ArrowException:
                raise DataError(
                    f"column {name!r} of {what} is {kinds[0]} in one table and {' and '.join(map(str, kinds[1:]))} in "
                    "another, so that chosen rows do not fit in one table: make it of one kind, or leave it out"
                ) from None
        raise DataError(f"{what} do not fit in one table: {error}") from error


def _apart(sources: Sequence[Any], target: Any) -> None:
    """Refuse a target that is one of the sources' files."""
    if not isinstance(target, str | Path):
        return
    ours = {Path(one.path).resolve() for one in find_sources(target)}
    for source in sources:
        if isinstance(source, str | Path):
            for one in find_sources(source):
                if Path(one.path).resolve() in ours:
                    raise InputError(f"the target {target} is one of the sources: its held-out rows would be learned "
                                     "from; name the other tables as sources")  # fmt: skip


def _named(sources: Sequence[Any], task: str | None) -> tuple[list[Part], int, int, list[str]]:
    """The tasks, records read and unreadable ones, and notes."""
    if not sources:
        raise InputError("there is no source: name a table for each task, or a table with a task column")
    found = [read_records(source) for source in sources]
    read, bad = sum(one.read for one in found), sum(one.bad for one in found)
    notes = [note for one in found for note in one.notes]
    if task is None:
        names = [Path(str(source)).name if isinstance(source, str | Path) else f"task {n}"
                 for n, source in enumerate(sources)]  # fmt: skip
        names = [name if names.count(name) == 1 else str(source) for name, source in zip(names, sources)]
        if len(set(names)) < len(names):
            raise InputError("the same source is given twice")
        return [Part(name, one.table, one.raw) for name, one in zip(names, found)], read, bad, notes
    parts: dict[str, list[Part]] = {}
    for one, table in zip(found, _alike(found)):
        words = words_of(one.raw, task, "task column")
        missing = [word is None or not word.strip() for word in words]
        if any(missing):
            raise DataError(f"task column {task!r} is empty in row {missing.index(True)}")
        for name in sorted(set(words)):
            mask = pa.array(words == name)
            parts.setdefault(name, []).append(Part(name, table.filter(mask), one.raw.filter(mask)))
    merged = [
        Part(name, together([one.table for one in rows], f"task {name!r}"),
             together([one.raw for one in rows], f"task {name!r}"))
        for name, rows in parts.items()
    ]  # fmt: skip
    return merged, read, bad, notes


def _alike(found: list[Records]) -> list[pa.Table]:
    """The tables, with a column as it stands in the file where another table has words in it."""
    words = {name for one in found for name in one.table.column_names if is_text(one.table[name])}
    tables = []
    for one in found:
        table = one.table
        for at, name in enumerate(table.column_names):
            if name in words and not is_text(table[name]) and is_text(one.raw[name]):
                text = one.raw[name]
                text = pc.if_else(pc.equal(text, ""), pa.scalar(None, text.type), text)
                table = table.set_column(at, name, text)
        tables.append(table)
    return tables


def _columns(parts: list[Part], other: set[str | None]) -> list[str]:
    tables = [part.table for part in parts]
    found = [name for name in tables[-1].column_names if name not in other
             and all(name in one.column_names and not is_text(one[name]) for one in tables)]  # fmt: skip
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


def _pool(part: Part, columns: list[str], labels: Float[np.ndarray, " n"]) -> Pool:
    inputs = np.column_stack([numbers_of(part.table, column) for column in columns])
    rows = np.flatnonzero(np.isfinite(inputs).all(axis=1) & np.isfinite(labels))
    return Pool(part.name, inputs[rows], labels[rows], rows, part.raw)


def _leave_out_target(pools: list[Pool], parts: list[Part], other: list[str]) -> None:
    """Drop source rows that are equal to a target row in inputs, label and the columns `other` that all tables have."""

    def keys(pool: Pool, part: Part) -> list[tuple]:
        words = [words_of(part.table, name)[pool.rows].tolist() for name in other]
        numbers = np.column_stack([pool.inputs, pool.labels]) + 0.0  # no -0
        return list(zip((row.tobytes() for row in numbers), *words))

    ours = set(keys(pools[-1], parts[-1]))
    for pool, part in zip(pools[:-1], parts[:-1]):
        new = np.array([key not in ours for key in keys(pool, part)], dtype=bool)
        pool.inputs, pool.labels, pool.rows = pool.inputs[new], pool.labels[new], pool.rows[new]


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
