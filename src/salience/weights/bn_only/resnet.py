"""The residual network for small images that the paper trains."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from salience.errors import InputError
from salience.weights.bn_only.gammas import init_bn


class CifarResNet(nn.Module):
    """ResNet-N for small images, with random features: He normal weights, scales from U[0, 1], shifts 0.

    A 3x3 convolution; three segments of D = (N - 2) / 6 blocks with W, 2W and 4W channels, the last two
    entered at stride 2; average over the image; linear ``fc``. Where a block changes the shape, its shortcut
    is a 1x1 convolution with batch normalisation. That makes 2W (7 + 14 D) scales and shifts.

    Parameters
    ----------
    depth : int
        N = 6 D + 2: 14, 20, 32, 56, 110, 866 and so on.
    width : int
        W; 16 in the paper's sweep over depth.
    in_channels, num_classes : int
    generator : torch.Generator, optional
        Draws the weights; torch's global one by default.

    Raises
    ------
    InputError
        A depth that is not 6 D + 2, or a size below 1.

    References
    ----------
    He et al., arXiv 1512.03385, section 4.2; Frankle et al., arXiv 2003.00152, section 3.
    """

    def __init__(
        self,
        depth: int = 14,
        width: int = 16,
        in_channels: int = 3,
        num_classes: int = 10,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise InputError(f"depth: got {depth}; it must be 6 D + 2 with D >= 1, such as 14, 20 or 110")
        if min(width, in_channels, num_classes) < 1:
            raise InputError(
                f"width, in_channels and num_classes: got {width}, {in_channels}, {num_classes}; each >= 1"
            )
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        blocks, channels = [], width
        for segment in range(3):
            for block in range((depth - 2) // 6):
                wide, stride = width * 2**segment, 2 if segment and not block else 1
                blocks.append(_Block(channels, wide, stride))
                channels = wide
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, generator=generator)
        bound = channels**-0.5  # torch's default for the bias of a linear layer
        nn.init.uniform_(self.fc.bias, -bound, bound, generator=generator)
        init_bn(self, generator=generator)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Logits of a batch of images."""
        return self.fc(self.blocks(self.relu(self.bn(self.conv(x)))).mean((2, 3)))


class _Block(nn.Module):
    def __init__(self, narrow: int, wide: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(narrow, wide, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or narrow != wide:
            self.shortcut = nn.Sequential(nn.Conv2d(narrow, wide, 1, stride=stride, bias=False), nn.BatchNorm2d(wide))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(y + self.shortcut(x))
