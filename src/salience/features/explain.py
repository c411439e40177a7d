"""Explain the user's images with several methods, and measure there whether the maps point at what the model uses."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from captum.attr import Attribution
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from salience.errors import InputError
from salience.features.attribution import attribute_batches, default_layers, device_of, evaluating, target_classes
from salience.features.baselines import CentreMap, EdgeMap, RandomSmoothMap
from salience.features.bee.explain import BEE
from salience.features.faithfulness import RANDOM, Faithfulness, MapProof, insertion_deletion, map_proofs
from salience.features.methods import SaliencyMethod, as_maps
from salience.features.normgrad.checks import randomization_check, weight_layers
from salience.measure.paired import paired_difference
from salience.model.at import logits_of
from salience.model.batches import map_batches
from salience.model.images import ImageSet

_LEARN_FROM = (20, 300)  # images that BEE learns from, at least and at most
_RANDOMISED_ON = 32  # images: a correlation near 1 or near 0 shows in few
BASELINES = {RANDOM: RandomSmoothMap, "the centre": CentreMap, "an edge detector": EdgeMap}


@dataclass
class Explained:
    """Maps of images by several methods, and how they did.

    Attributes
    ----------
    maps : dict of str to Tensor (n, height, width)
        By method, as raw values; float32.
    classes : Tensor (n,)
        The class that is explained of each image.
    probabilities : Tensor (n,)
        That the model gives it.
    predicted : Tensor (n,)
    layers : dict of str to list of str
        Where each method looked; empty for the input.
    proofs : dict of str to MapProof
        By method; empty where nothing was measured.
    runs : dict of str to Faithfulness
        Curves of methods and baselines on the measured images.
    measured : list of int
        Which images were measured on.
    notes : list of str
        What was noticed on the way.
    """

    maps: dict[str, Float[Tensor, "n height width"]]
    classes: Int[Tensor, " n"]
    probabilities: Float[Tensor, " n"]
    predicted: Int[Tensor, " n"]
    layers: dict[str, list[str]]
    proofs: dict[str, MapProof] = field(default_factory=dict)
    runs: dict[str, Faithfulness] = field(default_factory=dict)
    measured: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def explain(
    model: nn.Module,
    images: ImageSet,
    methods: Mapping[str, SaliencyMethod],
    *,
    layers: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    target: str | int = "predicted",
    measure: int = 100,
    steps: int = 20,
    batch_size: int = 32,
    random_state: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Explained:
    """Explain every image with every method, and measure on some of them.

    Parameters
    ----------
    model : torch.nn.Module
        A classifier.
    images : ImageSet
    methods : mapping of str to SaliencyMethod
        Such as a part of `salience.features.methods.METHODS`.
    layers : sequence of str
        For the methods that look at layers; each method's own choice by default.
    options : mapping
        Of methods, by the names of `SaliencyMethod.options`; a method takes those that are its own.
    target : {"predicted", "label"} or int
        The class to explain.
    measure : int
        Images to measure on, evenly spread; 0 measures nothing.
    steps : int
        Of insertion and deletion.
    batch_size : int
    random_state : int
        Of random maps, random weights and intervals.
    progress : callable, optional
        ``progress(stage, done, total)``.

    Returns
    -------
    Explained

    Raises
    ------
    InputError
        Options out of range, or labels asked for and not there.
    DataError
        A picture that cannot be read.
    """
    if measure < 0 or steps < 2:
        raise InputError(f"measure and steps: got {measure} and {steps}; at least 0 images and 2 steps")
    tell = progress or (lambda stage, done, total: None)
    n = len(images)

    def watched(stage: str) -> Dataset:
        return _Watched(images, lambda done: tell(stage, done, n))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        classes, probabilities, predicted = _predictions(model, watched("predictions"), images, target, batch_size)
        attributions, places = attributions_for(model, images, methods, layers, options or {})
        chosen = np.linspace(0, n - 1, min(measure, n)).round().astype(int).tolist() if measure else []
        learned = [_learned(name, each, images, chosen, tell) for name, each in attributions.items()]
        maps = {}
        for name, attribution in attributions.items():
            run = methods[name].run
            found = attribute_batches(attribution, watched(name), target=target, batch_size=batch_size, **run)
            maps[name] = as_maps(found)
        result = Explained(maps, classes, probabilities, predicted, places)
        if measure:
            _measure(model, images, attributions, result, chosen, steps, batch_size, random_state, tell)
    result.notes += [note for note in learned if note]
    result.notes += list(dict.fromkeys(str(one.message) for one in caught if one.category is UserWarning))
    return result


class _Watched(Dataset):
    """Images whose reading is told."""

    def __init__(self, images: ImageSet, tell: Callable[[int], None]) -> None:
        self.images, self.tell = images, tell

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        item = self.images[i]
        self.tell(i + 1)
        return item


def _predictions(
    model: nn.Module, data: Dataset, images: ImageSet, target: str | int, batch_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The class to explain of each image, its probability, and the predicted class."""
    device = device_of(model)

    def one(batch: Any) -> tuple[Tensor, Tensor]:
        logits = logits_of(model(batch[0].to(device)))
        logits = logits.mean((2, 3)) if logits.ndim == 4 else logits
        if logits.ndim != 2 or logits.shape[1] < 2:
            raise InputError(
                f"model: gives {tuple(logits.shape)} for {len(batch[0])} images; two classes or more are needed"
            )
        if target == "label":
            if images.labels is None:
                raise InputError("--target label: the images have no labels (sub-folders, or a column 'label')")
            wanted = target_classes(logits, batch[1].to(logits.device))
        else:
            wanted = target_classes(logits, None if target == "predicted" else target)  # type: ignore[arg-type]
        shares = logits.double().softmax(1).gather(1, wanted[:, None])[:, 0]
        return torch.stack([wanted, logits.argmax(1)], 1), shares

    with evaluating(model), torch.no_grad():
        found, shares = map_batches(one, data, batch_size=batch_size)
    return found[:, 0], shares, found[:, 1]


