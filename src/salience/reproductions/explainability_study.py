"""Claim: gradient maps of an adversarially trained network lie more on the object than those of its plain twin,
Grad-CAM hardly changes, and insertion scores follow confidence.

Substitute for the paper's twelve ImageNet networks: one small network with batch normalisation on canvases of two
scikit-learn digits, which go four ways from one start: plain; against PGD in the maximum norm; by AdvProp; and with as
much random noise. The figures of the paper could not be read; its findings are in the abstract.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from salience.evidence import Bar, Control, Outcome, Run
from salience.features import ExplainabilityBench, adversarial_fit, attribution_suite, pgd_attack
from salience.measure import paired_difference
from salience.report import figures as draw
from salience.reproductions.worlds import canvas, nets, zoo

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from salience.features import BenchResult

EPS, STEPS = 0.05, 2
NOISE = 0.15  # on every pixel: three scenes in four are solved then, and the networks are not too sure
SCENES, EPOCHS, TUNING_EPOCHS = 3000, 4, 3
MEASURES = (
    "insertion", "insertion, normalised", "deletion", "deletion, normalised", "pointing", "localisation", "energy",
)  # fmt: skip
RECIPES = ("plain", "robust", "advprop", "noise")


class Setting(NamedTuple):
    """Images judged, samples of RISE and LIME, steps of integrated gradients and of the curves."""

    images: int
    samples: int
    n_steps: int
    steps: int


SETTINGS = {"smoke": Setting(12, 8, 4, 4), "desk": Setting(100, 120, 16, 16), "full": Setting(500, 1000, 50, 64)}


def build(seed: int) -> nn.Module:
    """`nets.small_cnn` with batch normalisation, which AdvProp needs."""
    plain = nets.small_cnn(seed)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for name, layer in plain.named_children():
        layers[name] = layer
        if isinstance(layer, nn.Conv2d):
            layers[name.replace("c", "n")] = nn.BatchNorm2d(layer.out_channels)
    return nn.Sequential(layers)


def train_start(model: nn.Module, seed: int) -> None:
    """What all twins begin with: 3,000 scenes, each digit's output by itself."""
    _fit(model, seed, "vanilla", EPOCHS, 2e-3)


def train_plain(model: nn.Module, seed: int) -> None:
    """As many steps more on the scenes as the others take."""
    _tune(model, seed, "vanilla")


def train_robust(model: nn.Module, seed: int) -> None:
    """Against attacks."""
    _tune(model, seed, "pgd")


def train_advprop(model: nn.Module, seed: int) -> None:
    """Clean and attacked scenes with normalisations of their own."""
    _tune(model, seed, "advprop")


def train_noise(model: nn.Module, seed: int) -> None:
    """With random noise as large as the attacks."""
    _tune(model, seed, "noise")


START = zoo.Recipe(build, train_start)
TRAINED = {
    "plain": zoo.Recipe(build, train_plain), "robust": zoo.Recipe(build, train_robust),
    "advprop": zoo.Recipe(build, train_advprop), "noise": zoo.Recipe(build, train_noise),
}  # fmt: skip


def _tune(model: nn.Module, seed: int, recipe: str) -> None:
    model.load_state_dict(zoo.trained(START, seed).state_dict())
    _fit(model, seed, recipe, TUNING_EPOCHS, 1e-3)


def _fit(model: nn.Module, seed: int, recipe: str, epochs: int, lr: float) -> None:
    scenes = canvas.scenes(SCENES, seed, noise=NOISE)

    def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=lr)

    adversarial_fit(
        model, torch.from_numpy(scenes.images), torch.from_numpy(scenes.multi_hot()), recipe=recipe,  # type: ignore[arg-type]
        optimizer=adam, epochs=epochs, generator=torch.Generator().manual_seed(seed), eps=EPS, steps=STEPS,
        loss=binary_cross_entropy_with_logits, bounds=None, batch_size=32, milestones=(epochs - 1,),
    )  # fmt: skip


