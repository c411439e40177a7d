"""PACE on the user's images: concepts of 70 % of them, and what is measured on the others."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.cluster import KMeans
from torch import Tensor, nn

from salience.concepts.craft.explain import spread
from salience.concepts.pace.estimator import PACE, PaceExplanation
from salience.concepts.pace.measures import per_image, perturb
from salience.concepts.pace.tokens import PatchTokens, vit_tokens
from salience.errors import DataError, InputError, NothingToDo
from salience.features.attribution import device_of
from salience.measure.paired import PairedDifference, difference_over_draws, paired_difference
from salience.model.batches import map_batches
from salience.model.images import ImageSet

FEWEST = 20  # images
HELD_OUT = 0.3
SHOWN = 8  # patches of a concept
DRAWS = 20  # of random concepts
MEASURES = ("faithfulness", "stability", "sparsity")


@dataclass
class PaceProof:
    """What held-out images say of the concepts, and of simpler ones of the same patches.

    Attributes
    ----------
    values : dict of str to dict of str to array (n,)
        By method ("PACE", "k-means", "random"), faithfulness, stability and sparsity of every held-out image.
    over_random, over_kmeans : dict of str to PairedDifference
        By how much PACE is better: more faithful, nearer under perturbation, sparser.
    """

    values: dict[str, dict[str, Float[np.ndarray, " n"]]]
    over_random: dict[str, PairedDifference]
    over_kmeans: dict[str, PairedDifference]

    @property
    def better(self) -> bool:
        """Whether the concepts tell the model's predictions better than random ones."""
        return self.over_random["faithfulness"].low > 0

    @property
    def words(self) -> str:
        """The verdict in plain words."""
        if not self.better:
            return "these concepts tell the model's predictions no better than random ones here"
        share = self.values["PACE"]["faithfulness"].mean()
        text = f"from its concepts alone, {share:.0%} of the model's predictions can be told"
        ahead = [name for name, gain in self.over_kmeans.items() if gain.low > 0]
        behind = [name for name, gain in self.over_kmeans.items() if gain.high < 0]
        told = []
        if ahead:
            told.append(f"better than a k-means histogram in {' and '.join(ahead)}")
        if behind:
            told.append(f"worse {'' if ahead else 'than a k-means histogram '}in {' and '.join(behind)}")
        return f"{text}; {', '.join(told) or 'no better than a k-means histogram'}"


@dataclass
class PaceFound:
    """Concepts of images, at three levels.

    Attributes
    ----------
    pace : PACE
    learned, measured : integer arrays
        Rows of the images that the concepts were found in, and of those that they were measured on.
    predicted : integer array (n,)
        Class that the model predicts of each measured image.
    explained : PaceExplanation
        Of the measured images.
    patches : integer array (k, count, 2)
        Data set level: row and patch of the learned images nearest to each concept.
    grid : (int, int)
        Patches of an image: rows and columns.
    proof : PaceProof
    notes : list of str
    """

    pace: PACE
    learned: Int[np.ndarray, " l"]
    measured: Int[np.ndarray, " n"]
    predicted: Int[np.ndarray, " n"]
    explained: PaceExplanation
    patches: Int[np.ndarray, "k count 2"]
    grid: tuple[int, int]
    proof: PaceProof
    notes: list[str] = field(default_factory=list)


