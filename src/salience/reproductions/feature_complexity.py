"""Claim: features that are harder to decode from early layers are learned later and matter less to the decision, which
shuffled features do not show.

Substitute for ResNet-50 on ImageNet: a small residual network learns scikit-learn's digits, shifted at random and
noisy, with a checkpoint after each of 12 epochs; 100 features of 64 penultimate neurons in place of 10,000 of 2,048.
The paper's correlations stand in figures whose values could not be read, so the bars are from a trial of this setting.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from scipy.stats import norm
from sklearn.linear_model import Ridge
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from salience.concepts import (
    ComplexityReport,
    ComplexityStudy,
    block_layers,
    feature_complexity,
    feature_importance,
    layer_activations,
    linear_head,
    rank_correlation,
    time_to_decode,
    v_information,
)
from salience.errors import InputError
from salience.evidence import Bar, Control, Outcome, Run
from salience.measure.ranking import spearman
from salience.model.fitting import fit
from salience.reproductions.worlds import digits, nets, zoo

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE, SHIFT, NOISE = 12, 2, 0.1
CHANNELS, WIDTH, BLOCKS = 24, 64, 5
EPOCHS, COPIES, LEARNING_RATE, BATCH = 12, 3, 1e-3, 64
LEARN = 800  # images that features and decoders are learned from
FEATURES, EXTREME = 100, 10  # of the dictionary; the simplest and the most complex ones that flow is told of


def reproduce(run: Run) -> Outcome:
    """Train with checkpoints, study the features of the last one, and measure controls by the same correlations."""
    if run.data is not None:
        raise InputError("--data: this reproduction makes its own digits; leave it out")

    # Data and model: shifted noisy digits, one network at every epoch.
    run.step("training the network")
    epochs = list(zoo.trained(zoo.Recipe(build, train_briefly if run.smoke else train), run.seed).children())
    checkpoints = {str(i + 1): model for i, model in enumerate(epochs[: 2 if run.smoke else EPOCHS])}
    ink, rng = digits.ink(run.seed), run.rng("images")
    learn, test = shifted(ink.train_x[:LEARN], rng), shifted(ink.test_x, rng)
    if run.smoke:
        learn, test = learn[:300], test[:200]

    # Method: features and all that is said of them.
    run.step("features")
    study = ComplexityStudy(n_features=20 if run.smoke else FEATURES, noise=[NOISE], draws=2 if run.smoke else 5,
                            random_state=run.seed)  # fmt: skip
    model = checkpoints[list(checkpoints)[-1]]
    report = study.run(model, learn, test, checkpoints)

    # Measure: the same with other features, other decoders, and the two identities.
    run.step("controls")
    world = layers_of(model, checkpoints, learn, test, ink.test_y[: len(test)])
    planted = planted_complexity(world, quadrants(learn), quadrants(test))
    rows = [run.rng("shuffled").permutation(len(part)) for part in (learn, test)]
    lost = planted_complexity(world, quadrants(learn)[rows[0]], quadrants(test)[rows[1]])
    exact, wrong = identities(world, report, model)
    assert report.time is not None
    own = correlations(report.complexity.score, report.time.score, report)
    codes, held = (run.rng("shuffled features").permutation(part) for part in (report.train_features, report.features))
    shuffled = correlations(report.shuffled.score, time_to_decode(world.penultimate, codes, held).score, report)
    inside = in_sample(world, report, rows[0])
    pixels = correlations(1 - report.complexity.information[0], report.time.score, report)
    accuracy = float((model(test).argmax(1).numpy() == ink.test_y[: len(test)]).mean())

    figures = {
        **own,
        "complexity of a linear feature": planted[0],
        "complexity of an XOR feature": planted[1],
        "XOR over linear": planted[1] - planted[0],
        "least complexity of a shuffled feature": float(report.shuffled.score[report.shuffled.live].min()),
        "largest error of the closed form": exact[0],
        "largest error of importance": exact[1],
        **told(report),
        "accuracy of the network": accuracy,
    }
    named = {"time": "time to decode", "time, readable": "time to decode, readable features",
             "importance": "importance", "importance, readable": "importance, readable features"}  # fmt: skip
    return Outcome(
        claim="features that are harder to decode from early layers are learned later and matter less to the decision, "
        "which shuffled features do not show",
        level="mechanism",
        figures=figures,
        bars=[
            Bar("time", at_least=0.6), Bar("time, readable", at_least=0.6),
            Bar("importance", at_most=-0.3), Bar("importance, readable", at_most=-0.3),
            Bar("XOR over linear", at_least=0.2),
            Bar("least complexity of a shuffled feature", at_least=0.95),
            Bar("largest error of the closed form", at_most=1e-6),
            Bar("largest error of importance", at_most=1e-6),
        ],
        controls=[
            Control("shuffled features", "random", {**shuffled, "XOR over linear": lost[1] - lost[0]}),
            Control("judged in sample", "fake", inside),
            Control("from the input alone", "fake", pixels),
            Control("decoders of variance 1", "fake", {"largest error of the closed form": wrong[0]}),
            Control("absolute value outside the mean", "fake", {"largest error of importance": wrong[1]}),
        ],
        intervals={
            name: (one.low, one.high) for name, key in named.items()
            if np.isfinite((one := report.correlations[key]).low)
        },
        pictures={"Complexity, importance and time": _scatter(report), "Where and when": _curves(report)},
        notes=[
            f"Correlations are Spearman's over features, with bootstrap intervals. Readable: R^2 above 0.5 at "
            f"the penultimate layer. Layers: {', '.join(report.complexity.names)}, maps averaged to 4 x 4.",
            "Told and not judged: epochs, flow and companions. In the paper complexity and importance have no relation "
            "after the first epoch, and the skip path carries nearly all from the third block on.",
        ],
    )  # fmt: skip


class World(NamedTuple):
    """Activations of both parts, of every layer and of each checkpoint's penultimate one; labels of the second."""

    layers: dict[str, tuple[Tensor, Tensor]]
    penultimate: dict[str, tuple[Tensor, Tensor]]
    labels: np.ndarray


