"""Concepts of classes of the user's images by any extractor and any importance, measured on held-out images."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.ndimage import uniform_filter
from torch import Tensor, nn
from torch.nn.functional import interpolate

from salience.concepts.attributions import METHODS, concept_importance, mean_importance
from salience.concepts.concept_model import Codes, ConceptModel, logits_of_codes
from salience.concepts.craft.crops import stacked
from salience.concepts.craft.estimator import nonnegative_layers, predicted_classes
from salience.concepts.craft.explain import FEWEST, HELD_OUT, SHOWN, ConceptProof, prove, spread
from salience.concepts.extractors import KMeansConcepts, NMFConcepts, PCAConcepts, RandomConcepts
from salience.concepts.holistic.extraction import ExtractionReport, extraction_report
from salience.concepts.holistic.faithfulness import importance_report
from salience.concepts.holistic.strategies import StrategyGraph, count_different, strategy_graph
from salience.concepts.importance import gradient_input, tcav
from salience.concepts.seminmf import SemiNMFConcepts
from salience.concepts.sparse_autoencoder import SAEConcepts
from salience.errors import DataError, InputError, NothingToDo, nearest
from salience.features.attribution import as_grid, default_layers, device_of
from salience.measure.paired import Interval
from salience.model.batches import map_batches
from salience.model.images import ImageSet

EXTRACTORS: dict[str, Any] = {
    "nmf": NMFConcepts, "k-means": KMeansConcepts, "pca": PCAConcepts, "semi-nmf": SemiNMFConcepts, "sae": SAEConcepts,
    "random": RandomConcepts,
}  # fmt: skip
COMPARED = ("gradient_input", "saliency", "sobol")  # importances beside the chosen one
ROWS, FEW_ROWS = 20_000, 4_000  # positions that concepts are found in, and on which extractors are compared
CLUSTERS, GRAPH_IMAGES = 5, 300  # strategies; images of a class


@dataclass
class ClassView:
    """A class seen through the concepts.

    Attributes
    ----------
    class_id : int
    images, learned, measured : integer arrays
        Rows of the images that are predicted as it; those that concepts were found in, and the held-out ones.
    order : integer array (k,)
        Concepts from the most to the least important.
    importance : list of Interval
        Mean over images and 95 % interval, by concept.
    proof : ConceptProof
        Whether that order carries the class on held-out images.
    faithfulness : dict of str to (float, float, float)
        Mean C-deletion, C-insertion and muFidelity of the local importances of several methods there.
    agreement : float
        Share of held-out predictions that survive being written in concepts.
    crops : dict of int to array (m, 3)
        By concept the places (row, top, left) where most of it is, at most one an image.
    maps : dict of int to Tensor (m, height, width)
        By concept, where it is in these images; without positions 0 images.
    """

    class_id: int
    images: Int[np.ndarray, " n"]
    learned: Int[np.ndarray, " l"]
    measured: Int[np.ndarray, " m"]
    order: Int[np.ndarray, " k"]
    importance: list[Interval]
    proof: ConceptProof
    faithfulness: dict[str, tuple[float, float, float]]
    agreement: float
    crops: dict[int, Int[np.ndarray, "c 3"]]
    maps: dict[int, Float[Tensor, "c height width"]]


@dataclass
class HolisticConcepts:
    """What was found about all the classes together, which share a dictionary.

    Attributes
    ----------
    concepts : ConceptModel
    extractor, method : str
        How concepts were found and weighed.
    side : int
        Of crops, in pixels.
    classes : list of ClassView
    extraction : dict of str to ExtractionReport or None
        Of every extractor; None where it refused.
    graph : StrategyGraph
        Of the images `rows`, by their importances `local` to the class that each is predicted as.
    rows : integer array (m,)
    local : array (m, k)
    predicted, labels : integer arrays (m,)
        Labels are None where the images have none.
    notes : list of str
    """

    concepts: ConceptModel
    extractor: str
    method: str
    side: int
    classes: list[ClassView]
    extraction: dict[str, ExtractionReport | None]
    graph: StrategyGraph
    rows: Int[np.ndarray, " m"]
    local: Float[np.ndarray, "m k"]
    predicted: Int[np.ndarray, " m"]
    labels: Int[np.ndarray, " m"] | None
    notes: list[str] = field(default_factory=list)


def explain_strategies(
    model: nn.Module,
    images: ImageSet,
    classes: Sequence[int],
    *,
    extractor: str = "nmf",
    method: str = "gradient_input",
    layer: str | None = None,
    n_concepts: int = 10,
    n_clusters: int | None = None,
    measure: int = 100,
    batch_size: int = 64,
    random_state: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> HolisticConcepts:
    """Find concepts that the classes share, weigh them, measure both halves, and group images by what decides them.

    Parameters
    ----------
    model : torch.nn.Module
    images : ImageSet
    classes : sequence of int
        Each is explained by the images that the model predicts as it.
    extractor : {"nmf", "k-means", "pca", "semi-nmf", "sae", "random"}
    method : str
        Importance: a name of `concept_importance`.
    layer : str, optional
        By default the last with positions that is never negative, and without one the last with positions.
    n_concepts, n_clusters : int
        Of the dictionary, and strategies of the graph: 5, or as many as images differ, by default.
    measure : int
        Images of a class at most to estimate importance on, and to measure on.
    batch_size, random_state : int
    progress : callable, optional
        ``progress(stage, done, total)``.

    Raises
    ------
    InputError
        An option out of range, or more concepts than the layer has channels.
    DataError
        A picture that cannot be read, or negative activations with "nmf".
    NothingToDo
        Fewer than 10 images are predicted as a class.
    """
    for name, value, choice in (("extractor", extractor, list(EXTRACTORS)), ("importance", method, list(METHODS))):
        if value not in choice:
            raise InputError(f"{name}: there is no {value!r}; {nearest(value, choice)}")
    if measure < 2:
        raise InputError(f"measure: got {measure}; it must be at least 2")
    tell = progress or (lambda stage, done, total: None)
    tell("predictions", 0, 1)
    predicted = predicted_classes(model, images, batch_size)[0].numpy()
    tell("predictions", 1, 1)
    own, learned, held = _parted(predicted, classes, measure)

    notes: list[str] = []
    layer = layer or layer_of(model, stacked(images, learned[classes[0]][:2]), extractor)
    concepts = ConceptModel(model, layer, make(extractor, n_concepts, random_state))
    known = _positions(concepts, images, np.concatenate(list(learned.values())), batch_size, random_state)
    concepts.extractor.fit(known)
    extraction = _compare(concepts, extractor, n_concepts, known, images, np.concatenate(list(held.values())),
                          batch_size, random_state, tell, notes)  # fmt: skip
    weigh = _Weigher(concepts, method, batch_size, random_state)
    found = []
    for number, each in enumerate(classes):
        tell("classes", number, len(classes))
        found.append(_view(weigh, images, each, own[each], learned[each], held[each], measure))
    tell("classes", len(classes), len(classes))
    for view in found:
        if view.agreement < 0.5:
            notes.append(f"class {view.class_id}: only {view.agreement:.0%} of the predictions survive when "
                         "activations are written in these concepts. Try more, or another extractor")  # fmt: skip
    rows = np.concatenate([each[spread(len(each), GRAPH_IMAGES)] for each in own.values()])
    local = _local(weigh, images, rows, predicted[rows], tell)
    labels = None if images.labels is None else images.labels.numpy()[rows]
    if n_clusters is None and count_different(local) == 1:
        notes.append(f"{method} is the same for all images, so there is one strategy; choose an importance that reads "
                     "the codes, such as gradient_input")  # fmt: skip
    graph = strategy_graph(
        local, None if labels is None else labels == predicted[rows], random_state=random_state,
        n_clusters=min(CLUSTERS, count_different(local)) if n_clusters is None else n_clusters,
    )  # fmt: skip
    return HolisticConcepts(concepts, extractor, method, _side(images), found, extraction, graph, rows, local,
                            predicted[rows], labels, list(dict.fromkeys(notes)))  # fmt: skip


def _parted(
    predicted: Int[np.ndarray, " n"], classes: Sequence[int], measure: int
) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray], dict[int, np.ndarray]]:
    """By class, the images that are predicted as it; those to learn from; the held-out ones, `measure` at most."""
    own = {each: np.flatnonzero(predicted == each) for each in classes}
    for each, rows in own.items():
        if len(rows) < FEWEST:
            raise NothingToDo(f"class {each}: the model predicts it for {len(rows)} of {len(predicted)} images; "
                              f"{FEWEST} at least are needed")  # fmt: skip
    held = {each: rows[spread(len(rows), max(2, round(HELD_OUT * len(rows))))] for each, rows in own.items()}
    learned = {each: np.setdiff1d(rows, held[each]) for each, rows in own.items()}
    return own, learned, {each: rows[spread(len(rows), measure)] for each, rows in held.items()}


def make(extractor: str, n_concepts: int, random_state: int) -> Any:
    """An extractor by its name, unfitted."""
    seed = {} if extractor == "pca" else {"random_state": random_state}
    return EXTRACTORS[extractor](n_concepts=n_concepts, **seed)


def layer_of(model: nn.Module, example: Tensor, extractor: str) -> str:
    """The last layer with positions that is never negative; without one, and not for NMF, the last with positions."""
    try:
        return nonnegative_layers(model, example)[-1]
    except InputError:
        if extractor == "nmf":
            raise
        return default_layers(model, example)[-1]


def _positions(
    concepts: ConceptModel, images: ImageSet, rows: np.ndarray, batch_size: int, random_state: int
) -> Float[Tensor, "n p"]:
    """Activations at positions of some images: all positions, or as many of each image as make `ROWS`."""
    device, most = device_of(concepts.model), max(1, ROWS // len(rows))

    def some(part: Any) -> Tensor:
        with torch.no_grad():
            a = concepts.activations(stacked(images, rows[list(part)]).to(device))
        a = a.reshape(len(a), -1, a.shape[-1])
        if a.shape[1] <= most:
            return a
        picked = [np.random.default_rng([random_state, int(rows[i])]).choice(a.shape[1], most, replace=False)
                  for i in part]  # fmt: skip
        return a[torch.arange(len(a))[:, None], torch.from_numpy(np.sort(picked, axis=1))]

    return map_batches(some, list(range(len(rows))), batch_size=batch_size).flatten(0, 1)


def _compare(
    concepts: ConceptModel, chosen: str, n_concepts: int, known: Tensor, images: ImageSet, rows: np.ndarray,
    batch_size: int, random_state: int, tell: Callable, notes: list[str],
) -> dict[str, ExtractionReport | None]:  # fmt: skip
    """Every extractor on the same activations, of as many held-out images as have `ROWS` positions, 10 at least."""
    device = device_of(concepts.model)
    with torch.no_grad():
        positions = concepts.activations(stacked(images, rows[:1]).to(device))[0, ..., 0].numel()
        pictures = stacked(images, rows[spread(len(rows), max(10, ROWS // positions))])
        unseen = map_batches(lambda x: concepts.activations(x.to(device)), pictures, batch_size=batch_size)

    def head(a: Tensor) -> Tensor:
        def some(part: range) -> Tensor:
            where = slice(part.start, part.stop)
            return concepts.behind(a[where].to(device), pictures[where].to(device))

        return map_batches(some, range(len(a)), batch_size=batch_size)

    few = known[torch.from_numpy(spread(len(known), FEW_ROWS))]
    found: dict[str, ExtractionReport | None] = {}
    for number, name in enumerate(EXTRACTORS):
        tell("extractors", number, len(EXTRACTORS))
        try:
            own = make(name, n_concepts, random_state).fit(few)
            found[name] = extraction_report(few, unseen, own, random_state=random_state, head=head)
        except (InputError, DataError) as error:
            if name == chosen:
                raise
            found[name] = None
            notes.append(f"{name} was left out of the comparison: {error}")
    tell("extractors", len(EXTRACTORS), len(EXTRACTORS))
    return found


@dataclass
class _Weigher:
    """Codes and importances of pictures, with what stays the same."""

    concepts: ConceptModel
    method: str
    batch_size: int
    random_state: int

    def encode(self, pictures: Tensor) -> Codes:
        """Codes of pictures, batch by batch."""
        device = device_of(self.concepts.model)
        with torch.no_grad():
            return map_batches(lambda x: self.concepts.encode(x.to(device)), pictures, batch_size=self.batch_size)

    def phi(self, codes: Codes, pictures: Tensor, target: Any, method: str = "") -> Float[np.ndarray, "n k"]:
        """Importance of each concept to each picture."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a code that an image lacks, a layer of one position
            return concept_importance(self.concepts, codes, pictures, target, method=method or self.method,
                                      batch_size=self.batch_size, random_state=self.random_state)  # fmt: skip


