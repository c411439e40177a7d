"""Load a model and its processor from a local directory or file, without running code from either."""

from __future__ import annotations

import importlib
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model
from torch import nn

from salience.errors import DataError, InputError, nearest
from salience.model.narrowing import check_size, read_shapes, reshape, shapes_file
from salience.model.safe import check_directory, check_header

_PROCESSOR_FILES = (
    "processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json",
)  # fmt: skip


class Loaded(NamedTuple):
    """A model in evaluation mode, and its tokenizer or image processor (None where there is none)."""

    model: nn.Module
    processor: Any


def load(
    path: str | os.PathLike,
    *,
    arch: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Loaded:
    """Load a model for reading: checked first, whole, and in evaluation mode.

    Parameters
    ----------
    path : path-like
        A `transformers` directory, or a ``.safetensors`` file with the weights of `arch`. A narrowed model
        (``salience_shapes.json`` in the directory, ``FILE.safetensors.shapes.json`` beside the file) gets the
        shapes listed there.
    arch : str, optional
        For a file: ``"package.module:factory"``, your own function that is called without arguments and
        builds the network. The weights must fit it exactly.
    device : torch.device or str, optional
        Where to put the model; the CPU when left out.
    dtype : torch.dtype, optional
        The type of its parameters; when left out that of the directory, or that `arch` builds.

    Raises
    ------
    InputError
        `path` is no local directory or safetensors file, or `arch` cannot be imported.
    DataError
        The directory could run code (see `check_directory`), or weights are missing or do not fit.
    """
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise InputError(f"dtype: got {dtype!r}; give a torch.dtype such as torch.float16")
    if os.path.isfile(path):
        return Loaded(_load_file(Path(path), arch, dtype).to(device or "cpu").eval(), None)
    if arch is not None:
        raise InputError(f"arch: goes with a FILE.safetensors; {os.fspath(path)!r} is not such a file")
    root = check_directory(path)
    model = _load_directory(root, dtype).to(device or "cpu").eval()
    return Loaded(model, load_processor(root))


def _load_file(file: Path, arch: str | None, dtype: torch.dtype | None) -> nn.Module:
    if file.suffix != ".safetensors":
        raise InputError(
            f"model: {file} is not a .safetensors file. Other formats run code when read; convert it "
            "where you trust it with safetensors.torch.save_model(network, 'FILE.safetensors')"
        )
    if arch is None:
        raise InputError(f"arch: {file} holds weights only; name what builds the network, package.module:factory")
    check_header(file)
    model = factory(arch)()
    if not isinstance(model, nn.Module):
        raise InputError(f"arch: {arch} returned a {type(model).__name__}; it must return a torch.nn.Module")
    if (listed := shapes_file(file)).is_file():
        reshape(model, read_shapes(listed), str(listed))
    _fill(model, file, arch)
    return model.to(dtype) if dtype is not None else model


def _fill(model: nn.Module, file: Path, arch: str) -> None:
    """Load all tensors of `file` into `model`, which they must fit exactly."""
    try:
        # Knows tied weights: a key whose tensor is shared with a stored one does not count as missing.
        missing, unexpected = load_model(model, file, strict=False)
    except (RuntimeError, SafetensorError) as error:  # a shape that does not fit, a broken file
        raise DataError(f"{file}: cannot be loaded into {arch}: {error}") from error
    _refuse_missing(str(file), missing)
    if unexpected:
        raise DataError(f"{file}: {arch} has no place for {_some(unexpected)}")


def factory(arch: str) -> Callable[[], Any]:
    """The function that ``package.module:factory`` names.

    Raises
    ------
    InputError
        It cannot be imported.
    """
    module_name, _, name = arch.partition(":")
    if not (module_name and name):
        raise InputError(f"arch: got {arch!r}; it must read package.module:factory")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(f"arch: cannot import {module_name!r}: {error}; is it installed or on PYTHONPATH?") from error
    if not callable(getattr(module, name, None)):
        names = [n for n in dir(module) if callable(getattr(module, n)) and not n.startswith("_")]
        raise InputError(f"arch: {module_name} has no function {name!r}; {nearest(name, names)}")
    return getattr(module, name)


_SAFELY: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}


