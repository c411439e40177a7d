"""A pruned delta as a file of its own: the kept entries and where they lie, and whole what was not pruned."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from salience.errors import DataError, InputError
from salience.model.safe import check_header
from salience.model.shards import DTYPES, header_of

_FORMAT = "salience delta 1"
_INDEX, _VALUE, _WHOLE = ".indices", ".values", ".whole"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


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
    with DeltaWriter(path, record or {}, dtype) as file:
        for name, delta in deltas.items():
            flat = (delta.to_dense() if delta.is_sparse else delta).detach().reshape(-1)
            where = flat.nonzero()[:, 0]
            file.add(name, tuple(delta.shape), where, flat[where])
        for name, tensor in (whole or {}).items():
            file.add_whole(name, tensor)


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
    with DeltaFile(path) as file:
        deltas = {name: _sparse(*file.kept(name), shape) for name, shape in file.shapes.items()}
        return deltas, {name: file.whole(name) for name in file.names - file.shapes.keys()}, file.record


class DeltaWriter:
    """Writes a delta file tensor by tensor: memory holds what is added, not the file; use it in a ``with`` block.

    Entries of one size go to a temporary file beside `path`, as those of 8, 4, 2 and 1 bytes must follow each other.
    The file has its name when it is complete; after an exception there is none.
    """

    def __init__(self, path: str | os.PathLike, record: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> None:
        self.path, self.record, self.dtype = Path(path), record, dtype
        self._shapes: dict[str, list[int]] = {}
        self._spools: dict[int, IO[bytes]] = {}
        self._written: dict[int, list[tuple[str, Tensor]]] = {}  # empty tensors: names, dtypes and shapes

    def add(self, name: str, shape: tuple[int, ...], where: Tensor, values: Tensor) -> None:
        """The kept entries of one tensor, by their index in the flattened tensor."""
        cast = values.to(self.dtype)
        if not torch.isfinite(cast).all():
            raise InputError(f"deltas: {name!r} does not fit {self.dtype}")
        self._shapes[name] = list(shape)
        self._append(name + _INDEX, where.to(torch.int32 if math.prod(shape) < 2**31 else torch.int64))
        self._append(name + _VALUE, cast)

    def add_whole(self, name: str, tensor: Tensor) -> None:
        """A tensor that replaces that of the base."""
        self._append(name + _WHOLE, tensor.detach())

    def __enter__(self) -> DeltaWriter:
        self._opened = ExitStack()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._opened:
            if kind is None:
                self._finish()

    def _append(self, name: str, tensor: Tensor) -> None:
        tensor = tensor.to("cpu").contiguous()
        if tensor.itemsize not in self._spools:
            spool = tempfile.TemporaryFile(dir=self.path.absolute().parent)  # noqa: SIM115
            self._spools[tensor.itemsize] = self._opened.enter_context(spool)
        self._spools[tensor.itemsize].write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
        self._written.setdefault(tensor.itemsize, []).append((name, tensor.to("meta")))

    def _finish(self) -> None:
        if not self._written:
            raise InputError("deltas: there are none to write")
        described: dict[str, Any] = {
            "__metadata__": {
                "format": _FORMAT, "shapes": json.dumps(self._shapes),
                "record": json.dumps(dict(self.record), default=str),
            }
        }  # fmt: skip
        sizes, at = sorted(self._written, reverse=True), 0
        for size in sizes:
            for name, tensor in self._written[size]:
                stop = at + size * tensor.numel()
                described[name] = {
                    "dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, stop],
                }  # fmt: skip
                at = stop
        header = json.dumps(described).encode()
        header += b" " * (-len(header) % 8)
        unfinished = self.path.with_name(f"{self.path.name}.tmp")
        try:
            with open(unfinished, "wb") as out:
                out.write(len(header).to_bytes(8, "little") + header)
                for size in sizes:
                    self._spools[size].seek(0)
                    shutil.copyfileobj(self._spools[size], out, 1 << 20)
            os.replace(unfinished, self.path)
        finally:
            unfinished.unlink(missing_ok=True)


class DeltaFile:
    """A delta file, read tensor by tensor; use it in a ``with`` block.

    Attributes
    ----------
    names : set of str
        All tensors that the delta changes.
    shapes : dict of str to tuple of int
        Of those of which entries were kept; the others are `whole`.
    record : dict

    Raises
    ------
    InputError
        There is no such file.
    DataError
        It is damaged, or was written by something else.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        if not os.path.isfile(path):
            raise InputError(f"delta: {os.fspath(path)} is not a file")
        self.path = Path(path)
        check_header(self.path)
        try:
            with safe_open(path, framework="pt") as stored:  # which checks that the header describes the file
                header = stored.metadata() or {}
            if header.get("format") != _FORMAT:
                raise DataError(f"{self.path}: not a delta file (its format is {header.get('format')!r})")
            self.record: dict[str, Any] = json.loads(header.get("record", "{}"))
            self.shapes = {name: tuple(map(int, shape)) for name, shape in json.loads(header["shapes"]).items()}
        except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{self.path}: damaged delta file: {error}") from error
        self._entries = header_of(self.path)
        whole = {name.removesuffix(_WHOLE) for name in self._entries if name.endswith(_WHOLE)}
        self.names = whole | self.shapes.keys()
        for name in self.shapes:
            if name in whole or not {name + _INDEX, name + _VALUE} <= self._entries.keys():
                raise DataError(f"{self.path}: damaged delta file: {name!r} has not its indices and values")

    def kept(self, name: str) -> tuple[Tensor, Tensor]:
        """Indices in the flattened tensor (int64), in rising order or not, and values (float32)."""
        where, values = self._read(name + _INDEX).long(), self._read(name + _VALUE)
        size = math.prod(self.shapes[name])
        if where.shape != values.shape or (len(where) and not 0 <= int(where.min()) <= int(where.max()) < size):
            raise DataError(f"{self.path}: the indices of {name!r} do not fit its shape {self.shapes[name]}")
        return where, values.float()

    def whole(self, name: str) -> Tensor:
        """A tensor that replaces that of the base."""
        return self._read(name + _WHOLE)

    def _read(self, name: str) -> Tensor:
        entry = self._entries[name]
        return entry.read(self._stream, 0, entry.size).view(entry.shape)

    def __enter__(self) -> DeltaFile:
        self._stream = open(self.path, "rb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()


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


def _sparse(where: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    if not shape:
        return values.sum().to_sparse()
    places = torch.stack(torch.unravel_index(where, shape))
    return torch.sparse_coo_tensor(places, values, shape, check_invariants=True).coalesce()