def _view(weigh: _Weigher, images: ImageSet, class_id: int, own: np.ndarray, learned: np.ndarray, measured: np.ndarray,
          measure: int) -> ClassView:  # fmt: skip
    concepts, rows = weigh.concepts, learned[spread(len(learned), measure)]
    pictures, held = stacked(images, rows), stacked(images, measured)
    codes, held_codes = weigh.encode(pictures), weigh.encode(held)
    phi = weigh.phi(codes, pictures, class_id)
    ranks = {
        weigh.method: phi.mean(0),
        "gradient_input": gradient_input(concepts, codes, pictures, class_id, batch_size=weigh.batch_size).mean(0),
        "tcav": tcav(concepts, codes, pictures, class_id, batch_size=weigh.batch_size).mean(0),
        "mean code": codes.flatten(0, -2).mean(0).double().numpy(),
    }  # fmt: skip
    proof = prove(concepts, held_codes, held, class_id, ranks, weigh.random_state)
    local = {name: weigh.phi(held_codes, held, class_id, name) for name in dict.fromkeys((weigh.method, *COMPARED))}
    local["random"] = np.random.default_rng(weigh.random_state).random((len(held), codes.shape[-1]))
    agreement = [int(logits_of_codes(concepts, held_codes[i : i + 1], held[i : i + 1], 1).argmax(1)) == class_id
                 for i in range(len(held))]  # fmt: skip
    crops, maps = _tops(codes, pictures, rows, _side(images))
    return ClassView(
        class_id, own, learned, measured, np.argsort(-phi.mean(0), kind="stable"),
        mean_importance(phi, class_id, random_state=weigh.random_state), proof,
        {name: _faithfulness(weigh, held_codes, held, class_id, values) for name, values in local.items()},
        float(np.mean(agreement)), crops, maps,
    )  # fmt: skip


