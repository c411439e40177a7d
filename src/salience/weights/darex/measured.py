"""Prune or merge directories and measure it on the user's own data: what the commands do, without the printing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from salience.errors import DataError, InputError
from salience.model.loading import Loaded, load
from salience.model.shards import TensorStore, rewrite
from salience.weights.darex.delta_file import DeltaFile, DeltaWriter
from salience.weights.darex.deltas import BLOCK, HEADS, check_rates, importance_delta, keep_block, mask_seed
from salience.weights.darex.diagnosis import DeltaStats, Recommendation, recommend
from salience.weights.darex.directories import Divisor, Pair, check_pair, merge_directories, prune_directory
from salience.weights.darex.pruner import DeltaPruner, is_decoder
from salience.weights.darex.rescaling import search
from salience.weights.evaluation import Comparison, Evaluation, compare
from salience.weights.model_output import model_output, put_directory, work_folder

Step = Callable[[str], None]
_FLATTERS = "the same command chose q and measured it, on other masks: its figure flatters somewhat"


@dataclass
class Changed:
    """What was done, how q was chosen, and how it compares.

    Parameters
    ----------
    out : str
    method : str
    q : float or mapping of str to float or None
    branch : str
        How q was chosen, in words.
    comparison : Comparison or None
        The result under the name of its method, beside inputs and baselines.
    against : str
        The baseline that decides: the best one of equal size.
    stats : DeltaStats or None
    recommendation : Recommendation or None
    search : list of (float, float)
        Candidates and their scores, larger is better.
    notes : list of str
    """

    out: str
    method: str
    q: Divisor | None
    branch: str
    comparison: Comparison | None = None
    against: str = "dare"
    stats: DeltaStats | None = None
    recommendation: Recommendation | None = None
    search: list[tuple[float, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def compress_delta(
    base: str | os.PathLike,
    tuned: str | os.PathLike,
    out: str | os.PathLike,
    *,
    evaluation: Evaluation | None,
    method: Literal["darex", "dare", "magnitude"] = "darex",
    rate: float = 0.99,
    rescale: float | str = "auto",
    selection: str = "auto",
    exclude: Sequence[str] = HEADS,
    seed: int = 0,
    overwrite: bool = False,
    step: Step = lambda _: None,
) -> Changed:
    """Drop most of a delta, choose q on one half of the user's examples and measure on the other.

    Writes a model directory, or with an `out` that ends in ``.safetensors`` the pruned delta alone. Beside the result
    stand DARE and the largest entries at equal rate, the fine-tuned model, and the base where it has the same tensors.

    Parameters
    ----------
    base, tuned, out : path-like
    evaluation : Evaluation or None
        Needed by darex unless `rescale` is a number. Of a command the same figure chooses q and measures.
    method : {"darex", "dare", "magnitude"}
    rate : float in [0, 1)
    rescale, selection
        As in `DeltaPruner`.
    exclude : sequence of str
    seed : int
    overwrite : bool
    step : callable
        Told what is done next.
    """
    check_rates(rate, None)
    if method != "darex" and rescale != "auto":
        raise InputError(f"rescale: belongs to darex; {method} has none to choose")
    if method == "darex" and isinstance(rescale, str) and evaluation is None:
        raise InputError("rescale: give data or a command to choose q on, or q itself, or take method 'dare'")
    as_file = Path(out).suffix == ".safetensors"
    with model_output(out, overwrite, [base, tuned], evaluation) as output:
        work = work_folder(output)
        step("checking the models")
        pair = check_pair(base, tuned, exclude=exclude)
        if as_file:
            _check_restorable(base, tuned)
        chosen, measured = _parts(evaluation)
        step("choosing q")
        result = _chosen(base, tuned, pair, chosen, work, method, rate, rescale, selection, exclude, seed)
        result.out, result.stats = os.fspath(out), pair.stats
        if pair.added:
            some = ", ".join(pair.added[:4]) + (f" and {len(pair.added) - 4} more" if len(pair.added) > 4 else "")
            result.notes.append(f"only the fine-tuned model has {some}: kept as fine-tuned")
        assert pair.stats is not None
        result.recommendation = recommend(
            pair.stats, can_train=False, has_labels=evaluation is not None, decoder=pair.decoder
        )

        def pruned(name: str, q: Divisor | None = None) -> Path:
            how: Literal["random", "magnitude"] = "magnitude" if name == "magnitude" else "random"
            return prune_directory(base, tuned, work / name, pair.names, rate=rate, q=q, method=how, seed=final)

        final = mask_seed(seed, 0)
        model = pruned(method, result.q) if measured is not None or not as_file else None
        if measured is not None:
            step("measuring")
            models: dict[str, Any] = {"fine-tuned": tuned, method: model}
            models |= {name: pruned(name) for name in ("dare", "magnitude") if name != method}
            if _same_names(base, tuned):
                models["base"] = base
            result.comparison = compare(measured, models)
            result.against = _best(result.comparison, [name for name in ("dare", "magnitude") if name != method])
        step("writing")
        record = {"base": str(base), "tuned": str(tuned), "method": method, "rate": rate, "q": result.q, "seed": seed}
        if as_file:
            _write_delta(base, tuned, output.file(), pair, {**record, "mask seed": final})
        elif model is not None:
            put_directory(output, model)
        output.commit({"command": "compress delta", **record})
    return result


def merge_deltas(
    models: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    evaluation: Evaluation | None,
    base: str | os.PathLike | None = None,
    method: Literal["linear", "task", "dare", "darex"] = "linear",
    weights: Sequence[float] | None = None,
    rate: float = 0.9,
    q: float | None = None,
    exclude: Sequence[str] = HEADS,
    seed: int = 0,
    overwrite: bool = False,
    step: Step = lambda _: None,
) -> Changed:
    """Put several models, or delta files, into one; measured beside each of them and the plain mean.

    Parameters
    ----------
    models : sequence of path-like
        Directories, or delta files that `compress_delta` wrote.
    out, base, method, weights, rate, exclude, seed, overwrite
        As in `merge_directories`.
    evaluation : Evaluation or None
    q : float, optional
        Of darex; chosen on one half of the examples if left out.
    step : callable
        Told what is done next.
    """
    if Path(out).suffix == ".safetensors":
        raise InputError(f"out: {os.fspath(out)} must name a directory: a merged model is written whole")
    inputs = [*models, *([base] if base is not None else [])]
    with model_output(out, overwrite, inputs, evaluation) as output:
        work = work_folder(output)
        directories = [
            _restored(model, base, work / f"model {number}") if Path(model).is_file() else Path(model)
            for number, model in enumerate(models)
        ]
        chosen, measured = _parts(evaluation)
        tried: list[tuple[float, float]] = []
        branch = f"{method}: q as given" if q is not None else f"{method}: no q to choose"

        def merged(name: str, how: str, divisor: float | None = None, use: int = 0, replaced: bool = False) -> Path:
            return merge_directories(
                directories, work / name, base=None if how == "linear" else base, method=how,  # type: ignore[arg-type]
                weights=weights, rate=rate, q=divisor, exclude=exclude, seed=mask_seed(seed, use), overwrite=replaced,
            )  # fmt: skip

        if method == "darex" and q is None:
            if chosen is None:
                raise InputError("q: give data or a command to choose it on, or q itself, or take method 'dare'")
            step("choosing q")
            sign = 1 if chosen.higher_is_better else -1

            def judge(candidate: float) -> float:
                return sign * float(chosen.score(merged("candidate", "darex", candidate, 1, True)).mean())

            found = search(judge, 1 - rate, 1.0, min(0.2, 5 * (1 - rate)))
            q, tried, branch = found.best, found.trials, f"darex: one q for all layers by validation: {found.best:g}"
        result = Changed(os.fspath(out), method, q, branch, search=tried)
        if tried and chosen is not None and chosen.kind == "command":
            result.notes.append(_FLATTERS)
        step("merging")
        model = merged("merged", method, q)
        if measured is not None:
            step("measuring")
            shown: dict[str, Any] = {method: model}
            if method == "task" and weights is None:
                result.notes.append("at equal weights the sum of deltas is the mean of the models")
            elif method != "linear":
                shown["mean"] = merged("mean", "linear")
            if method == "darex":
                shown["dare"] = merged("dare", "dare")
            shown |= dict(zip(_names(models, shown), directories))
            result.comparison = compare(measured, shown)
            rivals: list[str] = [name for name in shown if name in ("mean", "dare")] or [
                n for n in shown if n != method
            ]
            result.against = _best(result.comparison, rivals)
        step("writing")
        put_directory(output, model)
        record = {"models": [str(each) for each in models], "base": base and str(base), "weights": weights}
        output.commit({"command": "merge delta", **record, "method": method, "rate": rate, "q": q, "seed": seed})
    return result


def _names(models: Sequence[str | os.PathLike], taken: Collection[str]) -> list[str]:
    """What each input is called: its own name, or the whole path where that is not unique."""
    names = [Path(model).name for model in models]
    return [
        name if names.count(name) == 1 and name not in taken else os.fspath(model) for name, model in zip(names, models)
    ]


def _best(comparison: Comparison, names: Sequence[str]) -> str:
    sign = 1 if comparison.higher_is_better else -1
    return max(names, key=lambda name: sign * float(comparison.scores[name].mean()))


def _parts(evaluation: Evaluation | None) -> tuple[Evaluation | None, Evaluation | None]:
    """What chooses and what measures: two halves of data, the same command twice."""
    if evaluation is None or evaluation.kind == "command":
        return evaluation, evaluation
    return replace_half(evaluation, 0), replace_half(evaluation, 1)


def replace_half(evaluation: Evaluation, half: Literal[0, 1]) -> Evaluation:
    """The same evaluation on every other example."""
    return replace(evaluation, half=half)


def _chosen(
    base: str | os.PathLike,
    tuned: str | os.PathLike,
    pair: Pair,
    evaluation: Evaluation | None,
    folder: Path,
    method: str,
    rate: float,
    rescale: float | str,
    selection: str,
    exclude: Sequence[str],
    seed: int,
) -> Changed:
    result = Changed("", method, None, f"{method}: no q to choose")
    if method != "darex":
        return result
    if not isinstance(rescale, str):
        result.q, result.branch = check_rates(rate, float(rescale)), "darex: q as given"
        return result
    assert evaluation is not None
    sign = 1 if evaluation.higher_is_better else -1
    if evaluation.kind == "command":
        if rescale not in ("auto", "global"):
            raise InputError(f"rescale: {rescale!r} looks at activations, which a command does not have; take 'global'")

        def judge(q: float) -> float:
            to = folder / "candidate"
            prune_directory(base, tuned, to, pair.names, rate=rate, q=q, seed=mask_seed(seed, 1, 0), overwrite=True)
            return sign * float(evaluation.score(to).mean())

        found = search(judge, 1 - rate, 1.0, min(0.05, 5 * (1 - rate)))
        result.q, result.search = found.best, found.trials
        result.branch = f"darex: one q for all layers by the command: {found.best:g}"
        result.notes.append(_FLATTERS)
        return result
    before, after = load(base), load(tuned)
    if set(pair.names) - {name for name, _ in after.model.named_parameters(remove_duplicate=False)}:
        rescale = "global"
        result.notes.append("the model stores its tensors under other names than it loads them: one q for all layers")
    decoder = is_decoder(after.model)
    inputs = evaluation.inputs(after, rows=100 if decoder else 50, tokens=256 if decoder else 128)  # as the authors
    way: Any = rescale
    pruner = DeltaPruner(rate=rate, rescale=way, selection=selection, exclude=exclude, random_state=seed)
    pruner.fit(
        before.model,
        after.model,
        score=lambda model: sign * float(evaluation.score(Loaded(model, after.processor)).mean()),
        batches=inputs,
    )
    result.q, result.search, result.branch = pruner.q_, pruner.search_, pruner.branch_
    return result


def _check_restorable(base: str | os.PathLike, tuned: str | os.PathLike) -> None:
    """Refuse a delta file of a model that base and delta alone would not give back."""
    one, two = (json.loads((Path(each) / "config.json").read_text(encoding="utf-8")) for each in (base, tuned))
    other = [f"{key} in config.json" for key in ("architectures", "id2label") if one.get(key) != two.get(key)]
    if not _same_names(base, tuned):
        other.insert(0, "names or shapes of tensors, as of a new head")
    if other:
        raise InputError(
            f"out: {os.fspath(tuned)} differs from {os.fspath(base)} in {' and '.join(other)}, which a delta file does "
            "not hold; name a directory"
        )


def _write_delta(
    base: str | os.PathLike, tuned: str | os.PathLike, path: Path, pair: Pair, record: Mapping[str, Any]
) -> None:
    names = set(pair.names)
    with TensorStore(base) as before, TensorStore(tuned) as after, DeltaWriter(path, record) as file:
        for name, entry in after.entries.items():
            if name in names:
                file.add(name, entry.shape, *_kept(before, after, name, record))
                continue
            tensor = after.read(name)
            if name not in before.entries or not torch.equal(tensor, before.read(name)):
                file.add_whole(name, tensor)


def _kept(before: TensorStore, after: TensorStore, name: str, record: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Flat indices and values of what is kept of one delta, found block by block where the method allows it."""
    size, magnitude = after.entries[name].size, record["method"] == "magnitude"
    q, rate = record["q"], record["rate"]
    divisor = q[name] if isinstance(q, Mapping) else 1 - rate if q is None else q
    indices, values = [], []
    for start, stop in after.entries[name].pieces(None if magnitude else BLOCK):
        delta = after.read(name, start, stop).float() - before.read(name, start, stop).float()
        if magnitude:
            delta = importance_delta(delta, rate)
        else:
            mask = torch.from_numpy(keep_block(record["mask seed"], name, start // BLOCK, stop - start, 1 - rate))
            delta = delta.where(mask, 0).div_(divisor)
        where = delta.nonzero()[:, 0]
        indices.append((where + start).to(torch.int32 if size < 2**31 else torch.int64))
        values.append(delta[where])
    return torch.cat(indices), torch.cat(values)


def _restored(file: str | os.PathLike, base: str | os.PathLike | None, out: Path) -> Path:
    """The model directory that a delta file stands for."""
    if base is None:
        raise InputError(f"base: is needed by the delta file {os.fspath(file)}")
    with DeltaFile(file) as delta:
        with TensorStore(base) as store:
            shapes = {name: entry.shape for name, entry in store.entries.items()}
        if stray := sorted(delta.names - shapes.keys()):
            raise InputError(
                f"base: {os.fspath(base)} has no tensor {stray[0]!r}, which the delta {os.fspath(file)} has"
            )
        for name, shape in delta.shapes.items():
            if shape != shapes[name]:
                raise DataError(f"{os.fspath(file)}: {name!r} has shape {shape}, and {shapes[name]} in {base}")

        def add(name: str, tensor: Tensor) -> Tensor:
            if name not in delta.names:
                return tensor
            if name not in delta.shapes:
                return delta.whole(name)
            wide, (where, values) = tensor.float(), delta.kept(name)
            wide.view(-1).index_add_(0, where, values)
            return wide

        return rewrite(base, out, add)


def _same_names(base: str | os.PathLike, tuned: str | os.PathLike) -> bool:
    with TensorStore(base) as one, TensorStore(tuned) as two:
        return {n: e.shape for n, e in one.entries.items()} == {n: e.shape for n, e in two.entries.items()}
