"""Claim: with 99 % of a delta dropped, a divisor found by search keeps more of the fine-tuned accuracy than DARE's
``1 - p``, and so does fine-tuning with decay towards the pre-trained weights.

Substitute for BERT on GLUE: an MLP of three hidden layers of 512 units, pre-trained on scikit-learn's digits and
fine-tuned on the same digits turned by 90 degrees, with a new head. The body's delta is pruned; q is chosen on a
validation split and judged on test images and other masks.

One statement of the paper does not hold here: at a fine-tuning rate of 1e-4 the gap between DAREx and DARE should
vanish, since the delta is small, and it does not. It is in the figures and is not judged.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from salience.evidence import Bar, Control, Outcome, Run
from salience.measure.paired import paired_difference
from salience.model.at import training_mode
from salience.model.fitting import fit
from salience.report import figures as draw
from salience.reproductions.worlds import digits, zoo
from salience.reproductions.worlds.nets import mlp
from salience.weights import AdamR, DeltaPruner, delta_stats

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RATE = 0.99
OTHER_RATES = (0.95, 0.995)
MASKS = 4
ETA_RANGE = (0.1, 1.5)  # what `DeltaPruner` searches
HEAD = ("6",)  # the last linear layer of the network


class World(NamedTuple):
    """Turned digits, flat, in three parts, and the network that was pre-trained on upright ones."""

    base: nn.Module
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def build(seed: int) -> nn.Module:
    """The network before any training."""
    return mlp([64, 512, 512, 512, 10], seed)


def pretrain(model: nn.Module, seed: int) -> None:
    """15 epochs on upright digits."""
    world = digits.split(seed)
    fit(
        model, torch.from_numpy(world.train_x).flatten(1), torch.from_numpy(world.train_y), loss=cross_entropy,
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-3), epochs=15,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


def reproduce(run: Run) -> Outcome:
    """Fine-tune, drop 99 % of the delta, and compare what divides the rest."""
    world = make_world(run)
    epochs = 2 if run.smoke else 20

    # Models: plain fine-tuning, fine-tuning towards the base (AdamR), towards zero (the fake), and a gentle one.
    run.step("fine-tuning")
    plain = finetune(run, world, "adam", epochs)
    regular = {strength: finetune(run, world, "adamr", epochs, strength) for strength in (0.01, 0.1)}
    decayed = {
        "AdamW": finetune(run, world, "adamw", epochs, 0.1),
        "to zero": finetune(run, world, "zero", epochs, 0.1),
    }
    gentle = finetune(run, world, "adam", epochs, lr=1e-4)

    # Method: q by validation, by outputs and per layer, and the methods that need no q; all on other masks.
    run.step("pruning")
    darex = pruned(run, world, plain, "darex", rescale="global", score=True)
    ways = {
        "DARE": pruned(run, world, plain, "dare"),
        "DAREx 1/q_v": darex,
        "DAREx 1/q_e": pruned(run, world, plain, "darex", rescale="global"),
        "DAREx per layer 1/q_v": pruned(run, world, plain, "darex", rescale="layer", score=True),
        "DAREx per layer 1/q_e": pruned(run, world, plain, "darex", rescale="layer"),
        "magnitude": pruned(run, world, plain, "magnitude"),
        "WANDA": pruned(run, world, plain, "wanda"),
        "DAREx columns": pruned(run, world, plain, "darex", rescale="global", score=True, structured=True),
        "DARE columns": pruned(run, world, plain, "dare", structured=True),
    }
    regularised = {strength: pruned(run, world, model, "dare") for strength, model in regular.items()}
    soft = {way: pruned(run, world, gentle, way, rescale="global", score=True) for way in ("dare", "darex")}
    fakes = {name: pruned(run, world, model, "dare") for name, model in decayed.items()}
    chance = pruned(run, world, plain, "darex", rescale=float(run.rng("q").uniform(1 - RATE, 1)))
    kept_mean = pruned(run, world, plain, "darex", masks="other masks", rescale=1 - RATE)

    # Measure.
    dare = ways["DARE"].correct
    spread = delta_spread(world, plain)
    gain = paired_difference(darex.correct, dare, random_state=run.rng("bootstrap"))
    figures = {
        "accuracy of the fine-tuned model": accuracy(plain, world.test),
        **{f"accuracy {name}": float(way.correct.mean()) for name, way in ways.items()},
        **{f"accuracy AdamR {strength} and DARE": float(way.correct.mean()) for strength, way in regularised.items()},
        **{
            f"eta by {by}": float(ways[f"DAREx per layer {way}"].eta)  # type: ignore[arg-type]
            for by, way in (("validation", "1/q_v"), ("outputs", "1/q_e"))
        },
        "searches for eta that ended on the edge of their range": float(
            sum(abs(way.eta - edge) < 1e-6 for way in ways.values() if way.eta is not None for edge in ETA_RANGE)
        ),
        "gain of DAREx over DARE": gain.mean,
        "q over 1 - p": float(darex.q) / (1 - RATE),
        "spread of the delta with AdamR 0.1": delta_spread(world, regular[0.1]) / spread,
        "spread of the delta with AdamR 0.01": delta_spread(world, regular[0.01]) / spread,
        "gain of AdamR 0.1 and DARE over DARE": float((regularised[0.1].correct - dare).mean()),
        "accuracy of AdamR 0.1 before pruning": accuracy(regular[0.1], world.test),
        "accuracy DARE at small learning rate": float(soft["dare"].correct.mean()),
        "gain of DAREx at small learning rate": float((soft["darex"].correct - soft["dare"].correct).mean()),
        "standard deviation of the delta": spread,
        "relative size of the delta": delta_stats(_body(world.base), _body(plain)).relative,
    }
    for rate in OTHER_RATES:
        for name, way, options in (
            ("DARE", "dare", {}),
            ("DAREx 1/q_v", "darex", {"rescale": "global", "score": True}),
        ):
            other = pruned(run, world, plain, way, rate=rate, **options)  # type: ignore[arg-type]
            figures[f"accuracy {name} at {rate}"] = float(other.correct.mean())
    return Outcome(
        claim="at extreme pruning rates a searched rescaling factor keeps more of the fine-tuned accuracy than DARE's, "
        "and so does fine-tuning with decay towards the base weights",
        level="mechanism",
        figures=figures,
        bars=[
            Bar("gain of DAREx over DARE", at_least=0.10),
            Bar("q over 1 - p", at_least=1.3),
            Bar("spread of the delta with AdamR 0.1", at_most=0.5),
            Bar("gain of AdamR 0.1 and DARE over DARE", at_least=0.25),
        ],
        controls=[
            Control(
                "q drawn at random",
                "random",
                {
                    "gain of DAREx over DARE": float((chance.correct - dare).mean()),
                    "q over 1 - p": float(chance.q) / (1 - RATE),
                },
            ),
            Control(
                "q = 1 - p, on other masks",
                "fake",
                {
                    "gain of DAREx over DARE": float((kept_mean.correct - dare).mean()),
                    "q over 1 - p": float(kept_mean.q) / (1 - RATE),
                },
            ),
            *(
                Control(
                    f"decay towards zero ({name})",
                    "fake",
                    {
                        "spread of the delta with AdamR 0.1": delta_spread(world, decayed[name]) / spread,
                        "gain of AdamR 0.1 and DARE over DARE": float((fakes[name].correct - dare).mean()),
                    },
                )
                for name in decayed
            ),
        ],
        intervals={"gain of DAREx over DARE": (gain.low, gain.high)},
        pictures={
            "Accuracy after dropping 99 % of the delta, and the delta itself": picture(world, plain, regular, figures)
        },
        notes=[
            "Importance-based pruning and a q per layer do not win on this small network: reported, not judged.",
            f"Each accuracy is a mean over {MASKS} masks that no search has seen.",
            "At a fine-tuning rate of 1e-4 the paper has the gain of DAREx vanish; here it is "
            f"{float((soft['darex'].correct - soft['dare'].correct).mean()):+.3f}. Reported, not judged.",
        ],
    )  # fmt: skip


class Pruned(NamedTuple):
    """Share of masks under which each test image is classified rightly, the divisor, and the eta that gave it."""

    correct: np.ndarray
    q: Any  # a number, or one for each tensor
    eta: float | None


def pruned(
    run: Run,
    world: World,
    tuned: nn.Module,
    method: str,
    *,
    score: bool = False,
    rate: float = RATE,
    masks: str = "masks",
    **options: Any,
) -> Pruned:
    """Choose q once, then prune with several masks and classify the test images."""
    images, _ = world.validation
    correct: list[np.ndarray] = []
    seeds = [int(seed) for seed in run.rng(masks).integers(2**31, size=1 if run.smoke else MASKS)]
    for number, seed in enumerate(seeds):
        pruner = DeltaPruner(rate=rate, method=method, exclude=HEAD, random_state=seed, **options)
        if number == 0:
            by: dict[str, Any] = {"score": lambda model: accuracy(model, world.validation)} if score else {}
            pruner.fit(world.base, tuned, batches=[images], **by)
            q, eta = pruner.q_, pruner.eta_
            if method == "darex":  # the divisor is chosen once; the other masks are those that it is judged on
                options = {**options, "rescale": q}
                pruner = DeltaPruner(rate=rate, method=method, exclude=HEAD, random_state=seed, **options)
        pruner.fit(world.base, tuned, batches=[images])
        correct.append(_correct(pruner.apply(), world.test))
    return Pruned(np.mean(correct, axis=0), q, eta)


def finetune(run: Run, world: World, how: str, epochs: int, strength: float = 0.0, lr: float = 1e-3) -> nn.Module:
    """The base with a new head, trained on the turned digits."""
    model: Any = copy.deepcopy(world.base)
    model[6] = mlp([512, 10], int(run.generator("head").initial_seed()))[0]
    body = dict(_body(world.base))
    optimizer: torch.optim.Optimizer
    if how == "adamr":
        optimizer = AdamR(model.named_parameters(), body, lr=lr, weight_decay=strength)
    elif how == "zero":
        zeros = {name: torch.zeros_like(value) for name, value in body.items()}
        optimizer = AdamR(model.named_parameters(), zeros, lr=lr, weight_decay=strength)
    elif how == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=strength)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    fit(model, *world.train, loss=cross_entropy, optimizer=optimizer, epochs=epochs, generator=run.generator("batches"))
    return model.eval()


def make_world(run: Run) -> World:
    """The pre-trained network and the turned digits; a fifth of the training part is for validation."""
    split = digits.split(run.seed)
    turned = [torch.from_numpy(x).rot90(1, (2, 3)).flatten(1) for x in (split.train_x, split.test_x)]
    labels = [torch.from_numpy(y) for y in (split.train_y, split.test_y)]
    order = torch.randperm(len(turned[0]), generator=run.generator("validation"))
    held, train = order[: len(order) // 5], order[len(order) // 5 :]
    return World(
        zoo.trained(zoo.Recipe(build, pretrain), run.seed),
        (turned[0][train], labels[0][train]),
        (turned[0][held], labels[0][held]),
        (turned[1], labels[1]),
    )


def accuracy(model: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    """Share of images classified rightly."""
    return float(_correct(model, part).mean())


def delta_spread(world: World, tuned: nn.Module) -> float:
    """Standard deviation of the body's delta."""
    return delta_stats(_body(world.base), _body(tuned)).std


