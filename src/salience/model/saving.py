"""Save a model of other widths so that it can be loaded again."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import nn

from salience.errors import InputError
from salience.model.narrowing import differences, shapes_file, write_shapes
from salience.model.shards import INDEX, WEIGHTS, copy_rest

# Configuration fields that hold the width between the two layers of a transformer's feed-forward part.
_WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "encoder_ffn_dim", "d_ff")


def save_narrowed(
    wide: nn.Module,
    narrow: nn.Module,
    path: str | os.PathLike,
    *,
    source: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> bool:
    """Write a narrowed model, as a directory where it is one of `transformers` and as a safetensors file else.

    Where the new widths can be said in the configuration, as when all feed-forward parts were narrowed alike,
    they are, and `from_pretrained` loads the result. Where not, a list of shapes lies beside the weights, and
    `salience.model.load` reads it.

    Parameters
    ----------
    wide, narrow : torch.nn.Module
        The model before and after; neither is changed.
    path : path-like
        A directory, or ``FILE.safetensors`` for a model that is not from `transformers`. It appears under its
        name when it is complete.
    source : path-like, optional
        Directory of the model before, from which tokenizer, generation settings and the like are copied.
    overwrite : bool
        Replace what is at `path`.

    Returns
    -------
    bool
        Whether the result needs `salience.model.load`, because its shapes are those of a list.

    Raises
    ------
    InputError
        `path` exists, its folder does not, or it does not fit the kind of model.
    """
    out = Path(path).absolute()
    config = getattr(narrow, "config", None)
    if (config is None) != (out.suffix == ".safetensors"):
        kind = "a .safetensors file" if config is None else "a directory"
        raise InputError(f"path: {path} must name {kind} for {type(narrow).__name__}")
    if out.exists() and not overwrite:
        raise InputError(f"path: {path} exists; overwrite=True replaces it")
    if out.is_dir() and not (out / WEIGHTS).is_file():
        raise InputError(f"path: {path} is not a model directory, so it is not overwritten")
    if not out.parent.is_dir():
        raise InputError(f"path: folder {out.parent} does not exist")
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        listed = _write_file(wide, narrow, folder, out) if config is None else _write(narrow, folder, out, source)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return listed


def _write_file(wide: nn.Module, narrow: nn.Module, folder: Path, out: Path) -> bool:
    shapes = differences(wide, narrow)
    save_model(narrow, str(folder / out.name))
    listed = bool(shapes.shapes or shapes.identity)
    if listed:
        write_shapes(shapes_file(folder / out.name), shapes)
        os.replace(shapes_file(folder / out.name), shapes_file(out))
    # Killed here or below, weights lie beside the list of others, and loading them says so.
    os.replace(folder / out.name, out)
    if not listed:
        shapes_file(out).unlink(missing_ok=True)
    return listed


def _write(narrow: Any, folder: Path, out: Path, source: str | os.PathLike | None) -> bool:
    target = folder / out.name
    target.mkdir()
    if source is not None:
        copy_rest(Path(source).resolve(), target)
        shapes_file(target).unlink(missing_ok=True)
        (target / INDEX).unlink(missing_ok=True)
    before, fitting = narrow.config, _fitting_config(narrow)
    if fitting is not None:
        narrow.config = fitting
        try:
            narrow.save_pretrained(target, max_shard_size="1000GB")
        finally:
            narrow.config = before
    else:
        # Under the network's own names: what `transformers` renames when it saves, it would not find again.
        named = copy.deepcopy(before)
        named.architectures = [type(narrow).__name__]
        named.dtype = next(narrow.parameters()).dtype
        named.save_pretrained(target)
        save_model(narrow, str(target / WEIGHTS), {"format": "pt"})
        write_shapes(shapes_file(target), differences(_announced(narrow, before), narrow))
    if out.exists():
        os.replace(out, folder / "old")
    os.replace(target, out)
    return fitting is None


def _announced(model: Any, config: Any) -> nn.Module:
    """The network that a configuration announces, without weights."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return type(model)._from_config(config)


def _fitting_config(model: Any) -> Any:
    """The model's configuration, with a narrower feed-forward part if need be, or None if none fits."""
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}

    def fits(config: Any) -> bool:
        return {name: tuple(v.shape) for name, v in _announced(model, config).state_dict().items()} == shapes

    if fits(model.config):
        return model.config
    changed = differences(_announced(model, model.config), model).shapes
    for field in (field for field in _WIDTHS if hasattr(model.config, field)):
        for width in sorted({size for shape in changed.values() for size in shape}):
            config = copy.deepcopy(model.config)
            setattr(config, field, width)
            if fits(config):
                return config
    return None
