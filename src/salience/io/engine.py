"""Run a function over units: the one seam between what is computed and where.

`fn(unit)` must depend on the unit alone, so that a retried, reordered or concurrent run gives the same result.
On one machine threads are enough: the kernels and pyarrow release the interpreter's lock. On a Ray cluster every unit
is a Ray task; Ray schedules, retries what a dying worker was at, and moves the results.
"""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any, TypeVar

from salience.errors import DataError, InputError, MissingExtra, SalienceError
from salience.io.corpus import Unit

T = TypeVar("T")
ENGINES = ("threads", "ray")
_AHEAD = 2  # units per worker that are in memory at most


def map_units(
    fn: Callable[[Unit], T], units: Sequence[Unit], *, workers: int | None = None, engine: str = "threads",
    done: Callable[[Unit, T], object] | None = None,
) -> Iterator[tuple[Unit, T]]:  # fmt: skip
    """Yield ``(unit, fn(unit))`` in the order of `units`; at most two units per worker are in memory.

    Parameters
    ----------
    fn : callable
        Pure function of a unit. For Ray it must be picklable.
    units : sequence of Unit
    workers : int, optional
        Number of threads, or of Ray tasks at once; all available cores by default.
    engine : {"threads", "ray"}
        Where to run; neither changes a result.
    done : callable, optional
        Called with every finished unit and its result, in the order in which they finish and in this process, though
        not always in this thread.

    Raises
    ------
    InputError
        `workers` below 1, or an unknown engine.
    """
    if engine not in ENGINES:
        raise InputError(f"engine must be one of {', '.join(ENGINES)}, not {engine!r}")
    if workers is not None and workers < 1:
        raise InputError(f"workers must be at least 1, not {workers}")
    if not units:
        return
    if engine == "ray":
        yield from _on_ray(fn, units, workers, done)
        return

    def finish(unit: Unit) -> T:
        result = fn(unit)
        if done is not None:
            done(unit, result)
        return result

    count = workers or available_cores()
    if count == 1 or len(units) == 1:
        yield from ((unit, finish(unit)) for unit in units)
        return
    pool, waiting = _threads(count), deque[tuple[Unit, Future[T]]]()
    try:
        for unit in units:
            waiting.append((unit, pool.submit(finish, unit)))
            if len(waiting) == _AHEAD * count:
                ready, future = waiting.popleft()
                yield ready, future.result()
        while waiting:
            ready, future = waiting.popleft()
            yield ready, future.result()
    finally:
        for _, future in waiting:
            future.cancel()
        wait([future for _, future in waiting])  # what runs on may still use what the caller closes now


@functools.lru_cache(maxsize=1)
def _threads(count: int) -> ThreadPoolExecutor:
    """One pool for all passes: new threads would fault in all their memory anew."""
    return ThreadPoolExecutor(count)


def connect_ray(address: str | None = None, workers: int | None = None) -> None:
    """Join a Ray cluster, or start one on this machine; does nothing where this process already has one.

    Parameters
    ----------
    address : str, optional
        Of the cluster ("auto", "10.0.0.5:6379", "ray://…"); a cluster of its own on this machine by default.
    workers : int, optional
        Cores of a cluster of its own; all by default.

    Raises
    ------
    MissingExtra
        Ray is not installed.
    InputError
        There is no cluster at `address`.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # we send nothing anywhere
    try:
        import ray
    except ModuleNotFoundError as error:
        raise MissingExtra("--engine ray needs the package 'ray': pip install 'salience[ray]'") from error
    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address is None:
            ray.init(num_cpus=workers or available_cores(), include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, TimeoutError, ValueError, RuntimeError) as error:
        raise InputError(f"no Ray cluster at {address or 'this machine'}: {str(error).splitlines()[0]}") from error


def _on_ray(
    fn: Callable[[Unit], T], units: Sequence[Unit], workers: int | None, done: Callable[[Unit, T], object] | None
) -> Iterator[tuple[Unit, T]]:
    connect_ray(workers=workers)
    import ray
    from ray.exceptions import RayError, RayTaskError

    task: Any = ray.remote(_apply).options(max_retries=3)  # Ray's retries, of what a dying worker was at
    shared = ray.put(fn)
    window = _AHEAD * (workers or max(1, int(ray.cluster_resources().get("CPU", 1))))
    waiting: deque[tuple[Unit, Any]] = deque()  # in order
    running: dict[Any, Unit] = {}
    ready: dict[int, T] = {}
    rest = iter(units)
    try:
        while True:
            while len(waiting) < window and (unit := next(rest, None)) is not None:
                reference = task.remote(shared, _portable(unit))
                waiting.append((unit, reference))
                running[reference] = unit
            if not waiting:
                return
            while waiting[0][0].number not in ready:
                (reference,), _ = ray.wait(list(running), num_returns=1)
                unit = running.pop(reference)
                result = ray.get(reference)
                ready[unit.number] = result
                if done is not None:
                    done(unit, result)
            unit, _ = waiting.popleft()
            yield unit, ready.pop(unit.number)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, SalienceError | OSError):
            raise cause from None
        raise
    except RayError as error:
        raise DataError(f"the Ray cluster gave up on a unit: {str(error).splitlines()[0]}") from error
    finally:
        for reference in running:
            ray.cancel(reference, force=False)


def _apply(fn: Callable[[Unit], T], unit: Unit) -> T:
    return fn(unit)


def _portable(unit: Unit) -> Unit:
    """The unit with no more of a table in memory than its own rows."""
    if unit.source.table is None:
        return unit
    rows = unit.source.table.slice(unit.start, unit.stop - unit.start)
    return replace(unit, source=replace(unit.source, table=rows), start=0, stop=rows.num_rows)


def available_cores() -> int:
    """Number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
