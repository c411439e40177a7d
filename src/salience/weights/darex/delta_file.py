"""A pruned delta as a file of its own: the kept entries and where they lie, and whole what was not pruned."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from salience.errors import DataError, InputError
from salience.model.safe import check_header

_FORMAT = "salience delta 1"
_INDEX, _VALUE, _WHOLE = ".indices", ".values", ".whole"


def save_delta(
    path: str | os.PathLike,
    deltas: Mapping[str, Tensor],
    *,
    whole: Mapping[str, Tensor] | None = None,
    record: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write pruned deltas as safetensors: flat indices (int32 where they fit) and values of the kept entries.

    Parameters
    ----------
    path : path-like
        A ``.safetensors`` file.
    deltas : mapping of str to Tensor
        Sparse or dense, as `DeltaPruner.transform` gives them; zeros are left out.
    whole : mapping of str to Tensor, optional
        Tensors that replace those of the base: the head.
    record : mapping, optional
        How they came about (rate, q, seed); plain JSON data.
    dtype : torch.dtype
        Of the values.

    Raises
    ------
    InputError
        There is nothing to write, or a value does not fit `dtype`.
    """
    if not deltas and not whole:
        raise InputError("deltas: there are none to write")
    tensors, shapes = {}, {}
    for name, delta in deltas.items():
        flat = (delta.to_dense() if delta.is_sparse else delta).detach().reshape(-1)
        where = flat.nonzero()[:, 0]
        values = flat[where].to(dtype)
        if not torch.isfinite(values).all():
            raise InputError(f"deltas: {name!r} does not fit {dtype}")
        tensors[name + _INDEX] = where.to(torch.int32 if flat.numel() < 2**31 else torch.int64)
        tensors[name + _VALUE] = values
        shapes[name] = list(delta.shape)
    for name, tensor in (whole or {}).items():
        tensors[name + _WHOLE] = tensor.detach().contiguous()
    header = {"format": _FORMAT, "shapes": json.dumps(shapes), "record": json.dumps(dict(record or {}), default=str)}
    save_file(tensors, path, header)


def load_delta(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Read what `save_delta` wrote.

    Returns
    -------
    (dict of str to sparse Tensor, dict of str to Tensor, dict)
        Deltas as COO tensors, tensors that replace those of the base, and the record.

    Raises
    ------
    DataError
        The file is damaged, or was written by something else.
    """
    if not os.path.isfile(path):
        raise InputError(f"delta: {os.fspath(path)} is not a file")
    check_header(Path(path))
    try:
        with safe_open(path, framework="pt") as stored:
            header = stored.metadata() or {}
            if header.get("format") != _FORMAT:
                raise DataError(f"{os.fspath(path)}: not a delta file (its format is {header.get('format')!r})")
            shapes = json.loads(header["shapes"])
            deltas = {name: _sparse(stored, name, shape, path) for name, shape in shapes.items()}
            names: list[str] = list(stored.keys())
            whole = {name.removesuffix(_WHOLE): stored.get_tensor(name) for name in names if name.endswith(_WHOLE)}
    except (SafetensorError, KeyError, ValueError) as error:
        raise DataError(f"{os.fspath(path)}: damaged delta file: {error}") from error
    return deltas, whole, json.loads(header.get("record", "{}"))


@torch.no_grad()
def add_delta(model: nn.Module, deltas: Mapping[str, Tensor], whole: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Add deltas to a base model in place, and put the replaced tensors in.

    Supported: any `torch.nn.Module` whose parameters have the names and shapes of the deltas.

    Parameters
    ----------
    model : torch.nn.Module
        The base; its named parameters change.
    deltas : mapping of str to Tensor
        Sparse or dense.
    whole : mapping of str to Tensor, optional
        Parameters or buffers to replace.

    Raises
    ------
    DataError
        A name or shape that the model does not have; nothing is changed then.
    """
    named = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    for name, tensor in [*deltas.items(), *(whole or {}).items()]:
        if name not in named:
            raise DataError(f"{type(model).__name__}: has no parameter {name!r} to which a delta belongs")
        if named[name].shape != tensor.shape:
            raise DataError(
                f"{type(model).__name__}: {name!r} has shape {tuple(named[name].shape)}, "
                f"its delta {tuple(tensor.shape)}"
            )
    for name, delta in deltas.items():
        dense = delta.to_dense() if delta.is_sparse else delta
        named[name].copy_(named[name].float() + dense.to(named[name].device).float())
    for name, tensor in (whole or {}).items():
        named[name].copy_(tensor)
    return model


def _sparse(stored: Any, name: str, shape: list[int], path: str | os.PathLike) -> Tensor:
    where, values = stored.get_tensor(name + _INDEX).long(), stored.get_tensor(name + _VALUE)
    size = 1
    for axis in shape:
        size *= axis
    if where.shape != values.shape or (len(where) and not 0 <= int(where.min()) <= int(where.max()) < size):
        raise DataError(f"{os.fspath(path)}: the indices of {name!r} do not fit its shape {tuple(shape)}")
    if not shape:
        return values.float().sum().to_sparse()
    places = torch.stack(torch.unravel_index(where, tuple(shape)))
    return torch.sparse_coo_tensor(places, values.float(), tuple(shape), check_invariants=True).coalesce()