def skeleton(path: str | os.PathLike) -> nn.Module:
    """The network of a directory without its weights, on the meta device: names, shapes and layers, in no memory.

    Raises
    ------
    InputError, DataError
        As `load`.
    """
    root = check_directory(path)
    config, cls = _class(root)
    model = _empty(root, config, cls)
    if (listed := shapes_file(root)).is_file():
        reshape(model, read_shapes(listed), str(listed))
    return model


def _class(root: Path) -> tuple[Any, Any]:
    """Configuration of a directory, and the class that wrote it, so that a classifier comes back with its head."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(root, **_SAFELY)
    except Exception as error:  # what a broken configuration raises is up to each model's own code
        raise DataError(f"{root}: no transformers model: {error}") from error
    name = str((getattr(config, "architectures", None) or ["AutoModel"])[0])
    cls: Any = getattr(transformers, name, None)
    if not hasattr(cls, "from_pretrained"):
        raise DataError(f"{root}: architecture {name!r} is not in transformers {transformers.__version__}")
    return config, cls


def _attention(cls: Any) -> str:
    # Said aloud, since what is left out is taken from the directory's configuration.
    return "sdpa" if getattr(cls, "_supports_sdpa", False) else "eager"


def _builder(cls: Any) -> Any:
    """What builds the network from its configuration; of `AutoModel` it is public."""
    return getattr(cls, "_from_config", None) or cls.from_config


def _empty(root: Path, config: Any, cls: Any) -> nn.Module:
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            return _builder(cls)(config, attn_implementation=_attention(cls))
    except Exception as error:
        raise DataError(f"{root}: cannot be built as {cls.__name__}: {error}") from error


def _load_narrowed(root: Path, dtype: torch.dtype | None) -> nn.Module:
    """A model whose widths are not those of its configuration; one file of weights under the network's own names."""
    config, cls = _class(root)
    listed, file = shapes_file(root), root / "model.safetensors"
    if not file.is_file():
        raise DataError(f"{root}: has {listed.name} but no {file.name}")
    shapes = read_shapes(listed)
    plan = _empty(root, config, cls)
    try:
        with safe_open(file, framework="pt") as stored:
            count = sum(math.prod(stored.get_slice(key).get_shape()) for key in stored.keys())  # noqa: SIM118
    except SafetensorError as error:
        raise DataError(f"{file}: not readable as safetensors: {error}") from error
    check_size(plan, count, str(listed))
    reshape(plan, shapes, str(listed))  # what is wrong with the list is found before anything is allocated
    with torch.random.fork_rng(devices=[]):
        # Built for real and not on the meta device: buffers that are not stored are computed by its constructor.
        model = _builder(cls)(config, attn_implementation=_attention(cls), dtype=dtype or config.dtype)
    reshape(model, shapes, str(listed))
    _fill(model, file, cls.__name__)
    return model


def _load_directory(root: Path, dtype: torch.dtype | None) -> nn.Module:
    if shapes_file(root).is_file():
        return _load_narrowed(root, dtype)
    config, cls = _class(root)
    name = cls.__name__
    try:
        model, info = cls.from_pretrained(
            root,
            config=config,
            dtype=dtype or "auto",
            use_safetensors=True,
            attn_implementation=_attention(cls),
            output_loading_info=True,
            **_SAFELY,
        )
    except Exception as error:
        raise DataError(f"{root}: cannot be loaded as {name}: {error}") from error
    _refuse_missing(str(root), info["missing_keys"])
    if info["unexpected_keys"]:
        warnings.warn(f"{root}: {name} does not use {_some(info['unexpected_keys'])}", stacklevel=3)
    return model


def load_processor(path: str | os.PathLike) -> Any:
    """The tokenizer or image processor of a model directory; None where there is none.

    Raises
    ------
    InputError, DataError
        As `load`.
    """
    import transformers

    root = check_directory(path)
    if not any((root / name).is_file() for name in _PROCESSOR_FILES):
        return None
    try:
        return transformers.AutoProcessor.from_pretrained(root, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise DataError(f"{root}: the model is fine, its tokenizer or processor is not: {error}") from error


def _refuse_missing(where: str, keys: Any) -> None:
    if keys:  # they would be left at random values, and everything computed afterwards would be noise
        raise DataError(f"{where}: no weights for {_some(keys)}")


def _some(keys: Any) -> str:
    keys = sorted(keys)
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
