"""Claim: explanations differ more between shifted probe sets than between halves of one set, and most concepts are
harder to learn than the classes they explain.

Substitute for ADE20k against Pascal under a scene classifier: scikit-learn's digits, with concepts that are measured on
each image (loops, ink, slant, symmetries, the ink of 16 cells, ...: above or below a quantile of its set). Two halves
of the digits are two probe sets of one distribution; the second half, turned, blurred, paler and noisy, is the shifted
one. The model is a small network that tells digits, the generic one has learned which way up they are. The study with
people cannot be repeated at a desk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from scipy import ndimage
from sklearn.metrics import average_precision_score
from torch import nn
from torch.nn.functional import cross_entropy

from salience.concepts import (
    ConceptData,
    LinearExplanation,
    capacity_path,
    fit_cavs,
    learnability,
    normalized_ap,
    probe_shift,
)
from salience.concepts.concept_audit.linear import Parts, split
from salience.errors import InputError
from salience.evidence import Bar, Control, Outcome, Run
from salience.model.fitting import fit
from salience.reproductions.worlds import digits, nets, zoo

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from salience.concepts import Capacity, LearnReport, ProbeReport

WIDTH, CLASSES = 64, 10
TURNED, BLURRED, CONTRAST, NOISE = 25, 0.7, 0.7, 0.05
LOW, HIGH = 0.3, 0.7  # quantiles below and above which an attribute is a concept
PAPER = 0.3  # ink below which a pixel belongs to the background, of which loops are islands
KS = (4, 8, 16, 24, 32, 40, 48, 64)
DRAWS = 20  # random explanations
SPLITS = 5
SMOKE_ROWS, SMOKE_KS = 300, (8, 32, 64)


def reproduce(run: Run) -> Outcome:
    """Compare probe sets, learn concepts from generic features, count concepts."""
    if run.data is not None:
        raise InputError("--data: this reproduction measures the concepts of its own digits; leave it out")

    # Data and models.
    run.step("training the two networks")
    short = run.smoke
    model = zoo.trained(zoo.Recipe(build, train), run.seed)
    generic = zoo.trained(zoo.Recipe(build_generic, train_generic), run.seed)
    ink = digits.ink(run.seed)
    images, labels = np.concatenate([ink.train_x, ink.test_x]), np.concatenate([ink.train_y, ink.test_y])
    order = run.rng("halves").permutation(len(images))[: SMOKE_ROWS if short else None]
    half = len(order) // 2
    one, two = images[order[:half]], images[order[half : 2 * half]]
    probes = {"A": one, "A2": two, "B": shifted(two, run.rng("noise"))}
    data = {name: probe_set(model, pictures) for name, pictures in probes.items()}

    # Audit A: probe sets.
    run.step("comparing probe sets")
    shift = probe_shift(data, control="A2")
    gap = shift.gap("B")

    # Audit B: learnability, of the concepts of all images, and of the digits in the place of concepts.
    run.step("learning concepts from generic features")
    everything = images[order]
    concepts, names = concepts_of(everything)
    features = seen(generic, everything)[0]
    parts = split(len(everything))
    learn = learnability(features, concepts, seen(model, ink.test_x)[1], ink.test_y, names=names,
                         explained_feats=seen(model, everything)[0])  # fmt: skip
    as_concepts = digits_as_concepts(features, labels[order])
    shuffled = shuffle(features, concepts, names, parts, run.rng("shuffled"))

    # Audit C: number of concepts.
    run.step("counting concepts")
    predictions = seen(model, everything)[1].argmax(1)
    path = capacity_path(concepts.astype(np.float64), predictions, SMOKE_KS if short else KS, names=names)
    test = concepts[parts.test].astype(np.float64), predictions[parts.test]

    figures = {
        "cosine A-A2": mean(shift.cosines["A2"]), "cosine A-B": mean(shift.cosines["B"]),
        "drop in cosine": gap.mean,
        **{f"AUC of concept vectors, {name}": mean(shift.aucs[name]) for name in data},
        **{f"fidelity, {name}": value for name, value in shift.fidelity.items()},
        "transfer to A2": shift.transfer["A2"], "transfer to B": shift.transfer["B"],
        "drop in transfer": shift.transfer["A2"] - shift.transfer["B"],
        "drop in transfer, concept bottleneck": shift.bottleneck_transfer["A2"] - shift.bottleneck_transfer["B"],
        **{f"top {shift.k} concepts shared, A-{name}": mean(shift.overlap[name]) for name in ("A2", "B")},
        **{f"units of the same concept, A-{name}": shift.units[name] for name in ("A2", "B")},
        "median NAP of concepts": float(np.median(list(learn.nap.values()))),
        "median NAP of the model's classes": learn.threshold,
        "median NAP of digits learned like concepts": float(np.median(as_concepts)),
        "share of concepts below the median class": learn.share_below,
        "share of concepts below the median digit": float(np.mean([*learn.nap.values()] < np.median(as_concepts))),
        **shuffled,
        "NAP of shuffled labels off the base rate": abs(shuffled["NAP of shuffled labels"] - shuffled["base rate"]),
        **{f"fidelity with at most {one.k}": one.fidelity for one in path},
        "concepts of the largest explanation": len(path[-1].names),
        "largest loss from more concepts": largest_loss([one.fidelity for one in path]),
        "largest difference to average precision": difference(features, concepts, names, parts, normalized_ap),
        "accuracy of the model": float((seen(model, ink.test_x)[1].argmax(1) == ink.test_y).mean()),
    }  # fmt: skip
    return Outcome(
        claim="explanations differ more between shifted probe sets than between halves of one set, and most concepts "
        "are harder to learn than the classes they explain",
        level="mechanism",
        figures=figures,
        bars=[
            Bar("drop in cosine", at_least=0.1),
            Bar("drop in transfer", at_least=0.25),
            Bar("share of concepts below the median class", at_least=0.8),
            Bar("NAP of shuffled labels off the base rate", at_most=0.05),
            Bar("largest loss from more concepts", at_most=0.02),
            Bar("largest difference to average precision", at_most=1e-12),
        ],
        controls=controls(run, figures, shift, data, learn, as_concepts, path, test,
                          difference(features, concepts, names, parts, one_at_a_time)),
        intervals={"drop in cosine": (gap.low, gap.high)},
        pictures={"The three probe sets, and what the audits find": _picture(run, probes, shift, learn, path)},
        notes=[
            f"{len(names)} concepts; {len(shift.concepts)} are frequent enough in all sets to be compared. Quantiles "
            "are those of each set, so that the shift changes which images have a concept, and not how many.",
            "That NAP of shuffled labels is near the base rate can have no random control: it is one.",
            "That more concepts lose nothing holds for any order of the same coefficients, so this bar has no "
            "plausible fake that misses; it tells apart what is random.",
            "Recognition, simulation and preferences are of people and were not measured.",
        ],
    )  # fmt: skip


def controls(run: Run, figures: dict[str, float], shift: ProbeReport, data: dict[str, ConceptData], learn: LearnReport,
             as_concepts: np.ndarray, path: list[Capacity], test: tuple[np.ndarray, np.ndarray],
             ties: float) -> list[Control]:  # fmt: skip
    """For each bar what knows nothing, and what a lazy audit would report in its place."""
    rng = run.rng("controls")
    vectors = {name: rng.normal(size=(len(shift.concepts), WIDTH)) for name in data}
    unit = {name: v / np.linalg.norm(v, axis=1, keepdims=True) for name, v in vectors.items()}
    cosine = {name: float((unit["A"] * unit[name]).sum(1).mean()) for name in ("A2", "B")}
    losses, transfers = [], []
    for _ in range(DRAWS):
        whole = path[-1].explanation
        losses.append(largest_loss([random_explanation(whole, rng, one.k).fidelity(*test) for one in path]))
        own = random_explanation(whole, rng, len(whole.names))
        sets = {name: data[name].only(list(whole.names)) for name in ("A2", "B")}
        fidelity = {name: own.fidelity(one.concepts, one.predictions) for name, one in sets.items()}
        transfers.append(fidelity["A2"] - fidelity["B"])
    return [
        Control("random concept vectors", "random", {"drop in cosine": cosine["A2"] - cosine["B"]}),
        Control("AUC of the vectors in place of their cosine", "fake", {
            "drop in cosine": figures["AUC of concept vectors, A2"] - figures["AUC of concept vectors, B"]}),
        Control("random explanations", "random", {"drop in transfer": float(np.mean(transfers))}),
        # Of the few images of a smoke run it is too noisy.
        *([] if run.smoke else [Control("each set's own fidelity in place of transfer", "fake", {
            "drop in transfer": figures["fidelity, A2"] - figures["fidelity, B"]})]),
        Control("random scores of concepts and classes", "random", {
            "share of concepts below the median class": random_share(rng, learn, data)}),
        Control("the digits in place of concepts", "fake", {
            "share of concepts below the median class": float(np.mean(as_concepts < learn.threshold))}),
        Control("plain average precision in place of NAP", "fake", {
            "NAP of shuffled labels off the base rate": abs(
                figures["plain AP of shuffled labels"] - figures["base rate"])}),
        Control("random explanations of few concepts", "random", {
            "largest loss from more concepts": float(np.median(losses))}),
        Control("one sample at a time, ties in any order", "fake", {"largest difference to average precision": ties}),
    ]  # fmt: skip


class Attributes(NamedTuple):
    """Measurements (n, a) of images by name, and the number of loops (n,)."""

    values: dict[str, np.ndarray]
    loops: np.ndarray


def attributes(images: np.ndarray) -> Attributes:
    """What is measured on each image of 8 x 8: moments, symmetries, edges, the ink of 16 cells, loops."""
    x = images.astype(np.float64)
    ink, axis = x.sum((1, 2)), np.arange(8) - 3.5
    share = x / np.maximum(ink, 1e-9)[:, None, None]
    across, down = (share * axis).sum((1, 2)), (share * axis[:, None]).sum((1, 2))
    dx, dy = axis - across[:, None, None], axis[:, None] - down[:, None, None]
    height = (share * dy**2).sum((1, 2))
    found = {
        "ink": ink, "centre to the right": across, "centre down": down, "width": (share * dx**2).sum((1, 2)),
        "height": height, "slant": (share * dx * dy).sum((1, 2)) / np.maximum(height, 1e-9),
        "symmetry left-right": -np.abs(x - x[:, :, ::-1]).sum((1, 2)),
        "symmetry up-down": -np.abs(x - x[:, ::-1]).sum((1, 2)),
        "edges across": np.abs(np.diff(x, axis=2)).sum((1, 2)), "edges down": np.abs(np.diff(x, axis=1)).sum((1, 2)),
    }  # fmt: skip
    cells = x.reshape(-1, 4, 2, 4, 2).sum((2, 4))
    found |= {f"cell {row + 1}{column + 1}": cells[:, row, column] for row in range(4) for column in range(4)}
    paper = np.pad(x < PAPER, ((0, 0), (1, 1), (1, 1)), constant_values=True)
    return Attributes(found, np.array([ndimage.label(one)[1] - 1 for one in paper]))


def concepts_of(images: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Which concepts each image has, (n, c), and their names."""
    values, loops = attributes(images)
    columns = {"loop": loops >= 1, "two loops": loops >= 2}
    for name, value in values.items():
        low, high = np.quantile(value, [LOW, HIGH])
        columns |= {f"much {name}": value > high, f"little {name}": value <= low}
    return np.stack(list(columns.values()), axis=1), tuple(columns)


