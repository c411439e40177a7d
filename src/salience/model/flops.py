"""What one pass costs in the layers that hold nearly all of it: linear and convolution layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from salience.model.at import run, training_mode
from salience.model.narrowing import is_conv1d


def layer_flops(model: nn.Module, example: Any) -> dict[str, int]:
    """Floating point operations of each linear and convolution layer in one pass over `example`.

        FLOPs = 2 * entries of the weight * places at which it is applied

    A multiplication and an addition count as two; biases, normalisation, activations and attention's own
    products are left out.

    Parameters
    ----------
    model : torch.nn.Module
        Left as it was.
    example : tensor, tuple or mapping
        Inputs of as many rows as are to be counted, usually one.

    Returns
    -------
    dict of str to int
        By name of the layer, in the model's order; a layer that runs twice counts twice, and one that is not
        called (it rests, or its weight is used directly, as in `nn.MultiheadAttention`) counts 0.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, _LAYERS) or is_conv1d(layer)}
    counts = dict.fromkeys(layers, 0)

    def hook_of(name: str) -> Any:
        def hook(layer: Any, args: Any, output: Tensor) -> None:
            channels = output.shape[-1] if isinstance(layer, nn.Linear) or is_conv1d(layer) else layer.out_channels
            counts[name] += 2 * layer.weight.numel() * (output.numel() // channels)

        return hook

    handles = [layer.register_forward_hook(hook_of(name)) for name, layer in layers.items()]
    try:
        with training_mode(model, False), torch.no_grad():
            run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return counts


_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
