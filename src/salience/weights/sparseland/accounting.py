"""What sparsity is worth: entries, operations and bytes, and the axes on which methods differ."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from salience.errors import InputError, nearest
from salience.model.at import run, training_mode
from salience.model.flops import layer_flops
from salience.weights.sparseland.densities import prunable

_AXES = ("when", "start", "mask", "allocation", "cost")
_WHERE = {
    "random": ("before", "sparse", "static", "any", "none"),
    "snip": ("before", "sparse", "static", "global", "one gradient"),
    "grasp": ("before", "sparse", "static", "global", "three gradients"),
    "synflow": ("before", "sparse", "static", "global", "100 passes without data"),
    "set": ("during", "sparse", "dynamic", "erk", "sparse"),
    "rigl": ("during", "sparse", "dynamic", "erk", "sparse, a dense gradient at updates"),
    "snfs": ("during", "sparse", "dynamic", "moves between layers", "a dense gradient at every step"),
    "gmp": ("during", "dense", "shrinks", "global or by layer", "dense at first"),
    "granet": ("during", "dense or sparse", "dynamic", "global", "dense at first"),
    "sr-ste": ("during", "dense", "dynamic", "N of M", "dense backward"),
    "magnitude": ("after", "dense", "static", "global or by layer", "a dense training"),
    "wanda": ("after", "dense", "static", "by row", "a dense training and a few passes"),
    "lottery": ("after", "dense", "shrinks", "global", "a training for each round"),
}


def taxonomy(method: str) -> dict[str, str]:
    """Where a method stands on the handbook's axes: when, from what start, how its mask behaves, at what cost.

    Parameters
    ----------
    method : str
        Such as "rigl", "snip" or "gmp".

    Raises
    ------
    InputError
        Unknown method.
    """
    if method not in _WHERE:
        raise InputError(f"method: got {method!r}; {nearest(method, _WHERE)}")
    return dict(zip(_AXES, _WHERE[method]))


class LayerSparsity(NamedTuple):
    """One weight: entries, those that are kept, and operations of a pass, dense and sparse."""

    entries: int
    kept: int
    dense_flops: int
    sparse_flops: float

    @property
    def density(self) -> float:
        """Share that is kept."""
        return self.kept / self.entries


@dataclass(frozen=True)
class SparsityReport:
    """The account of a sparse network.

    Parameters
    ----------
    layers : dict of str to LayerSparsity
        By name of the weight.
    density : float
        Of all prunable weights together.
    flops : float
        Operations of one pass, ``sum d_l * dense FLOPs_l``: what hardware for it could save, not what yours does.
    dense_flops : int
    bytes : dict of str to int
        Storage of the prunable weights: "dense", "csr" (values, 32-bit columns, row pointers) and "bitmask".
    explored : float or None
        R_s, the share of weights that was ever active in training.
    training_flops, dense_training_flops : float or None
        Of all steps so far per row, a backward pass counted as two forward ones; and without masks. An update of
        RigL costs ``2 f_S + f_D``, a step of SNFS as well.
    collapsed : tuple of str
        Weights of which nothing is left.
    """

    layers: dict[str, LayerSparsity]
    density: float
    flops: float
    dense_flops: int
    bytes: dict[str, int]
    explored: float | None
    training_flops: float | None
    dense_training_flops: float | None
    collapsed: tuple[str, ...]


def sparsity_report(
    model: nn.Module,
    masks: Mapping[str, Tensor] | None,
    example: Any,
    *,
    explored: float | None = None,
    passes: Mapping[str, float] | None = None,
    steps: int = 0,
    dense_backwards: Mapping[str, float] | None = None,
) -> SparsityReport:
    """Count what is kept, what a pass costs, and what storage takes.

    Supported: as of `prunable`.

    Parameters
    ----------
    model : torch.nn.Module
    masks : dict of str to bool Tensor, or None
        None counts the zeros of the weights themselves (-0.0 too).
    example : tensor, tuple or mapping
        One row of inputs.
    explored, passes, steps, dense_backwards
        Of training, from `SparseTrainer`: R_s, densities of layers summed over the steps, steps, and the absent shares
        of layers summed over those steps whose gradients were dense.

    Raises
    ------
    NothingToDo
        There is no weight to prune.
    """
    weights = prunable(model)
    kept = {name: int((e.weight != 0).sum()) for name, e in weights.items()} if masks is None else {
        name: int(mask.sum()) for name, mask in masks.items()
    }  # fmt: skip
    costs = layer_flops(model, example)
    layers = {
        name: LayerSparsity(
            entry.weight.numel(), kept.get(name, entry.weight.numel()), costs[entry.layer],
            costs[entry.layer] * kept.get(name, entry.weight.numel()) / entry.weight.numel(),
        )
        for name, entry in weights.items()
    }  # fmt: skip
    dense = sum(layer.dense_flops for layer in layers.values())
    training = None
    if passes is not None:
        forward = sum(layer.dense_flops * passes.get(name, steps) for name, layer in layers.items())
        # A step costs 3 f_S. With dense gradients it is 2 f_S + f_D: the gradient of the weights is the dense one.
        absent = dense_backwards or {}
        training = 3 * forward + sum(layer.dense_flops * absent.get(name, 0.0) for name, layer in layers.items())
    entries = sum(layer.entries for layer in layers.values())
    total = sum(layer.kept for layer in layers.values())
    size = {name: entry.weight.element_size() for name, entry in weights.items()}
    rows = {name: entry.weight.shape[1 - entry.in_axis] for name, entry in weights.items()}
    return SparsityReport(
        layers=layers,
        density=total / entries,
        flops=sum(layer.sparse_flops for layer in layers.values()),
        dense_flops=dense,
        bytes={
            "dense": sum(layer.entries * size[name] for name, layer in layers.items()),
            "csr": sum(layer.kept * (size[name] + 4) + 4 * (rows[name] + 1) for name, layer in layers.items()),
            "bitmask": sum(layer.kept * size[name] + (layer.entries + 7) // 8 for name, layer in layers.items()),
        },
        explored=explored,
        training_flops=training,
        dense_training_flops=None if training is None else 3.0 * dense * steps,
        collapsed=tuple(name for name, layer in layers.items() if not layer.kept),
    )


def measure_latency(model: nn.Module, example: Any, rounds: int = 20) -> float:
    """Median seconds of a pass here and now: masked weights in dense storage take as long as dense ones.

    Supported: any model.

    Parameters
    ----------
    model : torch.nn.Module
        In evaluation mode meanwhile.
    example : tensor, tuple or mapping
    rounds : int
        Passes that are timed, after two that are not.
    """
    cuda = any(parameter.is_cuda for parameter in model.parameters())
    seconds = []
    with training_mode(model, False), torch.no_grad():
        for number in range(rounds + 2):
            began = time.perf_counter()
            run(model, example)
            if cuda:
                torch.cuda.synchronize()
            if number > 1:
                seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)
