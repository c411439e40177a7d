"""Claim: the best of several maps from sampled baselines scores above the best of as many random smooth maps, and the
learned choice of baselines beats a uniform one.

Substitute for the paper's ImageNet networks: a small network on canvases of two scikit-learn digits, one layer, the
complete integrand, insertion as the measure, ten draws for the paper's hundred. The paper's tables could not be read;
its claim that other measures prefer other families is reported here and not judged.

At the judging seeds the learned choice does not beat a uniform one every time: on these networks the families differ
by 0.04 to 0.08 of insertion at one draw, which leaves little to gain and much to the draw.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from captum.attr import IntegratedGradients, LayerGradCam
from scipy.stats import chi2_contingency
from torch import Tensor, nn
from torch.nn.functional import interpolate

from salience.evidence import Bar, Control, Outcome, Run
from salience.features import BEE, LogisticThompson, RandomSmoothMap, baseline_families, path_map, score_maps
from salience.features.bee.path import enlarged
from salience.measure import paired_difference
from salience.model import Split
from salience.report import figures as draw
from salience.reproductions.worlds import canvas, nets, zoo
from salience.reproductions.worlds.canvas_net import CANVAS_NET

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LAYER, STEPS = "c2", 8
MAPS_GAIN, CHOICE_GAIN = "best of 10: gain over random maps, low end", "one draw: gain over uniform choice, low end"
WORST, BEST_ARM = "last pulls of the two families that lose most", "best arm in the last 200 rounds"


class Setting(NamedTuple):
    """How many images are learned from (insertion, deletion), explained, and drawn per family to know its mean."""

    pulls: int
    other_pulls: int
    images: int
    draws: int
    repeats: int


SETTINGS = {
    "smoke": Setting(20, 10, 8, 3, 2),
    "desk": Setting(1200, 400, 120, 10, 4),
    "full": Setting(5000, 5000, 500, 100, 20),
}


def reproduce(run: Run) -> Outcome:
    """Let a bandit learn on canvases which baselines to draw, and explain others with it."""
    setting = SETTINGS[run.scale]
    run.step("training the network")
    model = nets.small_cnn(run.seed).eval() if run.smoke else zoo.trained(CANVAS_NET, run.seed)
    # Scenes that the network never saw: of the test digits to explain, of the training digits to learn from.
    seen = torch.from_numpy(canvas.scenes(setting.pulls, run.seed + 1_000).images)
    scenes = canvas.scenes(setting.images, run.seed, part="test")
    images = torch.from_numpy(scenes.images)
    with torch.no_grad():
        logits = model(images)
    targets = logits.argmax(1)

    # Method: one bandit per measure.
    run.step("learning for insertion")
    bee = explainer(model, "insertion", run.seed).fit(seen)
    run.step("learning for deletion")
    other = explainer(model, "deletion", run.seed).fit(seen[: setting.other_pulls])

    # Baselines: each family and uniform choice at equal draws, random smooth maps, one map each of common methods.
    run.step("explaining")
    found = bee.explain(images, draws=setting.draws, all_metrics=False)
    best = {"BEE": scores_of(found), "BEE, fine-tuned": scores_of(
        bee.explain(images, draws=setting.draws, finetune=True, all_metrics=False)
    )}  # fmt: skip
    draws = family_draws(bee, images, setting.repeats)
    one, rank = draws.mean(2), beaten(draws)
    share = chances(bee, images)
    for name in baseline_families:
        alone = explainer(model, "insertion", run.seed, [name])
        alone._banks = bee._banks
        best[name] = scores_of(alone.explain(images, draws=setting.draws, all_metrics=False))
    uniform = explainer(model, "insertion", run.seed)
    uniform._banks = bee._banks
    best["uniform choice"] = scores_of(uniform.explain(images, draws=setting.draws, all_metrics=False))
    smooth = {
        name: random_scores(run, model, images, targets, setting.draws, name)[1].max(0)
        for name in ("random", "control")
    }
    single = {name: insertion(model, images, maps, targets) for name, maps in one_shot(model, images, targets).items()}

    # Measure.
    run.step("measuring")
    gain = paired_difference(best["BEE"], smooth["random"], random_state=run.rng("bootstrap"))
    learned, even = (share * one).sum(1), one.mean(1)
    choice = paired_difference(learned, even, random_state=run.rng("bootstrap"))
    over_uniform = paired_difference(best["BEE"], best["uniform choice"], random_state=run.rng("bootstrap"))
    by_deletion = other.explain(images, draws=setting.draws, all_metrics=False)
    counts = {
        "insertion": [sum(r.family == name for r in found) for name in baseline_families],
        "deletion": [sum(r.family == name for r in by_deletion) for name in baseline_families],
    }
    last = bee.pulled_[-100:]
    worst = np.array(bee.families)[rank.argsort()[:2]]
    few = bee.explain(images[: 4 if run.smoke else 30], draws=setting.draws)
    top = logits.topk(2, 1).indices.sort(1).values.numpy() == np.sort(scenes.labels, 1)
    figures = {
        MAPS_GAIN: gain.low,
        CHOICE_GAIN: choice.low,
        WORST: sum(last.count(name) for name in worst) / len(last),
        BEST_ARM: thompson(run, contextual=True),
        "network finds both digits": float(top.all(1).mean()),
        "best of 10: gain over random maps": gain.mean,
        "one draw: gain over uniform choice": choice.mean,
        "best of 10: gain over uniform choice": over_uniform.mean,
        **{f"best of 10: {name}": float(values.mean()) for name, values in best.items()},
        "best of 10: random smooth maps": float(smooth["random"].mean()),
        "one draw: BEE": float(learned.mean()),
        "one draw: uniform choice": float(even.mean()),
        **{f"one draw: {name}": float(value) for name, value in zip(bee.families, one.mean(0))},
        **{f"one map: {name}": float(values.mean()) for name, values in single.items()},
        **{f"draws beaten by one of {name}": float(value) for name, value in zip(bee.families, rank)},
        **{f"last pulls: {name}": last.count(name) / len(last) for name in bee.families},
        "p that insertion and deletion choose families alike": _alike(counts),
        **{f"chosen by insertion, {name}": float(np.nanmean([r.all_metrics[name] for r in few] or [np.nan]))
           for name in few[0].all_metrics if not all(np.isnan(r.all_metrics[name]) for r in few)},
    }  # fmt: skip
    return Outcome(
        claim="the best of ten maps from sampled baselines scores above the best of ten random smooth maps, and the "
        "learned choice of baselines beats a uniform one",
        level="mechanism",
        figures=figures,
        bars=[
            Bar(MAPS_GAIN, at_least=0.001),
            Bar(CHOICE_GAIN, at_least=0.001),
            Bar(WORST, at_most=0.25),
            Bar(BEST_ARM, at_least=0.6),
        ],
        controls=[
            Control(
                "random smooth maps drawn anew",
                "random",
                {MAPS_GAIN: low_end(run, smooth["control"], smooth["random"])},
            ),
            Control("uniform choice of family", "random", {CHOICE_GAIN: 0.0, WORST: 0.4}),
            Control(
                "one map from a fixed black baseline",
                "fake",
                {MAPS_GAIN: low_end(run, single["path from zeros"], smooth["random"])},
            ),
            Control("bandit without context", "fake", {BEST_ARM: thompson(run, contextual=False)}),
        ],
        intervals={
            "best of 10: gain over random maps": (gain.low, gain.high),
            "one draw: gain over uniform choice": (choice.low, choice.high),
            "best of 10: gain over uniform choice": (over_uniform.low, over_uniform.high),
        },
        pictures={
            "Images, the map of BEE, the best of as many random maps": _maps(run, model, images, found, targets),
            "Insertion of one draw and of the best of ten": _picture(figures, bee.families),
        },
        notes=[
            "A pull's reward is its rank among fresh draws of all families on the same image (reward='image'); the "
            "reference code ranks it among all scores seen so far.",
            "Which families are worst differs from network to network: they are those whose draws lose most "
            "against the others' draws, which is what the bandit is told.",
            "One draw of a policy is its expected score: the chance of each family times that family's mean.",
            "Areas end at 90 % of the pixels, as in the reference code, and are mean heights.",
        ],
    )  # fmt: skip


def explainer(model: nn.Module, metric: str, seed: int, families: list[str] | None = None) -> BEE:
    """BEE as this reproduction sets it."""
    return BEE(
        model, LAYER, metric=metric, families=families, n_steps=STEPS, integrand="ig", reward="image",
        multi_label=True, random_state=seed,
    )  # fmt: skip


def low_end(run: Run, a: np.ndarray, b: np.ndarray) -> float:
    return paired_difference(a, b, random_state=run.rng("control")).low


def scores_of(results: list) -> np.ndarray:
    return np.array([result.score for result in results])


def family_draws(bee: BEE, images: Tensor, repeats: int) -> np.ndarray:
    """Scores (images, families, repeats) of single draws of each family."""
    names = np.repeat(bee.families, repeats)
    drawn = [
        bee._drawn(x[None], bee._targets(x[None], None)[0], names, torch.Generator().manual_seed(i))[1].mean(1)
        for i, x in enumerate(images)
    ]
    return np.stack(drawn).reshape(len(images), len(bee.families), repeats)


def beaten(draws: np.ndarray) -> np.ndarray:
    """How many of the other families' draws a draw of each family beats, as a share: what a pull is rewarded for."""
    others = draws.shape[1] - 1
    return (draws[:, :, None] > draws[:, None]).sum(2).mean((0, 2)) / others


