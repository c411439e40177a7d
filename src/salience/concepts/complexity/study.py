"""All of the paper's measurements of one network, on the user's images."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from salience.concepts.complexity.decoding import Decodability, feature_complexity, time_to_decode, varies
from salience.concepts.complexity.dictionary import (
    FeatureDictionary,
    feature_importance,
    hoyer,
    learn_dictionary,
    split_signs,
    support_features,
)
from salience.concepts.complexity.findings import ComplexityReport, Epoch, RankCorrelation, rank_correlation
from salience.concepts.complexity.flow import noise_sensitivity, redundancy, residual_flow
from salience.concepts.complexity.layers import (
    PENULTIMATE,
    Head,
    LayerActivations,
    block_layers,
    layer_activations,
    linear_head,
    same_order,
)
from salience.concepts.complexity.residuals import residual_sums
from salience.errors import DataError, NothingToDo
from salience.features.attribution import device_of, images_and_labels
from salience.model.at import training_mode

READABLE = 0.5  # R^2 at the penultimate layer that the filtered correlations ask for
FEWEST = 50  # images of each of the two parts
Codes = tuple[Float[np.ndarray, "n k"], Float[np.ndarray, "m k"]]


class ComplexityStudy:
    """Learn the features of a network and measure each: complexity, importance, flow, when it was learned.

    Parameters
    ----------
    n_features : int
        k; more than the penultimate layer has neurons is usual.
    scope : {"global", "per_class"}
        See `learn_dictionary`; classes are the predicted ones.
    layers : "auto" or sequence of str
        Layers to decode from; by default `block_layers`.
    grid, ridge
        See `layer_activations` and `v_information`. Complexity depends on both.
    noise : sequence of float
        Deviations of pixel noise to try; none by default, since each costs ``draws`` passes.
    draws : int
    batch_size : int
    memory : int
        Bytes of activations of a part to hold; more go to a temporary file.
    random_state : int
    """

    def __init__(
        self,
        *,
        n_features: int = 100,
        scope: str = "global",
        layers: str | Sequence[str] = "auto",
        grid: int = 4,
        ridge: float | str = "cv",
        noise: Sequence[float] = (),
        draws: int = 100,
        batch_size: int = 64,
        memory: int = 2**30,
        random_state: int = 0,
    ) -> None:
        self.n_features, self.scope, self.layers, self.grid, self.ridge = n_features, scope, layers, grid, ridge
        self.noise, self.draws, self.batch_size = noise, draws, batch_size
        self.memory, self.random_state = memory, random_state

    def run(
        self,
        model: nn.Module,
        train: Any,
        val: Any,
        checkpoints: Mapping[str, nn.Module] | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> ComplexityReport:
        """Measure a network.

        Parameters
        ----------
        model : torch.nn.Module
            A classifier that ends in a linear layer.
        train, val : Tensor, Dataset or DataLoader
            Images to learn features and decoders on, and others to measure on; some hundreds at least. Not shuffled.
        checkpoints : dict of str to Module, optional
            The same network during training, in order; a mapping may load them when they are asked for. Without, what
            needs them is left out.
        progress : callable, optional
            ``progress(stage, done, total)``.

        Raises
        ------
        InputError
            An option out of range, or a network without a linear head.
        DataError
            Images come in different orders at different passes.
        NothingToDo
            Fewer than 50 images in a part.
        """
        tell = progress or (lambda stage, done, total: None)
        with tempfile.TemporaryDirectory() as folder:
            run = _Run(self, Path(folder), train, val)
            report = run.measure(model, tell)
            if checkpoints:
                run.follow(report, checkpoints, tell)
            run.forget()
        return report


class _Run:
    """One run of a study: the two parts of the data, and where large activations go."""

    def __init__(self, study: ComplexityStudy, folder: Path, train: Any, val: Any) -> None:
        self.study, self.folder, self.data = study, folder, (train, val)
        self.first: tuple[LayerActivations, LayerActivations] | None = None
        self.names: list[str] = []
        self.files, self.signed = 0, False

    def measure(self, model: nn.Module, tell: Callable[[str, int, int], None]) -> ComplexityReport:
        """All that is said of the finished network."""
        study = self.study
        example = _example(self.data[0], device_of(model))
        head = linear_head(model, example)
        self.names = block_layers(model, example) if study.layers == "auto" else list(study.layers)
        tell("layers", 0, 2)
        self.first = train, val = self.activations(model, self.names, tell)
        tell("features", 0, 3)
        dictionary, z, W = self.features(train, val, head)
        tell("features", 1, 3)
        parts = {name: (train.layers[name], val.layers[name]) for name in self.names}
        A = _tensor(val.layers[PENULTIMATE]).double().numpy()
        complexity = feature_complexity(parts, z[0], z[1], study.ridge)
        tell("features", 2, 3)
        rng = np.random.default_rng(study.random_state)
        shuffled = feature_complexity(parts, rng.permutation(z[0]), rng.permutation(z[1]), study.ridge)
        tell("features", 3, 3)

        targets = val.logits.argmax(1).numpy()
        D, b = dictionary.components_.double().numpy(), head.bias.numpy()
        importance = feature_importance(z[1], D, W, targets)
        live = complexity.live
        at_end = self.readability(train, val, z, parts, complexity)
        readable = live & (np.nan_to_num(at_end) > READABLE)
        counts = np.unique(np.geomspace(1, live.sum(), 12).round().astype(int))
        kept = (z[1] @ D @ W.T + b).argmax(1)
        report = ComplexityReport(
            dictionary, complexity, shuffled, importance, readable,
            _pair("importance", complexity.score, importance.absolute, live, readable, study.random_state),
            *z, float((kept == targets).mean()), {
                "redundancy": redundancy(A, z[1], random_state=study.random_state),
                "localisation": hoyer(D[:, : A.shape[1]] - D[:, A.shape[1] :] if self.signed else D),
                "share of images": (z[1] > 0).mean(0),
            }, (counts, support_features(z[1], D, W, b, importance.absolute, kept, counts.tolist())),
        )  # fmt: skip
        both = live & shuffled.live
        report.correlations["importance, shuffled features"] = rank_correlation(
            shuffled.score[both], importance.absolute[both], study.random_state
        )
        self.notes(report)
        self.paths(model, example, report, tell)
        self.shake(model, report, tell)
        return report

    def activations(
        self, model: nn.Module, names: Sequence[str], tell: Any = None
    ) -> tuple[LayerActivations, LayerActivations]:
        """Both parts; on disk where they are larger than the study's memory."""
        names = [*names] if PENULTIMATE in names else [*names, PENULTIMATE]
        found = []
        for place, data in enumerate(self.data):
            if isinstance(data, DataLoader) and isinstance(data.sampler, RandomSampler):
                raise DataError("images: a loader that shuffles gives another order at each pass, but rows must be the "
                                "same images everywhere; make it with shuffle=False")  # fmt: skip
            example = _example(data, device_of(model))
            one = layer_activations(model, example, names, grid=self.study.grid)
            rows: Any = data.dataset if isinstance(data, DataLoader) else data
            size = 4 * len(rows) * sum(part.shape[1] for part in one.layers.values())
            self.files += 1
            out = self.folder / f"{self.files}.npy" if size > self.study.memory else None
            part = layer_activations(
                model, data, names, grid=self.study.grid, batch_size=self.study.batch_size, out=out
            )
            if len(part.fingerprints) < FEWEST:
                raise NothingToDo(f"images: {len(part.fingerprints)} are too few to fit decoders and measure them on; "
                                  f"each of the two parts needs {FEWEST}")  # fmt: skip
            found.append(part)
            if tell is not None:
                tell("layers", place + 1, 2)
        return found[0], found[1]

    def features(
        self, train: LayerActivations, val: LayerActivations, head: Head
    ) -> tuple[FeatureDictionary, Codes, Any]:
        """The dictionary, the codes of both parts, and the head's weights; negative activations are split by sign."""
        A = [_tensor(part.layers[PENULTIMATE]) for part in (train, val)]
        W = head.weight.numpy()
        self.signed = min(float(part.min()) for part in A) < 0
        if self.signed:
            A, W = [split_signs(part) for part in A], np.concatenate([W, -W], 1)
        labels = train.logits.argmax(1)
        dictionary = learn_dictionary(A[0], self.study.n_features, self.study.scope, labels,
                                      random_state=self.study.random_state)  # fmt: skip
        return dictionary, (dictionary.codes_.double().numpy(), dictionary.encode(A[1]).double().numpy()), W

    def readability(
        self, train: Any, val: Any, z: Any, parts: Any, complexity: Decodability
    ) -> Float[np.ndarray, " k"]:
        """How much of each feature the last layer tells."""
        if PENULTIMATE in parts:
            return complexity.information[complexity.names.index(PENULTIMATE)]
        pair = {PENULTIMATE: (train.layers[PENULTIMATE], val.layers[PENULTIMATE])}
        return time_to_decode(pair, z[0], z[1], self.study.ridge).information[0]

    def notes(self, report: ComplexityReport) -> None:
        """What a reader of the figures has to know."""
        if report.complexity.dead:
            report.notes.append(f"{report.complexity.dead} of {len(report.complexity.live)} features are the same for "
                                "all images of a part and have no score")  # fmt: skip
        if self.signed:
            report.notes.append("the penultimate layer has negative values: positive and negative parts were "
                                "factorised side by side; a feature may stand for the absence of another")  # fmt: skip
        if len(self.names) == 1:
            report.notes.append("a single layer: complexity is 1 - I_V of that one")

    def paths(self, model: nn.Module, example: Tensor, report: ComplexityReport, tell: Any) -> None:
        """Flow on the held-out images, where the network has residual blocks."""
        with training_mode(model, False), torch.no_grad():
            if not residual_sums(model, example):
                return
        for number, measure in enumerate(("cka", "information")):
            tell("flow", number, 2)
            report.flow[measure] = residual_flow(model, self.data[1], report.features, measure=measure,
                                                 grid=self.study.grid, batch_size=self.study.batch_size)  # fmt: skip
        tell("flow", 2, 2)

    def shake(self, model: nn.Module, report: ComplexityReport, tell: Any) -> None:
        """Noise on the held-out images, relative to each feature's variance over them."""
        if not self.study.noise:
            return
        tell("noise", 0, 1)
        extractor: Any = _Split(report.dictionary) if self.signed else report.dictionary
        found = noise_sensitivity(model, self.data[1], extractor, self.study.noise, draws=self.study.draws,
                                  batch_size=self.study.batch_size, random_state=self.study.random_state)  # fmt: skip
        variance = np.where(varies(report.features), report.features.var(0), np.nan)
        report.companions |= {f"shaken by noise of {sigma:g}": own / variance for sigma, own in found.items()}
        tell("noise", 1, 1)

    def follow(self, report: ComplexityReport, checkpoints: Mapping[str, nn.Module], tell: Any) -> None:
        """When final features can be read, and how complex the features of each checkpoint are."""
        assert self.first is not None
        pairs: dict[str, tuple[Any, Any]] = {}
        needed = set(self.folder.iterdir())
        for number, name in enumerate(checkpoints):
            tell("checkpoints", number, len(checkpoints))
            model = checkpoints[name]
            train, val = self.activations(model, self.names)
            for before, now in zip(self.first, (train, val), strict=True):
                same_order(before, now, f"checkpoint {name}")
            pairs[name] = (_tensor(train.layers[PENULTIMATE]), _tensor(val.layers[PENULTIMATE]))
            report.epochs.append(self.epoch(name, model, train, val))
            del before, now, train, val
            for file in set(self.folder.iterdir()) - needed:
                file.unlink()
        report.time = time_to_decode(pairs, report.train_features, report.features, self.study.ridge)
        live = report.complexity.live & report.time.live
        report.correlations |= _pair("time to decode", report.complexity.score, report.time.score, live,
                                     report.readable & live, self.study.random_state)  # fmt: skip
        tell("checkpoints", len(checkpoints), len(checkpoints))

    def epoch(self, name: str, model: nn.Module, train: LayerActivations, val: LayerActivations) -> Epoch:
        """The features of a checkpoint, learned from nothing."""
        assert self.first is not None
        dictionary, z, W = self.features(train, val, linear_head(model, _example(self.data[0], device_of(model))))
        parts = {layer: (train.layers[layer], val.layers[layer]) for layer in self.names}
        found = feature_complexity(parts, *z, self.study.ridge)
        gamma = feature_importance(z[1], dictionary.components_, W, val.logits.argmax(1).numpy()).absolute
        live = np.flatnonzero(found.live)
        top = live[np.argsort(-gamma[live], kind="stable")][: max(1, round(len(live) / 100))]
        same = (val.logits.argmax(1) == self.first[1].logits.argmax(1)).double().mean()
        return Epoch(name, float(found.score[live].mean()), float(found.score[top].mean()),
                     rank_correlation(found.score[live], gamma[live], self.study.random_state),
                     float(same))  # fmt: skip

    def forget(self) -> None:
        """Let go of memory maps before their folder goes."""
        self.first = None


