"""The ResNet-20 for CIFAR-10 of He et al. (2015), with parameter-free shortcuts, as weights in circulation have it.

    salience explain saliency model.safetensors test.parquet --arch cifar_resnet20:resnet20 \
        --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 -o maps

with this folder on PYTHONPATH.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, relu


class Block(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut ("option A"): every other pixel, and channels of zeros."""

    def __init__(self, channels: int, wide: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, wide, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.stride, self.more = stride, (wide - channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Images of `wide` channels, at 1 / `stride` of the size."""
        y = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return relu(y + pad(shortcut, (0, 0, 0, 0, self.more, self.more)))


class ResNet20(nn.Module):
    """3 x 3 stem, three stages of three blocks with 16, 32 and 64 channels, average, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16, 1), Block(16, 16, 1), Block(16, 16, 1))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the ten classes, for images (batch, 3, 32, 32)."""
        x = relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.mean(x, dim=(2, 3)))


def resnet20() -> ResNet20:
    """What ``--arch cifar_resnet20:resnet20`` calls."""
    return ResNet20()
