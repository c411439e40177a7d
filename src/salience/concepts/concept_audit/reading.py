"""Probe sets as files: Parquet with a column for each concept, or a folder of pictures with a table beside them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int

from salience.errors import DataError, InputError, nearest
from salience.io.tables import TableReader, as_numbers
from salience.model.images import ImageSet, read_images

TABLES = ("concepts.csv", "concepts.parquet")
_FILE = "file"
_NOT_CONCEPTS = ("image", "label", _FILE)


class ProbeFiles(NamedTuple):
    """A probe set that was opened: pictures, which are decoded when asked for, and their concepts."""

    images: ImageSet
    concepts: Bool[np.ndarray, "n c"]
    names: tuple[str, ...]
    labels: Int[np.ndarray, " n"] | None


def read_probe(
    source: str | os.PathLike[str], processor: Any = None, *, concepts: Sequence[str] | None = None, **options: Any
) -> ProbeFiles:
    """Open pictures with concept labels.

    Parameters
    ----------
    source : path
        Either ``.parquet`` in the Hugging Face image layout (`read_images`) in which every further column of 0 and 1,
        or of truth values, is a concept; or a folder of pictures (sub-folders are classes, if there are any) that holds
        ``concepts.csv`` or ``concepts.parquet`` with a column `file`, the picture's path within the folder, and such a
        column for each concept. Columns of text are passed over.
    processor : transformers image processor, optional
    concepts : sequence of str, optional
        Columns to take; all by default.
    options
        `size`, `mean` and `std` of `read_images`.

    Returns
    -------
    ProbeFiles

    Raises
    ------
    InputError
        A path that does not exist, or a folder without the table.
    DataError
        A column that is missing or holds something else, no concept, a picture without a row or a row without picture.
    """
    path = Path(source)
    images = read_images(source, processor, **options)
    if path.is_dir():
        table = next((path / name for name in TABLES if (path / name).is_file()), None)
        if table is None:
            raise InputError(f"probe set {source}: holds no {' or '.join(TABLES)} with the pictures' concepts")
        columns, place = _read(table), str(table)
        order = _rows(columns, images.ids, place)
    elif path.suffix.lower() == ".parquet":
        columns, place = _read(path), str(path)
        order = np.arange(len(images))
    else:
        raise InputError(f"probe set {source}: must be a .parquet file, or a folder with {' or '.join(TABLES)}")
    names, values = _concepts(columns, concepts, place)
    labels = None if images.labels is None else images.labels.numpy()
    return ProbeFiles(images, values[order], names, labels)


def _read(path: Path) -> dict[str, pa.ChunkedArray]:
    """All columns but the pictures."""
    names = [name for name in TableReader(path).columns if name != "image"]
    batches = [batch for batch in TableReader(path, names)] if names else []
    bad = [one for batch in batches for one in batch.bad]
    if bad:
        raise DataError(f"{path}: {len(bad)} rows cannot be read, the first because of {bad[0].reason}")
    table = pa.concat_tables([batch.table for batch in batches]) if batches else pa.table({})
    return dict(zip(table.column_names, table.columns, strict=True))


def _rows(columns: dict[str, pa.ChunkedArray], ids: list[str], place: str) -> np.ndarray:
    """Where in the table each picture's row is."""
    if _FILE not in columns:
        raise DataError(f"{place}: has no column {_FILE!r} with each picture's path; {nearest(_FILE, columns)}")
    files = [str(one) for one in columns[_FILE].to_pylist()]
    at = {name: i for i, name in enumerate(files)}
    if len(at) < len(files):
        twice = next(name for i, name in enumerate(files) if at[name] != i)
        raise DataError(f"{place}: names {twice!r} in more than one row")
    missing = next((name for name in ids if name not in at), None)
    if missing is not None:
        raise DataError(f"{place}: has no row for the picture {missing!r}")
    extra = set(at) - set(ids)
    if extra:
        raise DataError(f"{place}: names {min(extra)!r}, which is no picture in the folder")
    return np.array([at[name] for name in ids])


def _concepts(
    columns: dict[str, pa.ChunkedArray], wanted: Sequence[str] | None, place: str
) -> tuple[tuple[str, ...], np.ndarray]:
    names, found = [], []
    for name in columns if wanted is None else wanted:
        if name not in columns:
            raise DataError(f"{place}: has no column {name!r}; {nearest(name, columns)}")
        if wanted is None and name in _NOT_CONCEPTS:
            continue
        values = as_numbers(columns[name])
        if values is None and wanted is None:
            continue  # text, such as a caption
        bad = [0] if values is None else np.flatnonzero(~np.isin(values, (0, 1)))
        if len(bad):
            row = int(bad[0])
            raise DataError(
                f"{place}, row {row}, column {name!r}: holds {columns[name][row].as_py()!r}; a concept is 0 or 1 in "
                "every row (name the columns that are concepts to leave out others)"
            )
        assert values is not None
        names.append(name)
        found.append(values.astype(bool))
    if not names:
        raise DataError(f"{place}: has no column of 0 and 1 that could be a concept")
    return tuple(names), np.stack(found, axis=1)