class _Split:
    """An extractor of activations with both signs."""

    def __init__(self, inner: FeatureDictionary) -> None:
        self.inner = inner

    def encode(self, activations: Float[Tensor, "n p"]) -> Float[Tensor, "n k"]:
        """Codes of activations of either sign."""
        return self.inner.encode(split_signs(activations))


def _pair(name: str, score: Any, other: Any, live: Any, readable: Any, random_state: int) -> dict[str, RankCorrelation]:
    """A correlation over all live features, and over those that the penultimate layer tells."""
    return {
        name: rank_correlation(score[live], other[live], random_state),
        f"{name}, readable features": rank_correlation(score[readable], other[readable], random_state),
    }


def _tensor(layer: Any) -> Float[Tensor, "n d"]:
    """A copy in memory of a layer that may be a part of a memory map."""
    return layer.clone() if isinstance(layer, Tensor) else torch.from_numpy(np.array(layer))


def _example(data: Any, device: Any) -> Tensor:
    """Two images of the data, on the model's device."""
    if isinstance(data, Tensor):
        return data[:2].to(device)
    if isinstance(data, DataLoader):
        return images_and_labels(next(iter(data)), device)[0][:2]
    items = [data[i] for i in range(min(2, len(data)))]
    return torch.stack([item[0] if isinstance(item, tuple | list) else item for item in items]).to(device)
