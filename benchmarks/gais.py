"""GAIS at size: seconds per row at 1,000,000 rows against 100,000, and the memory that each takes.

A fit is the mini-batch graphs, two epochs of training, four rounds of scores and the choice, of a made-up table of 20
features, on one thread, each size in a process of its own. The figure is a ratio of processor seconds per row, as
machines are noisy; 1 is linear, 10 quadratic. Memory is the peak of the process above its peak while the table was
made; an array of all pairs would take 4,000 GB at the larger size. With --graph another graph is measured.

Usage: python benchmarks/gais.py [--graph minibatch] [--rows 1000000] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

FEATURES, EPOCHS, PART = 20, 2, 10  # the smaller size is a tenth


def make_table(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Three classes that overlap, of unequal size; one label in twenty is wrong."""
    rng = np.random.default_rng(0)
    y = rng.choice(3, rows, p=[0.6, 0.3, 0.1])
    x = rng.normal(size=(rows, FEATURES)) + rng.normal(size=(3, FEATURES))[y]
    return x, np.where(rng.random(rows) < 0.05, rng.integers(0, 3, rows), y)


def held() -> float:
    """MB that this process held at its peak; `ru_maxrss` would start from its parent's."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) / 1000 for line in file if line.startswith("VmHWM"))


def measure(rows: int, graph: str) -> dict[str, float]:
    """Processor seconds and memory of one fit, in this process."""
    import torch

    from salience.data import GAIS

    torch.set_num_threads(1)
    GAIS(graph=graph, epochs=1).fit(*make_table(1000))  # what is loaded at the first use
    x, y = make_table(rows)
    before, began = held(), time.process_time()
    model = GAIS(graph=graph, epochs=EPOCHS).fit(x, y)
    seconds = time.process_time() - began
    return {"seconds": seconds, "memory, MB": held() - before, "table, MB": x.nbytes / 1e6,
            "chosen": float(len(model.selected_idx_)), "edges into a row": model.graph_stats_["edges"]}  # fmt: skip


def in_a_process(rows: int, graph: str) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--one", "--rows", str(rows), "--graph", graph]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"{rows:,} rows: {found['seconds']:.1f} s, {found['memory, MB']:.0f} MB", file=sys.stderr)
    return found


def main() -> None:
    """Measure both sizes and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graph", default="minibatch")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--one", action="store_true", help="measure this size alone, in this process")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.rows, options.graph)))
        return
    few = options.rows // PART
    small, large = in_a_process(few, options.graph), in_a_process(options.rows, options.graph)
    figures = {
        "graph": options.graph, "rows": options.rows, "features": FEATURES, "epochs": EPOCHS,
        f"processor seconds per row over those at {few:,} rows": large["seconds"] / PART / small["seconds"],
        "microseconds per row": 1e6 * large["seconds"] / options.rows,
        f"microseconds per row at {few:,} rows": 1e6 * small["seconds"] / few,
        "memory over the table, MB": large["memory, MB"], "table, MB": large["table, MB"],
        f"memory over the table at {few:,} rows, MB": small["memory, MB"],
        "edges into a row": large["edges into a row"], "chosen": large["chosen"],
    }  # fmt: skip
    print(json.dumps(figures, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