def reproduce(run: Run) -> Outcome:
    """Train the four twins, run the bench on held-out scenes, and read the findings off."""
    setting = SETTINGS[run.scale]
    models: dict[str, nn.Module] = {}
    for name in RECIPES:
        run.step(f"training: {name}")
        models[name] = build(run.seed).eval() if run.smoke else zoo.trained(TRAINED[name], run.seed)
    scenes = canvas.scenes(setting.images, run.seed, part="test", noise=NOISE)
    images, hot = torch.from_numpy(scenes.images), torch.from_numpy(scenes.multi_hot())
    targets, boxes = torch.from_numpy(scenes.labels[:, 0]), scenes.boxes[:, 0]

    # Accuracy of all four: both digits found, on clean, attacked, noisier and inverted-contrast scenes.
    run.step("attacking")
    accuracy = {name: accuracies(run, model, images, hot, scenes.labels) for name, model in models.items()}
    gain, kept = trained_well(accuracy["robust"], accuracy["plain"])
    if not run.smoke and (gain < 0.15 or kept < 0.8):
        run.step("the robust network is none: the bench says little")

    # Method: nine methods and three controls on three of the models.
    compared = {name: models[name] for name in ("plain", "robust", "advprop")}
    bench = ExplainabilityBench(
        compared,
        lambda model: attribution_suite(
            model, layer="relu4", example=images[:2], multi_label=True, samples=setting.samples,
            n_steps=setting.n_steps, random_state=run.seed,
        ),
        MEASURES, steps=setting.steps, multi_label=True, random_state=run.seed,
    )  # fmt: skip
    result = bench.run(images, targets, boxes, progress=lambda stage, done, total: run.step(stage))

    # Measure.
    run.step("measuring")
    figures, intervals = findings(run, result, scenes, targets)
    figures |= {"PGD accuracy, robust minus plain": gain, "clean accuracy, robust over plain": kept}
    figures |= {f"{which} accuracy, {name}": value for name, own in accuracy.items() for which, value in own.items()}
    figures |= sparsity(run)
    noise_gain, noise_kept = trained_well(accuracy["noise"], accuracy["plain"])
    return Outcome(
        claim="gradient maps of an adversarially trained network lie more on the object than those of its plain twin, "
        "Grad-CAM changes less than half as much, and insertion scores follow confidence",
        level="mechanism",
        figures=figures,
        bars=[
            Bar("PGD accuracy, robust minus plain", at_least=0.15),
            Bar("clean accuracy, robust over plain", at_least=0.8),
            Bar("gradient on the object, robust minus plain", at_least=0.08),
            Bar("gradient on the background, plain minus robust", at_least=0.1),
            Bar("Grad-CAM's change as a share of the gradient's", at_most=0.5),
            Bar("least correlation of insertion with confidence", at_least=0.7),
            Bar("methods that the random map out-points", at_most=0),
            Bar("gap of insertion closed by normalising", at_least=0.0),
        ],
        controls=[
            Control("random smooth maps for the gradient", "random", random_in_place(result, scenes)),
            Control(
                "random noise for attacks",
                "fake",
                {"PGD accuracy, robust minus plain": noise_gain, "clean accuracy, robust over plain": noise_kept},
            ),
        ],
        intervals=intervals,
        pictures={
            "One scene, its networks and the maps of all methods": _maps(result, images, targets),
            "Energy of the maps on the object": _energy(result),
        },
        notes=[
            "Accuracy: both digits of a scene are found. The explained class is the first digit's.",
            "AdvProp and the normalised areas are reported; whether deletion favours the robust network, too.",
            *result.warnings,
        ],
    )  # fmt: skip


