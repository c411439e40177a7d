"""Initialise the scales of batch normalisation, and read what training made of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from salience.errors import InputError, nearest
from salience.model.at import run, training_mode
from salience.model.batches import map_batches
from salience.weights.bn_only.layers import trainable_batch_norms

# Interval of the scales (gamma), and the shift (beta).
_SCHEMES = {"uniform": (0, 1, 0), "positivenegative": (-1, 1, 0), "fixed": (1, 1, 0), "oneone": (1, 1, 1)}


@torch.no_grad()
def init_bn(model: nn.Module, scheme: str = "uniform", generator: torch.Generator | None = None) -> None:
    """Set scale and shift of every batch normalisation in place.

    Supported: models with batch normalisation that has a scale and a shift.

    Parameters
    ----------
    model : torch.nn.Module
    scheme : {"uniform", "positivenegative", "fixed", "oneone"}
        The paper's gamma from U[0, 1] with beta 0; gamma from U[-1, 1] with beta 0; 1 and 0; 1 and 1.
    generator : torch.Generator, optional
        Torch's global one by default.

    Raises
    ------
    InputError
        Unknown scheme, or no batch normalisation to set.
    """
    if scheme not in _SCHEMES:
        raise InputError(f"scheme: got {scheme!r}; {nearest(scheme, _SCHEMES)}")
    low, high, beta = _SCHEMES[scheme]
    for layer in trainable_batch_norms(model).values():
        nn.init.uniform_(layer.weight, low, high, generator=generator)
        nn.init.constant_(layer.bias, beta)


@dataclass(frozen=True)
class GammaReport:
    """The scales of batch normalisation, and how many of them switch their channel off.

    Parameters
    ----------
    threshold : float
        A channel with ``|gamma| < threshold`` counts as disabled.
    gammas : dict of str to Tensor, each (channels,)
        By layer, in the model's order.
    """

    threshold: float
    gammas: dict[str, Float[Tensor, " channels"]]

    @property
    def values(self) -> Float[Tensor, " all_channels"]:
        """The scales of all layers in a row."""
        return torch.cat(list(self.gammas.values()))

    @property
    def fraction_disabled(self) -> float:
        """Share of disabled channels in the whole network."""
        return self._share(self.values)

    @property
    def fraction_by_layer(self) -> dict[str, float]:
        """Share of disabled channels in each layer."""
        return {name: self._share(gamma) for name, gamma in self.gammas.items()}

    def _share(self, gamma: Tensor) -> float:
        return float((gamma.abs() < self.threshold).double().mean())


def gamma_report(model: nn.Module, threshold: float = 0.01) -> GammaReport:
    """Read the scales of every batch normalisation (paper: a third ends below 0.01 in BN-only networks).

    Supported: models with batch normalisation that has a scale and a shift.

    Parameters
    ----------
    model : torch.nn.Module
        Left as it is.
    threshold : float
        Below it, in absolute value, a channel counts as disabled.

    Raises
    ------
    InputError
        No such layer, or a threshold that is not positive.
    """
    if not threshold > 0:
        raise InputError(f"threshold: got {threshold!r}; it must be positive")
    layers = trainable_batch_norms(model)
    return GammaReport(threshold, {name: layer.weight.detach().cpu().clone() for name, layer in layers.items()})


@torch.no_grad()
def zero_small_gammas(model: nn.Module, threshold: float = 0.01) -> int:
    """Set every scale with ``|gamma| < threshold`` to exactly 0, in place; returns how many.

    Supported, and errors: as of `gamma_report`.
    """
    report = gamma_report(model, threshold)
    for layer in trainable_batch_norms(model).values():
        layer.weight.masked_fill_(layer.weight.abs() < threshold, 0)
    return int((report.values.abs() < threshold).sum())


def dead_channels(model: nn.Module, data: Any, *, batch_size: int = 128) -> dict[str, Bool[Tensor, " channels"]]:
    """Find the channels that no input makes fire: the ReLU gives 0 at every place for every input.

    Supported: models whose rectifiers are `nn.ReLU` modules; the function `relu` cannot be seen.

    Parameters
    ----------
    model : torch.nn.Module
        In evaluation mode meanwhile; left as it was.
    data : Tensor, DataLoader or Dataset
        Inputs, or pairs of inputs and anything else.
    batch_size : int
        Rows at a time; a `DataLoader` has its own.

    Returns
    -------
    dict of str to bool Tensor, each (channels,)
        By name of the rectifier, True where the channel (dimension 1) is dead. A module that runs more than
        once in a pass has "name", "name:1", "name:2" and so on.

    Raises
    ------
    InputError
        No `nn.ReLU` runs.
    """
    fired: dict[str, Tensor] = {}
    calls: Counter[str] = Counter()

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            key = f"{name}:{calls[name]}" if calls[name] else name
            calls[name] += 1
            fired[key] = (output > 0).flatten(2).any(2) if output.ndim > 2 else output > 0

        return hook

    def fired_by(batch: Any) -> dict[str, Tensor]:
        calls.clear()
        fired.clear()
        run(model, batch[0] if isinstance(batch, tuple | list) else batch)
        if not fired:
            raise InputError(f"model: {type(model).__name__} runs no nn.ReLU, so dead channels cannot be seen")
        return dict(fired)

    rectifiers = {name: module for name, module in model.named_modules() if isinstance(module, nn.ReLU)}
    handles = [module.register_forward_hook(hook_of(name)) for name, module in rectifiers.items()]
    try:
        with training_mode(model, False), torch.no_grad():
            rows = map_batches(fired_by, data, batch_size=batch_size)
    finally:
        for handle in handles:
            handle.remove()
    return {name: ~row.any(0) for name, row in rows.items()}
