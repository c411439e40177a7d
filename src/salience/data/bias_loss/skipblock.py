"""SkipblockNet: a small network that carries its early features to late layers.

Source: arXiv 2107.11170, section 3.3 and table 1 (SkipNet-M in the first version), and the published `skipblocknet.py`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from salience.errors import InputError


class Row(NamedTuple):
    """One inverted residual block: kernel, expansion, channels out, squeeze-and-excite, h-swish, stride."""

    kernel: int
    expansion: float
    out: int
    excite: bool
    hswish: bool
    stride: int


STAGES = (
    (Row(3, 4, 24, False, False, 2), Row(3, 3, 24, False, False, 1), Row(5, 3, 40, True, False, 2),
     Row(5, 3, 40, True, False, 1), Row(5, 6, 40, True, True, 1)),
    (Row(3, 6, 80, False, True, 2), Row(3, 2.5, 80, False, True, 1), Row(3, 2.3, 80, False, True, 1),
     Row(3, 2.3, 80, False, True, 1)),
    (Row(3, 6, 112, True, True, 1), Row(3, 6, 112, True, True, 1), Row(5, 6, 160, True, True, 2),
     Row(5, 6, 160, True, True, 1), Row(5, 6, 160, True, True, 1)),
)  # fmt: skip


class SkipBlock(nn.Module):
    """Brings features of one place to another of smaller size: pool, then a bottleneck with a linear end.

        pool to size -> 1x1 -> BN, ReLU -> depthwise k x k -> BN, ReLU -> 1x1 -> BN     (+ identity where shapes agree)

    Parameters
    ----------
    inp, hidden, out : int
        Channels.
    kernel : int
        Odd.
    stride : {1, 2}
    size : int or pair of int, optional
        Height and width that is pooled to; otherwise each call gives it.

    Raises
    ------
    InputError
        A parameter out of range, or no size at all.
    """

    def __init__(
        self, inp: int, hidden: int, out: int, kernel: int, stride: int = 1, size: int | tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        _check_block(inp, hidden, out, kernel, stride)
        self.size = size
        self.identity = stride == 1 and inp == out
        self.body = nn.Sequential(*_bottleneck(inp, hidden, out, kernel, stride, nn.ReLU))

    def forward(
        self, x: Float[Tensor, "batch inp height width"], size: int | tuple[int, int] | None = None
    ) -> Float[Tensor, "batch out smaller narrower"]:
        """Features at the place of destination, `size` high and wide."""
        size = self.size if size is None else size
        if size is None:
            raise InputError("size: give it with the block or with each call")
        x = adaptive_avg_pool2d(x, size)
        return x + self.body(x) if self.identity else self.body(x)


class SkipblockNet(nn.Module):
    """SkipblockNet-M: inverted residual blocks in three stages, with skips from the stem to the second and the third.

        x0 = base(stem(x)),   a = A(x0) + skip1(x0),   b = B(a) + skip2(x0),   features = conv(C(b))

    5,532,352 parameters and 236.6 million multiply-adds at 224 x 224, width 1 and 1000 classes.

    Parameters
    ----------
    num_classes : int
    width : float
        Multiplies all channels (the last hidden layer only upwards), to a multiple of 8. The published code fails
        for widths that change the stem; here the skips follow it.
    in_channels : int
    dropout : float
    generator : torch.Generator, optional
        Draws the weights; torch's global one by default.

    Raises
    ------
    InputError
        A parameter out of range; images of other channels.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        width: float = 1.0,
        in_channels: int = 3,
        dropout: float = 0.2,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 1 or in_channels < 1 or not 0 < width < math.inf or not 0 <= dropout < 1:
            raise InputError(
                f"num_classes, in_channels, width, dropout: got {num_classes}, {in_channels}, {width}, {dropout}; the "
                "first two must be at least 1, width positive, dropout in [0, 1)"
            )
        stem = make_divisible(16 * width)
        self.in_channels = in_channels
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, stem, 3, 2, 1, bias=False), nn.BatchNorm2d(stem), nn.Hardswish()
        )
        self.base = _InvertedResidual(stem, stem, stem, Row(3, 1, stem, False, True, 1))
        stages, inp, hidden = [], stem, stem
        for rows in STAGES:
            blocks = []
            for row in rows:
                hidden, out = make_divisible(inp * row.expansion), make_divisible(row.out * width)
                blocks.append(_InvertedResidual(inp, hidden, out, row))
                inp = out
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.skip1 = SkipBlock(stem, make_divisible(stem * 6), make_divisible(40 * width), 5)
        self.skip2 = SkipBlock(stem, make_divisible(stem * 2.3), make_divisible(80 * width), 3)
        self.conv = nn.Sequential(nn.Conv2d(inp, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.Hardswish())
        last = make_divisible(1280 * max(width, 1.0))
        self.classifier = nn.Sequential(
            nn.Linear(hidden, last), nn.Hardswish(), nn.Dropout(dropout), nn.Linear(last, num_classes)
        )
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                fan_out = layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels
                nn.init.normal_(layer.weight, 0, math.sqrt(2 / fan_out), generator=generator)
            elif isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, 0, 0.01, generator=generator)
                nn.init.zeros_(layer.bias)

    def forward(
        self, x: Float[Tensor, "batch channels height width"], return_features: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (batch, classes); with `return_features`, also what `BiasLoss` weighs, before pooling."""
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise InputError(f"x: shape {tuple(x.shape)}; (batch, {self.in_channels}, height, width) is needed")
        early = self.base(self.stem(x))
        x = self.stages[0](early)
        x = self.stages[1](x + self.skip1(early, x.shape[-2:]))
        x = self.stages[2](x + self.skip2(early, x.shape[-2:]))
        features = self.conv(x)
        logits = self.classifier(features.mean((2, 3)))
        return (logits, features) if return_features else logits


class _InvertedResidual(nn.Module):
    def __init__(self, inp: int, hidden: int, out: int, row: Row) -> None:
        super().__init__()
        self.identity = row.stride == 1 and inp == out
        layers = _bottleneck(inp, hidden, out, row.kernel, row.stride, nn.Hardswish if row.hswish else nn.ReLU)
        if row.excite:
            layers.insert(6, _SqueezeExcite(hidden))  # after the depthwise activation
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.identity else self.body(x)


class _SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        narrow = make_divisible(channels // 4)
        self.gate = nn.Sequential(
            nn.Linear(channels, narrow), nn.ReLU(), nn.Linear(narrow, channels), nn.Hardsigmoid()
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x.mean((2, 3)))[:, :, None, None]


def make_divisible(channels: float, divisor: int = 8) -> int:
    """The multiple of `divisor` nearest to `channels`, at least one, and not more than 10 % below."""
    nearest = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * channels else nearest


def _bottleneck(
    inp: int, hidden: int, out: int, kernel: int, stride: int, activation: type[nn.Module]
) -> list[nn.Module]:
    return [
        nn.Conv2d(inp, hidden, 1, bias=False), nn.BatchNorm2d(hidden), activation(),
        nn.Conv2d(hidden, hidden, kernel, stride, (kernel - 1) // 2, groups=hidden, bias=False),
        nn.BatchNorm2d(hidden), activation(),
        nn.Conv2d(hidden, out, 1, bias=False), nn.BatchNorm2d(out),
    ]  # fmt: skip


def _check_block(inp: int, hidden: int, out: int, kernel: int, stride: int) -> None:
    if min(inp, hidden, out) < 1 or kernel < 1 or kernel % 2 == 0 or stride not in (1, 2):
        raise InputError(
            f"inp, hidden, out, kernel, stride: got {inp}, {hidden}, {out}, {kernel}, {stride}; channels >= 1, "
            "an odd kernel, and a stride of 1 or 2 are needed"
        )
