"""Read or replace the activations at a named layer, with plain forward hooks.

A layer is named as `model.named_modules()` names it. Its output may be a tensor, a tuple or list, a named
tuple, or a `ModelOutput`: the *activations* are the first tensor in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from salience.errors import InputError, nearest


def layer(model: nn.Module, name: str) -> nn.Module:
    """The sub-module of `model` called `name`; an `InputError` tells the nearest names if there is none."""
    modules = dict(model.named_modules())
    if name not in modules:
        raise InputError(f"layer: {type(model).__name__} has no layer {name!r}; {nearest(name, filter(None, modules))}")
    return modules[name]


def run(model: nn.Module, inputs: Any) -> Any:
    """``model(inputs)``, ``model(*inputs)`` for a tuple or ``model(**inputs)`` for a mapping."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returned: its `logits` where it has some, else its first tensor."""
    logits = getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else _activations(output, "the model")


class _Captured(dict[str, Tensor]):
    def __missing__(self, name: str) -> Tensor:
        raise InputError(f"layer: nothing captured at {name!r}; it was not asked for, or the pass did not reach it")


@contextmanager
def capture(model: nn.Module, names: str | Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Record the output of each named layer while the model runs inside the ``with`` block.

    The layer's own output is kept and the rest of the network goes on with a copy of it. An operation in
    place further down (a ReLU, a residual sum) therefore cannot falsify what was recorded, and gradients
    flow through it: ``torch.autograd.grad(loss, captured[name])`` is the gradient at that layer. (Comparing
    version counters would tell *that* an output was overwritten, too late to have the values back.)

    Parameters
    ----------
    model : torch.nn.Module
        Its weights, gradients and training flag are left alone; the hooks go, whatever happens in the block.
    names : str or iterable of str
        Layers as in `model.named_modules()`.

    Yields
    ------
    dict of str to Tensor
        Filled as the model runs. A layer that runs more than once holds its last output.

    Raises
    ------
    InputError
        No such layer, a layer that gives no tensor, or a name read that no pass has reached.
    """
    captured = _Captured()

    def hook_for(name: str) -> Callable:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            captured[name] = _activations(output, name)
            return _with_activations(output, captured[name].clone())

        return hook

    with _hooks(model, {name: hook_for(name) for name in ([names] if isinstance(names, str) else names)}):
        yield captured


@contextmanager
def replace(model: nn.Module, name: str, fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let the layer `name` give ``fn(its activations)`` while the model runs inside the ``with`` block.

    A tuple or `ModelOutput` keeps its structure and its other entries. The hook goes, whatever happens.

    Raises
    ------
    InputError
        No such layer, a layer that gives no tensor, or an `fn` that returns something else.
    """

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        new = fn(_activations(output, name))
        if not isinstance(new, Tensor):
            raise InputError(f"fn: returned {type(new).__name__} for layer {name!r}; it must return a tensor")
        return _with_activations(output, new)

    with _hooks(model, {name: hook}):
        yield


@contextmanager
def training_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put the whole model in training or evaluation mode for a while; every module gets its own flag back."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, flag in before:
            module.training = flag


@contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Let a `transformers` model compute attention step by step, so that its weights can be read.

    Fused kernels never form the attention matrix: ``output_attentions=True`` would give nothing.

    Raises
    ------
    InputError
        The model cannot switch: it is not from `transformers`, or its class has only one implementation.
    """
    switch: Any = getattr(model, "set_attn_implementation", None)
    if switch is None:
        raise InputError(
            f"model: {type(model).__name__} is no transformers model, its attention cannot be made readable; "
            "read a layer that returns the weights itself, with salience.model.capture"
        )
    configs: list[Any] = list(
        {
            id(m.config): m.config
            for m in model.modules()
            if hasattr(m, "config") and hasattr(m.config, "_attn_implementation")
        }.values()
    )
    before = [(config, config._attn_implementation) for config in configs]
    try:
        switch("eager")
        fused = [type(config).__name__ for config in configs if config._attn_implementation != "eager"]
        if fused:
            raise InputError(
                f"model: {type(model).__name__} cannot switch its attention ({fused[0]}); load it with "
                "attn_implementation='eager'"
            )
        yield
    finally:
        for config, implementation in before:
            # Behind the property, which would set the sub-models' configurations as well.
            config._attn_implementation_internal = implementation


@contextmanager
def _hooks(model: nn.Module, hooks: Mapping[str, Callable]) -> Iterator[None]:
    # All names are looked up first: one that is wrong must not leave the others' hooks behind.
    layers = [layer(model, name) for name in hooks]
    handles = [at.register_forward_hook(hook) for at, hook in zip(layers, hooks.values(), strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _activations(output: Any, name: str) -> Tensor:
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    if isinstance(output, Mapping | tuple | list):
        for value in values:
            if isinstance(value, Tensor):
                return value
    raise InputError(f"layer: {name!r} returns {type(output).__name__}, which holds no tensor to read")


def _with_activations(output: Any, new: Tensor) -> Any:
    """`output` with its first tensor replaced, all else the same."""
    if isinstance(output, Tensor):
        return new
    if isinstance(output, Mapping):
        key = next(key for key, value in output.items() if isinstance(value, Tensor))
        return type(output)(**{**output, key: new})
    at = next(i for i, value in enumerate(output) if isinstance(value, Tensor))
    values = [*output[:at], new, *output[at + 1 :]]
    return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)
