"""Which weights can be pruned, and how many of them each layer keeps."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from salience.errors import InputError, NothingToDo, nearest
from salience.model.narrowing import is_conv1d
from salience.scores import Scores

Mode = Literal["uniform", "uniform+", "er", "erk"]
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Prunable(NamedTuple):
    """A weight that masks may cover: its layer, itself, and the axis of its inputs (0 where stored transposed)."""

    layer: str
    weight: Tensor
    in_axis: int


def prunable(model: nn.Module, exclude: Sequence[str] = ()) -> dict[str, Prunable]:
    """Weights of linear and convolution layers by name, in the model's order; biases and normalisation never.

    Supported: any `torch.nn.Module`, also the `Conv1D` of `transformers`. Tied weights come once, under the first
    of their names.

    Parameters
    ----------
    model : torch.nn.Module
    exclude : sequence of str
        Patterns of names to leave dense, such as ``["lm_head.*", "*.0.weight"]``.

    Raises
    ------
    InputError
        A pattern that no weight matches.
    NothingToDo
        No such weight is left.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, Prunable] = {}
    for layer, module in model.named_modules():
        if isinstance(module, _LAYERS) or is_conv1d(module):
            weight: Any = module.weight
            name = names.get(id(weight))  # computed weights have none: their own parametrisation rules them
            if name is not None and name not in found:
                found[name] = Prunable(layer, weight, 0 if is_conv1d(module) else 1)
    for pattern in [exclude] if isinstance(exclude, str) else exclude:
        out = fnmatch.filter(found, pattern)
        if not out:
            raise InputError(f"exclude: no prunable weight is called {pattern!r}; {nearest(pattern, found)}")
        found = {name: entry for name, entry in found.items() if name not in out}
    if not found:
        raise NothingToDo(f"model: {type(model).__name__} has no weight of a linear or convolution layer to prune")
    return found


def shapes_of(weights: Mapping[str, Prunable]) -> dict[str, tuple[int, ...]]:
    """Shape of each weight by name."""
    return {name: tuple(entry.weight.shape) for name, entry in weights.items()}


def allocate(
    shapes: Mapping[str, Sequence[int]],
    density: float,
    mode: Mode | Scores = "erk",
    dense: Sequence[str] = (),
) -> dict[str, float]:
    """Density of each layer so that all together keep the share `density` of their weights.

        uniform   d_l = d
        uniform+  the first layer dense; below d = 0.2 the last linear layer at 0.2; the others lower to make up
        er        d_l = eps (n_in + n_out) / (n_in n_out)
        erk       d_l = eps (sum of the shape) / (product of the shape)
        Scores    d_l = eps score_l

    with eps such that the total is kept; layers that would exceed 1 become dense, and eps is solved anew.

    Parameters
    ----------
    shapes : mapping of str to sequence of int
        Shape of each weight, (out, in, ...).
    density : float
        Share of all weights to keep, in (0, 1].
    mode : {"uniform", "uniform+", "er", "erk"} or Scores
        Scores of layers, from any method: ids are names of weights or of their layers, values not negative. A
        layer without a score counts as an average one.
    dense : sequence of str
        Weights that stay dense.

    Returns
    -------
    dict of str to float
        By name, in the order of `shapes`.

    Raises
    ------
    InputError
        An option out of range, an unknown name, or a density that the dense layers alone exceed; the message has
        the smallest one that is possible.

    References
    ----------
    ER: Mocanu et al. 2018; ERK: Evci et al., "Rigging the Lottery", ICML 2020; uniform+: Gale et al. 2019.
    """
    if not 0 < density <= 1:
        raise InputError(f"density: got {density!r}; it must lie in (0, 1]")
    if not shapes:
        raise InputError("shapes: there are none")
    unknown = [name for name in dense if name not in shapes]
    if unknown:
        raise InputError(f"dense: no weight is called {unknown[0]!r}; {nearest(unknown[0], shapes)}")
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    fixed = dict.fromkeys(dense, 1.0)
    if isinstance(mode, Scores):
        raw = _from_scores(shapes, mode)
    elif mode in ("uniform", "uniform+"):
        raw = dict.fromkeys(shapes, 1.0)
        if mode == "uniform+":
            fixed |= _uniform_plus(shapes, density)
    elif mode == "er":
        raw = {name: (shape[0] + shape[1]) / (shape[0] * shape[1]) for name, shape in shapes.items()}
    elif mode == "erk":
        raw = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    else:
        raise InputError(f"mode: got {mode!r}; it must be uniform, uniform+, er, erk or Scores of layers")
    return _solve(raw, sizes, density, fixed)


def count_kept(density: float, size: int) -> int:
    """Exact number of weights that a layer of `size` keeps."""
    return round(density * size)


def counts_kept(densities: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, int]:
    """Number of weights that each layer keeps: ``d_l N_l`` by largest remainders, so that the total is exact."""
    wanted = {name: densities[name] * sizes[name] for name in sizes}
    counts = {name: math.floor(value + 1e-9) for name, value in wanted.items()}
    left = round(sum(wanted.values())) - sum(counts.values())
    for name in sorted(wanted, key=lambda name: counts[name] - wanted[name])[:left]:
        counts[name] += 1
    return counts


def _solve(
    raw: Mapping[str, float], sizes: Mapping[str, int], density: float, fixed: Mapping[str, float]
) -> dict[str, float]:
    """Scale raw densities to the total; layers above 1 become dense, which lowers the rest."""
    fixed = dict(fixed)
    total = sum(sizes.values())
    least = sum(share * sizes[name] for name, share in fixed.items())
    if least > density * total * (1 + 1e-12):
        raise InputError(
            f"density: {density} is below what the layers that stay dense hold; the smallest possible is "
            f"{math.ceil(least / total * 1e6) / 1e6}"
        )
    while True:
        free = [name for name in raw if name not in fixed]
        rest = density * total - sum(share * sizes[name] for name, share in fixed.items())
        weight = sum(raw[name] * sizes[name] for name in free)
        if not free:
            return {name: fixed[name] for name in raw}
        if weight == 0:  # layers without a score share what those with one have no room for
            even = max(rest, 0.0) / sum(sizes[name] for name in free)
            return {name: fixed.get(name, even) for name in raw}
        eps = max(rest, 0.0) / weight
        largest = max(raw[name] for name in free)
        if eps * largest <= 1:
            return {name: fixed.get(name, eps * raw[name]) for name in raw}
        fixed |= {name: 1.0 for name in free if raw[name] == largest}


def _uniform_plus(shapes: Mapping[str, Sequence[int]], density: float) -> dict[str, float]:
    names = list(shapes)
    fixed = {names[0]: 1.0}
    linear = [name for name in names[1:] if len(shapes[name]) == 2]
    if density < 0.2 and linear:
        fixed[linear[-1]] = 0.2
    return fixed


def _from_scores(shapes: Mapping[str, Sequence[int]], scores: Scores) -> dict[str, float]:
    given = dict(zip(scores.ids, scores.values.tolist()))
    if min(given.values()) < 0 or not any(given.values()):
        raise InputError("mode: Scores of layers must not be negative, nor all 0")
    found = {name: given.get(name, given.get(name.removesuffix(".weight"))) for name in shapes}
    known = [value for value in found.values() if value is not None]
    if not known:
        first = str(scores.ids[0])
        raise InputError(f"mode: no layer is called like the Scores' ids, such as {first!r}; {nearest(first, shapes)}")
    mean = sum(known) / len(known)
    if mean == 0:
        raise InputError("mode: the Scores of these layers are all 0")
    return {name: mean if value is None else value for name, value in found.items()}
