"""Run a function over units: the one seam between what is computed and where.

`fn(unit)` must depend on the unit alone, so that a retried, reordered or concurrent run gives the same result.
Threads are enough: the kernels and pyarrow release the interpreter's lock.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from salience.errors import InputError
from salience.io.corpus import Unit

T = TypeVar("T")


def map_units(
    fn: Callable[[Unit], T], units: Sequence[Unit], *, workers: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Iterator[tuple[Unit, T]]:  # fmt: skip
    """Yield ``(unit, fn(unit))`` in the order of `units`; at most two units per worker are in memory.

    Parameters
    ----------
    fn : callable
        Pure function of a unit.
    units : sequence of Unit
    workers : int, optional
        Number of threads; all available cores by default.
    progress : callable, optional
        Called with the bytes of every finished unit.
    """
    count = available_cores() if workers is None else workers
    if count < 1:
        raise InputError(f"workers must be at least 1, not {workers}")

    def finish(unit: Unit, result: T) -> tuple[Unit, T]:
        if progress is not None:
            progress(unit.bytes)
        return unit, result

    if count == 1 or len(units) == 1:
        yield from (finish(unit, fn(unit)) for unit in units)
        return
    with ThreadPoolExecutor(count) as pool:
        waiting: deque[tuple[Unit, Future[T]]] = deque()
        try:
            for unit in units:
                waiting.append((unit, pool.submit(fn, unit)))
                if len(waiting) == 2 * count:
                    ready, future = waiting.popleft()
                    yield finish(ready, future.result())
            while waiting:
                ready, future = waiting.popleft()
                yield finish(ready, future.result())
        finally:
            for _, future in waiting:
                future.cancel()


def available_cores() -> int:
    """Number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
