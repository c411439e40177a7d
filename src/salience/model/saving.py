"""Save a model of other widths so that it can be loaded again."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_model
from torch import nn

from salience.errors import InputError
from salience.model.narrowing import differences, shapes_file, write_shapes
from salience.model.shards import WEIGHTS, copy_rest

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
        `path` exists, or does not fit the kind of model.
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
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        listed = _write_file(wide, narrow, folder, out) if config is None else _write(wide, narrow, folder, out, source)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return listed


def _write_file(wide: nn.Module, narrow: nn.Module, folder: Path, out: Path) -> bool:
    shapes = differences(wide, narrow)
    save_model(narrow, str(folder / out.name))
    listed = bool(shapes.shapes or shapes.identity)
    shapes_file(out).unlink(missing_ok=True)  # a list never lies beside weights other than its own
    if listed:
        write_shapes(shapes_file(folder / out.name), shapes)
        os.replace(shapes_file(folder / out.name), shapes_file(out))
    os.replace(folder / out.name, out)
    return listed


def _write(wide: nn.Module, narrow: nn.Module, folder: Path, out: Path, source: str | os.PathLike | None) -> bool:
    model: object = narrow
    target = folder / out.name
    target.mkdir()
    if source is not None:
        copy_rest(Path(source).resolve(), target)
        shapes_file(target).unlink(missing_ok=True)
    fitting = _fitting_config(narrow)
    listed = fitting is None
    if fitting is not None:
        before, narrow.config = narrow.config, fitting  # type: ignore[assignment]
        try:
            narrow.save_pretrained(target, max_shard_size="1000GB")  # type: ignore[operator]
        finally:
            narrow.config = before
    else:
        narrow.config.save_pretrained(target)  # type: ignore[operator, union-attr]
        if getattr(model, "can_generate", bool)() and source is None:
            narrow.generation_config.save_pretrained(target)  # type: ignore[operator, union-attr]
        save_model(narrow, str(target / WEIGHTS), {"format": "pt"})
        write_shapes(shapes_file(target), differences(_announced(narrow), narrow))
    if out.exists():
        old = folder / "old"
        os.replace(out, old)
    os.replace(target, out)
    return listed


def _announced(model: nn.Module, config: object = None) -> nn.Module:
    """The network that the configuration announces, without weights."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return type(model)._from_config(config or model.config)  # type: ignore[attr-defined]


def _fitting_config(model: nn.Module) -> object | None:
    """The model's configuration, with a narrower feed-forward part if need be, or None if none fits."""
    import copy

    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}

    def fits(config: object) -> bool:
        return {name: tuple(v.shape) for name, v in _announced(model, config).state_dict().items()} == shapes

    config = model.config
    if fits(config):
        return config
    wanted = differences(_announced(model), model)
    widths = {min(shape) if len(shape) > 1 else shape[0] for shape in wanted.shapes.values()}
    widths |= {size for shape in wanted.shapes.values() for size in shape}
    for field in _WIDTHS:
        if hasattr(config, field):
            for width in sorted(widths):
                changed = copy.deepcopy(config)
                setattr(changed, field, width)
                if fits(changed):
                    return changed
    return None