def shifted(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Turned, blurred, paler and noisy."""
    turned = ndimage.rotate(images, TURNED, axes=(2, 1), reshape=False, order=1)
    pale = ndimage.gaussian_filter(turned, (0, BLURRED, BLURRED)) * CONTRAST
    return np.clip(pale + rng.normal(0, NOISE, images.shape), 0, 1).astype(np.float32)


def build(seed: int) -> nn.Module:
    """The model that is explained: 64 hidden units."""
    return nets.mlp([64, WIDTH, CLASSES], seed)


def build_generic(seed: int) -> nn.Module:
    """A network for the four ways up."""
    return nets.mlp([64, WIDTH, 4], seed + 1000)


def train(model: nn.Module, seed: int) -> None:
    """Teach it to tell digits."""
    ink = digits.ink(seed)
    _fit(model, ink.train_x, ink.train_y, seed, 40)


def train_generic(model: nn.Module, seed: int) -> None:
    """Teach it which way up a digit is."""
    _fit(model, *ways_up(digits.ink(seed).train_x), seed, 20)


def ways_up(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each image turned by 0, 90, 180 and 270 degrees, and by how many quarters."""
    turned = [np.rot90(images, quarters, (1, 2)) for quarters in range(4)]
    return np.concatenate(turned), np.repeat(np.arange(4), len(images))


def _fit(model: nn.Module, images: np.ndarray, labels: np.ndarray, seed: int, epochs: int) -> None:
    fit(model, torch.from_numpy(images.reshape(-1, 64).copy()), torch.from_numpy(labels), loss=cross_entropy,
        optimizer=torch.optim.Adam(model.parameters(), lr=3e-3), epochs=epochs,
        generator=torch.Generator().manual_seed(seed))  # fmt: skip


def seen(model: nn.Module, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hidden units and logits of a network."""
    layers: nn.Sequential = model  # type: ignore[assignment]
    with torch.no_grad():
        hidden = layers[:2](torch.from_numpy(images.reshape(-1, 64)))
        return hidden.numpy(), layers[2](hidden).numpy()


def probe_set(model: nn.Module, images: np.ndarray) -> ConceptData:
    """Images as the model sees them, and their concepts."""
    hidden, logits = seen(model, images)
    concepts, names = concepts_of(images)
    predictions = logits.argmax(1)
    weights = model[2].weight.detach().numpy()  # type: ignore[index]
    return ConceptData(hidden, concepts, names, predictions, weights[predictions])


def naps(features: np.ndarray, labels: np.ndarray, names: tuple[str, ...], parts: Parts) -> dict[str, float]:
    """NAP on the test part of a probe for each column of labels."""
    n_pos, truth = len(parts.test) / CLASSES, dict(zip(names, labels[parts.test].T))
    probed = fit_cavs(features, labels, names, parts)
    return {name: normalized_ap(truth[name], cav.scores(features[parts.test]), n_pos)
            for name, cav in probed.cavs.items()}  # fmt: skip


def digits_as_concepts(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """NAP of the digits, learned as the concepts are; there are few of them, hence over several splits."""
    hot, names = np.stack([labels == c for c in range(CLASSES)], axis=1), tuple(map(str, range(CLASSES)))
    each = [naps(features, hot, names, split(len(labels), 42 + i)) for i in range(SPLITS)]
    return np.concatenate([list(found.values()) for found in each])


def shuffle(features: np.ndarray, concepts: np.ndarray, names: tuple[str, ...], parts: Parts,
            rng: np.random.Generator) -> dict[str, float]:  # fmt: skip
    """The same with labels that mean nothing: NAP, what random scores would get, and the plain AP."""
    labels = rng.permuted(concepts, axis=0)
    probed = fit_cavs(features, labels, names, parts)
    truth = labels[parts.test][:, [name in probed.cavs for name in names]]
    scores = [cav.scores(features[parts.test]) for cav in probed.cavs.values()]
    n_pos = len(parts.test) / CLASSES
    return {
        "NAP of shuffled labels": mean([normalized_ap(t, s, n_pos) for t, s in zip(truth.T, scores, strict=True)]),
        "base rate": float(np.mean(n_pos / (n_pos + (~truth).sum(0)))),
        "plain AP of shuffled labels": mean([average_precision_score(t, s) for t, s in zip(truth.T, scores)]),
    }


def difference(features: np.ndarray, concepts: np.ndarray, names: tuple[str, ...], parts: Parts, measure) -> float:
    """Largest difference of NAP with N = positives to scikit-learn's average precision, with and without ties."""
    probed, worst = fit_cavs(features, concepts[:, :5], names[:5], parts), 0.0
    for name, cav in probed.cavs.items():
        truth, scores = concepts[parts.test, names.index(name)], cav.scores(features[parts.test])
        for values in (scores, scores.round()):
            found = measure(truth, values, float(truth.sum()))
            worst = max(worst, abs(found - average_precision_score(truth, values)))
    return worst


def one_at_a_time(truth: np.ndarray, scores: np.ndarray, n_pos: float) -> float:
    """NAP with each sample as a threshold of its own, equal scores in whatever order they are sorted."""
    hit = truth[np.argsort(scores)[::-1]]
    recall = np.cumsum(hit) / hit.sum()
    return float((n_pos * recall / (n_pos * recall + np.cumsum(~hit))) @ np.diff(recall, prepend=0.0))


def random_explanation(like: LinearExplanation, rng: np.random.Generator, k: int) -> LinearExplanation:
    """Random coefficients on k random concepts."""
    coef = rng.normal(size=like.coef.shape) * (rng.permutation(len(like.names)) < k)
    return LinearExplanation(like.classes, coef, np.zeros(len(like.classes)), like.names, np.nan, np.nan)


def random_share(rng: np.random.Generator, learn: LearnReport, data: dict[str, ConceptData]) -> float:
    """Share of concepts whose NAP by random scores is below that of the median class by random scores."""
    concepts = data["A"].only(list(learn.nap)).concepts
    n_pos = len(concepts) / CLASSES
    own = [normalized_ap(one, rng.normal(size=len(one)), n_pos) for one in concepts.T]
    classes = [normalized_ap(data["A"].predictions == c, rng.normal(size=len(concepts)), n_pos)
               for c in np.unique(data["A"].predictions)]  # fmt: skip
    return float(np.mean(np.array(own) < np.median(classes)))


def largest_loss(fidelities: list[float]) -> float:
    """By how much a later entry falls short of an earlier one, at most."""
    best = np.maximum.accumulate(fidelities)
    return float((best - np.array(fidelities)).max())


def mean(values: dict | list) -> float:
    """Mean of a list, or of a dict's values."""
    return float(np.mean(list(values.values()) if isinstance(values, dict) else values))


def _picture(run: Run, probes: dict[str, np.ndarray], shift: ProbeReport, learn: LearnReport,
             path: list[Capacity]) -> Figure:  # fmt: skip
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.6), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=(1, 2.2))
    pictures = figure.add_subplot(grid[0, :])
    rows = [np.hstack([np.pad(one, 1, constant_values=1) for one in probes[name][:16]]) for name in ("A2", "B")]
    pictures.imshow(1 - np.vstack(rows), cmap="gray", vmin=0, vmax=1)
    pictures.set_yticks([4.5, 14.5], ["A2", "B"])
    pictures.set_xticks([])
    one = figure.add_subplot(grid[1, 0])
    pairs = np.array([[shift.cosines["A2"][name], shift.cosines["B"][name]] for name in shift.concepts])
    one.scatter(pairs[:, 0], pairs[:, 1], s=14)
    ends = [min(pairs.min(), 0), 1]
    one.plot(ends, ends, color="grey", linewidth=0.8)
    one.set(xlabel="cosine A-A2", ylabel="cosine A-B", title="each concept's vector")
    two = figure.add_subplot(grid[1, 1])
    known = {"concepts": list(learn.nap.values()), "the model's classes": list(learn.nap_classes.values())}
    two.hist(list(known.values()), bins=np.linspace(0, 1, 21).tolist(), density=True,
             label=list(known))  # fmt: skip
    two.legend(frameon=False, loc="upper left")
    two.set(xlabel="normalised average precision", yticks=[], title="how well each is known")
    three = figure.add_subplot(grid[1, 2])
    three.plot([len(each.names) for each in path], [each.fidelity for each in path], marker="o")
    three.axvline(32, color="grey", linewidth=0.8, linestyle="--")
    three.set(xlabel="concepts used", ylabel="predictions foretold", ylim=(0, 1), title="capacity (line at 32)")
    return figure
