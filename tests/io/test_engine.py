"""Units are mapped in order, on any number of workers, without reading far ahead; errors arrive."""

from __future__ import annotations

import threading
import time

import pyarrow as pa
import pytest

from salience.errors import InputError
from salience.io import Corpus, Unit, available_cores, corpus, map_units


@pytest.fixture
def units(monkeypatch: pytest.MonkeyPatch) -> list[Unit]:
    monkeypatch.setattr(corpus, "TABLE_ROWS", 10)
    return Corpus(pa.table({"text": ["x"] * 205})).units


@pytest.mark.parametrize("workers", [1, 2, 7, None])
def test_order_and_progress(units: list[Unit], workers: int | None) -> None:
    done: list[tuple[Unit, int]] = []

    def slow_at_first(unit: Unit) -> int:
        time.sleep(0.005 if unit.number % 3 == 0 else 0)
        return unit.start

    found = list(map_units(slow_at_first, units, workers=workers, done=lambda unit, start: done.append((unit, start))))
    assert found == [(unit, 10 * unit.number) for unit in units]
    assert sorted(done, key=lambda pair: pair[1]) == found
    assert list(map_units(slow_at_first, [], workers=workers)) == []


def test_units_run_at_once_but_not_far_ahead(units: list[Unit]) -> None:
    together = threading.Barrier(2)
    started = []

    def meet(unit: Unit) -> None:
        started.append(unit.number)
        if unit.number < 2:
            together.wait(timeout=10)  # breaks unless two units run at the same time

    results = map_units(meet, units, workers=2)
    next(results)
    time.sleep(0.1)
    assert max(started) < 5  # two per worker, and the one handed out
    results.close()
    assert len(started) < 6


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_in_a_unit_stops_the_run(units: list[Unit], workers: int) -> None:
    started = []

    def fail(unit: Unit) -> int:
        started.append(unit.number)
        if unit.number == 2:
            raise ValueError("unit 2")
        return unit.number

    with pytest.raises(ValueError, match="unit 2"):
        list(map_units(fail, units, workers=workers))
    assert len(started) < len(units)


@pytest.mark.parametrize("workers", [0, -1])
def test_workers_below_one_are_refused(units: list[Unit], workers: int) -> None:
    with pytest.raises(InputError, match=f"workers must be at least 1, not {workers}"):
        next(map_units(lambda unit: unit, units, workers=workers))
    assert available_cores() >= 1
