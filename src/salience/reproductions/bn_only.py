"""Claim: training only the normalisation scales and shifts of a random network is far more accurate than
training as many randomly chosen weights of each channel.

Substitute for the paper's ResNet-866 on CIFAR-10 (82 %): a ResNet-14 of width 8 on scikit-learn's 8 x 8
digits, 560 trainable entries in either arm. The paper's third of disabled features comes with deep nets and
long training; the share is reported here and not judged. ``--scale full --data DIR`` trains a ResNet-110
by the paper's recipe on ``DIR/cifar10/train*.parquet`` and ``test*.parquet``.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from salience.errors import DataError, InputError
from salience.evidence import Bar, Control, Outcome, Run
from salience.measure.paired import paired_difference
from salience.model.at import training_mode
from salience.model.batches import map_batches
from salience.model.fitting import fit
from salience.report import figures as draw
from salience.reproductions.worlds import digits
from salience.weights import (
    CifarResNet,
    ParamSelection,
    dead_channels,
    gamma_report,
    init_bn,
    select_params,
    train_subset,
    zero_small_gammas,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What trains in each arm, and a pattern of names that do not.
ARMS = {
    "bn-only": ("bn", ()),
    "control": ("per_channel", ()),
    "random": ("random", ()),
    "output": ("output", ()),
    "bn+output": ("bn+output", ()),
    "all": ("all", ()),
    "scales only": ("bn", ("*.bias",)),
    "shifts only": ("bn", ("*.weight",)),
}  # fmt: skip
JUDGED = ("bn-only", "control", "output")
CIFAR_MEAN, CIFAR_DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Setting(NamedTuple):
    """Size of the network and of its training."""

    depth: int
    width: int
    epochs: int
    batch_size: int
    augment: bool


SETTINGS = {
    "smoke": Setting(8, 4, 2, 64, augment=False),
    "desk": Setting(14, 8, 30, 64, augment=False),
    "full": Setting(110, 16, 160, 128, augment=True),
}


class Images(NamedTuple):
    """Training and test images (n, channels, height, width) and their classes (n,)."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


class Arm(NamedTuple):
    """A network of which one part was trained."""

    model: nn.Module
    trained: int  # entries
    correct: np.ndarray  # of the test images
    changed: int  # frozen entries with other bits than before

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())


def reproduce(run: Run) -> Outcome:
    """Train parts of one random network, and look at the scales."""
    full, setting = run.scale == "full", SETTINGS[run.scale]
    images = _images(run)

    # Method: every arm starts from the same random network and sees the same batches.
    arms = {name: train(run, images, setting, name) for name in ARMS}
    bn = arms["bn-only"]

    # Measure: the arms, once more on replicates, and what small scales are good for against as many others.
    replicates = [accuracies(run, images, arms)] if full else []
    for seed in run.replicate_seeds(2) if run.master and not full else ():
        again = replace(run, seed=seed)
        fresh = _images(again)
        replicates.append(accuracies(again, fresh, {name: train(again, fresh, setting, name) for name in JUDGED}))
    run.step("measuring")
    zeroed, others = copy.deepcopy(bn.model), copy.deepcopy(bn.model)
    small = zero_small_gammas(zeroed)
    _zero_random_scales(others, small, run.generator("others"))
    gain = paired_difference(bn.correct, arms["control"].correct, random_state=run.rng("bootstrap"))
    reports = {name: gamma_report(arms[name].model) for name in ("bn-only", "all")}
    figures = {
        **judged("bn-only", replicates),
        **{f"accuracy {name}": arm.accuracy for name, arm in arms.items()},
        "bn-only minus control": gain.mean,
        "entries trained, bn-only": bn.trained,
        "entries trained, control": arms["control"].trained,
        "changed frozen entries": sum(arm.changed for arm in arms.values())
        + changed_by_decay(run, images, setting, naive=False),
        "scales below 0.01": small,
        "points moved by zeroing them": _points(bn.correct, _correct(zeroed, images)),
        "points moved by zeroing as many others": _points(bn.correct, _correct(others, images)),
        **{f"disabled, {name}": report.fraction_disabled for name, report in reports.items()},
        **{f"dead channels, {name}": _dead(arms[name].model, images) for name in reports},
    }
    accuracy = [] if full else [Bar("mean accuracy", at_least=0.9, once=True)]
    return Outcome(
        claim="training only the normalisation scales and shifts of a random network is far more accurate "
        "than training as many randomly chosen weights of each channel",
        level="claim" if full else "mechanism",
        figures=figures,
        bars=[
            *accuracy,
            Bar("mean gain over control", at_least=0.2, once=True),
            Bar("points moved by zeroing them", at_most=0.5),
            Bar("changed frozen entries", at_most=0),
        ],
        controls=[
            Control("scales drawn anew", "random", judged("redrawn", replicates)),
            Control("output layer only", "fake", judged("output", replicates)),
            Control(
                "gradients masked, decay not",
                "fake",
                {"changed frozen entries": changed_by_decay(run, images, setting, naive=True)},
            ),
        ],
        intervals={"bn-only minus control": (gain.low, gain.high)},
        pictures={"Accuracy by what trains, and where training moves the scales": _picture(arms)},
        notes=[
            "The means are over replicates drawn from the master seed: other splits, networks and masks.",
            "The masked arms train without weight decay; an epoch of its own tries that masks withstand it.",
        ],
    )


