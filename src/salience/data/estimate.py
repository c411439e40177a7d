"""What a text selection will cost, measured on the first batch of the corpus."""

from __future__ import annotations

import time
from typing import Any

from salience.data.dsir.weights import DSIR
from salience.errors import NothingToDo
from salience.io import Corpus, available_cores, peek, read

_WORKER_BYTES = 150_000_000  # a block, its texts and n-grams, the memo table
_BASE_BYTES = 200_000_000


def estimate(raw: Corpus, targets: list[Corpus], model: DSIR, count: int | None) -> dict[str, Any]:
    """Bytes, passes, peak memory and time of `select_text`, from a timed batch; writes nothing.

    Returns
    -------
    dict
        raw_files, raw_bytes, target_bytes, units, passes, workers, peak_bytes, bytes_per_second, seconds.
    """
    peek(raw)
    featurizer, workers = model.featurizer(), model.workers or available_cores()
    batches = (batch for unit in raw.units for batch in read(raw, unit))
    first = next((batch for batch in batches if len(batch)), None)
    if first is None:
        raise NothingToDo("the raw corpus holds no document")
    featurizer(first.text)  # compile
    began = time.perf_counter()
    featurizer(first.text)
    rate = max(first.text.nbytes, 1) / max(time.perf_counter() - began, 1e-9)
    parallel = min(workers, len(raw.units))
    target_bytes = sum(target.bytes for target in targets)
    return {
        "raw_files": len(raw.sources),
        "raw_bytes": raw.bytes,
        "target_bytes": target_bytes,
        "units": len(raw.units),
        "passes": 2,
        "workers": workers,
        "peak_bytes": _BASE_BYTES + workers * _WORKER_BYTES + 2 * 32 * 7 * (count or 0),
        "bytes_per_second": rate * parallel,
        "seconds": (2 * raw.bytes + target_bytes) / (rate * parallel),
    }
