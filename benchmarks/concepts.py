"""Concepts against what they cannot beat: scikit-learn's NMF and the matrix products, and bare forward passes.

1. NMF: as many iterations as scikit-learn's coordinate descent, from each one's own beginning, to a relative error at
   most 1 % above its. At most 1.1 times its time, and at most twice that of the two products of an iteration alone.
   Where overcomplete is there, also its HALS with the 500 iterations of its default: at least 5 times faster. It then
   still leaves several times our error, and does after 1,500 iterations, so that no equal error can be compared.
2. Sobol importance behind the second stage of a ResNet-18: exactly images x design x (concepts + 2) rows go through
   the layers behind (counted), at 0.95 at least of the speed of these layers alone on batches of the same size.

Rounds alternate, on one thread; figures are medians of ratios of processor seconds: machines are noisy.

overcomplete's package imports torchvision and timm, which its solvers do not need, and its metadata would install them:
``pip install --no-deps --target FOLDER overcomplete==0.3.0`` and FOLDER on PYTHONPATH.

Usage: python benchmarks/concepts.py [--rounds 5] [--large] [--json FILE]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from sklearn.decomposition import NMF
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from salience.concepts import ConceptModel, NMFConcepts, nmf, sobol_importance

CONCEPTS, ITERATIONS = 25, 50
IMAGES, SIDE, BATCH, DESIGN, K = 2, 96, 192, 32, 10
GATES = {
    "NMF over scikit-learn": 1.1, "NMF over its products": 2.0, "relative error over scikit-learn's": 1.01,
    "overcomplete's HALS over NMF": 5.0, "speed of bare passes": 0.95,
}  # fmt: skip


def activations(n: int, p: int) -> np.ndarray:
    """Sums of sparse parts, as behind a ReLU, and noise."""
    rng = np.random.default_rng(0)
    parts = rng.random((n, CONCEPTS), dtype=np.float32) ** 4 @ rng.random((CONCEPTS, p), dtype=np.float32) ** 2
    return parts + 0.05 * rng.random((n, p), dtype=np.float32)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds, and what came out."""
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


def theirs(a: np.ndarray) -> float:
    """Relative error of scikit-learn's factorisation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = NMF(CONCEPTS, max_iter=ITERATIONS, tol=0).fit(a)
    return float(model.reconstruction_err_ / np.linalg.norm(a))


def overcomplete_hals() -> Any:
    """The class of overcomplete's factorisation, without the rest of its package; None where it is not installed."""
    found = importlib.util.find_spec("overcomplete")
    if found is None:
        return None
    package = types.ModuleType("overcomplete")
    package.__path__ = list(found.submodule_search_locations or ())
    sys.modules["overcomplete"] = package
    return importlib.import_module("overcomplete.optimization.nmf").NMF


def products(a: Tensor, u: Tensor, v: Tensor) -> None:
    """The two products with the activations that every iteration makes."""
    for _ in range(ITERATIONS):
        v @ a.T
        u.T @ a


def factorisation(n: int, p: int, rounds: int) -> dict[str, float]:
    """Ratios at one shape."""
    a = activations(n, p)
    tensor = torch.from_numpy(a)
    found: dict[str, list[float]] = {}
    peer = overcomplete_hals()
    for _ in range(rounds):
        own, ours = timed(lambda: nmf(tensor, CONCEPTS, max_iter=ITERATIONS, tol=0))
        other, error = timed(lambda: theirs(a))
        floor, _ = timed(lambda ours=ours: products(tensor, ours.codes, ours.dictionary))
        print(f"{n} x {p}: ours {own:.2f} s, scikit-learn {other:.2f} s, products {floor:.2f} s", file=sys.stderr)
        for name, value in (("over scikit-learn", own / other), ("over its products", own / floor),
                            ("relative error over scikit-learn's", ours.relative_error / error)):  # fmt: skip
            found.setdefault(f"NMF {n} x {p}, {name}", []).append(value)
        if peer is not None:
            model = peer(CONCEPTS, solver="hals", tol=0)
            slow, (u, v) = timed(lambda model=model: model.fit(tensor, max_iter=500))
            left = float((tensor - u @ v).norm() / tensor.norm()) / ours.relative_error
            print(f"{n} x {p}: overcomplete's HALS {slow:.2f} s", file=sys.stderr)
            for name, value in (("overcomplete's HALS over it", slow / own), ("its relative error over ours", left)):
                found.setdefault(f"NMF {n} x {p}, {name}", []).append(value)
    return {name: float(np.median(values)) for name, values in found.items()}


def importance(rounds: int) -> dict[str, float]:
    """Rows counted, and speed against the layers behind the cut alone."""
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=10
    )
    model = transformers.ResNetForImageClassification(config).eval()
    images = torch.randn(IMAGES, 3, SIDE, SIDE)
    extractor = NMFConcepts(n_concepts=K)
    concepts = ConceptModel(model, "resnet.encoder.stages.1", extractor)
    with torch.no_grad():
        a = concepts.activations(images)
        extractor.fit(a.flatten(0, -2))
        codes = concepts.encode(images)
    behind = nn.Sequential(*model.resnet.encoder.stages[2:], model.resnet.pooler, model.classifier).eval()
    rows = DESIGN * (K + 2)
    batch = a[:1].movedim(-1, 1).repeat(BATCH, 1, 1, 1)

    def bare() -> None:
        with torch.no_grad():
            for _ in range(IMAGES):
                for start in range(0, rows, BATCH):
                    behind(batch[: min(BATCH, rows - start)])

    def ours() -> np.ndarray:
        return sobol_importance(concepts, codes, images, 0, n_design=DESIGN, batch_size=BATCH)

    counts: list[int] = []
    handle = model.classifier.register_forward_hook(lambda module, args, out: counts.append(len(out)))
    ours()
    handle.remove()
    assert sum(counts) == IMAGES * rows, (sum(counts), IMAGES * rows)
    bare()
    speeds = []
    for _ in range(rounds):
        own, floor = timed(ours)[0], timed(bare)[0]
        print(f"Sobol {own:.2f} s, bare passes {floor:.2f} s", file=sys.stderr)
        speeds.append(floor / own)
    return {"rows behind the layer": sum(counts), "rows of the design": IMAGES * rows,
            "speed of bare passes": float(np.median(speeds))}  # fmt: skip


def main() -> None:
    """Measure; print the figures beside their gates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--large", action="store_true", help="also 50,000 x 2,048")
    parser.add_argument("--json", help="also write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        figures: dict[str, Any] = factorisation(8000, 512, options.rounds)
        if options.large:
            figures |= factorisation(50_000, 2048, max(1, options.rounds // 2))
        figures |= importance(options.rounds)
    figures["gates"] = GATES
    print(json.dumps(figures, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