def train(run: Run, images: Images, setting: Setting, name: str) -> Arm:
    """One arm: a random network, part of it trained."""
    run.step(f"training {name}")
    which, exclude = ARMS[name]
    model = _network(run, images, setting)
    chosen = select_params(model, which, generator=run.generator("mask"), exclude=exclude)
    before = copy.deepcopy(model)
    train_subset(
        model, images.train_x, images.train_y, chosen, epochs=setting.epochs, batch_size=setting.batch_size,
        weight_decay=0.0 if chosen.masks else 1e-4, generator=run.generator("batches"),
    )  # fmt: skip
    return Arm(model, chosen.count, _correct(model, images), changed_entries(before, model, chosen))


def accuracies(run: Run, images: Images, arms: Mapping[str, Arm]) -> dict[str, float]:
    """Accuracy of the arms that bars judge, and of the trained network with its scales drawn anew."""
    redrawn = copy.deepcopy(arms["bn-only"].model)
    init_bn(redrawn.cpu(), generator=run.generator("redrawn"))
    redrawn.to(images.test_x.device)
    return {
        **{name: arms[name].accuracy for name in JUDGED},
        "redrawn": float(_correct(redrawn, images).mean()),
    }


def judged(name: str, replicates: list[dict[str, float]]) -> dict[str, float]:
    """The figures that `once` bars judge, with `name` in the place of the method; NaN without replicates."""
    if not replicates:
        return {"mean accuracy": math.nan, "mean gain over control": math.nan}
    return {
        "mean accuracy": float(np.mean([each[name] for each in replicates])),
        "mean gain over control": float(np.mean([each[name] - each["control"] for each in replicates])),
    }


def changed_entries(before: nn.Module, after: nn.Module, chosen: ParamSelection) -> int:
    """How many entries outside the selection have other bits than before."""
    count = 0
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        other = (old.detach().view(torch.int32) != new.detach().view(torch.int32)).cpu()
        free = chosen.masks.get(name, torch.tensor(name in chosen.names))
        count += int((other & ~free).sum())
    return count


def changed_by_decay(run: Run, images: Images, setting: Setting, naive: bool) -> int:
    """Frozen entries that change when the control trains for an epoch with momentum and weight decay.

    The naive way is to mask the gradients only.
    """
    model = _network(run, images, setting)
    chosen = select_params(model, "per_channel", generator=run.generator("mask"))
    before = copy.deepcopy(model)
    batches, size = run.generator("batches"), setting.batch_size
    if naive:
        for name, mask in chosen.masks.items():
            model.get_parameter(name).register_hook(lambda grad, mask=mask: grad * mask.to(grad.device))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        fit(model, images.train_x, images.train_y, loss=cross_entropy, optimizer=optimizer, epochs=1,
            generator=batches, batch_size=size)  # fmt: skip
    else:
        train_subset(model, images.train_x, images.train_y, chosen, epochs=1, batch_size=size, generator=batches)
    return changed_entries(before, model, chosen)