def accuracies(run: Run, model: nn.Module, images: Tensor, hot: Tensor, labels: np.ndarray) -> dict[str, float]:
    """Share of scenes in which both digits are found."""
    noisy = images + 0.1 * torch.randn(images.shape, generator=run.generator("noise"))
    attacked = pgd_attack(
        model, images, hot, eps=EPS, steps=10, loss=binary_cross_entropy_with_logits, bounds=None,
        generator=run.generator("attack"),
    )  # fmt: skip
    sets = {"clean": images, "PGD": attacked, "noisy": noisy, "faint": 0.6 * images}
    found = {}
    for which, x in sets.items():
        with torch.no_grad():
            top = model(x).topk(2, 1).indices.sort(1).values.numpy()
        found[which] = float((top == np.sort(labels, 1)).all(1).mean())
    return found


def trained_well(own: dict[str, float], plain: dict[str, float]) -> tuple[float, float]:
    """Accuracy gained under attack, and the share of clean accuracy kept: a constant would lose the latter."""
    return own["PGD"] - plain["PGD"], own["clean"] / max(plain["clean"], 1e-9)


def background(maps: Tensor, scenes: canvas.Scenes) -> np.ndarray:
    """Share of a map's energy outside of both digits' boxes."""
    outside = torch.from_numpy(~scenes.box_masks().any(1))
    values = maps.abs().double()
    return ((values * outside).sum((1, 2)) / values.sum((1, 2)).clamp_min(1e-30)).numpy()


