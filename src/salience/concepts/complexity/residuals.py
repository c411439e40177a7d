"""Residual sums of a network, found by watching a pass: what came around, and what came through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_DEEPER = {F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d, F.linear, torch.matmul,
           Tensor.matmul, Tensor.__matmul__, torch.bmm, F.scaled_dot_product_attention}  # fmt: skip
_SUMS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__iadd__, Tensor.add_, Tensor.__radd__}


@dataclass
class ResidualSum:
    """A place where a network adds a shallow path to a deep one.

    Attributes
    ----------
    name : str
        The module in which the sum is made, with "#2" and so on for its further sums.
    module : str
        That module.
    skip, branch : Tensor
        What is added: `branch` went through more layers with weights than `skip`.
    stem : str
        The module whose output `module` is given, if there is one.
    """

    name: str
    module: str
    skip: Tensor
    branch: Tensor
    stem: str = ""


def residual_sums(model: nn.Module, inputs: Tensor) -> list[ResidualSum]:
    """Run a model once and return its residual sums in order.

    A sum counts if both sides have the shape of its result and stem from the input, and one has gone through more
    convolutions, linear layers or attentions than the other. Nothing goes by the names of modules or by their class.
    """
    watch = _Watch(model)
    given = inputs.clone()
    watch.depth(given, 0)
    try:
        with watch:
            model(given)
    finally:
        watch.remove()
    return watch.found


class _Watch(TorchFunctionMode):
    """Notes on each tensor how many layers with weights lie between it and the input."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found: list[ResidualSum] = []
        self._inside: list[str] = []
        self._count: dict[str, int] = {}
        self._given: dict[str, str] = {}
        self._handles: list[Any] = []
        for name, module in model.named_modules():
            self._handles.append(module.register_forward_pre_hook(lambda m, a, name=name: self._enter(name, a)))
            self._handles.append(module.register_forward_hook(lambda m, a, out, name=name: self._leave(name, out)))

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self._handles:
            handle.remove()

    @staticmethod
    def depth(tensor: Tensor, depth: int) -> None:
        """Note on a tensor how many layers with weights it went through."""
        tensor._salience_depth = depth  # type: ignore[attr-defined]

    def _enter(self, name: str, args: Any) -> None:
        self._inside.append(name)
        self._given[name] = getattr(args[0], "_salience_module", "") if args else ""

    def _leave(self, name: str, output: Any) -> None:
        self._inside.pop()
        if isinstance(output, Tensor) and name:
            output._salience_module = name  # type: ignore[attr-defined]  # the outermost one stays

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [each for each in _flat((args, kwargs or {})) if hasattr(each, "_salience_depth")]
        summed = None
        if function in _SUMS and len(given) == 2 and given[0].shape == given[1].shape:
            skip, branch = sorted(given, key=lambda each: each._salience_depth)
            if skip._salience_depth < branch._salience_depth:
                summed = ResidualSum("", "", skip.detach().clone(), branch.detach().clone())
        result = function(*args, **(kwargs or {}))
        if given:
            deepest = max(each._salience_depth for each in given) + (function in _DEEPER)
            for each in _flat(result):
                if not getattr(each, "_salience_depth", -1) > deepest:
                    self.depth(each, deepest)
                if len(given) == 1 and function not in _DEEPER and not hasattr(each, "_salience_module"):
                    each._salience_module = getattr(given[0], "_salience_module", "")  # type: ignore[attr-defined]
        if summed is not None and isinstance(result, Tensor) and result.shape == summed.skip.shape:
            summed.module = next((name for name in reversed(self._inside) if name), "")
            number = self._count[summed.module] = self._count.get(summed.module, 0) + 1
            summed.stem = self._given.get(summed.module, "")
            summed.name = (summed.module or "sum") + (f"#{number}" if number > 1 else "")
            self.found.append(summed)
        return result


def _flat(value: Any) -> list[Tensor]:
    """All tensors in lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for each in value for tensor in _flat(each)] if isinstance(value, list | tuple) else []
