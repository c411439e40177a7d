"""Load a model and its processor from a local directory or file, without running code from either."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import nn

from salience.errors import DataError, InputError, nearest
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
        A `transformers` directory, or a ``.safetensors`` file with the weights of `arch`.
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
    return Loaded(model, _load_processor(root))


def _load_file(file: Path, arch: str | None, dtype: torch.dtype | None) -> nn.Module:
    if file.suffix != ".safetensors":
        raise InputError(
            f"model: {file} is not a .safetensors file. Other formats run code when read; convert it "
            "where you trust it with safetensors.torch.save_model(network, 'FILE.safetensors')"
        )
    if arch is None:
        raise InputError(f"arch: {file} holds weights only; name what builds the network, package.module:factory")
    check_header(file)
    model = _factory(arch)()
    if not isinstance(model, nn.Module):
        raise InputError(f"arch: {arch} returned a {type(model).__name__}; it must return a torch.nn.Module")
    try:
        # Knows tied weights: a key whose tensor is shared with a stored one does not count as missing.
        missing, unexpected = load_model(model, file, strict=False)
    except (RuntimeError, SafetensorError) as error:  # a shape that does not fit, a broken file
        raise DataError(f"{file}: cannot be loaded into {arch}: {error}") from error
    _refuse_missing(str(file), missing)
    if unexpected:
        raise DataError(f"{file}: {arch} has no place for {_some(unexpected)}")
    return model.to(dtype) if dtype is not None else model


def _factory(arch: str) -> Callable[[], Any]:
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


def _load_directory(root: Path, dtype: torch.dtype | None) -> nn.Module:
    import transformers

    safely: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    try:
        config = transformers.AutoConfig.from_pretrained(root, **safely)
    except Exception as error:  # what a broken configuration raises is up to each model's own code
        raise DataError(f"{root}: no transformers model: {error}") from error
    # The class that wrote the directory, so that a classifier comes back with its head.
    name = str((getattr(config, "architectures", None) or ["AutoModel"])[0])
    cls: Any = getattr(transformers, name, None)
    if not hasattr(cls, "from_pretrained"):
        raise DataError(f"{root}: architecture {name!r} is not in transformers {transformers.__version__}")
    try:
        model, info = cls.from_pretrained(
            root,
            config=config,
            dtype=dtype or "auto",
            use_safetensors=True,
            # Said aloud, since what is left out is taken from the directory's configuration.
            attn_implementation="sdpa" if getattr(cls, "_supports_sdpa", False) else "eager",
            output_loading_info=True,
            **safely,
        )
    except Exception as error:
        raise DataError(f"{root}: cannot be loaded as {name}: {error}") from error
    _refuse_missing(str(root), info["missing_keys"])
    if info["unexpected_keys"]:
        warnings.warn(f"{root}: {name} does not use {_some(info['unexpected_keys'])}", stacklevel=3)
    return model


def _load_processor(root: Path) -> Any:
    import transformers

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
