"""Networks that are trained once: cached by the recipe's source, the seed and the library versions."""

from __future__ import annotations

import hashlib
import inspect
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import nn

import salience
from salience.errors import InputError
from salience.io.place import home
from salience.reproductions.worlds.nets import seeded


class Recipe(NamedTuple):
    """How to make a trained network, as two plain functions defined at the top of a module.

    ``build(seed)`` returns the untrained network, ``train(model, seed)`` trains it in place. What they draw
    from torch's random numbers is seeded by `trained`.
    """

    build: Callable[[int], nn.Module]
    train: Callable[[nn.Module, int], None]


def trained(recipe: Recipe, seed: int) -> nn.Module:
    """The network of `recipe` for `seed`, trained now or taken from ``home()/worlds``; in evaluation mode.

    The cache's key holds the source of both functions, the source of the functions and the values of the
    constants (numbers, strings, tuples) that they use from their own module, the seed, and the
    versions of torch, numpy and salience. What they use from elsewhere counts as part of salience's version.
    A damaged file is trained anew; processes that race write the same network, and each sees a whole file.

    Raises
    ------
    InputError
        A function of the recipe has no source to go by: a lambda, closure or partial, or typed at a prompt.
    """
    folder = home() / "worlds"
    folder.mkdir(parents=True, exist_ok=True)  # fails before the training, not after it
    path = folder / f"{key(recipe, seed)}.safetensors"
    if path.exists():
        with seeded(seed):
            model = recipe.build(seed)
        if _load(model, path):
            return model.eval()
    with seeded(seed):
        model = recipe.build(seed).train()
        recipe.train(model, seed)
    _save(model, path)
    return model.eval()


def key(recipe: Recipe, seed: int) -> str:
    """The name under which a trained network is cached: 32 hexadecimal digits."""
    parts = [f"seed {seed}", torch.__version__, np.__version__, salience.__version__]
    seen: set[FunctionType] = set()
    for function in recipe:
        parts += _sources(function, seen)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _sources(function: Any, seen: set[FunctionType]) -> Iterator[str]:
    """Source of a function, and of the functions and constants that it uses from its own module."""
    function = inspect.unwrap(function)  # run-time type checks wrap
    name = getattr(function, "__qualname__", repr(function))
    if not inspect.isfunction(function) or "<" in name or function.__closure__:
        raise InputError(f"a recipe must be made of functions defined at the top of a module; {name} is not one")
    if function in seen:
        return
    seen.add(function)
    try:
        yield inspect.getsource(function)
    except OSError as error:
        raise InputError(f"the source of {name} cannot be read, so that no cache can be keyed by it") from error
    for used in sorted(_names(function.__code__)):
        value = function.__globals__.get(used)
        if isinstance(value, (int, float, str, tuple)):
            yield f"{used} = {value!r}"
        elif inspect.isfunction(value) and value.__module__ == function.__module__:
            yield from _sources(value, seen)


def _names(code: CodeType) -> set[str]:
    """Names that a function's code looks up, functions inside it included."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _save(model: nn.Module, path: Path) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    os.close(handle)
    try:
        save_model(model, temporary, metadata={"digest": _digest(model)})
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _load(model: nn.Module, path: Path) -> bool:
    """Fill `model` from `path`; False if it does not hold what was saved."""
    try:
        with safe_open(path, framework="pt") as file:
            digest = (file.metadata() or {}).get("digest")
        load_model(model, path)
    except (FileNotFoundError, SafetensorError, RuntimeError):  # gone, cut short, or other shapes
        return False
    return digest == _digest(model)


def _digest(model: nn.Module) -> str:
    """Hash of all weights: safetensors itself would not notice a changed byte."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(name.encode() + flat.numpy().tobytes())
    return digest.hexdigest()
