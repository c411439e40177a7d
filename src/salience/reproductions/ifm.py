"""Claim: merging similar channels without data or fine-tuning keeps more accuracy than L1-norm pruning to equal
widths, and wider networks keep a smaller share of distinct features.

Substitute for the paper's VGG and ResNet on CIFAR-10 and ImageNet: networks 64-w-w-10 on scikit-learn's 8 x 8
digits, w = 64, 128 and 256. Baselines without data: L1 and L2 norm and random channels; with data, for contrast,
a channel's activations times the weights that read it.
"""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from salience.evidence import Bar, Control, Outcome, Run
from salience.measure.paired import paired_difference
from salience.model.fitting import fit
from salience.model.narrowing import replace_tensors
from salience.report import figures as draw
from salience.reproductions.worlds import digits, nets, zoo
from salience.weights import (
    IFMResult,
    equivalence_report,
    feature_complexity,
    iterative_feature_merging,
    prune_channels,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BETAS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
SHARES = (0.3, 0.5, 0.7, 0.8, 0.9)
JUDGED_SHARE, JUDGED_BETA, JUDGED_WIDTH = 0.7, 0.15, 128
EPOCHS = 40


def build_8(seed: int) -> nn.Module:
    return nets.mlp([64, 8, 8, 10], seed)


def build_64(seed: int) -> nn.Module:
    return nets.mlp([64, 64, 64, 10], seed)


def build_128(seed: int) -> nn.Module:
    return nets.mlp([64, 128, 128, 10], seed)


def build_256(seed: int) -> nn.Module:
    return nets.mlp([64, 256, 256, 10], seed)


def learn(model: nn.Module, seed: int) -> None:
    """Adam for 40 epochs, or as many as is worth it for the smallest network."""
    world = digits.ink(seed)
    fit(
        model, torch.from_numpy(world.train_x).flatten(1), torch.from_numpy(world.train_y), loss=cross_entropy,
        optimizer=torch.optim.Adam(model.parameters(), 1e-3), epochs=EPOCHS,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


WIDTHS = {"smoke": {8: build_8}, "desk": {64: build_64, 128: build_128, 256: build_256}}


def reproduce(run: Run) -> Outcome:
    """Merge the channels of trained networks of three widths, and of an untrained one."""
    world = digits.ink(run.seed)
    inputs, labels = torch.from_numpy(world.test_x).flatten(1), world.test_y
    builders = WIDTHS["smoke" if run.smoke else "desk"]
    models = {}
    for width, build in builders.items():
        run.step(f"training width {width}")
        models[width] = zoo.trained(zoo.Recipe(build, learn), run.seed)
    judged = 8 if run.smoke else JUDGED_WIDTH
    model = models[judged]

    # Method: how many features are left at each threshold, and accuracy at a given number of channels.
    run.step("merging")
    left = {width: feature_complexity(each, BETAS, example=inputs[:1]) for width, each in models.items()}
    fresh = feature_complexity(builders[judged](run.seed + 1), (JUDGED_BETA,), example=inputs[:1])
    curves = {name: [correct(each, inputs, labels) for each in narrowed] for name, narrowed in
              narrowings(run, model, inputs).items()}  # fmt: skip
    planted, gap = planted_duplicates(models[min(models)], inputs)

    # Measure
    at = SHARES.index(JUDGED_SHARE)
    accuracy = {name: float(values[at].mean()) for name, values in curves.items()}
    gain = paired_difference(curves["merged"][at], curves["L1 norm"][at], random_state=run.rng("bootstrap"))
    whole = {width: share.fraction()[BETAS.index(JUDGED_BETA)] for width, share in left.items()}
    shares = {f"features left of width {width}": whole.get(width, math.nan) for width in WIDTHS["desk"]}
    figures = {
        "accuracy at 70 % merged": accuracy["merged"],
        "gain over L1 norm": gain.mean,
        "accuracy before": float(correct(model, inputs, labels).mean()),
        **{f"accuracy at 70 %, {name}": value for name, value in accuracy.items() if name != "merged"},
        **{f"accuracy at {share:.0%} merged": float(curves["merged"][i].mean())
           for i, share in enumerate(SHARES) if i != at},
        "untrained features lost": 1 - fresh.fraction()[0],
        **shares,
        "planted channels left too many": planted,
        "output gap of planted duplicates": gap,
    }  # fmt: skip
    return Outcome(
        claim="merging similar channels without data or fine-tuning keeps more accuracy than L1-norm pruning to "
        "equal widths, and wider networks keep a smaller share of distinct features",
        level="mechanism",
        figures=figures,
        bars=[
            Bar("accuracy at 70 % merged", at_least=0.92),
            Bar("gain over L1 norm", at_least=0.25),
            Bar("untrained features lost", at_most=0.02),
            Bar("features left of width 64", above="features left of width 128"),
            Bar("features left of width 128", above="features left of width 256"),
            Bar("planted channels left too many", at_most=0),
            Bar("output gap of planted duplicates", at_most=1e-5),
        ],
        controls=[
            control("random channels", "random", accuracy, "random"),
            control("similar channels dropped, not merged", "fake", accuracy, "dropped"),
            control("L2 norm", "fake", accuracy, "L2 norm"),
        ],
        intervals={"gain over L1 norm": (gain.low, gain.high)},
        pictures={"Accuracy as channels go, and how many different ones remain": _picture(curves, left)},
        notes=[
            "The widths of all baselines are those that merging left; all start from the same network.",
            "'dropped' keeps one channel of each merged set as it was and deletes the others.",
        ],
    )


def control(name: str, kind, accuracy: dict[str, float], arm: str) -> Control:
    """Another way to lose the same channels, judged by the same figures."""
    return Control(
        name,
        kind,
        {
            "accuracy at 70 % merged": accuracy[arm],
            "gain over L1 norm": accuracy[arm] - accuracy["L1 norm"],
        },
    )


def narrowings(run: Run, model: nn.Module, inputs: Tensor) -> dict[str, list[nn.Module]]:
    """The network at each share of channels gone, by way of losing them."""
    ways: dict[str, list[nn.Module]] = {
        name: [] for name in ("merged", "reference rule", "L1 norm", "L2 norm", "random", "dropped", "activations")
    }
    train_x = torch.from_numpy(digits.ink(run.seed).train_x).flatten(1)
    for share in SHARES:
        merged = iterative_feature_merging(model, example=inputs[:1], beta=math.inf, max_ratio=share)
        other = iterative_feature_merging(model, example=inputs[:1], beta=math.inf, max_ratio=share, rule="sum_in")
        keep = {name: after for name, (_, after) in merged.widths.items()}
        pruned = {
            "L1 norm": prune_channels(model, keep, by="l1", example=inputs[:1]),
            "L2 norm": prune_channels(model, keep, by="l2", example=inputs[:1]),
            "random": prune_channels(
                model, keep, by="random", example=inputs[:1], generator=run.generator(f"random {share}")
            ),
            "activations": prune_channels(model, keep, by="activation", example=inputs[:1], batches=[train_x]),
        }
        ways["merged"].append(merged.model)
        ways["reference rule"].append(other.model)
        ways["dropped"].append(_dropped(model, merged))
        for name, result in pruned.items():
            ways[name].append(result.model)
    return ways


def planted_duplicates(model: nn.Module, inputs: Tensor) -> tuple[int, float]:
    """Double every hidden unit and halve what reads it; merge at a tiny threshold: channels too many, output gap."""
    doubled = copy.deepcopy(model)
    layers = [layer for layer in doubled if isinstance(layer, nn.Linear)]  # type: ignore[attr-defined]
    tensors: dict[str, Tensor] = {}
    for number, (name, layer) in enumerate((n, m) for n, m in doubled.named_modules() if isinstance(m, nn.Linear)):
        weight, bias = layer.weight.detach(), layer.bias.detach()
        if number:
            weight = torch.cat([weight, weight], 1) / 2
        if number < len(layers) - 1:
            weight, bias = torch.cat([weight, weight], 0), torch.cat([bias, bias])
        tensors |= {f"{name}.weight": weight, f"{name}.bias": bias}
    replace_tensors(doubled, tensors)
    result = iterative_feature_merging(doubled, example=inputs[:1], beta=1e-6)
    wrong = sum(abs(after - before // 2) for before, after in result.widths.values())
    report = equivalence_report(model, result.model, inputs, [])
    return wrong, report.largest_difference


@torch.no_grad()
def correct(model: nn.Module, inputs: Tensor, labels: np.ndarray) -> np.ndarray:
    """Whether each row is classified as it should be."""
    return (model(inputs).argmax(1).numpy() == labels).astype(float)


def _dropped(model: nn.Module, merged: IFMResult) -> nn.Module:
    """One channel of each merged set, unchanged: what is left when nothing is carried over."""
    narrow = copy.deepcopy(model)
    names = [name for name, layer in narrow.named_modules() if isinstance(layer, nn.Linear)]
    tensors = {key: value.clone() for key, value in narrow.state_dict().items()}
    for name, following in pairwise(names):
        kept = torch.tensor([cell[0] for cell in merged.grouping[name]])
        for key in (f"{name}.weight", f"{name}.bias"):
            tensors[key] = tensors[key][kept]
        tensors[f"{following}.weight"] = tensors[f"{following}.weight"][:, kept]
    replace_tensors(narrow, tensors)
    return narrow


def _picture(curves: dict[str, list[np.ndarray]], left: dict) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6.4), layout="constrained")
    above, below = figure.subplots(2, 1)
    shown = ("merged", "activations", "L1 norm", "dropped", "random")
    draw.curve(
        above,
        [100 * share for share in SHARES],
        {name: [100 * float(each.mean()) for each in curves[name]] for name in shown},
        xlabel="channels gone, in %",
        ylabel="accuracy in %",
    )
    draw.curve(
        below,
        BETAS,
        {f"width {width}": [100 * f for f in share.fraction()] for width, share in left.items()},
        xlabel="threshold beta",
        ylabel="channels left in %",
    )
    return figure
