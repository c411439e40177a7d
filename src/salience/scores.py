"""Scores: one number per unit, with what it is a number of and where it came from.

The exchange format at the borders of the library: save a method's result, report it, hand it to another verb. Larger
means more important; a `Scores` whose numbers are log-weights draws with probability proportional to their exponential.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Float, Int

from salience import __version__
from salience.errors import DataError, InputError, nearest

if TYPE_CHECKING:
    import pandas as pd

_METADATA = b"salience.scores"


class Scores:
    """One finite number per id.

    Parameters
    ----------
    values : (n,) float
        Larger means more important.
    ids : (n,) sequence of str or int
        Unique; kept as strings.
    unit : str
        What an id stands for: "sample", "token", "feature", "layer", …
    provenance : mapping, optional
        How the numbers came about (method, parameters, source); plain JSON data.

    Raises
    ------
    InputError
        Empty, unequal lengths, a NaN or infinite value, a duplicate id, provenance that is not plain data.

    Examples
    --------
    >>> scores = Scores([0.1, 2.0, 1.0], ["a", "b", "c"], unit="sample")
    >>> list(scores.top(2).ids)
    ['b', 'c']
    """

    def __init__(
        self,
        values: Sequence[float] | Float[np.ndarray, " n"],
        ids: Sequence[str | int] | np.ndarray | pa.Array,
        unit: str,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            numbers = np.array(values, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise InputError(f"values must be numbers: {error}") from error
        if isinstance(ids, str):
            raise InputError("ids must be a sequence of ids, not one string")
        names = ids if isinstance(ids, pa.Array) else _names(ids)
        if numbers.ndim != 1:
            raise InputError(f"values must have one dimension, not shape {numbers.shape}")
        if len(numbers) != len(names):
            raise InputError(f"{len(numbers)} values for {len(names)} ids")
        if not len(numbers):
            raise InputError("there are no values: Scores cannot be empty")
        if names.null_count:
            raise InputError(f"{names.null_count} of {len(names)} ids are null")
        self._ids = names.cast(pa.large_string())
        bad = np.flatnonzero(~np.isfinite(numbers))
        if len(bad):
            raise InputError(
                f"value of id {self._ids[int(bad[0])].as_py()!r} is {numbers[bad[0]]}; values must be finite"
            )
        if pc.count_distinct(self._ids).as_py() < len(names):
            counts = pc.value_counts(self._ids)
            twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")[0].as_py()
            raise InputError(f"id {twice!r} occurs more than once")
        if not unit:
            raise InputError("unit must say what an id stands for, such as 'sample'")
        try:
            self.provenance: dict[str, Any] = json.loads(json.dumps(dict(provenance or {})))
        except (TypeError, ValueError) as error:
            raise InputError(f"provenance must be plain JSON data: {error}") from error
        numbers.setflags(write=False)
        self.values: Float[np.ndarray, " n"] = numbers
        self.unit = unit

    @property
    def ids(self) -> np.ndarray:
        """The ids, (n,) str."""
        return np.asarray(self._ids.to_pylist(), dtype=object)

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        method = f", method={self.provenance['method']!r}" if "method" in self.provenance else ""
        return f"Scores({len(self)} {self.unit}s, {self.values.min():.4g} to {self.values.max():.4g}{method})"

    def keep(self, which: Bool[np.ndarray, " n"] | Int[np.ndarray, " m"]) -> Scores:
        """The scores where a mask holds, or at given positions."""
        where = np.asarray(which)
        if where.dtype == bool:
            if where.shape != self.values.shape:
                raise InputError(f"a mask of length {len(self)} is needed, not of shape {where.shape}")
            where = np.flatnonzero(where)
        if not where.size:
            raise InputError("nothing is kept: Scores cannot be empty")
        if where.ndim != 1 or where.dtype.kind not in "iu" or where.min() < 0 or where.max() >= len(self):
            raise InputError(f"positions must be whole numbers in 0..{len(self) - 1}")
        return Scores(self.values[where], self._ids.take(pa.array(where, pa.int64())), self.unit, self.provenance)

    def top(self, count: int) -> Scores:
        """The `count` largest, largest first; ties in the order of their ids."""
        self._check_count(count)
        return self.keep(self._descending()[:count])

    def sample(self, count: int, *, random_state: int | np.random.Generator = 0, temperature: float = 1.0) -> Scores:
        """Draw without replacement, each next id with probability proportional to ``exp(value / temperature)``.

        Gumbel top-k: the largest ``value / temperature + G``, G ~ Gumbel(0, 1), are such a draw.
        """
        self._check_count(count)
        _check_temperature(temperature)
        noise = np.random.default_rng(random_state).gumbel(size=len(self))
        keys = self._scaled(temperature) + noise
        return self.keep(np.argsort(-keys, kind="stable")[:count])

    def weights(self, temperature: float = 1.0) -> Float[np.ndarray, " n"]:
        """Weights for a loss: softmax of ``value / temperature``, scaled to mean 1."""
        _check_temperature(temperature)
        exponentials = np.exp(self._scaled(temperature))
        return exponentials * (len(self) / exponentials.sum())

    def ranks(self) -> Float[np.ndarray, " n"]:
        """Rank of every value over n, in (0, 1], largest 1; equal values share their mean rank."""
        _, inverse, counts = np.unique(self.values, return_inverse=True, return_counts=True)
        last = np.cumsum(counts)
        return ((last - (counts - 1) / 2) / len(self))[inverse]

    def combine(self, *others: Scores) -> Scores:
        """Mean of the ranks of several scores on the same ids (scales need not agree).

        Raises
        ------
        InputError
            Units or ids differ.
        """
        ranks = [self.ranks()]
        for other in others:
            if other.unit != self.unit:
                raise InputError(f"cannot combine scores of {self.unit}s with scores of {other.unit}s")
            where = pc.index_in(self._ids, other._ids)
            if where.null_count or len(other) != len(self):
                only = self._ids.filter(where.is_null())
                example = f"; {only[0].as_py()!r} is in one only" if len(only) else ""
                raise InputError(f"ids differ: {len(self)} and {len(other)} of them{example}")
            ranks.append(other.ranks()[np.asarray(where)])
        provenance = {"combined": "mean rank", "of": [self.provenance, *(other.provenance for other in others)]}
        return Scores(np.mean(ranks, axis=0), self._ids, self.unit, provenance)

    def aligned(self, ids: Sequence[str | int]) -> Float[np.ndarray, " m"]:
        """Values of the given ids, in their order.

        Raises
        ------
        InputError
            An id has no score; the nearest ones are told.
        """
        names = _names(ids)
        where = pc.index_in(names, self._ids)
        if where.null_count:
            missing = names.filter(where.is_null())[0].as_py()
            raise InputError(f"id {missing!r} has no score ({nearest(missing, self._ids[:10_000].to_pylist())})")
        return self.values[np.asarray(where)]

    def to_pandas(self) -> pd.Series:
        """A pandas Series of the values, indexed by id."""
        import pandas as pd

        return pd.Series(self.values, index=pd.Index(self.ids, name=self.unit), name="score")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a Parquet file with the columns `id` and `score`; never leaves a torn file."""
        Scores.save_parts(path, [(self._ids, self.values)], self.unit, self.provenance)

    @staticmethod
    def save_parts(
        path: str | os.PathLike[str], parts: Iterable[tuple[pa.Array, Float[np.ndarray, " m"]]], unit: str,
        provenance: Mapping[str, Any],
    ) -> None:  # fmt: skip
        """Write scores that come in parts (ids and values) and may be too many for memory, as `save` does."""
        schema = pa.schema([("id", pa.large_string()), ("score", pa.float64())])
        described = json.dumps({"unit": unit, "provenance": provenance, "salience": __version__})
        temporary = Path(f"{path}.partial")
        try:
            with pq.ParquetWriter(
                temporary, schema.with_metadata({_METADATA: described.encode()}), write_page_checksum=True
            ) as writer:
                for ids, values in parts:
                    writer.write_table(pa.table([ids, pa.array(values)], writer.schema))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """Read what `save` wrote, or any Parquet file with the columns `id` and `score`.

        Raises
        ------
        DataError
            The file is damaged or has other columns.
        """
        try:
            table = pq.read_table(path, page_checksum_verification=True, partitioning=None)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} is not a readable Scores file: {error}") from error
        for column in ("id", "score"):
            if column not in table.column_names:
                raise DataError(f"{path} has no column {column!r} ({nearest(column, table.column_names)})")
        try:
            described = json.loads((table.schema.metadata or {}).get(_METADATA, b"{}"))
            values = table["score"].to_numpy()
            ids = table["id"].cast(pa.large_string()).combine_chunks()
            return cls(values, ids, described.get("unit", "sample"), described.get("provenance"))
        except (pa.ArrowException, ValueError, LookupError, AttributeError) as error:
            raise DataError(f"{path} holds no scores: {error}") from error

    def _descending(self) -> Int[np.ndarray, " n"]:
        return np.lexsort((self.ids.astype(str), -self.values))

    def _scaled(self, temperature: float) -> Float[np.ndarray, " n"]:
        """Values over temperature, the largest moved to 0 so that no exponential overflows."""
        with np.errstate(over="ignore"):
            return (self.values - self.values.max()) / temperature

    def _check_count(self, count: int) -> None:
        if not isinstance(count, int | np.integer) or not 1 <= count <= len(self):
            raise InputError(f"count must be a whole number in 1..{len(self)}, not {count}")


def _names(ids: Sequence[str | int] | np.ndarray) -> pa.Array:
    try:
        return pa.array([str(name) for name in ids], pa.large_string())
    except UnicodeEncodeError as error:
        raise InputError(f"an id is not valid Unicode: {error}") from error


def _check_temperature(temperature: float) -> None:
    if not (temperature > 0 and np.isfinite(temperature)):
        raise InputError(f"temperature must be positive and finite, not {temperature}")
