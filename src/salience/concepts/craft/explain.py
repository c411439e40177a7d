"""CRAFT on the user's images, class by class, with the proof on images that it has not seen."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.integrate import trapezoid
from torch import Tensor, nn
from torch.utils.data import Subset

from salience.concepts.concept_curves import follow_orders
from salience.concepts.concept_model import Codes, logits_of_codes
from salience.concepts.craft.crops import stacked
from salience.concepts.craft.estimator import Craft, predicted_classes
from salience.concepts.importance import gradient_input, sobol_importance, tcav
from salience.errors import InputError, NothingToDo
from salience.measure.paired import Interval, PairedDifference, bootstrap_interval, paired_difference
from salience.model.images import ImageSet

RANDOM_ORDERS = 100
HELD_OUT = 0.3  # of a class's images
FEWEST = 10  # images of a class
SHOWN = 8  # crops of a concept that are kept to be looked at
PARTS = 3  # sub-concepts of a concept that is taken apart


class Order(NamedTuple):
    """An order of concepts, followed on held-out images.

    Attributes
    ----------
    changed : array (k + 1,)
        Share of the concepts that are out, or in.
    deletion, insertion : array (n, k + 1)
        The class's probability; for the random order the mean over its draws.
    logit_deletion : array (n, k + 1)
        The logit, where an order that takes out last what speaks against the class does best.
    """

    changed: Float[np.ndarray, " points"]
    deletion: Float[np.ndarray, "n points"]
    insertion: Float[np.ndarray, "n points"]
    logit_deletion: Float[np.ndarray, "n points"]

    def area(self, which: str) -> Float[np.ndarray, " n"]:
        """Area under one of the curves, for each image."""
        return trapezoid(getattr(self, which), self.changed, axis=-1)

    @property
    def score(self) -> Float[np.ndarray, " n"]:
        """Area under insertion minus area under deletion of each image; the higher, the better."""
        return self.area("insertion") - self.area("deletion")


@dataclass
class ConceptProof:
    """Whether an order of concepts tells what carries the class, on held-out images.

    Attributes
    ----------
    orders : dict of str to Order
        The order that is judged, cheaper ones, and "random".
    over_random : PairedDifference
        Its score over the mean of the random orders.
    beaten : float
        Share of the random orders with a lower mean score: above 0.95 for one random order in twenty.
    heuristic : str
        The best of the others.
    over_heuristic : PairedDifference
    """

    orders: dict[str, Order]
    over_random: PairedDifference
    beaten: float
    heuristic: str
    over_heuristic: PairedDifference

    @property
    def better(self) -> bool | None:
        """Whether the order is better than random ones; None if more than one in twenty does as well.

        Where a single concept of k carries the class, one random order in k begins with it: that is then told.
        """
        if self.over_random.low <= 0 or self.beaten < 0.5:
            return False
        return True if self.beaten >= 0.95 else None

    @property
    def words(self) -> str:
        """The verdict in plain words."""
        if self.over_random.high < 0:
            return "worse than random orders here"
        if self.better is False:
            return "no better than random orders here"
        text = f"its order of concepts carries the class better than {self.beaten:.0%} of random orders"
        if self.better is None:
            return f"{text}, which may be luck"
        if self.over_heuristic.low > 0:
            return f"{text}, and than {self.heuristic}"
        less = "less well than" if self.over_heuristic.high < 0 else "no better than"
        return f"{text}, but {less} {self.heuristic}"


@dataclass
class ClassConcepts:
    """What CRAFT found about one class.

    Attributes
    ----------
    class_id : int
    images, learned, measured : integer arrays
        Rows of the images that are predicted as the class; those concepts were learned from, and those measured on.
    craft : Craft
    order : integer array (k,)
        Concepts from the most to the least important.
    importance : list of Interval
        Total Sobol index of each concept: mean over images and 95 % interval.
    effect : array (k,)
        Mean of gradient x code: above 0 a concept speaks for the class, below 0 against it.
    top_crops : dict of int to integer array
        By concept, the crops that hold most of it, at most one an image.
    maps : dict of int to Tensor (m, height, width)
        By concept, where it is in the images that its top crops come from.
    agreement : float
        Share of held-out images whose predicted class survives being written in concepts.
    relative_error : float
        ``|A - U V| / |A|`` on the crops.
    proof : ConceptProof or None
    parts : dict of int to Craft
        Sub-concepts of the most important concepts.
    notes : list of str
    """

    class_id: int
    images: Int[np.ndarray, " n"]
    learned: Int[np.ndarray, " l"]
    measured: Int[np.ndarray, " m"]
    craft: Craft
    order: Int[np.ndarray, " k"]
    importance: list[Interval]
    effect: Float[np.ndarray, " k"]
    top_crops: dict[int, Int[np.ndarray, " c"]]
    maps: dict[int, Float[Tensor, "c height width"]]
    agreement: float
    relative_error: float
    proof: ConceptProof | None = None
    parts: dict[int, Craft] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def explain_classes(
    model: nn.Module,
    images: ImageSet,
    classes: Sequence[int],
    craft: Craft,
    *,
    n_design: int = 32,
    measure: int = 100,
    refine: int = 1,
    earlier_layer: str | None = None,
    random_state: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[ClassConcepts]:
    """Find the concepts of classes, and measure on held-out images whether they carry them.

    Parameters
    ----------
    model : torch.nn.Module
    images : ImageSet
    classes : sequence of int
        Each is explained by the images that the model predicts as it.
    craft : Craft
        Unfitted: its parameters are used for every class.
    n_design : int
        Points of a block of the Sobol design; every image has a scrambled design of its own.
    measure : int
        Images of a class at most to estimate importance on, and to measure on.
    refine : int
        Most important concepts to take apart at an earlier layer.
    earlier_layer : str, optional
        For that; by default that of `Craft.refine`.
    random_state : int
    progress : callable, optional
        ``progress(stage, done, total)``.

    Raises
    ------
    InputError
        An option out of range.
    DataError
        A picture that cannot be read, or a layer with negative values.
    NothingToDo
        Fewer than 10 images are predicted as a class.
    """
    if measure < 2 or refine < 0 or n_design < 2:
        raise InputError(f"measure, refine and n_design: got {measure}, {refine} and {n_design}; at least 2, 0 and 2")
    tell = progress or (lambda stage, done, total: None)
    tell("predictions", 0, 1)
    predicted = predicted_classes(model, images, craft.batch_size)[0].numpy()
    tell("predictions", 1, 1)
    found = []
    for number, class_id in enumerate(classes):
        tell("classes", number, len(classes))
        own = np.flatnonzero(predicted == class_id)
        if len(own) < FEWEST:
            raise NothingToDo(f"class {class_id}: the model predicts it for {len(own)} of {len(images)} images; "
                              f"{FEWEST} at least are needed")  # fmt: skip
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            one = _explain_class(model, images, class_id, own, craft, n_design, measure, refine, earlier_layer,
                                 random_state)  # fmt: skip
        one.notes += list(dict.fromkeys(str(w.message) for w in caught if w.category is UserWarning))
        found.append(one)
    tell("classes", len(classes), len(classes))
    return found


def _explain_class(
    model: nn.Module, images: ImageSet, class_id: int, own: np.ndarray, craft: Craft, n_design: int, measure: int,
    refine: int, earlier_layer: str | None, random_state: int,
) -> ClassConcepts:  # fmt: skip
    out = spread(len(own), max(2, round(HELD_OUT * len(own))))
    learned, measured = np.delete(own, out), own[out][spread(len(out), measure)]
    fitted = Craft(**craft.get_params()).fit(model, Subset(images, learned.tolist()))
    concepts = fitted.concepts_

    pictures = stacked(images, learned[spread(len(learned), measure)])
    codes = fitted.transform(pictures)
    totals = sobol_importance(concepts, codes, pictures, class_id, n_design=n_design, random_state=random_state)
    importance = [bootstrap_interval(column, random_state=random_state) for column in totals.T]
    effects = gradient_input(concepts, codes, pictures, class_id, batch_size=craft.batch_size)
    ranks = {
        "Sobol": totals.mean(0), "gradient x code": effects.mean(0),
        "TCAV": tcav(concepts, codes, pictures, class_id, batch_size=craft.batch_size).mean(0),
        "mean code": codes.flatten(0, -2).mean(0).double().numpy(),
    }  # fmt: skip

    held = stacked(images, measured)
    held_codes = fitted.transform(held)
    proof = prove(concepts, held_codes, held, class_id, ranks, random_state)
    agreement = np.mean([
        int(logits_of_codes(concepts, held_codes[i : i + 1], held[i : i + 1], 1).argmax(1)) == class_id
        for i in range(len(held))
    ])  # fmt: skip

    order = np.argsort(-totals.mean(0), kind="stable")
    tops = {int(i): top_crops(fitted, int(i)) for i in order}
    maps = {i: _maps(fitted, i, crops) for i, crops in tops.items()}
    notes = []
    if agreement < 0.5:
        notes.append(f"only {agreement:.0%} of the predictions survive when activations are written in these concepts: "
                     "what carries the class is left out. Try more concepts or larger crops")  # fmt: skip
    result = ClassConcepts(class_id, own, learned, measured, fitted, order, importance, effects.mean(0), tops, maps,
                           float(agreement), fitted.relative_error_, proof, notes=notes)  # fmt: skip
    for i in map(int, order[:refine]):
        try:
            result.parts[i] = fitted.refine(i, earlier_layer, PARTS)
        except InputError as error:
            if earlier_layer is not None:
                raise
            result.notes.append(f"concept {i} was not taken apart: {error}")
    return result


def prove(concepts: Any, codes: Codes, images: Tensor, class_id: int, ranks: dict[str, np.ndarray],
          random_state: int) -> ConceptProof:  # fmt: skip
    """Concepts out and in by each order, on held-out images; the first of `ranks` is judged against the others."""
    draws = np.random.default_rng(random_state).random((RANDOM_ORDERS, codes.shape[-1]))
    every = np.concatenate([np.stack(list(ranks.values())), draws])
    curves = {}
    for name, mode, score in (("deletion", "deletion", "probability"), ("insertion", "insertion", "probability"),
                              ("logit_deletion", "deletion", "logit")):  # fmt: skip
        changed, curves[name] = follow_orders(concepts, codes, images, class_id, every, mode=mode, score=score)
    found = [Order(changed, *(curves[name][i] for name in curves)) for i in range(len(every))]
    orders = dict(zip(ranks, found, strict=False))
    random = found[len(ranks) :]
    orders["random"] = Order(changed, *(curves[name][len(ranks) :].mean(0) for name in curves))
    judged, *others = ranks
    own = orders[judged].score
    best = max(others, key=lambda name: float(orders[name].score.mean()))
    return ConceptProof(
        orders, paired_difference(own, orders["random"].score, random_state=random_state),
        float(np.mean([one.score.mean() < own.mean() for one in random])), best,
        paired_difference(own, orders[best].score, random_state=random_state),
    )  # fmt: skip


def top_crops(craft: Craft, concept: int, count: int = SHOWN) -> Int[np.ndarray, " c"]:
    """The crops that hold most of a concept, at most one an image, none that holds nothing of it."""
    codes = craft.crop_codes_[:, concept].numpy()
    ranked = np.argsort(-codes, kind="stable")
    ranked = ranked[codes[ranked] > 0]
    _, first = np.unique(craft.crops_.boxes[ranked, 0], return_index=True)
    return ranked[np.sort(first)][:count]


def _maps(craft: Craft, concept: int, crops: np.ndarray) -> Float[Tensor, "c height width"]:
    """Grad-CAM maps of a concept in the images of some crops; the codes themselves at a layer without Grad-CAM."""
    if not len(crops):
        return torch.zeros(0, 1, 1)
    pictures = stacked(craft.crops_.images, craft.crops_.boxes[crops, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a concept that an image as a whole hardly holds has a flat map
        return craft.attribution_maps(pictures, [concept])[:, 0]


def spread(count: int, wanted: int) -> Int[np.ndarray, " w"]:
    """Places spread evenly over `count`, at most `wanted` of them."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(int))
