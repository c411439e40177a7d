"""Saliency methods against the bare passes of the model that they make, in one run on one core.

1. Calls: NormGrad and its family make exactly one forward and one backward pass a batch (counted).
2. Time: integrated gradients (captum's) over a data set through `attribute_batches` takes at most 1.05 times the bare
   forward and backward passes at the same batch size, and at most 1.02 times captum alone; NormGrad is told beside
   them. Rounds alternate; equal maps are checked first. Figures are ratios: machines are noisy.
3. Memory: the peak of integrated gradients at a fixed internal batch grows by at most 5 % from 20 to 200 steps, each
   in a process of its own.

Usage: python benchmarks/attribution.py [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from captum.attr import IntegratedGradients
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from salience.features import GradCAM, LinearApproximation, LogitsModel, NormGrad, attribute_batches

IMAGES, SIDE, BATCH, STEPS = 8, 96, 16, 32
GATES = {"of bare passes": 1.05, "of captum alone": 1.02, "memory": 1.05}


def network() -> nn.Module:
    """A ResNet-18 with random weights."""
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=10
    )
    return transformers.ResNetForImageClassification(config).eval()


def pictures() -> tuple[Tensor, Tensor]:
    """Images, and the classes to explain."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(IMAGES, 3, SIDE, SIDE, generator=generator), torch.arange(IMAGES) % 10


def counted(model: nn.Module) -> dict[str, int]:
    """Most forward and backward passes a batch, over the family."""
    images, classes = pictures()
    stages = [f"resnet.encoder.stages.{k}" for k in range(4)]
    family = {
        "NormGrad, 4 layers": NormGrad(model, stages), "selective NormGrad": NormGrad(model, stages[3], selective=True),
        "Grad-CAM": GradCAM(model, stages[3]), "gradient x activation": LinearApproximation(model, stages[2]),
    }  # fmt: skip
    worst = {"forward": 0, "backward": 0}
    for attribution in family.values():
        calls = {"forward": 0, "backward": 0}

        def seen(module: nn.Module, args: object, output: Tensor, calls: dict[str, int] = calls) -> None:
            calls["forward"] += 1
            output.register_hook(lambda g: calls.update(backward=calls["backward"] + 1))

        handle = model.classifier.register_forward_hook(seen)
        attribute_batches(attribution, TensorDataset(images, classes), target="label", batch_size=IMAGES)
        handle.remove()
        worst = {name: max(worst[name], calls[name]) for name in worst}
    return worst


def bare(logits: nn.Module, images: Tensor, classes: Tensor, passes: int) -> None:
    """Forward and backward passes to the input, nothing else."""
    for _ in range(passes):
        x = images.detach().requires_grad_()
        score = logits(x).gather(1, classes[:, None]).sum()
        torch.autograd.grad(score, x)


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def peak(steps: int) -> float:
    """Peak resident size in MB of a process that takes so many steps."""
    command = [sys.executable, __file__, "--memory-of", str(steps)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def ratios(rounds: int) -> dict[str, float]:
    """Seconds of each, as ratios of the same round."""
    model = network()
    logits = LogitsModel(model)
    images, classes = pictures()
    path = IntegratedGradients(logits)
    options = {"n_steps": STEPS, "internal_batch_size": BATCH}
    loader = DataLoader(TensorDataset(images, classes), batch_size=IMAGES)
    wide, targets = images.repeat(BATCH // IMAGES, 1, 1, 1), classes.repeat(BATCH // IMAGES)
    work = {
        "ours": lambda: attribute_batches(path, loader, target="label", **options),
        "captum": lambda: path.attribute(images, target=classes, **options),
        "bare": lambda: bare(logits, wide, targets, IMAGES * STEPS // BATCH),
        "normgrad": lambda: NormGrad(model, "resnet.encoder.stages.3").attribute(images, classes),
        "bare once": lambda: bare(logits, images, classes, 1),
    }
    assert torch.equal(work["ours"](), work["captum"]().detach()), "maps differ"
    found: dict[str, list[float]] = {"of bare passes": [], "of captum alone": [], "NormGrad of one bare pass": []}
    for number in range(rounds):
        names = list(work)
        order = names[number % len(names) :] + names[: number % len(names)]
        seconds = {name: timed(work[name]) for name in order}
        print({name: round(value, 3) for name, value in seconds.items()}, file=sys.stderr)
        found["of bare passes"].append(seconds["ours"] / seconds["bare"])
        found["of captum alone"].append(seconds["ours"] / seconds["captum"])
        found["NormGrad of one bare pass"].append(seconds["normgrad"] / seconds["bare once"])
    return {name: float(np.median(values)) for name, values in found.items()}


def main() -> None:
    """Count, time, weigh; print the figures beside their gates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if options.memory_of:
        images, classes = pictures()
        path = IntegratedGradients(LogitsModel(network()))
        data = TensorDataset(images, classes)
        attribute_batches(path, data, target="label", n_steps=options.memory_of, internal_batch_size=BATCH)
        print(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024)  # of this process alone
        return
    calls = counted(network())
    assert calls == {"forward": 1, "backward": 1}, calls
    few, many = peak(20), peak(200)
    figures = {
        "forward passes a batch, NormGrad and its family": calls["forward"],
        "backward passes a batch, NormGrad and its family": calls["backward"],
        **{f"integrated gradients, seconds {name}" if name.startswith("of") else name: value
           for name, value in ratios(options.rounds).items()},
        "peak memory, 20 steps, MB": few,
        "peak memory, 200 steps, MB": many,
        "peak memory, 200 of 20 steps": many / few,
        "gates": GATES,
    }  # fmt: skip
    print(json.dumps(figures, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
