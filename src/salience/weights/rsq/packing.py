"""Codes in a file: so many bits for each weight and no more, with the scales that give the weights back exactly.

``codes.safetensors`` holds for each matrix ``NAME.codes`` (out, bytes), ``NAME.scale`` and, of an asymmetric grid, also
``NAME.zero`` (out, groups); its metadata say how to read them. Code k of a row stands in the bits from ``k * bits`` on
of the row's bytes, lowest first.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from jaxtyping import UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from salience.errors import DataError, InputError
from salience.model.loading import skeleton
from salience.model.safe import check_directory
from salience.model.shards import copy_rest
from salience.weights.rsq.grids import Grid, Scales, spread
from salience.weights.rsq.layers import QuantizedMatrix
from salience.weights.rsq.quantizer import QuantResult
from salience.weights.rsq.rotating import attach, decoder_layers, online_turns

CODES, REST = "codes.safetensors", "rest.safetensors"
_FORMAT = "salience codes 1"


def pack_bits(codes: UInt8[Tensor, "out in_"], bits: int) -> UInt8[Tensor, "out bytes"]:
    """Codes of so many bits, side by side in bytes; each row begins with a byte of its own."""
    rows = []
    for part in codes.numpy():
        each = np.unpackbits(part[:, None], axis=1, bitorder="little")[:, :bits]
        rows.append(np.packbits(each.reshape(-1), bitorder="little"))
    return torch.from_numpy(np.stack(rows))


def unpack_bits(packed: UInt8[Tensor, "out bytes"], bits: int, columns: int) -> UInt8[Tensor, "out in_"]:
    """What `pack_bits` packed."""
    rows = []
    for part in packed.numpy():
        each = np.unpackbits(part, count=columns * bits, bitorder="little").reshape(columns, bits)
        rows.append(np.packbits(each, axis=1, bitorder="little")[:, 0])
    return torch.from_numpy(np.stack(rows))


def description(grid: Grid, group_size: int, online: bool) -> dict[str, str]:
    """The metadata of a file of codes."""
    kept = {
        "format": _FORMAT, "bits": grid.bits, "sym": grid.sym, "grid": grid.kind, "group_size": group_size,
        "online": online,
    }  # fmt: skip
    return {"salience": json.dumps(kept)}  # one key: of several the order in the file is left to chance


def write_codes(
    path: Path, matrices: Mapping[str, QuantizedMatrix], grid: Grid, group_size: int, online: bool = False
) -> None:
    """Write the codes of some matrices."""
    tensors: dict[str, Tensor] = {}
    for name, matrix in matrices.items():
        tensors[f"{name}.codes"] = pack_bits(matrix.codes, grid.bits)
        tensors[f"{name}.scale"] = matrix.scales.scale.contiguous()
        if not grid.sym and grid.kind == "uniform":
            tensors[f"{name}.zero"] = matrix.scales.zero.contiguous()
    save_file(tensors, path, description(grid, group_size, online))


def join_files(parts: Sequence[Path], out: Path) -> None:
    """One safetensors file with the tensors of several, copied without being read; metadata of the first."""
    header: dict[str, Any] = {}
    starts = []
    size = 0
    for part in parts:
        described, start = _head(part)
        starts.append(start)
        length = 0
        for name, entry in described.items():
            if name == "__metadata__":
                header.setdefault(name, entry)
                continue
            first, last = entry["data_offsets"]
            header[name] = {**entry, "data_offsets": [size + first, size + last]}
            length = max(length, last)
        size += length
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(out, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part, start in zip(parts, starts, strict=True):
            with open(part, "rb") as source:
                source.seek(start)
                shutil.copyfileobj(source, file, 1 << 20)


def _head(path: Path) -> tuple[dict[str, Any], int]:
    stream: BinaryIO
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return json.loads(stream.read(length)), 8 + length


@contextmanager
def built_beside(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name when all is in it; if that fails, it goes.

    Raises
    ------
    InputError
        `out` exists, or its folder does not.
    """
    if out.exists():
        raise InputError(f"out: {out} exists")
    if not out.absolute().parent.is_dir():
        raise InputError(f"out: folder {out.absolute().parent} does not exist")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir()
    try:
        yield partial
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def save_packed(result: QuantResult, path: str | os.PathLike, *, source: str | os.PathLike | None = None) -> None:
    """Write a quantised model as codes: as small as it is on disk, and only `load_packed` reads it.

    Parameters
    ----------
    result : QuantResult
        From `RSQQuantizer.quantize`.
    path : path-like
        A folder that is not there yet. It appears when it is complete.
    source : path-like, optional
        Directory of the model before, from which the tokenizer and the like are copied.

    Raises
    ------
    InputError
        `path` exists, or its folder does not.
    """
    model: Any = result.model
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], model.lm_head.weight.dtype
    packed = {f"{name}.weight" for name in result.matrices}
    rest = {name: value.detach().cpu().contiguous() for name, value in model.named_parameters() if name not in packed}
    with built_beside(Path(path)) as out:
        if source is not None:
            copy_rest(check_directory(source), out)
        config.save_pretrained(out)
        write_codes(out / CODES, result.matrices, result.grid, result.group_size, result.online)
        save_file(rest, out / REST, {"format": "pt"})


