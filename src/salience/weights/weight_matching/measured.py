"""Match and merge networks and measure it on the user's own data: what `merge permute` does, without the printing."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_model
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from salience.errors import DataError, InputError
from salience.model.loading import Loaded, load
from salience.weights.evaluation import Comparison, Evaluation, compare
from salience.weights.model_output import model_output, work_folder
from salience.weights.weight_matching.alignment import distance_reduction, singular_alignment
from salience.weights.weight_matching.matching import match_activations, match_weights
from salience.weights.weight_matching.merging import interpolate, merge_many, recalibrate_norms
from salience.weights.weight_matching.spec import apply_permutation, infer_spec

_LINE = 11


@dataclass
class Permuted:
    """What was matched, how well, and how the merged network compares."""

    out: str
    method: str
    branch: str
    comparison: Comparison | None = None
    against: str = "plain mean"
    units: int = 0
    groups: int = 0
    distance_cut: float = float("nan")
    aligned: dict[str, tuple[float, float]] = field(default_factory=dict)  # gamma: before, after
    line: dict[str, list[float]] = field(default_factory=dict)  # mean score along the line between the first two
    notes: list[str] = field(default_factory=list)


def merge_permuted(
    models: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    evaluation: Evaluation | None,
    arch: str | None = None,
    method: Literal["weights", "activations"] = "weights",
    mode: Literal["reference", "mean"] = "reference",
    example: Any = None,
    seed: int = 0,
    overwrite: bool = False,
    step: Callable[[str], None] = lambda _: None,
) -> Permuted:
    """Line the hidden units of several networks up with those of the first, and average them.

    Running statistics of batch normalisation are taken anew from one half of the data; the other half measures the
    result beside the plain mean and each network.

    Parameters
    ----------
    models : sequence of path-like
        Directories, or ``FILE.safetensors`` of `arch`.
    out : path-like
        Of the same kind as the models.
    evaluation : Evaluation or None
        With a command, activations and new statistics need `example` data, which a command lacks.
    arch : str, optional
        ``package.module:factory``.
    method : {"weights", "activations"}
    mode : {"reference", "mean"}
        As in `merge_many`.
    example : Tensor or mapping, optional
        Inputs of the model where there is no data.
    seed : int
    overwrite : bool
    step : callable
        Told what is done next.
    """
    if len(models) < 2:
        raise InputError(f"models: got {len(models)}; two or more are needed")
    with model_output(out, overwrite, models, evaluation) as output:
        result, best = _merged(models, out, work_folder(output), evaluation, arch, method, mode, example, seed, step)
        step("writing")
        _save(best, output.file() if _is_file(out) else output.folder)
        output.commit({"command": "merge permute", "models": [str(each) for each in models], "arch": arch,
                       "method": method, "mode": mode, "seed": seed})  # fmt: skip
    return result


def _merged(
    models: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    work: Path,
    evaluation: Evaluation | None,
    arch: str | None,
    method: str,
    mode: Literal["reference", "mean"],
    example: Any,
    seed: int,
    step: Callable[[str], None],
) -> tuple[Permuted, Loaded]:
    step("loading")
    loaded = [load(model, arch=arch) for model in models]
    kinds = {type(each.model).__name__ for each in loaded}
    if len(kinds) > 1:
        raise DataError(f"models: are of different classes: {', '.join(sorted(kinds))}")
    if not (_is_file(out) or hasattr(loaded[0].model, "save_pretrained")):
        raise InputError(f"out: {os.fspath(out)} must end in .safetensors, as the models do")
    states = [{name: value.clone() for name, value in each.model.state_dict().items()} for each in loaded]
    network = loaded[0].model
    data = evaluation is not None and evaluation.kind != "command"
    chosen = replace(evaluation, half=0) if evaluation is not None and data else None
    measured = replace(evaluation, half=1) if evaluation is not None and data else evaluation
    inputs = chosen.inputs(loaded[0], rows=1000) if chosen is not None else []
    sample = _head(inputs[0]) if inputs else example
    if sample is None:
        raise InputError("example: give data to measure on, or the shape of an input, to see how the network is wired")
    step("matching")
    spec = infer_spec(network, sample)
    draw = torch.Generator().manual_seed(seed)
    if method == "activations":
        if not inputs:
            raise InputError("method: 'activations' needs data")
        permuted = [states[0]]
        for other, state in zip(loaded[1:], states[1:], strict=True):
            found = match_activations(spec, network, other.model, inputs)
            permuted.append(apply_permutation(spec, found.permutations, state))
        merged = _mean(permuted)
    else:
        merged = merge_many(spec, states, mode=mode, generator=draw)
        first = match_weights(spec, states[0], states[1], generator=torch.Generator().manual_seed(seed))
        permuted = [states[0], apply_permutation(spec, first.permutations, states[1])]
    plain = _mean(states)
    result = Permuted(os.fspath(out), "permuted mean", f"units lined up by their {method}")
    result.groups, result.units = len(spec.sizes), sum(spec.sizes.values())
    try:
        result.distance_cut = distance_reduction(states[0], states[1], permuted[1])
    except DataError:
        result.notes.append("the first two networks are equal")
    for gamma in (0.0, 0.3):
        pair = [singular_alignment(states[0], state, gamma=gamma).score for state in (states[1], permuted[1])]
        result.aligned[f"{gamma:g}"] = (pair[0], pair[1])
    normed = any(isinstance(module, _BatchNorm) for module in network.modules())
    if normed and not inputs:
        result.notes.append("batch normalisation keeps the mean of the statistics: give data to take them anew")

    def filled(state: dict[str, Tensor], fresh: bool = True) -> Loaded:
        other = copy.deepcopy(network)
        other.load_state_dict(state)
        if normed and inputs and fresh:
            recalibrate_norms(other, [batch if not isinstance(batch, tuple) else batch[0] for batch in inputs])
        return Loaded(other.eval(), loaded[0].processor)

    best = filled(merged)
    if measured is not None:
        step("measuring")
        shown: dict[str, Any] = {"permuted mean": best, "plain mean": filled(plain)}
        shown |= {f"model {number + 1}": each for number, each in enumerate(loaded)}
        if not data:
            ending = ".safetensors" if _is_file(out) else ""
            shown = {name: _save(each, work / (name.replace(" ", "-") + ending)) for name, each in shown.items()}
        result.comparison = compare(measured, shown)
    if data and measured is not None and len(models) == 2:
        step("measuring the line between the two")
        for name, second in (("as trained", states[1]), ("permuted", permuted[1])):
            points = [t / (_LINE - 1) for t in range(_LINE)]
            result.line[name] = [
                float(measured.score(filled(interpolate(states[0], second, t), 0 < t < 1)).mean()) for t in points
            ]
    return result, best


def _head(batch: Any) -> Any:
    return {name: value[:2] for name, value in batch.items()} if isinstance(batch, dict) else batch[:2]


def _mean(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    merged = states[0]
    for number, state in enumerate(states[1:], 2):
        merged = interpolate(merged, state, 1 / number)
    return merged


def _is_file(out: str | os.PathLike) -> bool:
    return Path(out).suffix == ".safetensors"


def _save(loaded: Loaded, path: Path) -> Path:
    """Write a network as the models came: a directory, or one file."""
    model: Any = loaded.model
    if _is_file(path):
        save_model(model, str(path))
        return path
    model.save_pretrained(path)
    if loaded.processor is not None:
        loaded.processor.save_pretrained(path)
    return path
