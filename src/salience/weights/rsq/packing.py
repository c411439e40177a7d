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
from collections.abc import Mapping, Sequence
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


def save_packed(result: QuantResult, path: str | os.PathLike, *, source: str | os.PathLike | None = None) -> None:
    """Write a quantised model as codes: as small as it is on disk, and only `load_packed` reads it.

    Parameters
    ----------
    result : QuantResult
        From `RSQQuantizer.quantize`.
    path : path-like
        A folder that is not there yet.
    source : path-like, optional
        Directory of the model before, from which the tokenizer and the like are copied.

    Raises
    ------
    InputError
        `path` exists.
    """
    out = Path(path)
    if out.exists():
        raise InputError(f"path: {path} exists")
    out.mkdir()
    if source is not None:
        copy_rest(check_directory(source), out)
    model: Any = result.model
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], model.lm_head.weight.dtype
    config.save_pretrained(out)
    write_codes(out / CODES, result.matrices, result.grid, result.group_size, result.online)
    packed = {f"{name}.weight" for name in result.matrices}
    rest = {name: value.detach().cpu().contiguous() for name, value in model.named_parameters() if name not in packed}
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
        It is unsafe, or holds no packed model, or one that its configuration does not fit.
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
        return kept
    except (KeyError, ValueError, TypeError):
        raise DataError(f"{root / CODES}: is not a file of codes of this version") from None


@torch.no_grad()
def _fill(model: Any, codes: Any, rest: Any, kept: Mapping[str, Any]) -> list[str]:
    """Put all weights in place; gives the names of those that are not there."""
    grid = Grid(kept["bits"], kept["sym"], False, kept["grid"])
    coded, plain = set(codes.keys()), set(rest.keys())
    missing = []
    for name, parameter in model.named_parameters():
        matrix = name.removesuffix(".weight")
        if name in plain:
            value = rest.get_tensor(name)
        elif f"{matrix}.codes" in coded:
            scale = codes.get_tensor(f"{matrix}.scale")
            middle = torch.full_like(scale, 2 ** (grid.bits - 1))
            zero = codes.get_tensor(f"{matrix}.zero") if f"{matrix}.zero" in coded else middle
            columns = parameter.shape[1]
            unpacked = unpack_bits(codes.get_tensor(f"{matrix}.codes"), grid.bits, columns)
            value = grid.decode(unpacked, *spread(Scales(scale, zero), columns))
        else:
            missing.append(name)
            continue
        if value.shape != parameter.shape:
            raise DataError(f"{name}: stored as {tuple(value.shape)}, the configuration has {tuple(parameter.shape)}")
        parameter.copy_(value.to(parameter.dtype))
    return missing
