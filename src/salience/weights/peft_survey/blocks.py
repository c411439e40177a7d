"""Where the parts of a transformer are: its blocks, their attention and feed-forward layers, found by their names."""

from __future__ import annotations

import copy
import fnmatch
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from salience.errors import InputError, nearest
from salience.model.narrowing import is_conv1d

OWN = "salience_"  # in the names of modules that methods have put on a model
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_KEY = re.compile(r"(^|[._])(k|key)(_proj)?$")
_VALUE = re.compile(r"(^|[._])(v|value)(_proj)?$")
_QUERY = re.compile(r"(^|[._])(q|query)(_proj)?$")
_FUSED = re.compile(r"c_attn$|qkv(_proj)?$|in_proj$|query_key_value$")


class Block(NamedTuple):
    """One transformer block; all parts by their full names in the model.

    Parameters
    ----------
    name : str
    layer : nn.Module
    attention : list of str
        Linear layers of attention, in their order; the last one is its output projection.
    feed_forward : list of str
        Linear layers of the feed-forward part, in their order; the last one leads back to the model's width.
    """

    name: str
    layer: nn.Module
    attention: list[str]
    feed_forward: list[str]

    def projection(self, kind: str) -> list[str]:
        """Linear layers of attention that make queries, keys or values ("query", "key", "value"); fused ones count."""
        pattern = {"query": _QUERY, "key": _KEY, "value": _VALUE}[kind]
        return [name for name in self.attention if pattern.search(name) or _FUSED.search(name)]

    @property
    def core(self) -> str:
        """The module that computes attention itself: the one that holds the projections."""
        return self.attention[0].rpartition(".")[0]


def find_blocks(model: nn.Module) -> list[Block]:
    """The transformer blocks of a model, in its order; of a U-Net those of all its levels.

    A block is a member of an `nn.ModuleList` that holds linear layers with "attn" or "attention" in their names and
    others besides. Lists inside a block (experts, sub-layers) do not count.

    Raises
    ------
    InputError
        There is none.
    """
    blocks: list[Block] = []
    for list_name, modules in model.named_modules():
        if not isinstance(modules, nn.ModuleList) or any(list_name.startswith(f"{b.name}.") for b in blocks):
            continue
        for key, layer in modules.named_children():
            name = f"{list_name}.{key}" if list_name else key
            inner = [part for part, module in layer.named_modules() if part and _linear(module) and OWN not in part]
            attention = [f"{name}.{part}" for part in inner if _ATTENTION.search(part)]
            others = [f"{name}.{part}" for part in inner if not _ATTENTION.search(part)]
            if attention and others and not _nested(layer):
                blocks.append(Block(name, layer, attention, others))
    if not blocks:
        raise InputError(
            f"model: no transformer blocks found in {type(model).__name__}: none of its module lists holds layers with "
            "attention and a feed-forward part; name the layers in target"
        )
    return blocks


def linear_layers(model: nn.Module, target: str | Sequence[str]) -> list[str]:
    """Full names of the linear layers that a method sits on.

    Parameters
    ----------
    model : nn.Module
    target : str or sequence of str
        "auto" (all linear layers of the blocks; where there are no blocks, all but the last), "attention",
        "feed_forward", or names: full, a last part such as "q_proj", or with wildcards.

    Raises
    ------
    InputError
        A name fits no linear layer, or there is none at all.
    """
    every = [name for name, module in model.named_modules() if _linear(module) and OWN not in name]
    if isinstance(target, str) and target in ("auto", "attention", "feed_forward"):
        try:
            blocks = find_blocks(model)
        except InputError:
            if target != "auto" or len(every) < 2:
                raise
            return every[:-1]
        parts = {"auto": ("attention", "feed_forward")}.get(target, (target,))
        chosen = {name for block in blocks for part in parts for name in getattr(block, part)}
        return [name for name in every if name in chosen]
    found: list[str] = []
    for pattern in [target] if isinstance(target, str) else target:
        fitting = [n for n in every if n == pattern or n.endswith(f".{pattern}") or fnmatch.fnmatchcase(n, pattern)]
        if not fitting:
            raise InputError(f"target: no linear layer is called {pattern!r}; {nearest(pattern, _last_parts(every))}")
        found += fitting
    return list(dict.fromkeys(found))


def width_of(layer: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer or a `Conv1D` of transformers."""
    any_layer: Any = layer
    if is_conv1d(layer):
        rows, columns = any_layer.weight.shape
        return rows, columns
    return any_layer.in_features, any_layer.out_features


def without_storage(model: nn.Module) -> Any:
    """A copy whose parameters and buffers take no memory: to count what a method would add before it is added."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty: Any = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(model, memo)


@contextmanager
def unchanged_on_failure(model: nn.Module) -> Iterator[None]:
    """Undo what happened to a model's modules, hooks and flags if the body fails; entries of weights are not copied."""
    modules = [(module, {key: (value, copy.copy(value) if type(value) in (dict, OrderedDict) else None)
                         for key, value in vars(module).items()}) for module in model.modules()]  # fmt: skip
    parameters = [(parameter, parameter.data, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for module, attributes in modules:
            vars(module).clear()
            for key, (value, inside) in attributes.items():
                if inside is not None:  # the same dictionary, since handles of hooks refer to it
                    value.clear()
                    value.update(inside)
                vars(module)[key] = value
        for parameter, data, flag in parameters:
            parameter.data = data
            parameter.requires_grad_(flag)
        raise


def hold_statistics(model: nn.Module) -> None:
    """Let normalisation with running statistics use the base's, and never move them, in training mode too.

    They belong to the frozen base: a file of what was trained would not hold them.
    """
    for module in model.modules():
        if isinstance(getattr(module, "running_mean", None), torch.Tensor):
            module.register_forward_pre_hook(_in_evaluation)


def release_statistics(model: nn.Module) -> None:
    """Undo `hold_statistics`."""
    for module in model.modules():
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _in_evaluation]:
            del hooks[key]


def _in_evaluation(module: nn.Module, args: tuple[Any, ...]) -> None:
    module.training = False


def is_quantised(model: nn.Module) -> bool:
    """Whether weights are integers, or the model says that it was loaded quantised."""
    if getattr(model, "is_quantized", False) or getattr(model, "is_loaded_in_4bit", False):
        return True
    return any(not (p.is_floating_point() or p.is_complex()) for p in model.parameters())


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _nested(layer: nn.Module) -> bool:
    """Whether a layer holds a list of blocks itself, as a level of a U-Net does."""
    return any(
        isinstance(part, nn.ModuleList) and any(_ATTENTION.search(n) for n, _ in child.named_modules() if n)
        for part in layer.modules()
        for child in (part if isinstance(part, nn.ModuleList) else ())
        if any(_linear(m) and not _ATTENTION.search(n) for n, m in child.named_modules())
    )


def _last_parts(names: Sequence[str]) -> list[str]:
    return [name.rpartition(".")[2] for name in names]
