"""Find the layers of a model with what is tuned in each, and damp that for a while."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from salience.errors import InputError
from salience.model.at import layer as module_called


class TunedLayer(NamedTuple):
    """One layer, and what is tuned in it.

    `parameters` are its trainable ones by name. `scalings` are the places of the factors that multiply adapters:
    ``place[key]`` is a number. `unscaled` are the parameters that no such factor multiplies.
    """

    name: str
    parameters: dict[str, nn.Parameter]
    scalings: list[tuple[dict[str, Any], str]]
    unscaled: dict[str, nn.Parameter]


def find_layers(model: nn.Module, layers: str | Sequence[str] = "auto") -> list[TunedLayer]:
    """The layers that hold trainable parameters, in the model's order.

    Parameters that several layers share, or that also stand outside of the layers, belong to none of them.

    Parameters
    ----------
    model : torch.nn.Module
        With `requires_grad` set on what is tuned, as `peft.get_peft_model` leaves it.
    layers : "auto" or sequence of str
        "auto" takes the longest `nn.ModuleList` that holds trainable parameters and stands in no other list. Else
        names of modules as in `model.named_modules()`, each a layer, or a list whose entries are layers.

    Raises
    ------
    InputError
        No trainable parameter, no layer that holds one, an unknown name, or an adapter that is merged.
    """
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if not trainable:
        raise InputError(
            f"model: {type(model).__name__} has no trainable parameter; attach an adapter that trains first"
        )
    if isinstance(layers, str):
        names = _longest_list(model, trainable) if layers == "auto" else _entries(model, [layers])
    else:
        names = _entries(model, layers)
    place = {f"{name}.": number for number, name in enumerate(names)}
    owners: dict[int, set[int]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        inside = [number for prefix, number in place.items() if name.startswith(prefix)]
        owners.setdefault(id(parameter), set()).update(inside or [-1])
    own = {key for key, holders in owners.items() if key in trainable and len(holders) == 1 and -1 not in holders}
    found = [_tuned_layer(name, module_called(model, name), own) for name in names]
    found = [layer for layer in found if layer.parameters]
    if not found:
        raise InputError(
            f"model: {type(model).__name__} trains parameters outside of its layers only, as prompt and prefix tuning "
            "do. Adapters within layers are supported (LoRA, DoRA, LoHa, LoKr, IA3, OFT, …), and full fine-tuning"
        )
    return found


@contextmanager
def damped(layers: Iterable[TunedLayer], factor: float, start: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiply by `factor` what tuning added to some layers, for as long as the ``with`` block lasts.

    An adapter's own scaling is multiplied: ``h = W x + factor * scaling * B A x``. What has no scaling goes back
    towards where it started, ``theta_0 + factor * (theta - theta_0)``; a parameter without an entry in `start` has
    not moved. Afterwards everything is as it was, bit for bit, whatever happens in the block.

    Parameters
    ----------
    layers : iterable of TunedLayer
    factor : float
    start : mapping of str to Tensor
        Values before tuning, by name of the parameter.
    """
    scalings = [(place, key, place[key]) for layer in layers for place, key in layer.scalings]
    moved = [(p, p.data, start[name]) for layer in layers for name, p in layer.unscaled.items() if name in start]
    try:
        for place, key, value in scalings:
            place[key] = value * factor
        for parameter, value, origin in moved:
            parameter.data = torch.lerp(origin.to(value), value, factor)
        yield
    finally:
        for place, key, value in scalings:
            place[key] = value
        for parameter, value, _ in moved:
            parameter.data = value


def _longest_list(model: nn.Module, trainable: set[int]) -> list[str]:
    """Names of the entries of the longest outermost list of modules that holds trainable parameters."""
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{other}.") for other in lists)
        if not isinstance(module, nn.ModuleList) or len(module) < 2 or nested:
            continue
        if any(id(parameter) in trainable for parameter in module.parameters()):
            lists[name] = module
    if not lists:
        raise InputError(
            f"model: {type(model).__name__} has no nn.ModuleList that holds trainable parameters. Prompt and prefix "
            "tuning have no layers to choose from; for other models name them, as in layers=['blocks.0', 'blocks.1']"
        )
    chosen = max(lists, key=lambda name: len(lists[name]))
    others = sorted(set(lists) - {chosen})
    if others:
        warnings.warn(
            f"the layers of {chosen!r} are drawn from, and what trains in {', '.join(map(repr, others))} trains at "
            f"every step; to draw from all, give layers={[chosen, *others]!r}",
            stacklevel=4,
        )
    return [f"{chosen}.{number}" for number in range(len(lists[chosen]))]


def _entries(model: nn.Module, layers: Sequence[str]) -> list[str]:
    names: list[str] = []
    for name in layers:
        module = module_called(model, name)
        is_list = isinstance(module, nn.ModuleList | nn.Sequential)
        names += [f"{name}.{child}" for child, _ in module.named_children()] if is_list else [name]
    nested = [name for name in names if any(name.startswith(f"{other}.") for other in names)]
    if nested or len(set(names)) < len(names) or not names or "" in names:
        raise InputError(f"layers: {list(layers)!r} must name at least one layer, each once and none within another")
    return names


def _tuned_layer(name: str, layer: nn.Module, own: set[int]) -> TunedLayer:
    parameters = {f"{name}.{key}": p for key, p in layer.named_parameters() if id(p) in own}
    scalings, scaled = [], set()
    for at, module in layer.named_modules():
        inside = {key: p for key, p in module.named_parameters() if id(p) in own}
        if not inside:
            continue
        # A dict by adapter is peft's. A plain number of that name is something else, such as that of attention.
        factors = getattr(module, "scaling", None)
        if isinstance(factors, dict):
            used = [key for key in factors if any(key in path.split(".") for path in inside)]
            places = [(factors, key) for key in used]
        else:
            places = [(vars(module), "adapter_scaling")] if "adapter_scaling" in vars(module) else []
        if places and getattr(module, "merged", False):
            raise InputError(f"layer {f'{name}.{at}'!r}: its adapter is merged into the weights; unmerge it to tune it")
        if places:
            scalings += places
            scaled |= {id(p) for p in inside.values()}
    return TunedLayer(name, parameters, scalings, {key: p for key, p in parameters.items() if id(p) not in scaled})