def explain_images(
    model: nn.Module,
    images: ImageSet,
    pace: PACE,
    *,
    classes: list[int] | None = None,
    layer: int = -1,
    measure: int = 100,
    batch_size: int = 64,
    random_state: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> PaceFound:
    """Find concepts in images, and measure them on others.

    Parameters
    ----------
    model : torch.nn.Module
        A vision transformer of `transformers`; see `vit_tokens`.
    images : ImageSet
    pace : PACE
        Unfitted. With more dimensions than a third of the patches of a concept allow, set its `reduce_dim`.
    classes : list of int, optional
        Use only the images that the model predicts as one of these; all by default.
    layer : int
        Block of the transformer.
    measure : int
        Held-out images at most to measure on.
    batch_size : int
        Images through the model at once.
    random_state : int
    progress : callable, optional
        ``progress(stage, done, total)``.

    Raises
    ------
    InputError
        An option out of range, or a model that is no vision transformer.
    DataError
        A picture that cannot be read, or only one class predicted.
    NothingToDo
        Fewer than 20 images.
    """
    tell = progress or (lambda stage, done, total: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tell("patches", 0, 2)
        tokens = _tokens(model, images, layer, batch_size)
        rows = np.arange(len(images))
        if classes:
            rows = rows[np.isin(tokens.probs.argmax(1).numpy(), classes)]
        if len(rows) < FEWEST:
            raise NothingToDo(
                f"images: {len(rows)} are left; {FEWEST} at least are needed to find and measure concepts"
            )
        out = spread(len(rows), round(HELD_OUT * len(rows)))
        learned, measured = np.delete(rows, out), rows[out][spread(len(out), max(2, measure))]
        twins = _tokens(model, _Twins(images, random_state), layer, batch_size)
        tell("patches", 1, 2)
        device = device_of(model)
        train, test, aug, test_aug = (PatchTokens(*(v[part].to(device) for v in source)) for source, part in (
            (tokens, learned), (tokens, measured), (twins, learned), (twins, measured)))  # fmt: skip
        tell("patches", 2, 2)
        pace.fit(*train, aug.emb, aug.attn)
        tell("concepts", 1, 1)
        explained = pace.explain(*test)
        proof = _prove(pace, train, test, test_aug, explained, random_state)
        places = pace.nearest_patches(train.emb, SHOWN).cpu().numpy()
        places[..., 0] = learned[places[..., 0]]
    height, width = images.picture(0).shape[:2]
    notes = list(dict.fromkeys(str(w.message) for w in caught if w.category is UserWarning))
    if pace.reseeded_:
        notes.append(f"{pace.reseeded_} concepts were empty on the way and started anew; fewer concepts may do")
    return PaceFound(pace, learned, measured, test.probs.argmax(1).cpu().numpy(), explained, places,
                     _grid(train.emb.shape[1], height, width), proof, notes)  # fmt: skip


class _Twins(torch.utils.data.Dataset):
    """Every picture perturbed, as the model takes it."""

    def __init__(self, images: ImageSet, random_state: int) -> None:
        self.images, self.random_state = images, random_state

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        pixels = torch.from_numpy(self.images.picture(i)).permute(2, 0, 1).float() / 255
        twin = perturb(pixels[None], random_state=self.random_state, first_row=i)[0]
        return self.images.pixel_values((twin * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()), 0


def _tokens(model: nn.Module, data: Any, layer: int, batch_size: int) -> PatchTokens:
    return PatchTokens(*map_batches(lambda batch: tuple(vit_tokens(model, batch[0], layer)), data,
                                    batch_size=batch_size))  # fmt: skip


def _grid(patches: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of square patches that cover an image."""
    side = math.sqrt(height * width / patches)
    rows, columns = round(height / side), round(width / side)
    if rows * columns != patches:
        raise InputError(f"model: has {patches} patches for images of {height} x {width} pixels, which is no grid of "
                         "squares")  # fmt: skip
    return rows, columns


def _prove(
    pace: PACE, train: PatchTokens, test: PatchTokens, aug: PatchTokens, explained: PaceExplanation, random_state: int
) -> PaceProof:
    """Measure PACE, hard clusters of the same patches, and random ones, on held-out images and their twins."""
    predicted = [part.probs.argmax(1).cpu().numpy() for part in (train, test)]
    if len(np.unique(predicted[0])) < 2:
        raise DataError(f"images: the model predicts class {predicted[0][0]} throughout; concepts have nothing to tell "
                        "apart, so give images of more classes")  # fmt: skip
    k = pace.n_concepts
    x = [pace.standardize(part.emb).cpu().numpy() for part in (train, test, aug)]
    rng = np.random.default_rng(random_state)
    flat = x[0].reshape(-1, x[0].shape[-1])
    kmeans = KMeans(k, n_init=3, random_state=random_state).fit(flat[rng.permutation(len(flat))[:20_000]])
    shares = [np.stack([(kmeans.predict(one.reshape(-1, one.shape[-1])).reshape(len(one), -1) == c).mean(1)
                        for c in range(k)], 1) for one in x]  # fmt: skip
    own = [pace.transform(*train), explained.theta, pace.transform(*aug)]
    patches = train.emb.shape[1]
    draws = []
    for _ in range(DRAWS):
        vectors = [rng.multinomial(patches, np.full(k, 1 / k), len(one)) / patches for one in x]
        draws.append(per_image(*_with(predicted, vectors)))
    values = {"PACE": per_image(*_with(predicted, own)), "k-means": per_image(*_with(predicted, shares))}
    signs = {"faithfulness": 1, "stability": -1, "sparsity": 1}
    over_random = {name: difference_over_draws(sign * values["PACE"][name], [sign * one[name] for one in draws],
                                               random_state=random_state) for name, sign in signs.items()}  # fmt: skip
    over_kmeans = {name: paired_difference(sign * values["PACE"][name], sign * values["k-means"][name],
                                           random_state=random_state) for name, sign in signs.items()}  # fmt: skip
    values["random"] = {name: np.mean([one[name] for one in draws], axis=0) for name in MEASURES}
    return PaceProof(values, over_random, over_kmeans)


def _with(predicted: list[np.ndarray], vectors: list[Any]) -> tuple[Any, ...]:
    train, test, aug = vectors
    return train, predicted[0], test, predicted[1], aug