def chances(bee: BEE, images: Tensor) -> np.ndarray:
    """How likely the bandit draws each family (images, families)."""
    drawn = [bee._policy(x[None], 400, np.random.default_rng(i)) for i, x in enumerate(images)]
    return np.array([[(names == family).mean() for family in bee.families] for names in drawn])


def insertion(model: nn.Module, images: Tensor, maps: Tensor, targets: Tensor) -> np.ndarray:
    return score_maps(model, images, maps, targets, "insertion", steps=10, until=0.9, multi_label=True)


def random_scores(run: Run, model: nn.Module, images: Tensor, targets: Tensor, draws: int, use: str) -> tuple:
    """`draws` random smooth maps of each image (draws, images, ...), and their scores (draws, images)."""
    seeds = run.rng(use).integers(2**31, size=draws)
    maps = [RandomSmoothMap(model, random_state=int(seed)).attribute(images)[:, 0] for seed in seeds]
    return maps, np.array([insertion(model, images, one, targets) for one in maps])


def one_shot(model: nn.Module, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """One map each, by common methods and by the path from a fixed baseline of zeros."""
    split, size = Split(model, LAYER), (images.shape[2], images.shape[3])
    with torch.no_grad():
        a = split.encode(images)
    zeros = path_map(split, images, targets, a, torch.zeros_like(a), n_steps=STEPS, integrand="ig")
    cam = LayerGradCam(model, model.get_submodule("c4")).attribute(images, targets).detach()
    gradients = IntegratedGradients(model).attribute(images, target=targets, n_steps=32).detach()
    return {
        "path from zeros": enlarged(zeros, size),
        "Grad-CAM at the last layer": interpolate(cam, size, mode="bilinear")[:, 0],
        "integrated gradients of the pixels": gradients.sum(1).float(),
    }


def thompson(run: Run, contextual: bool) -> float:
    """Share of the last 200 of 800 rounds in which the best of five arms is pulled, over ten problems.

    Weights of the arms are standard normal in ten dimensions and contexts have norm 2. Without context the
    bandit sees a constant, and can learn only which arm is best on average.
    """
    rng, shares = run.rng("bandit"), []
    for _ in range(2 if run.smoke else 10):
        weights = rng.standard_normal((5, 10))
        bandit = LogisticThompson(5, 10 if contextual else 1, random_state=rng)
        hits = []
        for _ in range(800):
            phi = rng.standard_normal(10)
            phi *= 2 / np.linalg.norm(phi)
            seen = phi if contextual else np.ones(1)
            arm, values = bandit.choose(seen), weights @ phi
            hits.append(arm == values.argmax())
            bandit.update(arm, seen, 1 if rng.random() < 1 / (1 + np.exp(-values[arm])) else -1)
        shares.append(np.mean(hits[-200:]))
    return float(np.mean(shares))


def _alike(counts: dict[str, list[int]]) -> float:
    table = np.array(list(counts.values()))
    table = table[:, table.sum(0) > 0]
    return float(chi2_contingency(table).pvalue) if table.shape[1] > 1 else 1.0


def _maps(run: Run, model: nn.Module, images: Tensor, found: list, targets: Tensor) -> Figure:
    from matplotlib.figure import Figure

    count = min(6, len(images))
    figure = Figure(figsize=(1.35 * count, 4.4), layout="constrained")
    axes = figure.subplots(3, count)
    drawn, scores = random_scores(run, model, images, targets, len(found[0].scores), "random")
    for i in range(count):
        best = int(scores[:, i].argmax())
        rows: list[tuple[Tensor, str, str]] = [
            (images[i, 0], "gray_r", f"explained: {int(targets[i])}"),
            (found[i].map, "magma", f"{found[i].family} {found[i].score:.2f}"),
            (drawn[best][i], "magma", f"random {scores[best, i]:.2f}"),
        ]
        for ax, (picture, colours, title) in zip(axes[:, i], rows):
            ax.imshow(picture, cmap=colours)
            ax.set_title(title, fontsize=8)
            ax.set_axis_off()
    return figure


def _picture(figures: dict[str, float], families: list[str]) -> Figure:
    from matplotlib.figure import Figure

    names = ["BEE", "uniform choice", *families]
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    draw.change(
        figure.add_subplot(), names, [figures[f"one draw: {name}"] for name in names],
        [figures[f"best of 10: {name}"] for name in names], ("one draw", "best of ten"), xlabel="insertion",
    )  # fmt: skip
    return figure
