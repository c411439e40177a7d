"""Read and rewrite the weights of a model directory tensor by tensor, or block by block, without loading the model."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from salience.errors import DataError, InputError
from salience.model.safe import PICKLES, check_directory

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_LEDGER = ".rewrite.json"
# Weights in other formats would no longer be those of this model, and code is never passed on.
_NOT_COPIED = PICKLES | {".safetensors", ".gguf", ".onnx", ".py"}


def rewrite(
    in_dir: str | os.PathLike,
    out_dir: str | os.PathLike,
    tensor_fn: Callable[..., Tensor],
    *,
    block: int | None = None,
    inputs: Sequence[str | os.PathLike] = (),
    fingerprint: str = "",
    overwrite: bool = False,
    resume: bool = False,
) -> Path:
    """Write the model of `in_dir` to `out_dir`, each stored tensor replaced by ``tensor_fn(name, tensor)``.

    Shards, index, metadata, dtypes, configuration, generation settings and tokenizer are kept. Tied weights
    are stored once: `tensor_fn` sees them once, and they stay tied. `in_dir` is only read; `out_dir` appears
    under its name when it is complete. Memory holds one tensor at a time, or one block of it.

    Parameters
    ----------
    in_dir : path-like
        A `transformers` directory with ``model.safetensors``, single or sharded with an index.
    out_dir : path-like
        Where to write it.
    tensor_fn : callable
        Gets a tensor's name and value and returns one of the same shape, which is cast to the stored dtype.
        For `resume` to hold it must depend on nothing else, a random draw on the name and a seed only.
    block : int, optional
        For functions that act entry by entry: ``tensor_fn(name, piece, start)`` gets flat pieces of at most this
        many entries, the first of which has index `start` in the flattened tensor. It may change them in place, and
        must not keep them.
    inputs : sequence of path-like
        What `tensor_fn` reads besides `in_dir`: `out_dir` must lie apart from all of it.
    fingerprint : str
        What `tensor_fn` depends on (bits, seed, the other model's hash): a run is resumed only by its like.
    overwrite : bool
        Replace a model already at `out_dir`, or begin an interrupted run again.
    resume : bool
        Go on after the last finished shard of an interrupted run; the result is the same, byte for byte.

    Returns
    -------
    Path
        `out_dir`.

    Raises
    ------
    InputError
        `out_dir` cannot be used as asked, or `tensor_fn` returns something other than a tensor of that shape.
    DataError
        `in_dir` is unsafe or damaged, or a result is not finite; the message names the tensor.
    """
    source, out = check_directory(in_dir), Path(out_dir).resolve()
    shards = _shards(source)
    _check_output([source, *inputs], out, overwrite)
    partial = out.with_name(f".{out.name}.partial")
    finished = _finished(partial, source, fingerprint, overwrite, resume)
    left = [shard for shard in shards if shard not in finished]
    for shard in left:
        # After the last one nothing is left to resume, so that it needs no hashes: a model in one file has none taken.
        hashes = _rewrite_shard(source / shard, partial / shard, tensor_fn, block, hashed=shard != left[-1])
        if hashes:
            finished[shard] = hashes
            _write_ledger(partial, fingerprint, finished)
    copy_rest(source, partial)
    (partial / _LEDGER).unlink()
    if out.exists():
        old = out.with_name(f".{out.name}.old")
        shutil.rmtree(old, ignore_errors=True)  # from a run killed between the next two lines
        os.replace(out, old)
        os.replace(partial, out)
        shutil.rmtree(old)
    else:
        os.replace(partial, out)
    return out


class _Buffer:
    """Memory for one piece after another: fresh memory for each would cost as much as reading it."""

    def __init__(self) -> None:
        self._raw = torch.empty(0, dtype=torch.uint8)

    def of(self, size: int) -> Tensor:
        if self._raw.numel() < size:
            self._raw = torch.empty(size, dtype=torch.uint8)
        return self._raw[:size]


class Entry(NamedTuple):
    """Where a tensor lies: its type, its shape, and the offset of its first byte in `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    def pieces(self, block: int | None) -> list[tuple[int, int]]:
        """First and one-past-last index of flat pieces of at most `block` entries; all in one by default."""
        step = block or max(self.size, 1)
        return [(first, min(first + step, self.size)) for first in range(0, max(self.size, 1), step)]

    def read(self, stream: BinaryIO, first: int, last: int, into: _Buffer | None = None) -> Tensor:
        """Entries `first` to `last` of the flattened tensor, from its opened file; in memory that is used again."""
        # Read, not mapped: mapped pages count as memory of this process until the whole file is in it.
        size = (last - first) * self.dtype.itemsize
        raw = torch.empty(size, dtype=torch.uint8) if into is None else into.of(size)
        stream.seek(self.start + first * self.dtype.itemsize)
        if stream.readinto(raw.numpy()) != size:  # type: ignore[attr-defined]
            raise DataError(f"{self.file}: ends in the middle of a tensor")
        return raw.view(self.dtype)


class TensorStore:
    """The stored tensors of a model directory, read one by one or piece by piece; use it in a ``with`` block.

    Parameters
    ----------
    in_dir : path-like
        A `transformers` directory with ``model.safetensors``, single or sharded with an index.

    Attributes
    ----------
    path : Path
    entries : dict of str to Entry
        Type, shape and place of each tensor by name.

    Raises
    ------
    InputError
        `in_dir` is no directory.
    DataError
        It is unsafe or damaged.
    """

    def __init__(self, in_dir: str | os.PathLike) -> None:
        self.path = check_directory(in_dir)
        self.entries: dict[str, Entry] = {}
        for shard in _shards(self.path):
            _open(self.path / shard)
            self.entries |= header_of(self.path / shard)
        self._opened, self._buffer = ExitStack(), _Buffer()
        files = {entry.file for entry in self.entries.values()}
        self._streams = {file: self._opened.enter_context(open(file, "rb")) for file in files}  # noqa: SIM115

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """A tensor by its name, in its shape; with `last` a flat piece, which lasts until the next one is read."""
        entry = self.entries[name]
        stream = self._streams[entry.file]
        if last is None:
            whole = entry.read(stream, first, entry.size)
            return whole.view(entry.shape) if first == 0 else whole
        return entry.read(stream, first, last, self._buffer)

    def close(self) -> None:
        """Close the files."""
        self._opened.close()

    def __enter__(self) -> TensorStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}  # fmt: skip


def header_of(file: Path) -> dict[str, Entry]:
    """Where each tensor of a safetensors file lies; the file must have been checked to be one."""
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        described = json.loads(stream.read(length))
    described.pop("__metadata__", None)
    unknown = {each["dtype"] for each in described.values()} - set(DTYPES)
    if unknown:
        raise DataError(f"{file}: holds tensors of type {min(unknown)}, which torch does not have")
    return {
        name: Entry(file, DTYPES[each["dtype"]], tuple(each["shape"]), 8 + length + each["data_offsets"][0])
        for name, each in described.items()
    }


def _shards(source: Path) -> list[str]:
    """Names of the weight files, checked to hold exactly the tensors that the index promises."""
    if not (source / INDEX).is_file():
        if not (source / WEIGHTS).is_file():
            raise DataError(f"{source}: holds neither {WEIGHTS} nor {INDEX}")
        return [WEIGHTS]
    promised: dict[str, set[str]] = {}
    for name, shard in json.loads((source / INDEX).read_text(encoding="utf-8"))["weight_map"].items():
        promised.setdefault(shard, set()).add(name)
    for shard, names in promised.items():
        if not (source / shard).is_file():
            raise DataError(f"{source / INDEX}: names {shard}, which is not there")
        with _open(source / shard) as stored:
            wrong = names ^ set(stored.keys())
        if wrong:
            raise DataError(f"{source / shard}: holds other tensors than its index says ({min(wrong)})")
    return sorted(promised)


def _check_output(inputs: Sequence[str | os.PathLike], out: Path, overwrite: bool) -> None:
    for name in inputs:
        read = Path(name).resolve()
        if out == read or out.is_relative_to(read) or read.is_relative_to(out):
            raise InputError(f"out_dir: {out} and the input {read} must not contain each other")
    if not out.exists():
        return
    if not overwrite:
        raise InputError(f"out_dir: {out} exists; overwrite=True replaces it")
    if not ((out / WEIGHTS).is_file() or (out / INDEX).is_file()):
        raise InputError(f"out_dir: {out} is not a model directory, so it is not overwritten")


def _finished(partial: Path, source: Path, fingerprint: str, overwrite: bool, resume: bool) -> dict[str, list[str]]:
    """Finished shards of an interrupted run, with hashes of what was read and written; makes `partial`."""
    if partial.exists() and not (resume or overwrite):
        raise InputError(
            f"out_dir: an interrupted run is at {partial}; resume=True goes on, overwrite=True begins again"
        )
    if partial.exists() and not resume:
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    if not (partial / _LEDGER).is_file():
        _write_ledger(partial, fingerprint, {})
        return {}
    ledger = json.loads((partial / _LEDGER).read_text(encoding="utf-8"))
    if ledger["fingerprint"] != fingerprint:
        raise InputError(
            f"resume: the interrupted run had fingerprint {ledger['fingerprint']!r}, this one has "
            f"{fingerprint!r}; overwrite=True begins again"
        )
    for shard, (read, written) in ledger["finished"].items():
        if not (source / shard).is_file() or _hash(source / shard) != read:
            raise InputError(f"resume: {source / shard} has changed since; overwrite=True begins again")
        if not (partial / shard).is_file() or _hash(partial / shard) != written:
            raise DataError(f"{partial / shard}: damaged since it was written; overwrite=True begins again")
    return ledger["finished"]


def _rewrite_shard(
    source: Path, target: Path, tensor_fn: Callable[..., Tensor], block: int | None, hashed: bool
) -> list[str]:
    """Write one file; gives the hashes of what was read and written, taken on the way, if they are wanted."""
    _open(source)  # which checks that the header describes the file
    entries = sorted(header_of(source).items(), key=lambda item: item[1].start)
    digests = [xxhash.xxh3_128(), xxhash.xxh3_128()] if hashed else []
    # The name is given to whole files only, so that a resumed run never trusts half of one.
    unfinished = target.with_name(f"{target.name}.tmp")
    buffer = None if block is None else _Buffer()
    with open(source, "rb") as stored, open(unfinished, "wb") as out, torch.no_grad():
        header = stored.read(8)
        header += stored.read(int.from_bytes(header, "little"))
        for digest in digests:
            digest.update(header)
        out.write(header)
        for name, entry in entries:
            for start, stop in entry.pieces(block):
                piece = entry.read(stored, start, stop, buffer)
                if hashed:
                    digests[0].update(_bytes(piece))
                if block is None:
                    new = _rewritten(name, piece.view(entry.shape), tensor_fn)
                else:
                    new = _rewritten(name, piece, tensor_fn, start)
                written = _bytes(new)
                if hashed:
                    digests[1].update(written)
                out.write(written)
    os.replace(unfinished, target)
    return [digest.hexdigest() for digest in digests]


def _rewritten(name: str, tensor: Tensor, tensor_fn: Callable[..., Tensor], *start: int) -> Tensor:
    shape, dtype = tensor.shape, tensor.dtype
    new = tensor_fn(name, tensor, *start)
    if not isinstance(new, Tensor) or new.shape != shape:
        came = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
        raise InputError(f"tensor_fn: returned {came} for {name!r}; it must return a tensor of {tuple(shape)}")
    new = new.detach().to("cpu", dtype).contiguous()
    if not _finite(new):
        raise DataError(f"tensor_fn: {name!r} is not finite after it (NaN, infinite, or too large for {dtype})")
    return new


def _finite(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()) or not tensor.numel():
        return True
    if tensor.itemsize > 1 and not tensor.is_complex() and math.isfinite(float(tensor.sum(dtype=torch.float32))):
        return True  # one pass: a single NaN or infinity would have spread to the sum
    return bool(torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor).all())


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise DataError(f"{file}: not readable as safetensors: {error}") from error


def copy_rest(source: Path, partial: Path) -> None:
    """Copy what is neither weights nor code nor hidden: configuration, tokenizer, generation settings."""
    for file in sorted(source.rglob("*")):
        path = file.relative_to(source)
        hidden = any(part.startswith(".") for part in path.parts)
        other_index = path.name.endswith(".index.json") and path.name != INDEX
        if file.is_file() and not (hidden or other_index or file.suffix.lower() in _NOT_COPIED):
            (partial / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, partial / path)  # contents: a link of a cache becomes a file


def _write_ledger(partial: Path, fingerprint: str, finished: dict[str, list[str]]) -> None:
    unfinished = partial / f"{_LEDGER}.tmp"
    unfinished.write_text(json.dumps({"fingerprint": fingerprint, "finished": finished}), encoding="utf-8")
    os.replace(unfinished, partial / _LEDGER)


def _hash(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
