"""On a Ray cluster the same units give the same results, and a worker that dies costs nothing."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from salience.errors import DataError, InputError
from salience.io import Corpus, Ledger, Unit, corpus, map_units, read

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two workers on this machine."""
    from salience.io import connect_ray

    connect_ray(workers=2)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test
    yield
    ray.shutdown()


class TextsOf:
    def __init__(self, pool: Corpus, dies: Path | None = None) -> None:
        self.pool, self.dies = pool, dies

    def __call__(self, unit: Unit) -> list[str]:
        if self.dies is not None and unit.number == 3 and not self.dies.exists():
            self.dies.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return [text for batch in read(self.pool, unit) for text in batch.text.to_pylist()]


def failing(unit: Unit) -> None:
    raise DataError(f"unit {unit.number} is bad")


def test_units_retries_and_errors(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "UNIT_BYTES", 100)
    monkeypatch.setattr(corpus, "TABLE_ROWS", 7)
    (tmp_path / "raw.jsonl").write_text("".join(f'{{"text": "document number {n}"}}\n' for n in range(40)))
    for pool in (Corpus(tmp_path / "raw.jsonl"), Corpus(pa.table({"text": [str(n) for n in range(40)]}))):
        expected = list(map_units(TextsOf(pool), pool.units, workers=1))
        assert len(expected) > 4
        done: list[tuple[Unit, list[str]]] = []
        dying = TextsOf(pool, tmp_path / f"died{len(expected)}")
        add = done.append
        found = list(
            map_units(dying, pool.units, workers=2, engine="ray", done=lambda unit, texts, add=add: add((unit, texts)))
        )
        assert found == expected and dying.dies.exists()
        assert sorted(done, key=lambda pair: pair[0].number) == expected
    with pytest.raises(DataError, match=r"^unit \d is bad$"):
        list(map_units(failing, pool.units, engine="ray"))
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    ledger = Ledger(tmp_path / "ledger", {})
    assert list(ledger.map("stage", TextsOf(pool), pool.units, engine="ray")) == expected
    assert list(ledger.map("stage", failing, pool.units)) == expected  # all from the log
    ledger.remove()


def test_select_text_gives_the_same_rows(cluster: None, tmp_path: Path) -> None:
    from salience.data import DSIR, select_text

    sea, law = ["wave", "tide", "harbour", "anchor", "sail"], ["court", "judge", "statute", "appeal", "clause"]
    for name, kinds in (("a", (sea, law)), ("b", (law, sea)), ("target", (sea, sea))):
        lines = [
            f'{{"text": "{" ".join(kinds[n % 2][(n * k) % 5] for k in range(1, 12))} end{name}{n}"}}' for n in range(90)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    raw, target = Corpus([tmp_path / "a.jsonl", tmp_path / "b.jsonl"]), [Corpus(tmp_path / "target.jsonl")]
    results = []
    for engine in ("threads", "ray"):
        model = DSIR(num_buckets=200, min_tokens=5, smoothing=1.0, workers=2)
        out = tmp_path / f"{engine}.jsonl"
        results.append((select_text(raw, target, out, count=30, model=model, engine=engine).proof, out.read_bytes()))
    assert results[0] == results[1] and results[0][0] is not None


def test_unknown_engines_are_refused(tmp_path: Path) -> None:
    pool = Corpus(pa.table({"text": ["a"]}))
    with pytest.raises(InputError, match="engine must be one of threads, ray, not 'spark'"):
        list(map_units(len, pool.units, engine="spark"))
