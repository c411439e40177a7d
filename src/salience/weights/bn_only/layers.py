"""Find the normalisation layers of a model."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from salience.errors import InputError

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)  # _NormBase: batch and instance normalisation


def norm_layers(model: nn.Module) -> dict[str, Any]:
    """All normalisation layers by name, those of `transformers` included."""
    return {name: module for name, module in model.named_modules() if _is_norm(module)}


def batch_norms(model: nn.Module) -> dict[str, Any]:
    """All batch normalisation by name, whatever its state."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def trainable_batch_norms(model: nn.Module) -> dict[str, Any]:
    """All batch normalisation by name; an `InputError` if there is none or some is unusable."""
    layers = batch_norms(model)
    if not layers:
        kinds = sorted({type(layer).__name__ for layer in norm_layers(model).values()})
        hint = f"; it has {', '.join(kinds)}, which which='norm' selects" if kinds else ""
        raise InputError(f"model: {type(model).__name__} has no batch normalisation{hint}")
    for name, layer in layers.items():
        if not layer.affine:
            raise InputError(f"layer {name!r}: affine=False, so it has no scale and shift")
        if not layer.track_running_stats:
            raise InputError(
                f"layer {name!r}: track_running_stats=False, so at test time a prediction would depend on "
                "the rest of its batch; build it with track_running_stats=True"
            )
    return layers


def _is_norm(module: nn.Module) -> bool:
    if isinstance(module, _NORMS):
        return True
    own = list(module.parameters(recurse=False))
    named = "norm" in type(module).__name__.lower() and not any(module.children())
    return named and bool(own) and all(parameter.ndim == 1 for parameter in own)
