"""What one pass costs in the layers that hold nearly all of it: linear and convolution layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from salience.model.at import run, training_mode
from salience.model.narrowing import is_conv1d

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


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
        By name of the layer, in the model's order. A layer that runs twice counts twice. One that is never called,
        but whose weight is used directly (as `nn.MultiheadAttention` uses that of `out_proj`), counts the products
        of that weight; one that rests counts 0.
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
    uncalled = {name: layers[name].weight for name, count in counts.items() if not count}
    return counts | (_products(model, example, uncalled) if uncalled else {})


def _products(model: nn.Module, example: Any, weights: Mapping[str, Any]) -> dict[str, int]:
    """Operations of the matrix products and convolutions that take these weights, in one pass."""
    with training_mode(model, False), torch.no_grad(), _without_fused_attention(), _Products(weights) as seen:
        run(model, example)
    return seen.counts


class _Products(TorchDispatchMode):
    """Sees every operation under its layers; weights are known by their memory, which views share."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.counts = dict.fromkeys(weights, 0)
        self._names = {weight.untyped_storage().data_ptr(): name for name, weight in weights.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cost = flop_registry.get(func._overloadpacket)
        if cost is None:  # an operation made of others is taken apart, so that its products are seen
            parts = func.decompose(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {})) if parts is NotImplemented else parts
        out = func(*args, **(kwargs or {}))
        for each in args:
            name = self._names.get(each.untyped_storage().data_ptr()) if isinstance(each, Tensor) else None
            if name is not None:
                self.counts[name] += cost(*args, **(kwargs or {}), out_val=out)
        return out


@contextmanager
def _without_fused_attention() -> Iterator[None]:
    """`nn.MultiheadAttention` in single operations: its fused kernel hides the products."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)
