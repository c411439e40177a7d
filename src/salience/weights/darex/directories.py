"""Prune and merge model directories block by block: no model is loaded, memory does not grow with its size."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from salience.errors import DataError, InputError, nearest
from salience.model.shards import TensorStore, rewrite
from salience.weights.darex.blocks import add_scaled
from salience.weights.darex.deltas import (
    BLOCK,
    BUFFERS,
    HEADS,
    check_rates,
    importance_delta,
    keep_block,
    mask_seed,
    prunable,
)
from salience.weights.darex.diagnosis import DeltaStats, StatsSum
from salience.weights.darex.pairing import in_names_of, is_own_part

Divisor = float | Mapping[str, float]
Method = Literal["linear", "task", "dare", "darex"]
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model")


class Pair(NamedTuple):
    """What a base and a fine-tuned directory have in common, and what not.

    Attributes
    ----------
    names : list of str
        The tensors to prune, as the fine-tuned model calls them.
    decoder : bool
    stats : DeltaStats or None
    added : list of str
        Tensors that only the fine-tuned model has, such as a new head: they stay as fine-tuned.
    """

    names: list[str]
    decoder: bool
    stats: DeltaStats | None
    added: list[str]


def check_pair(
    base: str | os.PathLike, tuned: str | os.PathLike, *, exclude: Sequence[str] = HEADS, look: bool = True
) -> Pair:
    """Check that two directories are a base and its fine-tuned model.

    Heads may differ: what only the base has is not looked at, what only the fine-tuned model has stays as it is, and
    the body may be named with or without the prefix of a model with a head. The vocabulary may have grown: then the
    rows of new tokens stay as fine-tuned.

    Parameters
    ----------
    base, tuned : path-like
    exclude : sequence of str
        Tensors that are not compared: the head.
    look : bool
        Read the weights once, for the statistics and to see that the delta is finite.

    Raises
    ------
    DataError
        Different architectures, tokenizers, tensors or shapes; integer weights; a delta that is not finite. Names the
        first tensor that does not fit.
    """
    with TensorStore(base) as before, TensorStore(tuned) as after:
        _same_family(before.path, after.path)
        grown = _same_vocabulary(before.path, after.path, may_grow=True)
        decoder = _decoder(after.path)
        partner = _same_tensors(before, after, exclude, grown)
        body = prunable(after.entries, decoder=decoder, exclude=exclude)
        names = [name for name in body if name in partner and _real(after, name)]
        sums = StatsSum()
        for name in names if look else ():
            entry = before.entries[partner[name]]
            for start, stop in entry.pieces(BLOCK):
                old, new = before.read(partner[name], start, stop), after.read(name, start, min(stop, entry.size))
                if not torch.isfinite(new.float() - old.float()).all():
                    raise DataError(f"{after.path}: {name!r} minus that of {before.path} is not finite")
                sums.add(name, old, new)
        added = sorted(after.entries.keys() - partner.keys())
    if not names:
        raise InputError("exclude: leaves no tensor to prune")
    return Pair(names, decoder, sums.result() if look else None, added)


def prune_directory(
    base: str | os.PathLike,
    tuned: str | os.PathLike,
    out: str | os.PathLike,
    names: Sequence[str],
    *,
    rate: float,
    q: Divisor | None = None,
    method: Literal["random", "magnitude"] = "random",
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Write base plus pruned delta for the tensors in `names`, the others as fine-tuned.

    Parameters
    ----------
    base, tuned, out : path-like
    names : sequence of str
        From `check_pair`.
    rate : float in [0, 1)
    q : float or mapping of str to float, optional
        ``1 - rate`` by default, which is DARE.
    method : {"random", "magnitude"}
        Magnitude holds a whole tensor in memory and does not rescale.
    seed : int
        Of the masks; each entry is drawn from seed, name and index alone, as in `DeltaPruner`.
    overwrite : bool
        Replace a model at `out`; never an input.

    Returns
    -------
    Path
        `out`.
    """
    chosen = set(names)
    divisors = {name: check_rates(rate, q[name] if isinstance(q, Mapping) else q) for name in names}
    with TensorStore(base) as before, TensorStore(tuned) as after:
        partner = in_names_of(before.entries, after.entries)
        if missing := sorted(chosen - partner.keys()):
            raise InputError(f"names: {os.fspath(base)} has no {missing[0]!r}; take them from check_pair")
        if method == "magnitude":

            def whole(name: str, tensor: Tensor) -> Tensor:
                if name not in chosen:
                    return tensor
                old, new = before.read(partner[name]).float(), tensor.float()
                rows = old.shape[0] if old.ndim else 1
                shared = new[:rows] if old.ndim else new
                shared.copy_(importance_delta(shared - old, rate).add_(old))
                return new

            return rewrite(tuned, out, whole, inputs=[base], overwrite=overwrite)

        def piece(name: str, new: Tensor, start: int) -> Tensor:
            if name not in chosen:
                return new
            count = min(new.numel(), before.entries[partner[name]].size - start)
            if count <= 0:
                return new  # rows of new tokens
            old = before.read(partner[name], start, start + count).float()
            mask = keep_block(seed, name, start // BLOCK, count, 1 - rate)
            add_scaled(old, old, new[:count].float(), 1 / divisors[name], mask)
            return torch.cat([old, new[count:].float()]) if count < new.numel() else old

        return rewrite(tuned, out, piece, block=BLOCK, inputs=[base], overwrite=overwrite)


def merge_directories(
    models: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    method: Method = "linear",
    weights: Sequence[float] | None = None,
    rate: float = 0.9,
    q: Divisor | None = None,
    exclude: Sequence[str] = HEADS,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Put several fine-tuned models of one base into one.

        linear    theta = sum_i w_i theta_i / sum_i w_i
        task      theta = theta_P + sum_i w_i (theta_i - theta_P)
        dare      theta = theta_P + sum_i w_i m_i (theta_i - theta_P) / (1 - p)
        darex     theta = theta_P + sum_i w_i m_i (theta_i - theta_P) / q

    What dare and darex do not prune (heads; of decoders all but attention and feed-forward) is merged as in task
    arithmetic where the base has it, else as in linear. Running statistics are averaged. Configuration and tokenizer
    are those of the first model.

    Parameters
    ----------
    models : sequence of path-like
        Two directories or more.
    out : path-like
    base : path-like, optional
        The common base; needed by all but linear.
    method : {"linear", "task", "dare", "darex"}
    weights : sequence of float, optional
        One per model; ``1 / n`` each by default.
    rate : float
        p, of dare and darex.
    q : float or mapping of str to float
        Of darex.
    exclude : sequence of str
    seed : int
        Model i has its own masks, which no other model and no other seed shares.
    overwrite : bool

    Returns
    -------
    Path
        `out`.

    Raises
    ------
    InputError
        An option out of range, or a method without what it needs.
    DataError
        Architectures, tokenizers, tensors or shapes differ, found before the first byte is written; or a result is not
        finite.
    """
    shares = _shares(models, weights)
    seeds = [mask_seed(seed, number) for number in range(len(models))]
    needs_base = method != "linear"
    if needs_base == (base is None):
        raise InputError(f"base: {'is needed by' if needs_base else 'means nothing to'} method {method!r}")
    if method == "darex" and q is None:
        raise InputError("q: is needed by darex; compress a delta with data to find it, or use method 'dare'")
    with ExitStack() as stack:
        stores = [stack.enter_context(TensorStore(model)) for model in models]
        before = stack.enter_context(TensorStore(base)) if base is not None else None
        body, partner = _check_models(stores, before, exclude)
        pruned = {name for name in body if _real(stores[0], name)} if method in ("dare", "darex") else set()
        divisors = {name: check_rates(rate, q[name] if isinstance(q, Mapping) else q) for name in pruned}
        total = sum(shares)
        if abs(total) < 1e-12:
            raise InputError(f"weights: {list(shares)} add up to zero")

        def merged(name: str, first: Tensor, start: int) -> Tensor:
            if not first.is_floating_point():
                return first  # counters and indices: those of the first model
            stop = start + first.numel()
            old = None if before is None else _base_piece(before, partner, name, start, stop)
            result = first.float().mul_(shares[0] / total) if old is None else old.clone()
            for number, (store, share) in enumerate(zip(stores, shares, strict=True)):
                if old is None:
                    if number:
                        result.add_(store.read(name, start, stop).float(), alpha=share / total)
                    continue
                part = (store.read(name, start, stop) if number else first).float()
                if name in pruned:
                    mask = keep_block(seeds[number], name, start // BLOCK, part.numel(), 1 - rate)
                    add_scaled(result, old, part, share / divisors[name], mask)
                else:
                    add_scaled(result, old, part, share)
            return result

        others = [*models[1:], *([base] if base is not None else [])]
        return rewrite(models[0], out, merged, block=BLOCK, inputs=others, overwrite=overwrite)


def _real(store: TensorStore, name: str) -> bool:
    """Whether a tensor holds real numbers, not counters or indices."""
    return store.entries[name].dtype.is_floating_point


def _base_piece(before: TensorStore, partner: Mapping[str, str], name: str, start: int, stop: int) -> Tensor | None:
    """The base's part of a tensor in float32; None where it has none, or it is a running statistic."""
    if name not in partner or name.split(".")[-1] in BUFFERS:
        return None
    return before.read(partner[name], start, stop).float()


def _shares(models: Sequence[object], weights: Sequence[float] | None) -> list[float]:
    if len(models) < 2:
        raise InputError(f"models: got {len(models)}; two or more are needed")
    if weights is None:
        return [1 / len(models)] * len(models)
    if len(weights) != len(models) or not np.isfinite(weights).all():
        raise InputError(f"weights: got {list(weights)}; one finite number for each of {len(models)} models is needed")
    return [float(weight) for weight in weights]


def _check_models(
    stores: Sequence[TensorStore], before: TensorStore | None, exclude: Sequence[str]
) -> tuple[set[str], dict[str, str]]:
    """Check that all models belong together; gives the tensors whose delta is pruned, and the base's names by ours."""
    first = stores[0]
    for other in [*stores[1:], *([before] if before else [])]:
        _same_family(first.path, other.path)
        _same_vocabulary(first.path, other.path, may_grow=False)
    for store in stores[1:]:
        _same_tensors(first, store, (), grown=False, same_head=True)
    body = set(prunable(first.entries, decoder=_decoder(first.path), exclude=exclude))
    if before is None:
        return body, {}
    # The base may have another head, but not one of the same name and another shape.
    partner = _same_tensors(before, first, exclude, grown=False)
    for name, own in partner.items():
        if before.entries[own].shape != first.entries[name].shape:
            raise DataError(f"{name!r} has another shape in {before.path} than in {first.path}")
    return body & partner.keys(), partner


def _same_tensors(
    before: TensorStore, after: TensorStore, exclude: Sequence[str], grown: bool, same_head: bool = False
) -> dict[str, str]:
    """Gives the first's name of each tensor that both have, by the second's name.

    What is not excluded must have one shape, but with `grown` embeddings may have more rows. Without `same_head`
    either may have parts that the other lacks as a whole.
    """
    partner = {name: name for name in before.entries} if same_head else in_names_of(before.entries, after.entries)
    for name in prunable(sorted(partner.keys() | after.entries.keys()), decoder=False, exclude=exclude):
        if name not in partner or name not in after.entries:
            store, names = (after, after.entries) if name in partner else (before, partner)
            entry = before.entries[partner[name]] if name in partner else after.entries[name]
            if same_head or (entry.dtype.is_floating_point and not is_own_part(name, names)):
                there = before if store is after else after
                near = nearest(name, names)
                raise DataError(f"{store.path}: has no tensor {name!r}, which is in {there.path}; {near}")
            continue
        old, new = before.entries[partner[name]], after.entries[name]
        taller = grown and len(old.shape) == 2 and old.shape[1:] == new.shape[1:] and new.shape[0] > old.shape[0]
        if old.shape != new.shape and not taller:
            raise DataError(f"{name!r} has shape {old.shape} in {before.path} and {new.shape} in {after.path}")
        for entry in (old, new):
            if len(entry.shape) > 1 and not entry.dtype.is_floating_point:
                raise DataError(f"{entry.file}: {name!r} has dtype {entry.dtype}; dequantise the weights first")
    return {name: own for name, own in partner.items() if name in after.entries}


def _same_family(one: Path, two: Path) -> None:
    first, second = _config(one), _config(two)
    if first.get("model_type") != second.get("model_type"):
        raise DataError(
            f"{one} is a {first.get('model_type')!r} model and {two} a {second.get('model_type')!r}: "
            "only models of one architecture go together"
        )


def _same_vocabulary(one: Path, two: Path, may_grow: bool) -> bool:
    """Refuse different tokenizers; gives whether the second has more tokens than the first, where it may."""
    sizes: list[int] = [_config(path).get("vocab_size", 0) for path in (one, two)]
    present = [file for file in _VOCABULARIES if (one / file).is_file() and (two / file).is_file()]
    grown = may_grow and sizes[1] > sizes[0]
    if sizes[0] != sizes[1] and not grown:
        raise DataError(f"{one} has a vocabulary of {sizes[0]} and {two} of {sizes[1]}; they must be the same")
    for file in present:
        first, second = (_vocabulary(path / file) for path in (one, two))
        more = (
            may_grow and isinstance(first, dict) and isinstance(second, dict)
            and all(second.get(token) == number for token, number in first.items())
        )  # fmt: skip
        if first != second and not more:
            raise DataError(f"{one / file} and {two / file} differ: the models have different tokenizers")
        grown = grown or (first != second and bool(more))
    return grown


def _vocabulary(file: Path) -> dict[str, object] | list[str] | bytes:
    """What decides which token a number stands for; how texts are padded or cut does not."""
    if file.suffix == ".txt":
        lines = file.read_text(encoding="utf-8").splitlines()
        return [line for line in lines if not line.startswith("#version")] if file.name == "merges.txt" else lines
    if file.suffix != ".json":
        return file.read_bytes()
    content = json.loads(file.read_text(encoding="utf-8"))
    if file.name == "vocab.json":
        return content
    model = content.get("model", {})
    vocabulary = model.get("vocab", {})
    if isinstance(vocabulary, list):
        vocabulary = {str(entry[0]): number for number, entry in enumerate(vocabulary)}
    added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    # One merge is written "a b" by older versions and ["a", "b"] by newer ones.
    merges = [each.split(" ") if isinstance(each, str) else each for each in model.get("merges") or []]
    return {**vocabulary, **added, "\0merges": json.dumps(merges), "\0type": model.get("type")}


def _config(path: Path) -> dict:
    file = path / "config.json"
    if not file.is_file():
        raise DataError(f"{path}: has no config.json, so it is not a transformers model")
    return json.loads(file.read_text(encoding="utf-8"))


def _decoder(path: Path) -> bool:
    names = _config(path).get("architectures") or []
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
