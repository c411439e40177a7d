"""Run a function over data in batches: order kept, memory bounded."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from salience.errors import InputError, NothingToDo

# A batch that can still be cut: how many rows it has, and what takes the rows from start to stop.
_Batch = tuple[int, Callable[[int, int], Any]]


def map_batches(
    fn: Callable[[Any], Any],
    data: Any,
    *,
    batch_size: int = 32,
    progress: bool = False,
    out: str | os.PathLike | None = None,
) -> Any:
    """Apply `fn` to `data` batch by batch and put the results together in the order of the data.

    When memory runs out the batch is halved, which is said once, and the smaller size is kept.

    Parameters
    ----------
    fn : callable
        Takes one batch and returns a tensor, or a tuple or dict of tensors, with one row per row of the
        batch. Called in the gradient mode of the caller; its results are detached and moved to the CPU.
    data : Tensor, ndarray, DataLoader, Dataset or sequence
        A tensor or array gives slices of itself, a `Dataset` collated batches, another sequence (of texts,
        say) lists. A `DataLoader` gives its own batches, in its own order.
    batch_size : int
        Rows per call of `fn`; a `DataLoader` has its own.
    progress : bool
        Draw a progress bar.
    out : path-like, optional
        A ``.npy`` file, not there yet, for a result larger than memory. It gets its name when it is
        complete, and is returned as a read-only memory map. bfloat16 is stored as float32.

    Returns
    -------
    Tensor, tuple of Tensor, dict of str to Tensor, or numpy.memmap

    Raises
    ------
    InputError
        `fn` does not return one row per row, or `out` cannot be used.
    NothingToDo
        `data` is empty.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size: got {batch_size!r}; it must be an integer of at least 1")
    batches, count = _batches(data, batch_size)
    if count == 0:
        raise NothingToDo("data: there are no rows to work on")
    results = _results(fn, batches, count, progress)
    if out is not None:
        return _to_disk(results, count, Path(out))
    parts = list(results)
    if not parts:
        raise NothingToDo("data: there are no rows to work on")
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, dict):
        return {key: torch.cat([part[key] for part in parts]) for key in first}
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _batches(data: Any, batch_size: int) -> tuple[Iterator[_Batch], int | None]:
    """The batches of `data`, and its number of rows where that is known."""
    if isinstance(data, DataLoader):
        return (_cuttable(batch) for batch in data), _rows_of(data)
    if isinstance(data, IterableDataset):
        return _batches(DataLoader(data, batch_size), batch_size)
    if not hasattr(data, "__getitem__") or isinstance(data, str | Mapping):
        raise InputError(
            f"data: got {type(data).__name__}; give a tensor, an array, a DataLoader, a Dataset or a sequence"
        )
    count = len(data)

    def take(start: int, stop: int) -> Any:
        if isinstance(data, Dataset):
            return default_collate([data[i] for i in range(start, stop)])
        return data[start:stop]

    def batch_at(start: int) -> _Batch:
        rows = min(batch_size, count - start)
        return rows, lambda i, j: take(start + i, start + j)

    return (batch_at(start) for start in range(0, count, batch_size)), count


def _rows_of(loader: DataLoader) -> int | None:
    """Rows that `loader` will give, as far as it can tell beforehand."""
    try:
        rows = len(loader.sampler)  # type: ignore[arg-type]
    except TypeError:  # an iterable dataset, or a sampler without a length
        return None
    if loader.batch_size is None:
        return None
    return rows - rows % loader.batch_size if loader.drop_last else rows


def _cuttable(batch: Any) -> _Batch:
    """A loader's batch: tensors in any nesting, and lists with one entry per row (texts)."""

    def nested(value: Any) -> bool:
        return isinstance(value, list | tuple) and any(isinstance(v, Tensor | Mapping | list | tuple) for v in value)

    def rows(value: Any) -> int:
        if isinstance(value, Mapping):
            return rows(next(iter(value.values())))
        return rows(value[0]) if nested(value) else len(value)

    def cut(value: Any, start: int, stop: int) -> Any:
        if isinstance(value, Mapping):
            return {key: cut(inner, start, stop) for key, inner in value.items()}
        return type(value)(cut(inner, start, stop) for inner in value) if nested(value) else value[start:stop]

    return rows(batch), lambda start, stop: batch if stop - start == rows(batch) else cut(batch, start, stop)


def _results(fn: Callable, batches: Iterator[_Batch], count: int | None, progress: bool) -> Iterator[Any]:
    limit, told = math.inf, False
    with Progress(disable=not progress) as bar:
        task = bar.add_task("rows", total=count)
        for rows, take in batches:
            start = 0
            while start < rows:
                step = int(min(limit, rows - start))
                result, error = _attempt(fn, take, start, start + step)
                if error is None:
                    yield result
                    start += step
                    bar.advance(task, step)
                    continue
                if step == 1:
                    raise error
                limit = step // 2
                _free_memory()
                if not told:
                    warnings.warn(f"out of memory: going on with {limit} rows or fewer a batch", stacklevel=3)
                    told = True


def _attempt(fn: Callable, take: Callable[[int, int], Any], start: int, stop: int) -> tuple[Any, Exception | None]:
    """The result of one batch, or the error if memory ran out."""
    try:
        result = fn(take(start, stop))
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
        # The traceback holds every tensor of the failed pass; without this nothing would be freed.
        return None, error.with_traceback(None)
    return _checked(result, stop - start), None


def _out_of_memory(error: Exception) -> bool:
    from accelerate.utils.memory import should_reduce_batch_size  # slow to import, seldom needed

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or should_reduce_batch_size(error)


def _checked(result: Any, rows: int) -> Any:
    """`result` on the CPU and out of the graph, if it has one row per row of its batch."""
    if isinstance(result, Mapping):
        return {key: _checked(value, rows) for key, value in result.items()}
    if isinstance(result, tuple):
        return tuple(_checked(value, rows) for value in result)
    if not isinstance(result, Tensor):
        raise InputError(f"fn: returned {type(result).__name__}; it must return tensors, or a tuple or dict of them")
    if result.ndim == 0 or len(result) != rows:
        raise InputError(f"fn: returned shape {tuple(result.shape)} for a batch of {rows} rows; it must keep rows")
    return result.detach().cpu()


def _free_memory() -> None:
    from accelerate.utils.memory import clear_device_cache

    clear_device_cache(garbage_collection=True)


def _to_disk(results: Iterator[Any], count: int | None, out: Path) -> np.memmap:
    if out.suffix != ".npy" or out.exists():
        raise InputError(f"out: {out} must end in .npy and must not exist yet")
    if count is None:
        raise InputError("out: the data does not say how many rows it has, so the file cannot be laid out")
    partial = out.with_name(f".{out.name}.partial")
    array: np.memmap | None = None
    row = 0
    try:
        for result in results:
            if not isinstance(result, Tensor):
                raise InputError(f"out: fn returned a {type(result).__name__}; a file holds a single tensor")
            part = (result.float() if result.dtype == torch.bfloat16 else result).numpy()
            if array is None:
                array = np.lib.format.open_memmap(partial, "w+", part.dtype, (count, *part.shape[1:]))
            array[row : row + len(part)] = part
            row += len(part)
        if array is None or row != count:
            raise InputError(f"data: announced {count} rows and gave {row}")
        array.flush()
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return np.load(out, mmap_mode="r", allow_pickle=False)
