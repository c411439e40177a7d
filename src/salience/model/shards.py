"""Rewrite the weights of a model directory tensor by tensor, one shard in memory at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
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
    tensor_fn: Callable[[str, Tensor], Tensor],
    *,
    fingerprint: str = "",
    overwrite: bool = False,
    resume: bool = False,
) -> Path:
    """Write the model of `in_dir` to `out_dir`, each stored tensor replaced by ``tensor_fn(name, tensor)``.

    Shards, index, metadata, dtypes, configuration, generation settings and tokenizer are kept. Tied weights
    are stored once: `tensor_fn` sees them once, and they stay tied. `in_dir` is only read; `out_dir` appears
    under its name when it is complete. Peak memory is about one shard.

    Parameters
    ----------
    in_dir : path-like
        A `transformers` directory with ``model.safetensors``, single or sharded with an index.
    out_dir : path-like
        Where to write it.
    tensor_fn : callable
        Gets a tensor's name and value and returns one of the same shape, which is cast to the stored dtype.
        For `resume` to hold it must depend on nothing else, a random draw on the name and a seed only.
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
    _check_output(source, out, overwrite)
    partial = out.with_name(f".{out.name}.partial")
    finished = _finished(partial, source, fingerprint, overwrite, resume)
    for shard in shards:
        if shard not in finished:
            _rewrite_shard(source / shard, partial / shard, tensor_fn)
            finished[shard] = [_hash(source / shard), _hash(partial / shard)]
            _write_ledger(partial, fingerprint, finished)
    _copy_rest(source, partial)
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


def _check_output(source: Path, out: Path, overwrite: bool) -> None:
    if out == source or out.is_relative_to(source) or source.is_relative_to(out):
        raise InputError(f"out_dir: {out} and in_dir must not contain each other")
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


def _rewrite_shard(source: Path, target: Path, tensor_fn: Callable[[str, Tensor], Tensor]) -> None:
    tensors = {}
    with _open(source) as stored:
        metadata = stored.metadata()
        for name in sorted(stored.keys()):
            tensors[name] = _rewritten(name, stored.get_tensor(name), tensor_fn)
    # The name is given to whole files only, so that a resumed run never trusts half of one.
    unfinished = target.with_name(f"{target.name}.tmp")
    save_file(tensors, unfinished, metadata)
    os.replace(unfinished, target)


def _rewritten(name: str, tensor: Tensor, tensor_fn: Callable[[str, Tensor], Tensor]) -> Tensor:
    shape, dtype = tensor.shape, tensor.dtype
    with torch.no_grad():
        new = tensor_fn(name, tensor)
    if not isinstance(new, Tensor) or new.shape != shape:
        came = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
        raise InputError(f"tensor_fn: returned {came} for {name!r}; it must return a tensor of {tuple(shape)}")
    new = new.detach().to("cpu", dtype).contiguous()
    if (new.is_floating_point() or new.is_complex()) and not torch.isfinite(new).all():
        raise DataError(f"tensor_fn: {name!r} is not finite after it (NaN, infinite, or too large for {dtype})")
    return new


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise DataError(f"{file}: not readable as safetensors: {error}") from error


def _copy_rest(source: Path, partial: Path) -> None:
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
