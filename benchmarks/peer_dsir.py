"""Run the official package on the benchmark's corpus; prints seconds and saves its log weights and chosen rows.

Usage: python peer_dsir.py RAW.jsonl TARGET.jsonl FOLDER COUNT   (in an environment of benchmarks/dsir.txt)
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
from data_selection import HashedNgramDSIR


def main(raw: str, target: str, folder: str, count: int) -> None:
    """Fit, weigh, take the top `count`, with one process."""
    began = time.perf_counter()
    dsir = HashedNgramDSIR([raw], [target], cache_dir=f"{folder}/cache", num_proc=1)
    dsir.fit_importance_estimator(num_tokens_to_fit="auto")
    fitted = time.perf_counter()
    dsir.compute_importance_weights()
    weighed = time.perf_counter()
    dsir.resample(out_dir=f"{folder}/out", num_to_sample=count, cache_dir=f"{folder}/resampled", top_k=True)
    done = time.perf_counter()
    np.save(f"{folder}/log_weights.npy", np.load(f"{folder}/cache/log_importance_weights/0.npy"))
    np.save(f"{folder}/log_diff.npy", dsir.log_diff)
    print(
        json.dumps(
            {"fit": fitted - began, "weigh": weighed - fitted, "resample": done - weighed, "total": done - began}
        )
    )
    Path(f"{folder}/done").touch()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
