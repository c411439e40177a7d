"""The network of the two-digit canvases: which of ten digits are in the scene?"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from salience.model.fitting import fit
from salience.reproductions.worlds import canvas, nets
from salience.reproductions.worlds.zoo import Recipe

SCENES, EPOCHS = 6000, 8


def build(seed: int) -> nn.Module:
    """An untrained `nets.small_cnn`, one output per digit."""
    return nets.small_cnn(seed)


def train(model: nn.Module, seed: int) -> None:
    """Learn the digits of 6,000 scenes, each output by itself."""
    scenes = canvas.scenes(SCENES, seed)
    fit(
        model, torch.from_numpy(scenes.images), torch.from_numpy(scenes.multi_hot()),
        loss=binary_cross_entropy_with_logits, optimizer=torch.optim.Adam(model.parameters(), lr=2e-3), epochs=EPOCHS,
        generator=torch.Generator().manual_seed(seed), batch_size=16, milestones=(6,),
    )  # fmt: skip


CANVAS_NET = Recipe(build, train)