def attributions_for(
    model: nn.Module,
    images: ImageSet,
    methods: Mapping[str, SaliencyMethod],
    layers: Sequence[str],
    options: Mapping[str, Any],
) -> tuple[dict[str, Attribution], dict[str, list[str]]]:
    """Each method's attribution, and the layers that it looks at (arguments as in `explain`)."""
    own: list[str] = list(layers)
    if not own and any(method.layers != "none" for method in methods.values()):
        first = torch.stack([images[i][0] for i in range(min(2, len(images)))])
        own = default_layers(model, first.to(device_of(model)))
    made, places = {}, {}
    for name, method in methods.items():
        places[name] = [] if method.layers == "none" else own if method.layers == "several" or layers else own[-1:]
        given = {key: value for key, value in options.items() if key in method.options}
        made[name] = method.make(model, places[name], **given)
    return made, places


def _learned(
    name: str,
    attribution: Attribution,
    images: ImageSet,
    measured: Sequence[int],
    tell: Callable[[str, int, int], None],
) -> str:
    """Let a method that learns do so on images that it is not measured on; what to tell of it."""
    if not isinstance(attribution, BEE):
        return ""
    others = np.setdiff1d(np.arange(len(images)), measured)
    if len(others) < _LEARN_FROM[0]:
        attribution.finetune = False  # there is nothing to go on from
        return (
            f"{name} drew its baselines with equal chance: {len(others)} images beside the measured ones are too few "
            f"to learn from ({_LEARN_FROM[0]} at least; lower --measure)"
        )
    own = others[np.unique(np.linspace(0, len(others) - 1, min(_LEARN_FROM[1], len(others))).round().astype(int))]
    tell(f"{name} learns", 0, 1)
    device = device_of(attribution.forward_func)
    attribution.fit([images[int(i)][0].to(device) for i in own])
    tell(f"{name} learns", 1, 1)
    share = {family: attribution.pulled_.count(family) / len(own) for family in attribution.families}
    drawn = ", ".join(f"{family} {part:.0%}" for family, part in sorted(share.items(), key=lambda item: -item[1]))
    return f"{name} learned from {len(own)} images that it is not measured on; it drew {drawn}"


def _measure(
    model: nn.Module,
    images: ImageSet,
    attributions: Mapping[str, Attribution],
    result: Explained,
    chosen: list[int],
    steps: int,
    batch_size: int,
    random_state: int,
    tell: Callable[[str, int, int], None],
) -> None:
    """Insertion and deletion for methods and baselines, and the methods' maps of random weights."""
    result.measured = chosen
    pixels = torch.stack([Subset(images, chosen)[i][0] for i in range(len(chosen))])
    classes = result.classes[chosen]
    compared = {name: maps[chosen] for name, maps in result.maps.items()}
    for name, kind in BASELINES.items():
        extra = {"random_state": random_state} if kind is RandomSmoothMap else {}
        compared[name] = kind(model, **extra).attribute(pixels)[:, 0]
    for name, attribution in attributions.items():
        if isinstance(attribution, BEE):  # as many tries for random maps, chosen in the same way
            tries = [RandomSmoothMap(model, random_state=random_state + 1 + i) for i in range(attribution.draws)]
            drawn = torch.cat([one.attribute(pixels) for one in tries], 1)
            device = device_of(model)
            best = attribution.best_of(pixels.to(device), drawn.to(device), classes)
            compared[f"best of {attribution.draws} random maps, chosen as {name} does"] = best.cpu()
    for number, (name, maps) in enumerate(compared.items()):
        tell("measuring", number, len(compared))
        result.runs[name] = insertion_deletion(model, pixels, maps, classes, steps=steps, batch_size=2 * batch_size)
    tell("measuring", len(compared), len(compared))
    randomised = {}
    for number, (name, attribution) in enumerate(attributions.items()):
        tell("random weights", number, len(attributions))
        lowest = weight_layers(attribution.forward_func)[:1]  # a cascade down to it draws all weights anew
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # flat maps of random weights are none of the user's
            found = randomization_check(
                attribution, pixels[:_RANDOMISED_ON], layers=lowest, batch_size=batch_size,
                generator=torch.Generator().manual_seed(random_state),
            )  # fmt: skip
        randomised[name] = found[lowest[0]].spearman
    tell("random weights", len(attributions), len(attributions))
    for name, attribution in attributions.items():
        if isinstance(attribution, BEE):
            rival = result.runs[f"best of {attribution.draws} random maps, chosen as {name} does"]
            gain = paired_difference(result.runs[name].score, rival.score, random_state=random_state)
            result.notes.append(
                f"{name} keeps the best of {attribution.draws} maps by {attribution.metric}; against the best of as "
                f"many random maps its score differs by {gain.mean:+.3f} (95 % interval {gain.low:+.3f} … "
                f"{gain.high:+.3f})"
            )
    result.proofs = map_proofs(
        {name: result.runs[name] for name in attributions},
        {name: result.runs[name] for name in BASELINES},
        randomised,
        random_state=random_state,
    )
