"""Small networks with random weights, the same for the same seed; the global random state stays untouched."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from salience.errors import InputError

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, ViTForImageClassification


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw torch's CPU random numbers from `seed` inside the block, and go on as before after it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def mlp(sizes: Sequence[int], seed: int) -> nn.Sequential:
    """Linear layers from ``sizes[0]`` inputs to ``sizes[-1]`` outputs, with ReLU between them.

    Raises
    ------
    InputError
        Fewer than two sizes.
    """
    if len(sizes) < 2:
        raise InputError(f"sizes must hold at least an input and an output width; got {list(sizes)}")
    with seeded(seed):
        layers = [layer for wide in pairwise(sizes) for layer in (nn.Linear(*wide), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def small_cnn(seed: int, *, in_channels: int = 1, num_classes: int = 10, width: int = 16) -> nn.Sequential:
    """Four 3 x 3 convolutions ``c1``..``c4``, the middle two of stride 2; global average; linear ``head``.

    Takes images (batch, in_channels, height, width) of any size from 8 x 8 on; the convolutions have 1, 2, 4
    and 4 times `width` channels.
    """
    with seeded(seed):
        return nn.Sequential(
            OrderedDict(
                c1=nn.Conv2d(in_channels, width, 3, padding=1),
                relu1=nn.ReLU(),
                c2=nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
                relu2=nn.ReLU(),
                c3=nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1),
                relu3=nn.ReLU(),
                c4=nn.Conv2d(4 * width, 4 * width, 3, padding=1),
                relu4=nn.ReLU(),
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                head=nn.Linear(4 * width, num_classes),
            )
        )


def tiny_vit(
    seed: int, *, image_size: int = 32, patch_size: int = 4, in_channels: int = 1, num_classes: int = 10
) -> ViTForImageClassification:
    """A `transformers` vision transformer: 3 layers, 4 heads, width 32, attention whose maps can be read."""
    from transformers import ViTConfig, ViTForImageClassification  # slow to import

    settings: dict[str, Any] = {
        "image_size": image_size,
        "patch_size": patch_size,
        "num_channels": in_channels,
        "num_labels": num_classes,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "attn_implementation": "eager",
    }
    with seeded(seed):
        return ViTForImageClassification(ViTConfig(**settings))


def tiny_gpt2(seed: int, *, vocab_size: int = 256, context: int = 128) -> GPT2LMHeadModel:
    """A `transformers` GPT-2: 2 layers, 4 heads, width 64, no dropout, eager attention; bytes as tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel  # slow to import

    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "n_positions": context,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "eager",
    }
    with seeded(seed):
        return GPT2LMHeadModel(GPT2Config(**settings))