class CropAndFlip(nn.Module):
    """In training, crop each image at random after padding it by 4 pixels, and mirror every other one."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        n, _, height, width = x.shape
        flipped = torch.where(torch.rand(n, 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)
        top, left = torch.randint(9, (2, n, 1), device=x.device)
        rows = (top + torch.arange(height, device=x.device))[:, None, :, None]
        columns = (left + torch.arange(width, device=x.device))[:, None, None, :]
        padded = pad(flipped, (4, 4, 4, 4))
        image = torch.arange(n, device=x.device)[:, None, None, None]
        channel = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
        return padded[image, channel, rows, columns]


def _network(run: Run, images: Images, setting: Setting) -> nn.Module:
    model = CifarResNet(
        setting.depth, setting.width, images.train_x.shape[1], 10, generator=run.generator("network")
    ).to(images.train_x.device)
    return nn.Sequential(CropAndFlip(), model) if setting.augment else model


def _images(run: Run) -> Images:
    if run.scale == "full":
        if run.data is None:
            raise InputError("scale 'full' needs --data: a folder that holds cifar10/train*.parquet")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        parts = [part for which in ("train", "test") for part in cifar(run.data / "cifar10", which)]
        return Images(*(part.to(device) for part in parts))
    if run.data is not None:
        raise InputError("--data is read at --scale full only")
    world = digits.split(run.seed)
    return Images(*map(torch.from_numpy, (world.train_x, world.train_y, world.test_x, world.test_y)))


def cifar(folder: Path, which: str, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Standardised images (n, 3, 32, 32) and classes of ``which*.parquet`` (Hugging Face image layout)."""
    import pyarrow.parquet as pq
    from PIL import Image  # comes with matplotlib

    files = sorted(folder.glob(f"{which}*.parquet"))
    if not files:
        raise DataError(f"{folder}: no file {which}*.parquet")
    images, labels = [], []
    for file in files:
        table = pq.read_table(file)
        if not {"image", "label"} <= set(table.column_names):
            raise DataError(f"{file}: has columns {table.column_names}; 'image' and 'label' are needed")
        for row in table.slice(0, limit).to_pylist():
            with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
                images.append(np.asarray(image.convert("RGB")))
            labels.append(row["label"])
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (CIFAR_MEAN, CIFAR_DEVIATION))
    return (pixels - mean) / deviation, torch.tensor(labels)


@torch.no_grad()
def _correct(model: nn.Module, images: Images) -> np.ndarray:
    with training_mode(model, False):
        logits = map_batches(model, images.test_x, batch_size=512)
    return (logits.argmax(1) == images.test_y.cpu()).double().numpy()


def _points(before: np.ndarray, after: np.ndarray) -> float:
    """Change of the accuracy in points, whichever way."""
    return 100 * abs(float(before.mean() - after.mean()))


@torch.no_grad()
def _zero_random_scales(model: nn.Module, count: int, generator: torch.Generator) -> None:
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    sizes = [layer.num_features for layer in layers]
    drawn = torch.zeros(sum(sizes), dtype=torch.bool)
    drawn[torch.randperm(sum(sizes), generator=generator)[:count]] = True
    for layer, mask in zip(layers, drawn.split(sizes), strict=True):
        layer.weight[mask.to(layer.weight.device)] = 0


def _dead(model: nn.Module, images: Images) -> float:
    return float(torch.cat(list(dead_channels(model, images.test_x).values())).double().mean())


def _picture(arms: Mapping[str, Arm]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6.4), layout="constrained")
    above, below = figure.subplots(2, 1)
    labels = {name: f"{name} ({arm.trained:,})" for name, arm in arms.items()}
    names = sorted(arms, key=lambda name: -arms[name].accuracy)
    draw.bars(
        above,
        [labels[name] for name in names],
        [100 * arms[name].accuracy for name in names],
        highlight=[labels["bn-only"]],
        xlabel="test accuracy in %, by what trains (entries)",
    )
    scales = {"bn-only": "bn-only", "all": "all trained", "control": "untrained"}
    draw.histogram(
        below,
        {label: gamma_report(arms[name].model).values.cpu().numpy() for name, label in scales.items()},
        xlabel="scale of a channel",
    )
    return figure
