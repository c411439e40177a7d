"""Real weights and real pictures: ResNet-20 on CIFAR-10, narrowed and made sparse."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, pad, relu

from salience.model import load, map_batches, read_images, save_narrowed
from salience.weights import apply_masks, iterative_feature_merging, mask_from_scores, prune_channels, score_magnitude

DATA = Path(os.environ.get("SALIENCE_DATA", "absent"))
pytestmark = [
    pytest.mark.realdata,
    pytest.mark.skipif(
        not (DATA / "resnet20-cifar10").is_dir(), reason="SALIENCE_DATA names no folder with resnet20-cifar10"
    ),
]


class Block(nn.Module):
    """Two convolutions; where the width changes, the shortcut takes every other pixel and pads channels."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, 1 if into == out else 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.extra = (out - into) // 2

    def forward(self, x):
        shortcut = pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra)) if self.extra else x
        return relu(self.bn2(self.conv2(relu(self.bn1(self.conv1(x))))) + shortcut)


class ResNet20(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16), Block(16, 16), Block(16, 16))
        self.layer2 = nn.Sequential(Block(16, 32), Block(32, 32), Block(32, 32))
        self.layer3 = nn.Sequential(Block(32, 64), Block(64, 64), Block(64, 64))
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(relu(self.bn1(self.conv1(x))))))
        return self.linear(adaptive_avg_pool2d(x, 1).flatten(1))


def resnet20() -> nn.Module:
    return ResNet20()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return load(DATA / "resnet20-cifar10" / "model.safetensors", arch="weights.test_real_resnet:resnet20").model


@pytest.fixture(scope="module")
def images(rows: int = 500):
    found = read_images(
        DATA / "cifar10" / "test.parquet", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), limit=rows
    )
    return torch.stack([found[i][0] for i in range(rows)]), found.labels


@torch.no_grad()
def accuracy(model: nn.Module, images) -> float:
    return float((map_batches(model, images[0], batch_size=250).argmax(1) == images[1]).double().mean())


def test_merging_keeps_more_than_pruning_at_the_same_widths(model, images, tmp_path) -> None:
    before = accuracy(model, images)
    assert before > 0.75
    merged = iterative_feature_merging(model, example=images[0][:1], beta=float("inf"), max_ratio=0.1)
    keep = {name: after for name, (_, after) in merged.widths.items()}
    assert len(keep) == 9 and set(merged.skipped) >= {"conv1", "layer2.0.conv2", "layer3.0.conv2"}
    pruned = prune_channels(model, keep, by="l1", example=images[0][:1], fold_norm=True).model
    scores = accuracy(merged.model, images), accuracy(pruned, images)
    assert scores[0] > before - 0.15 and scores[0] > scores[1] + 0.05
    save_narrowed(model, merged.model, tmp_path / "narrow.safetensors")
    back = load(tmp_path / "narrow.safetensors", arch="weights.test_real_resnet:resnet20").model
    assert accuracy(back, images) == scores[0]


def test_magnitude_keeps_more_than_random_weights(model, images) -> None:
    import copy

    before = accuracy(model, images)
    half, random = copy.deepcopy(model), copy.deepcopy(model)
    apply_masks(half, mask_from_scores(score_magnitude(model), 0.5))
    drawn = {name: torch.rand(score.shape, generator=torch.Generator().manual_seed(0)) for name, score in
             score_magnitude(model).items()}  # fmt: skip
    apply_masks(random, mask_from_scores(drawn, 0.5))
    assert accuracy(half, images) > before - 0.05 and accuracy(random, images) < 0.3