def findings(
    run: Run, result: BenchResult, scenes: canvas.Scenes, targets: Tensor
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """The study's findings as figures."""
    figures: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    scores = result.scores
    moved = {}
    for method in ("gradient", "grad-cam"):
        moved[method] = paired_difference(
            np.nan_to_num(scores["robust", method, "energy"]), np.nan_to_num(scores["plain", method, "energy"]),
            random_state=run.rng("bootstrap"),
        )  # fmt: skip
    before, after = (background(result.maps[name, "gradient"], scenes) for name in ("plain", "robust"))
    fallen = paired_difference(before, after, random_state=run.rng("bootstrap"))
    figures |= {
        "gradient on the object, robust minus plain": moved["gradient"].mean,
        "gradient on the background, plain minus robust": fallen.mean,
        "Grad-CAM on the object, robust minus plain": moved["grad-cam"].mean,
        "Grad-CAM's change as a share of the gradient's": abs(moved["grad-cam"].mean)
        / max(abs(moved["gradient"].mean), 1e-9),
    }
    intervals |= {
        "gradient on the object, robust minus plain": moved["gradient"][1:3],
        "gradient on the background, plain minus robust": fallen[1:3],
        "Grad-CAM on the object, robust minus plain": moved["grad-cam"][1:3],
    }
    bias = result.confidence_bias()
    pairs = [(name, "gradient x input") for name in ("plain", "robust")]
    figures |= {
        "least correlation of insertion with confidence": min(bias[(*pair, "insertion")] for pair in pairs),
        "correlation of deletion with confidence, plain": bias["plain", "gradient x input", "deletion"],
        "correlation of deletion with confidence, robust": bias["robust", "gradient x input", "deletion"],
        "mean confidence, plain": float(result.confidence["plain"].mean()),
        "mean confidence, robust": float(result.confidence["robust"].mean()),
        "methods that the random map out-points": _out_pointed(result, "random"),
        "gap of insertion closed by normalising": _gap(result, "insertion") - _gap(result, "insertion, normalised"),
        "gap of insertion": _gap(result, "insertion"),
    }
    for (name, method, measure), values in scores.items():
        if measure in ("pointing", "insertion", "deletion", "energy"):
            figures[f"{measure}, {name}, {method}"] = float(np.nanmean(values)) if np.isfinite(values).any() else np.nan
    ranks = result.method_ranks()
    figures |= {f"mean rank, {method}": rank for method, rank in ranks.items()}
    return figures, intervals


def _gap(result: BenchResult, measure: str) -> float:
    """How far plain and robust network lie apart, mean over the methods."""
    methods = [m for name, m in result.maps if name == "plain"]
    gaps = [
        abs(np.nanmean(result.scores["plain", m, measure]) - np.nanmean(result.scores["robust", m, measure]))
        for m in methods
        if all(np.isfinite(result.scores[name, m, measure]).any() for name in ("plain", "robust"))
    ]
    return float(np.mean(gaps)) if gaps else float("nan")


def _out_pointed(result: BenchResult, control: str) -> int:
    """Methods, over plain and robust network, that point at the object no more often than a control."""
    count = 0
    for name in ("plain", "robust"):
        least = result.scores[name, control, "pointing"].mean()
        methods = [m for model, m in result.maps if model == name and m not in ("random", "centre", "edges")]
        count += sum(result.scores[name, m, "pointing"].mean() <= least for m in methods)
    return count


def random_in_place(result: BenchResult, scenes: canvas.Scenes) -> dict[str, float]:
    """The figures on the gradient, measured for random maps instead."""
    energy = [result.scores[name, "random", "energy"] for name in ("plain", "robust")]
    outside = [background(result.maps[name, "random"], scenes).mean() for name in ("plain", "robust")]
    return {
        "gradient on the object, robust minus plain": float((energy[1] - energy[0]).mean()),
        "gradient on the background, plain minus robust": float(outside[0] - outside[1]),
    }


def sparsity(run: Run) -> dict[str, float]:
    """Hoyer sparsity of input gradients on breast_cancer, plain and robust: the same effect on a table, reported."""
    data = load_breast_cancer()
    x, y = data.data, data.target
    train_x, test_x, train_y, _ = train_test_split(x, y, test_size=0.3, stratify=y, random_state=run.seed)
    mean, spread = train_x.mean(0), train_x.std(0)
    train, test = (torch.from_numpy(((part - mean) / spread).astype(np.float32)) for part in (train_x, test_x))
    labels, found = torch.from_numpy(train_y), {}
    for recipe in ("vanilla", "pgd"):
        model = nets.mlp([30, 64, 2], run.seed)
        adversarial_fit(
            model, train, labels, recipe=recipe, optimizer=lambda p: torch.optim.Adam(p, lr=5e-3),
            epochs=2 if run.smoke else 40, generator=run.generator("table"), eps=0.3, steps=5, bounds=None,
        )  # fmt: skip
        probe = test.clone().requires_grad_()
        logits = model(probe)
        (gradient,) = torch.autograd.grad((logits[:, 1] - logits[:, 0]).sum(), probe)
        size = gradient.abs().double()
        root = size.shape[1] ** 0.5
        hoyer = (root - size.sum(1) / size.norm(dim=1).clamp_min(1e-12)) / (root - 1)
        found[f"gradient sparsity on breast_cancer, {recipe}"] = float(hoyer.mean())
    return found


def _maps(result: BenchResult, images: Tensor, targets: Tensor) -> Figure:
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for name, _ in result.maps))
    methods = list(dict.fromkeys(method for _, method in result.maps))
    figure = Figure(figsize=(1.15 * (len(methods) + 1), 1.35 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), len(methods) + 1)
    for row, name in enumerate(names):
        axes[row, 0].imshow(images[0, 0], cmap="gray_r")
        axes[row, 0].set_ylabel(name, fontsize=9)
        for column, method in enumerate(methods, 1):
            axes[row, column].imshow(result.maps[name, method][0].abs(), cmap="magma")
            if row == 0:
                axes[row, column].set_title(method.replace(" ", "\n", 1), fontsize=8)
    axes[0, 0].set_title(f"find the {int(targets[0])}", fontsize=8)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    return figure


def _energy(result: BenchResult) -> Figure:
    from matplotlib.figure import Figure

    methods = [method for name, method in result.maps if name == "plain"]
    values = {
        name: [float(np.nanmean(result.scores[name, method, "energy"])) for method in methods]
        for name in ("plain", "robust")
    }
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    draw.change(
        figure.add_subplot(), methods, values["plain"], values["robust"], ("plain", "robust"),
        xlabel="share of the map's energy in the object's box",
    )  # fmt: skip
    return figure
