"""Selection of rows at size: kMQ on 200,000 embeddings of 384 dimensions, against what one would write by hand.

The yardstick is scikit-learn's `MiniBatchKMeans` with as many clusters, then `numpy.random.Generator.choice` inside
each cluster by quality, with the same budgets. Rounds alternate, on one thread; figures are ratios of processor
seconds, as machines are noisy. Also told: the inertia of both, so that speed is not bought with worse clusters.

Usage: python benchmarks/rows.py [--rounds 3] [--rows 200000] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from sklearn.cluster import MiniBatchKMeans
from threadpoolctl import threadpool_limits

from salience.data import KMQSelector

DIM, CLUSTERS, BUDGET = 384, 512, 10_000


def make_embeddings(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors around 2,000 topics of unequal size, and a quality from 1 to 6."""
    rng = np.random.default_rng(0)
    topics = rng.normal(size=(2000, DIM)).astype(np.float32)
    which = np.minimum(rng.pareto(1.0, rows) * 40, 1999).astype(int)
    x = topics[which] + 1.2 * rng.normal(size=(rows, DIM)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True), rng.integers(1, 7, rows).astype(float)


def ours(x: np.ndarray, quality: np.ndarray) -> tuple[np.ndarray, float]:
    """Fit and select."""
    model = KMQSelector(n_clusters=CLUSTERS).fit(x)
    chosen = model.select(BUDGET, quality)
    return chosen, inertia(x, model.cluster_centers_, model.labels_)


def by_hand(x: np.ndarray, quality: np.ndarray) -> tuple[np.ndarray, float]:
    """MiniBatchKMeans and a loop over the clusters."""
    model = MiniBatchKMeans(CLUSTERS, random_state=0).fit(x)
    rng = np.random.default_rng(0)
    chosen = []
    for cluster in range(CLUSTERS):
        mine = np.flatnonzero(model.labels_ == cluster)
        p = np.exp(quality[mine] - quality[mine].max()) if len(mine) else np.empty(0)
        count = min(len(mine), round(BUDGET * len(mine) / len(x)))
        chosen.append(rng.choice(mine, count, replace=False, p=p / p.sum()) if count else mine[:0])
    return np.concatenate(chosen), inertia(x, model.cluster_centers_, model.labels_)


def inertia(x: np.ndarray, centres: np.ndarray, labels: np.ndarray) -> float:
    """Mean squared distance to the centre, of every hundredth row: it must not weigh in the seconds."""
    return float(((x[::100] - centres[labels[::100]]) ** 2).sum(axis=1).mean())


def timed(fn: Callable[[], tuple[np.ndarray, float]]) -> tuple[float, float]:
    """Processor seconds and inertia."""
    began = time.process_time()
    _, spread = fn()
    return time.process_time() - began, spread


def main() -> None:
    """Run the rounds and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--json", help="also write the figures to this file")
    options = parser.parse_args()
    x, quality = make_embeddings(options.rows)
    rounds = []
    with threadpool_limits(1):
        for _ in range(options.rounds):
            mine, hand = timed(lambda: ours(x, quality)), timed(lambda: by_hand(x, quality))
            rounds.append((mine, hand))
            print(f"ours {mine[0]:.2f} s, by hand {hand[0]:.2f} s", file=sys.stderr)
    ratios = [mine[0] / hand[0] for mine, hand in rounds]
    figures = {
        "rows": options.rows, "dimensions": DIM, "clusters": CLUSTERS, "budget": BUDGET,
        "kmq over MiniBatchKMeans and numpy, processor seconds, median": float(np.median(ratios)),
        "the same, worst": float(max(ratios)),
        "inertia of kmq over that of MiniBatchKMeans": rounds[0][0][1] / rounds[0][1][1],
        "kmq, processor seconds, best": min(mine[0] for mine, _ in rounds),
    }  # fmt: skip
    print(json.dumps(figures, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
