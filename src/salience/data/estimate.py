"""What a text selection will cost, measured on the first batch of the corpus: for `--dry-run` and the progress line."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from salience.data.dsir.weights import DSIR
from salience.data.text_passes import KEPT_BYTES
from salience.errors import NothingToDo
from salience.io import Corpus, available_cores, peek, read

_WORKER_BYTES = 150_000_000  # a block, its texts and n-grams, the memo table
_BASE_BYTES = 200_000_000
_ENOUGH = 1 << 20  # bytes of text to take the time of


def estimate(raw: Corpus, targets: list[Corpus], model: DSIR, count: int | None) -> dict[str, Any]:
    """Bytes, passes, peak memory and time of `select_text`, from a timed batch; writes nothing.

    Returns
    -------
    dict
        raw_files, raw_bytes, target_bytes, units, passes, workers, peak_bytes, bytes_per_second, seconds, and
        `stages`, the seconds of every stage.
    """
    peek(raw)
    featurizer, workers = model.featurizer(), model.workers or available_cores()
    unit, first = next(((unit, batch) for unit in raw.units for batch in read(raw, unit) if len(batch)), (None, None))
    if unit is None or first is None:
        raise NothingToDo("the raw corpus holds no document")
    texts = first.text.slice(0, max(1, len(first) * _ENOUGH // max(first.text.nbytes, _ENOUGH)))
    buckets = featurizer(texts)  # compiles, too
    hashing = _seconds(lambda: featurizer(texts)) / max(texts.nbytes, 1)
    reading = _seconds(lambda: next(iter(read(raw, unit)))) / max(first.text.nbytes, 1)
    parallel = min(workers, len(raw.units))
    target_bytes = sum(target.bytes for target in targets)
    # Two bytes an n-gram are kept from counting: so much of the corpus need not be hashed again.
    kept = min(1.0, KEPT_BYTES / max(2.0 * raw.bytes * len(buckets.ids) / max(texts.nbytes, 1), 1.0))
    stages = {
        "targets": target_bytes * (reading + hashing),
        "count": raw.bytes * (reading + hashing),
        "weigh": raw.bytes * (reading + hashing) * (1 - kept),
        "copy": raw.bytes * reading,
    }
    stages = {name: seconds / parallel for name, seconds in stages.items()}
    return {
        "raw_files": len(raw.sources),
        "raw_bytes": raw.bytes,
        "target_bytes": target_bytes,
        "units": len(raw.units),
        "passes": 2,
        "workers": workers,
        "peak_bytes": _BASE_BYTES + workers * _WORKER_BYTES + 2 * 32 * 7 * (count or 0),
        "bytes_per_second": parallel / (reading + hashing),
        "seconds": sum(stages.values()),
        "stages": stages,
    }


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return max(time.perf_counter() - began, 1e-9)
