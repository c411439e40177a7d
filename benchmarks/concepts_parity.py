"""CRAFT beside xplique's: designs, Jansen's estimator, codes and importance, on the same activations and the same head.

Planted non-negative maps, a two-layer head behind the average over positions, 10 concepts, 32 points. xplique
factorises the crops with scikit-learn, adding a penalty of 0.01 to the codes; both then go on with *its* dictionary:

- masks: `sobol_design` against its Halton sequence (in single precision there);
- Jansen: `total_indices` against its estimator on the same outputs (the same);
- codes: `nnls` against scikit-learn's `NMF.transform`, which keeps the penalty and stops early: told, not judged;
- importance: `sobol_importance` on its codes against its `estimate_importance`;
- passes behind the layer: equal.

Where overcomplete is on the path (see `concepts.py`), also its measures of extraction on the same matrices: W1, Fréchet
distance, Hungarian cosine loss (its sum over k), Hoyer score, and the share of entries above 1e-6.

Usage: python benchmarks/concepts_parity.py --peer ENVIRONMENT/bin/python [--json FILE]
with an environment as benchmarks/xplique.txt says.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from salience.concepts import (
    ConceptModel,
    dictionary_distance,
    hoyer,
    nnls,
    sobol_design,
    sobol_importance,
    total_indices,
    wasserstein,
)
from salience.concepts.holistic.extraction import frechet

IMAGES, SIDE, CHANNELS, K, DESIGN, TARGET = 12, 6, 32, 10, 32, 1
BARS = {"masks": 1e-7, "Jansen": 1e-5, "importance": 1e-4}
METRIC = 1e-6  # relative, in float64


class Head(nn.Module):
    """What stands behind the maps: mean over positions, a hidden layer, three classes."""

    def __init__(self, hidden: Tensor, head: Tensor) -> None:
        super().__init__()
        self.maps = nn.Identity()
        self.hidden, self.head = nn.Parameter(hidden), nn.Parameter(head)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of maps (n, channel, height, width)."""
        return (self.maps(x).mean((2, 3)) @ self.hidden).relu() @ self.head


class Dictionary:
    """A given dictionary as an extractor."""

    def __init__(self, components: Tensor) -> None:
        self.components_ = components

    def encode(self, activations: Tensor) -> Tensor:
        """Non-negative least squares."""
        return nnls(activations, self.components_)

    def decode(self, codes: Tensor) -> Tensor:
        """The product."""
        return codes @ self.components_


def given() -> dict[str, Any]:
    """Maps that are sums of sparse parts, crops of them, and a head."""
    rng = np.random.default_rng(0)
    parts = rng.random((K, CHANNELS)) ** 3
    maps = (rng.random((IMAGES, SIDE, SIDE, K)) ** 4 @ parts).astype(np.float32)
    return {
        "maps": maps, "crops": maps.reshape(-1, 4, CHANNELS).mean(1), "k": K, "design": DESIGN, "target": TARGET,
        "hidden": rng.standard_normal((CHANNELS, 16)).astype(np.float32),
        "head": rng.standard_normal((16, 3)).astype(np.float32),
        "outputs": rng.standard_normal(DESIGN * (K + 2)).astype(np.float32),
    }  # fmt: skip


def metrics() -> dict[str, float]:
    """Relative differences to overcomplete's measures; empty where it is not installed."""
    found = importlib.util.find_spec("overcomplete")
    if found is None:
        return {}
    package = types.ModuleType("overcomplete")
    package.__path__ = list(found.submodule_search_locations or ())
    sys.modules["overcomplete"] = package
    theirs = importlib.import_module("overcomplete.metrics")
    rng = np.random.default_rng(1)
    a, b = (torch.from_numpy(rng.random((200, CHANNELS)) ** 2) for _ in range(2))
    v, w = (torch.from_numpy(rng.normal(size=(K, CHANNELS))) for _ in range(2))
    codes = torch.from_numpy(rng.random((200, K)) - 0.5).relu()
    pairs = {
        "W1": (wasserstein(a, b), theirs.wasserstein_1d(a, b)),
        "Fréchet": (frechet(a, b), theirs.frechet_distance(a, b)),
        "dictionary distance": (dictionary_distance(v, w) * K, theirs.cosine_hungarian_loss(v, w)),
        "Hoyer": (float(hoyer(v.abs()).mean()), theirs.hoyer(v.abs()).mean()),
        "entries above 0": (float((codes.abs() > 1e-6).double().mean()), theirs.l0_eps(codes)),
    }
    return {f"overcomplete, {name}": abs(own - float(other)) / abs(float(other))
            for name, (own, other) in pairs.items()}  # fmt: skip


def main() -> None:
    """Compare; print the differences beside their bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="python of an environment with xplique")
    parser.add_argument("--json", help="also write the figures to this file")
    options = parser.parse_args()
    arrays = given()
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/given.npz", **arrays)
        script = Path(__file__).with_name("peer_xplique.py")
        subprocess.run([options.peer, str(script), f"{folder}/given.npz", f"{folder}/found.npz"], check=True)
        theirs = dict(np.load(f"{folder}/found.npz"))

    model = Head(torch.from_numpy(arrays["hidden"]), torch.from_numpy(arrays["head"])).eval()
    passes: list[int] = []
    model.register_forward_hook(lambda module, args, out: passes.append(len(out)))
    dictionary = torch.from_numpy(theirs["dictionary"])
    concepts = ConceptModel(model, "maps", Dictionary(dictionary))
    images = torch.from_numpy(arrays["maps"]).movedim(-1, 1).contiguous()
    totals = sobol_importance(concepts, torch.from_numpy(theirs["codes"]).float(), images, TARGET, n_design=DESIGN)
    counted = sum(passes)
    own = concepts.encode(images).detach().numpy()
    left = [float(np.linalg.norm(arrays["maps"] - codes @ theirs["dictionary"]) / np.linalg.norm(arrays["maps"]))
            for codes in (own, theirs["codes"])]  # fmt: skip
    figures: dict[str, Any] = {
        "masks": float(np.abs(sobol_design(K, DESIGN) - theirs["masks"]).max()),
        "Jansen": float(np.abs(total_indices(arrays["outputs"].astype(float), K) - theirs["jansen"].ravel()).max()),
        "importance": float(np.abs(totals.mean(0) - theirs["importance"].ravel()).max()),
        "passes behind the layer, ours": counted, "passes behind the layer, xplique": int(theirs["passes"]),
        "relative error of codes, nnls": left[0], "relative error of codes, xplique": left[1], "bars": BARS,
    }  # fmt: skip
    measures = metrics()
    figures |= measures
    print(json.dumps(figures, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    missed = [name for name, bar in BARS.items() if figures[name] > bar]
    missed += [name for name, difference in measures.items() if difference > METRIC]
    if missed or figures["passes behind the layer, ours"] != figures["passes behind the layer, xplique"]:
        raise SystemExit(f"not equal: {', '.join(missed) or 'passes'}")


if __name__ == "__main__":
    main()