def _faithfulness(weigh: _Weigher, codes: Codes, pictures: Tensor, class_id: int,
                  phi: np.ndarray) -> tuple[float, float, float]:  # fmt: skip
    """C-deletion, C-insertion and muFidelity, means over the images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        report = importance_report(weigh.concepts, codes, pictures, class_id, phi, random_state=weigh.random_state)
    return float(report.deletion.area.mean()), float(report.insertion.area.mean()), float(report.mu_fidelity.mean())


def _local(weigh: _Weigher, images: ImageSet, rows: np.ndarray, classes: np.ndarray, tell: Callable) -> np.ndarray:
    """Importances of many images, each to the class that it is predicted as."""
    parts = []
    for start in range(0, len(rows), weigh.batch_size):
        tell("strategies", start, len(rows))
        part = slice(start, start + weigh.batch_size)
        pictures = stacked(images, rows[part])
        parts.append(weigh.phi(weigh.encode(pictures), pictures, torch.from_numpy(classes[part])))
    tell("strategies", len(rows), len(rows))
    return np.concatenate(parts)


def _side(images: ImageSet) -> int:
    """Of crops: a third of the shorter side, 16 pixels or half of it at least."""
    short = min(images[0][0].shape[1:])
    return max(short // 3, min(16, short // 2), 1)


def _tops(
    codes: Codes, pictures: Tensor, rows: np.ndarray, side: int
) -> tuple[dict[int, np.ndarray], dict[int, Tensor]]:
    """By concept, where most of it is: in each image the window with the largest sum of codes, the best first."""
    height, width = pictures.shape[2:]
    grid = codes.movedim(-1, 1) if codes.ndim == 4 else as_grid(codes, (height, width)) if codes.ndim == 3 else None
    crops, maps = {}, {}
    for i in range(codes.shape[-1]):
        if grid is None:
            best = np.argsort(-codes[:, i].numpy(), kind="stable")[:SHOWN]
            crops[i] = np.array([(rows[j], 0, 0) for j in best if codes[j, i] > 0]).reshape(-1, 3)
            maps[i] = torch.zeros(0, height, width)
            continue
        large = interpolate(grid[:, [i]], size=(height, width), mode="bilinear", align_corners=False)[:, 0]
        inside = np.stack([uniform_filter(each.double().numpy(), side, mode="constant") for each in large])
        most = inside.reshape(len(rows), -1).max(1)
        best = np.argsort(-most, kind="stable")[:SHOWN]
        best = best[most[best] > 0]
        places = [np.unravel_index(inside[j].argmax(), inside[j].shape) for j in best]
        crops[i] = np.array([
            (rows[j], np.clip(y - side // 2, 0, height - side), np.clip(x - side // 2, 0, width - side))
            for j, (y, x) in zip(best, places, strict=True)
        ]).reshape(-1, 3)  # fmt: skip
        maps[i] = large[best]
    return crops, maps
