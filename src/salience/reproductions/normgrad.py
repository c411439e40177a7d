"""Claim: maps fused over layers point at the object at least as often as the best single layer, random smooth
maps less often than any, and meta steps make maps more class-sensitive.

Substitute for ResNet-50 on VOC07 and COCO: scenes of two digits on 32 x 32 pixels, and a small multi-label network;
each map is to point at the digit of its class. That the gradient dies at the last layer, that Grad-CAM falls off
before it, and that NormGrad cannot tell classes apart there also holds of maps that are wrong, so these figures are
told and not judged.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from captum.attr import Attribution
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from salience.errors import InputError
from salience.evidence import Bar, Control, Outcome, Run
from salience.features import (
    GradCAM,
    Gradient,
    LinearApproximation,
    MetaSaliency,
    NormGrad,
    PointingGame,
    class_sensitivity,
    normalise,
)
from salience.features.baselines import RandomSmoothMap
from salience.features.normgrad.contributions import contribution_map
from salience.features.normgrad.fusion import fuse
from salience.measure.paired import paired_difference
from salience.model.at import capture
from salience.model.fitting import fit
from salience.reproductions.worlds import canvas, nets, zoo

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# After each convolution's rectifier; the last one is followed by the global average.
LAYERS = ("relu1", "relu2", "relu3", "relu4")
METHODS = {
    "NormGrad": lambda model, layer: NormGrad(model, layer),
    "selective NormGrad": lambda model, layer: NormGrad(model, layer, selective=True),
    "linear approximation": lambda model, layer: LinearApproximation(model, layer),
    "Grad-CAM": lambda model, layer: GradCAM(model, layer),
    "gradient": lambda model, layer: Gradient(model, layer),
}
STEPS = (0.0025, 0.02)  # length of the meta step
SCENES, EPOCHS = 6000, 12
MARGIN = 2  # pixels around a digit's box that still count


def reproduce(run: Run) -> Outcome:
    """Point at digits with maps of every layer, and step."""
    if run.data is not None:
        raise InputError("--data: this reproduction makes its own scenes; leave it out")

    # Data and model: scenes of held-out digits, a network that says which digits are there.
    run.step("training the network")
    recipe = zoo.Recipe(build, train_briefly if run.smoke else train)
    model = zoo.trained(recipe, run.seed)
    scenes = canvas.scenes(24 if run.smoke else 400, run.seed, part="test")
    images = torch.from_numpy(scenes.images)
    top = model(images).topk(2, dim=1).indices.sort(1).values
    found = float((top == torch.from_numpy(scenes.labels).sort(1).values).all(1).double().mean())

    # Method and measure: each map points at its class's digit, or does not.
    game = Pointing(scenes)
    hits: dict[str, np.ndarray] = {}
    accuracy: dict[str, float] = {}
    for name, method in METHODS.items():
        run.step(f"maps: {name}")
        for layer in LAYERS:
            hits[f"{name} {layer}"], accuracy[f"{name} {layer}"] = game.play(method(model, layer))
        hits[f"{name} fused"], accuracy[f"{name} fused"] = game.play(method(model, list(LAYERS)))
    chance, fake = RandomSmoothMap(model, random_state=run.seed), ActivationOnly(model)
    _, accuracy["random smooth map"] = game.play(chance)
    _, accuracy["activation alone, fused"] = game.play(fake)

    best = {name: max(LAYERS, key=lambda layer: accuracy[f"{name} {layer}"]) for name in METHODS}
    lowest = min(accuracy[f"{name} {layer}"] for name in METHODS if name != "gradient" for layer in LAYERS)
    gain = {
        name: paired_difference(
            hits[f"{name} fused"], hits[f"{name} {best[name]}"], random_state=run.rng(f"interval {name}")
        )
        for name in ("selective NormGrad", "linear approximation")
    }  # fmt: skip

    run.step("meta steps")
    few = images[: 8 if run.smoke else 150]
    correlation = {}
    for name in ("NormGrad", "selective NormGrad"):
        plain = METHODS[name](model, LAYERS[-1])
        correlation[f"class correlation, {name}, no step"] = class_sensitivity(plain, few).mean
        for lr in STEPS:
            correlation[f"class correlation, {name}, lr {lr}"] = class_sensitivity(MetaSaliency(plain, lr), few).mean
    blind = {
        f"class correlation, NormGrad, lr {lr}": class_sensitivity(chance, few).mean for lr in STEPS
    }  # of maps that do not look at the network

    figures = {
        "largest error of the factorised norm": outer_product_error(model, images[:8]),
        **{f"pointing: {name}": value for name, value in accuracy.items()},
        "pointing: best single layer, selective NormGrad": accuracy[f"selective NormGrad {best['selective NormGrad']}"],
        "pointing: best single layer, linear approximation": accuracy[
            f"linear approximation {best['linear approximation']}"
        ],
        "fused minus best single, selective NormGrad": _gain(accuracy, best, "selective NormGrad"),
        "fused minus best single, linear approximation": _gain(accuracy, best, "linear approximation"),
        "pointing: lowest single layer": lowest,
        **correlation,
        "scenes with both digits found": found,
    }
    return Outcome(
        claim="maps fused over layers point at the object at least as often as the best single layer, random smooth "
        "maps less often than any, and meta steps make maps more class-sensitive",
        level="mechanism",
        figures=figures,
        bars=[
            Bar("largest error of the factorised norm", at_most=1e-6),
            Bar("fused minus best single, selective NormGrad", at_least=0.0),
            Bar("fused minus best single, linear approximation", at_least=0.04),
            Bar("pointing: lowest single layer", above="pointing: random smooth map"),
            Bar("class correlation, NormGrad, lr 0.0025", at_most=0.98),
            Bar("class correlation, NormGrad, no step", above="class correlation, NormGrad, lr 0.0025"),
            Bar("class correlation, NormGrad, lr 0.0025", above="class correlation, NormGrad, lr 0.02"),
        ],
        controls=[
            Control("random smooth maps", "random", _in_place(accuracy, best, "random smooth map", blind)),
            Control("activations without the gradient", "fake", _in_place(accuracy, best, "activation alone, fused")),
        ],
        intervals={f"fused minus best single, {name}": (one.low, one.high) for name, one in gain.items()},
        pictures={
            "Which layers point at the digit": _accuracies(accuracy),
            "One scene, explained at each layer": _maps(model, scenes),
        },
        notes=[
            "A map points where it is largest; a hit lies in the digit's 8 x 8 box or within 2 pixels of it.",
            "The best single layer is chosen on the scenes that it is judged on, in its favour.",
            "Meta steps can also make linear maps less class-sensitive; only NormGrad's are judged.",
        ],
    )


def build(seed: int) -> nn.Module:
    """The untrained network."""
    return nets.small_cnn(seed)


def train(model: nn.Module, seed: int) -> None:
    """Train it to tell which digits a scene holds."""
    _fit(model, seed, SCENES, EPOCHS)


def train_briefly(model: nn.Module, seed: int) -> None:
    """Train just long enough to try the plumbing."""
    _fit(model, seed, 256, 1)


def _fit(model: nn.Module, seed: int, count: int, epochs: int) -> None:
    scenes = canvas.scenes(count, seed)
    fit(
        model, torch.from_numpy(scenes.images), torch.from_numpy(scenes.multi_hot()),
        loss=binary_cross_entropy_with_logits, optimizer=torch.optim.Adam(model.parameters(), lr=5e-3), epochs=epochs,
        batch_size=32, milestones=(8,), gamma=0.2,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


class Pointing:
    """Both digits of every scene, each to be pointed at by a map of its own."""

    def __init__(self, scenes: canvas.Scenes) -> None:
        self.images = torch.from_numpy(scenes.images).repeat_interleave(2, dim=0)
        self.labels = torch.from_numpy(scenes.labels).flatten()
        self.masks = torch.from_numpy(scenes.box_masks(MARGIN)).flatten(0, 1)

    def play(self, attribution: Attribution) -> tuple[np.ndarray, float]:
        """Which maps hit, and the mean accuracy over the classes."""
        with warnings.catch_warnings():  # bias maps of the last layer are flat, which is one of the findings
            warnings.simplefilter("ignore", UserWarning)
            maps = attribution.attribute(self.images, target=self.labels)[:, 0]
        game = PointingGame(tolerance=0)
        return game.update(maps, self.masks, self.labels).astype(float), game.compute()


class ActivationOnly(Attribution):
    """The fake: where layers are active, whatever the class; no gradient and no backward pass."""

    def attribute(self, inputs: Tensor, target: Any = None) -> Tensor:
        """Fused norms of the activations."""
        with torch.no_grad(), capture(self.forward_func, LAYERS) as seen:
            self.forward_func(inputs)
        norms = [seen[name].norm(dim=1, keepdim=True) for name in LAYERS]
        size = inputs.shape[2:]
        return fuse([nn.functional.interpolate(one, size=size, mode="bilinear")[:, 0] for one in norms])[:, None]


def outer_product_error(model: nn.Module, images: Tensor) -> float:
    """Largest relative difference between ``|x_u| |g_u|`` and the norm of ``g_u x_u^T`` written out."""
    worst = 0.0
    for layer in LAYERS:
        with capture(model, layer) as seen:
            score = model(images)[:, 3].sum()
        g = torch.autograd.grad(score, seen[layer])[0]
        x = seen[layer].detach()
        outer = torch.einsum("bphw,bqhw->bpqhw", g.double(), x.double()).flatten(1, 2).norm(dim=1)
        ours = contribution_map(x, g, "conv1x1", "norm")
        worst = max(worst, float((ours - outer).abs().max() / outer.max()))
    return worst


def _gain(accuracy: dict[str, float], best: dict[str, str], name: str, fused: str | None = None) -> float:
    return accuracy[fused or f"{name} fused"] - accuracy[f"{name} {best[name]}"]


def _in_place(
    accuracy: dict[str, float], best: dict[str, str], name: str, more: dict[str, float] | None = None
) -> dict[str, float]:
    """The judged figures with other maps in the place of the fused ones."""
    return {
        **{f"fused minus best single, {of}": _gain(accuracy, best, of, name)
           for of in ("selective NormGrad", "linear approximation")},
        **(more or {}),
    }  # fmt: skip


def _accuracies(accuracy: dict[str, float]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    places = [*LAYERS, "fused"]
    for number, name in enumerate(METHODS):
        values = [accuracy[f"{name} {place}"] for place in places]
        axes.plot(range(4), values[:4], marker="o", color=f"C{number}", label=name)
        axes.plot(4, values[4], marker="D", color=f"C{number}")
    axes.axhline(accuracy["random smooth map"], color="0.5", linestyle="--", label="random smooth map")
    axes.set_xticks(range(5), places)
    axes.set_ylabel("maps that point at their digit")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, ncols=2, loc="lower left")
    return figure


def _maps(model: nn.Module, scenes: canvas.Scenes) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.6), layout="constrained")
    image = torch.from_numpy(scenes.images[:1])
    columns = [*LAYERS, list(LAYERS)]
    names = ("NormGrad", "selective NormGrad", "linear approximation", "Grad-CAM")
    axes = figure.subplots(len(names), len(columns) + 1)
    for row, name in enumerate(names):
        axes[row, 0].imshow(image[0, 0], cmap="gray")
        axes[row, 0].set_ylabel(name.replace(" ", "\n"), fontsize=8, rotation=0, ha="right", va="center")
        for column, layer in enumerate(columns, 1):
            one = METHODS[name](model, layer).attribute(image, target=int(scenes.labels[0, 0]))
            axes[row, column].imshow(normalise(one[:, 0])[0], cmap="cividis")
            axes[row, column].set_title("fused" if column == 5 else layer, fontsize=8)
    for one in axes.flat:
        one.set_xticks([])
        one.set_yticks([])
        one.spines[:].set_visible(False)
    axes[0, 0].set_title(f"map of: {canvas.WORDS[int(scenes.labels[0, 0])]}", fontsize=8)
    return figure