class Block(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.conv2 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """``relu(x + branch(x))``."""
        return torch.relu(x + self.conv2(torch.relu(self.conv1(x))))


class Net(nn.Module):
    """Stem, five residual blocks of 24 channels, 1 x 1 to 64, ReLU, average, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, CHANNELS, 3, padding=1), nn.ReLU())
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.wide = nn.Conv2d(CHANNELS, WIDTH, 1)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of ten digits, for images (n, 1, 12, 12)."""
        return self.head(torch.relu(self.wide(self.blocks(self.stem(x)))).mean((2, 3)))


def shifted(ink: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Digits (n, 8, 8) on 12 x 12 pixels, moved by up to 2 pixels each way, with noise of deviation 0.1."""
    places = rng.integers(0, 2 * SHIFT + 1, (len(ink), 2))
    canvas = rng.normal(0, NOISE, (len(ink), SIDE, SIDE))
    for picture, one, (top, left) in zip(canvas, ink, places, strict=True):
        picture[top : top + 8, left : left + 8] += one
    return torch.from_numpy(canvas.astype(np.float32))[:, None]


def build(seed: int) -> nn.Module:
    """A network for each epoch."""
    with nets.seeded(seed):
        return nn.ModuleList(Net() for _ in range(EPOCHS))


def train(model: nn.Module, seed: int) -> None:
    """Train one network, and keep a copy of it after each epoch."""
    _fit(model, seed, EPOCHS, COPIES)


def train_briefly(model: nn.Module, seed: int) -> None:
    """Train just long enough to try the plumbing."""
    _fit(model, seed, 2, 1)


def _fit(model: nn.Module, seed: int, epochs: int, copies: int) -> None:
    ink, rng = digits.ink(seed), np.random.default_rng(seed)
    images = torch.cat([shifted(ink.train_x, rng) for _ in range(copies)])
    labels = torch.from_numpy(np.tile(ink.train_y, copies))
    networks: Any = model
    network, steps = copy.deepcopy(networks[0]), len(images) // BATCH

    def keep(step: int) -> None:
        if step % steps == 0:
            networks[step // steps - 1].load_state_dict(network.state_dict())

    fit(network, images, labels, loss=cross_entropy, optimizer=torch.optim.Adam(network.parameters(), LEARNING_RATE),
        epochs=epochs, batch_size=BATCH, generator=torch.Generator().manual_seed(seed), on_step=keep)  # fmt: skip


def layers_of(
    model: nn.Module, checkpoints: dict[str, nn.Module], learn: Tensor, test: Tensor, labels: np.ndarray
) -> World:
    """What the study saw, for what is measured beside it."""
    names = block_layers(model, learn[:2])
    seen = [layer_activations(model, part, names) for part in (learn, test)]
    penultimate = {
        name: tuple(layer_activations(one, part, ["penultimate"]).layers["penultimate"] for part in (learn, test))
        for name, one in checkpoints.items()
    }
    return World({name: (seen[0].layers[name], seen[1].layers[name]) for name in names}, penultimate, labels)


def quadrants(images: Tensor) -> np.ndarray:
    """Ink of the upper left quadrant, and whether just one of it and the lower right one has more than half of all
    images have; (n, 2)."""
    half = SIDE // 2
    ink = images[:, 0].double()
    parts = torch.stack([ink[:, :half, :half].mean((1, 2)), ink[:, half:, half:].mean((1, 2))], 1).numpy()
    more = parts > np.median(parts, axis=0)
    return np.stack([parts[:, 0], more[:, 0] ^ more[:, 1]], 1).astype(np.float64)


def planted_complexity(world: World, learn: np.ndarray, test: np.ndarray) -> tuple[float, float]:
    """Complexity of the linear and of the XOR feature."""
    linear, xor = feature_complexity(world.layers, learn, test).score
    return float(linear), float(xor)


def correlations(K: np.ndarray, A: np.ndarray, report: ComplexityReport) -> dict[str, float]:
    """The four rank correlations that are judged, of these complexities and times; NaN where one is constant."""
    found = {}
    for name, rows in (("", np.isfinite(K) & np.isfinite(A)), (", readable", report.readable)):
        found[f"time{name}"] = rank_correlation(K[rows], A[rows]).value
        found[f"importance{name}"] = rank_correlation(K[rows], report.importance.absolute[rows]).value
    return found


def in_sample(world: World, report: ComplexityReport, rows: np.ndarray) -> dict[str, float]:
    """The same bars when decoders without a penalty are judged on what they were fitted to."""
    z = report.train_features
    layers, checkpoints = ({name: (part[0], part[0]) for name, part in steps.items()}
                           for steps in (world.layers, world.penultimate))  # fmt: skip
    K, A = feature_complexity(layers, z, z, 1e-9), time_to_decode(checkpoints, z, z, 1e-9)
    shuffled = feature_complexity(layers, z[rows], z[rows], 1e-9)
    return {**correlations(K.score, A.score, report),
            "least complexity of a shuffled feature": float(np.nanmin(shuffled.score))}  # fmt: skip


def told(report: ComplexityReport) -> dict[str, float]:
    """What is told and not judged."""
    live, order, first, last = report.complexity.live, report.order, report.epochs[0], report.epochs[-1]
    assert report.time is not None
    early = 1 - report.complexity.information[:-1].mean(0), 1 - report.time.information[:-1].mean(0)
    flow, last_layer = report.flow["cka"], 1 - report.complexity.information[-1]
    return {
        "time, last layer and checkpoint left out": spearman(early[0][live], early[1][live]),
        "last layer alone against importance": spearman(last_layer[live], report.importance.absolute[live]),
        "importance at the first checkpoint": first.against_importance.value,
        "mean complexity at the first checkpoint": first.mean,
        "mean complexity at the last checkpoint": last.mean,
        "complexity of the top 1 % at the first checkpoint": first.top,
        "complexity of the top 1 % at the last checkpoint": last.top,
        **{f"{name} on the {path} of the last block": float(getattr(flow, path)[-1, own].mean())
           for name, own in (("simplest", order[:EXTREME]), ("most complex", order[-EXTREME:]))
           for path in ("skip", "branch")},
        **{f"complexity against {name}": spearman(report.complexity.score[live], values[live])
           for name, values in report.companions.items()},
        "live features": float(live.sum()),
        "readable features": float(report.readable.sum()),
        "relative error of the dictionary": report.dictionary.relative_error_,
        "predictions kept": report.agreement,
    }  # fmt: skip


def identities(
    world: World, report: ComplexityReport, model: nn.Module
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Errors of the closed form against likelihoods, and of importance against occlusion: ours, and of the fakes."""
    H, H_test = world.layers["penultimate"]
    z, z_test = report.train_features, report.features
    scale = np.where(report.complexity.live, z_test.std(0), 1.0)
    z, z_test = z / scale, z_test / scale
    ours = v_information(H, z, H_test, z_test, 1.0)
    predicted = Ridge(1.0).fit(H.double().numpy(), z).predict(H_test.double().numpy())
    gain = {
        variance: (
            norm.logpdf(z_test, predicted, variance**0.5) - norm.logpdf(z_test, z_test.mean(0), variance**0.5)
        ).mean(0)
        for variance in (0.5, 1.0)
    }
    closed = [float(np.abs(ours - np.maximum(gain[variance], 0)).max()) for variance in (0.5, 1.0)]

    # Of the labels' logits: a network that is hardly trained predicts one class, where no sign changes.
    W, D = (
        linear_head(model, torch.zeros(2, 1, SIDE, SIDE)).weight.numpy(),
        report.dictionary.components_.double().numpy(),
    )
    z_test, rows, error, fake = report.features, np.arange(len(world.labels)), 0.0, 0.0
    importance = feature_importance(z_test, D, W, world.labels)
    logit = (z_test @ D @ W.T)[rows, world.labels]
    for i in range(z_test.shape[1]):
        without = z_test.copy()
        without[:, i] = 0
        change = np.abs(logit - (without @ D @ W.T)[rows, world.labels]).mean()
        error = max(error, abs(change - importance.absolute[i]))
        fake = max(fake, abs(change - abs(importance.signed[i])))
    return (closed[0], float(error)), (closed[1], float(fake))


def _scatter(report: ComplexityReport) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.8), layout="constrained")
    assert report.time is not None
    sides = (("importance (logit)", report.importance.absolute), ("time to decode", report.time.score))
    for axis, (name, values) in zip(figure.subplots(1, 2), sides, strict=True):
        axis.scatter(report.complexity.score, values, s=12)
        axis.set_xlabel("complexity K")
        axis.set_ylabel(name)
    return figure


def _curves(report: ComplexityReport) -> Figure:
    from matplotlib.figure import Figure

    assert report.time is not None
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    order = report.order
    for axis, steps in zip(figure.subplots(1, 2, sharey=True), (report.complexity, report.time), strict=True):
        for name, own in (("simplest 10", order[:EXTREME]), ("most complex 10", order[-EXTREME:])):
            axis.plot(range(len(steps.names)), steps.information[:, own].mean(1), marker="o", label=name)
        axis.set_xticks(range(len(steps.names)), steps.names, rotation=45, ha="right", fontsize=8)
        axis.set_ylim(0, 1)
        axis.legend(fontsize=8)
    return figure