def load_packed(path: str | os.PathLike) -> nn.Module:
    """The model of a packed directory, its weights decoded, with the hooks that it needs; in evaluation mode.

    Parameters
    ----------
    path : path-like
        What `save_packed` or ``salience compress quantize --packed`` wrote.

    Raises
    ------
    InputError
        `path` is no directory.
    DataError
        It is unsafe, or holds no packed model, or a damaged one, or one that its configuration does not fit.
    """
    root = check_directory(path)
    if not ((root / CODES).is_file() and (root / REST).is_file()):
        raise DataError(f"{root}: holds no packed model, which has {CODES} and {REST}; from_pretrained may load it")
    plan: Any = skeleton(root)
    with torch.random.fork_rng(devices=[]):  # built for real: buffers that are not stored are computed
        model = type(plan)._from_config(plan.config, dtype=plan.config.dtype or torch.float32)
    model.tie_weights()
    try:
        with safe_open(root / CODES, framework="pt") as codes, safe_open(root / REST, framework="pt") as rest:
            kept = _described(codes, root)
            missing = _fill(model, codes, rest, kept)
    except SafetensorError as error:
        raise DataError(f"{root}: not readable as safetensors: {error}") from error
    if missing:
        raise DataError(f"{root}: no weights for {missing[0]}")
    if kept["online"]:
        across, inner = online_turns(model.config)
        for _, layer in decoder_layers(model):
            attach(layer, across, inner)
    return model.eval()


def _described(codes: Any, root: Path) -> dict[str, Any]:
    try:
        kept = json.loads((codes.metadata() or {})["salience"])
        if kept["format"] != _FORMAT:
            raise ValueError
        Grid(kept["bits"], kept["sym"], False, kept["grid"])
        int(kept["group_size"]), kept["online"]
        return kept
    except (KeyError, ValueError, TypeError):  # InputError is a ValueError
        raise DataError(f"{root / CODES}: is not a file of codes of this version") from None


@torch.no_grad()
def _fill(model: Any, codes: Any, rest: Any, kept: Mapping[str, Any]) -> list[str]:
    """Put all weights in place; gives the names of those that are not there."""
    grid = Grid(kept["bits"], kept["sym"], False, kept["grid"])
    coded, plain = set(codes.keys()), set(rest.keys())
    strange = coded | plain
    missing = []
    for name, parameter in model.named_parameters():
        matrix = name.removesuffix(".weight")
        strange -= {name, *(f"{matrix}.{part}" for part in ("codes", "scale", "zero"))}
        if name in plain:
            value = rest.get_tensor(name)
            _check_shape(name, value, tuple(parameter.shape))
        elif f"{matrix}.codes" in coded and parameter.ndim == 2:
            rows, columns = parameter.shape
            size = columns if kept["group_size"] == -1 else kept["group_size"]
            shapes = {"codes": (rows, -(-columns * grid.bits // 8)), "scale": (rows, columns // size)}
            if not grid.sym and grid.kind == "uniform":
                shapes["zero"] = shapes["scale"]
            parts = {}
            for part, shape in shapes.items():
                if f"{matrix}.{part}" not in coded:
                    raise DataError(f"{matrix}.{part}: is not there, its codes are")
                parts[part] = codes.get_tensor(f"{matrix}.{part}")
                _check_shape(f"{matrix}.{part}", parts[part], shape)
            if parts["codes"].dtype != torch.uint8:
                raise DataError(f"{matrix}.codes: stored as {parts['codes'].dtype}; bytes are wanted")
            scale = parts["scale"]
            zero = parts.get("zero", torch.full_like(scale, 2 ** (grid.bits - 1)))
            unpacked = unpack_bits(parts["codes"], grid.bits, columns)
            value = grid.decode(unpacked, *spread(Scales(scale, zero), columns))
        else:
            missing.append(name)
            continue
        parameter.copy_(value.to(parameter.dtype))
    if strange:
        raise DataError(f"{min(strange)}: is stored, the configuration has no such weight")
    return missing


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise DataError(f"{name}: stored as {tuple(value.shape)}, the configuration needs {shape}")