@torch.no_grad()
def _correct(model: nn.Module, part: tuple[Tensor, Tensor]) -> np.ndarray:
    images, labels = part
    with training_mode(model, False):
        return (model(images).argmax(1) == labels).double().numpy()


def _body(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.named_parameters() if name.split(".")[0] not in HEAD}


def _delta(world: World, tuned: nn.Module) -> np.ndarray:
    base = _body(world.base)
    return torch.cat([(value - base[name]).flatten() for name, value in _body(tuned).items()]).numpy()


def picture(world: World, plain: nn.Module, regular: dict[float, nn.Module], figures: dict[str, float]) -> Figure:
    """Accuracies as bars, and the delta with and without AdamR."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6.4), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(3, 2))
    names = [name for name in figures if name.startswith("accuracy ") and " at " not in name and "before" not in name]
    names.sort(key=lambda name: -figures[name])
    draw.bars(
        above,
        [name.removeprefix("accuracy ") for name in names],
        [100 * figures[name] for name in names],
        highlight=["DAREx 1/q_v", "AdamR 0.1 and DARE"],
        xlabel="test accuracy in %, 99 % of the delta dropped",
    )
    deltas = {"plain": plain, **{f"AdamR {strength}": model for strength, model in regular.items()}}
    inner = {name: np.clip(_delta(world, model), -0.06, 0.06) for name, model in deltas.items()}
    draw.histogram(below, inner, xlabel="entry of the delta")
    return figure
