"""Paths of BEE against the bare passes of the layers behind the cut, in one run on one core.

1. Time: `path_map` at most 1.05 times bare forward and backward passes of what follows the layer, at the same batch
   size and for as many points; equal maps are checked first. Rounds alternate; figures are ratios.
2. Memory: its peak at a fixed internal batch grows by at most 5 % from 20 to 200 steps, each in a process of its own.

Usage: python benchmarks/bee_path.py [--rounds 5] [--json FILE]
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
import torch
import transformers
from torch import Tensor, nn

from salience.features import path_map
from salience.model import Split

LAYER, SIDE, BATCH, DRAWS, STEPS = "resnet.encoder.stages.0", 96, 16, 8, 15
GATES = {"of bare passes": 1.05, "memory": 1.05}


def network() -> nn.Module:
    """A ResNet-18 with random weights."""
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=10
    )
    return transformers.ResNetForImageClassification(config).eval()


def ends(model: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """An image, its activations for every draw, and baselines."""
    image = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a = Split(model, LAYER).encode(image)
    b = torch.rand(DRAWS, *a.shape[1:], generator=torch.Generator().manual_seed(2))
    return image, a.expand_as(b), b


def ours(model: nn.Module, image: Tensor, a: Tensor, b: Tensor, steps: int = STEPS) -> Tensor:
    return path_map(Split(model, LAYER), image, 3, a, b, n_steps=steps, integrand="ig", internal_batch_size=BATCH)


def behind(model: nn.Module, v: Tensor) -> Tensor:
    """What follows the layer, by hand."""
    for stage in model.resnet.encoder.stages[1:]:
        v = stage(v)
    return model.classifier(model.resnet.pooler(v))


def bare(model: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    """The same sums by bare passes at the same batch size."""
    points, total = STEPS + 1, torch.zeros(DRAWS, *a.shape[2:])
    for index in torch.arange(DRAWS * points).split(BATCH):
        row, k = index // points, index % points
        v = (b[row] + (k / STEPS).view(-1, 1, 1, 1) * (a[row] - b[row])).requires_grad_()
        (g,) = torch.autograd.grad(behind(model, v)[:, 3].sum(), v)
        weight = torch.where((k == 0) | (k == STEPS), 0.5, 1.0).view(-1, 1, 1, 1) / STEPS
        total.index_add_(0, row, (g * (a[row] - b[row]) * weight).sum(1))
    return total


def peak(steps: int) -> float:
    """Peak resident size in MB of a process that takes so many steps."""
    command = [sys.executable, __file__, "--memory-of", str(steps)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    """Time and weigh; print the figures beside their gates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    model = network()
    image, a, b = ends(model)
    if options.memory_of:
        ours(model, image, a, b, options.memory_of)
        print(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024)  # of this process alone
        return
    torch.testing.assert_close(ours(model, image, a, b), bare(model, a, b), atol=1e-5, rtol=1e-3)
    found = []
    for number in range(options.rounds):
        seconds = {}
        for name in ("ours", "bare") if number % 2 else ("bare", "ours"):
            began = time.perf_counter()
            if name == "ours":
                ours(model, image, a, b)
            else:
                bare(model, a, b)
            seconds[name] = time.perf_counter() - began
        print({name: round(value, 3) for name, value in seconds.items()}, file=sys.stderr)
        found.append(seconds["ours"] / seconds["bare"])
    few, many = peak(20), peak(200)
    figures = {
        "path_map, seconds of bare passes": float(np.median(found)), "gate": GATES["of bare passes"],
        "peak memory, 20 steps, MB": few, "peak memory, 200 steps, MB": many,
        "memory of 200 steps over 20": many / few, "gate of memory": GATES["memory"],
    }  # fmt: skip
    print(json.dumps(figures, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
