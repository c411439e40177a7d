"""Claim: matching the hidden units of two networks by their weights removes nearly all of the loss barrier between
them although it hardly brings them nearer, because the large singular directions line up; and two networks matched to a
third can be merged with each other.

Substitute for MLPs on MNIST and VGG11, ResNet20 on CIFAR-10: MLPs of three hidden layers on scikit-learn's digits.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from salience.evidence import Bar, Control, Outcome, Run
from salience.model.fitting import fit
from salience.report import figures as draw
from salience.reproductions.worlds import digits, zoo
from salience.reproductions.worlds.nets import mlp
from salience.weights import (
    BarrierResult,
    PermutationSpec,
    apply_permutation,
    barrier,
    distance_reduction,
    infer_spec,
    match_activations,
    match_straight_through,
    match_weights,
    merge_many,
    singular_alignment,
    taylor_barrier,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, NARROW, WIDE = 128, 32, 512
MEMBERS = 10  # networks of one seed have the seeds 10 s, 10 s + 1, ...
POINTS = 11


def build(seed: int) -> nn.Module:
    """The network of the bars."""
    return mlp([64, WIDTH, WIDTH, WIDTH, 10], seed)


def build_narrow(seed: int) -> nn.Module:
    """A narrower one."""
    return mlp([64, NARROW, NARROW, NARROW, 10], seed)


def build_wide(seed: int) -> nn.Module:
    """A wider one."""
    return mlp([64, WIDE, WIDE, WIDE, 10], seed)


def train(model: nn.Module, seed: int) -> None:
    """60 epochs on the digits of the seed that the members share."""
    world = digits.ink(seed // MEMBERS)
    fit(
        model, torch.from_numpy(world.train_x).flatten(1), torch.from_numpy(world.train_y), loss=cross_entropy,
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-4), epochs=60,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


def train_briefly(model: nn.Module, seed: int) -> None:
    """3 epochs: for plumbing."""
    world = digits.ink(seed // MEMBERS)
    fit(
        model, torch.from_numpy(world.train_x).flatten(1), torch.from_numpy(world.train_y), loss=cross_entropy,
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-3), epochs=3,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


class Data(NamedTuple):
    """Flat digits in two parts."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        """Test loss and accuracy."""
        with torch.no_grad():
            logits = model(self.test_x)
        accuracy = (logits.argmax(1) == self.test_y).double().mean()
        return float(cross_entropy(logits, self.test_y)), float(accuracy)


def reproduce(run: Run) -> Outcome:
    """Match three networks, merge them, and look at their singular directions."""
    split = digits.ink(run.seed)
    train_x, test_x = (torch.from_numpy(part).flatten(1) for part in (split.train_x, split.test_x))
    data = Data(train_x, torch.from_numpy(split.train_y), test_x, torch.from_numpy(split.test_y))

    # Models: three networks from other seeds, and what lines b and c up with a.
    run.step("training")
    recipe = zoo.Recipe(build, train_briefly if run.smoke else train)
    models = [zoo.trained(recipe, MEMBERS * run.seed + member) for member in range(3)]
    a, b, c = (copy.deepcopy(dict(model.state_dict())) for model in models)  # live tensors would change along
    spec = infer_spec(models[0], data.test_x[:2])

    # Method.
    run.step("matching")
    order, others = run.generator("order"), {"b": b, "c": c}
    found = {name: match_weights(spec, a, state, generator=order) for name, state in others.items()}
    by_weights = {name: apply_permutation(spec, found[name].permutations, state) for name, state in others.items()}
    outputs = match_activations(spec, models[0], models[1], [data.train_x])
    by_outputs = apply_permutation(spec, outputs.permutations, b)
    epochs = 2 if run.smoke else 60
    by_gradient = {
        name: apply_permutation(
            spec,
            match_straight_through(
                spec, models[0], model, data.train_x, data.train_y, cross_entropy, epochs=epochs, max_iter=10,
                generator=run.generator(f"ste {name}"),
            ).permutations,
            dict(model.state_dict()),
        )
        for name, model in (("b", models[1]), ("c", models[2]))
    }  # fmt: skip
    by_rows = apply_permutation(spec, match_weights(rows_only(spec), a, b, generator=order).permutations, b)
    chance = {name: torch.randperm(size, generator=run.generator(name)) for name, size in spec.sizes.items()}
    by_chance = apply_permutation(spec, chance, b)

    # Measure.
    run.step("measuring")

    def between(one: dict[str, Tensor], two: dict[str, Tensor]) -> BarrierResult:
        return barrier(models[0], one, two, data.evaluate, points=POINTS)

    lines = {
        "as trained": between(a, b),
        "weights": between(a, by_weights["b"]),
        "activations": between(a, by_outputs),
        "straight-through": between(a, by_gradient["b"]),
    }
    naive, naive_bc = lines["as trained"].barrier, between(b, c).barrier
    figures = {
        **judged(a, b, by_weights["b"], lines["weights"].barrier / naive),
        "barrier of b and c through a, share": between(by_weights["b"], by_weights["c"]).barrier / naive_bc,
        "barrier of b and c through a by straight-through, share": between(*by_gradient.values()).barrier / naive_bc,
        "largest change of a singular value": spectrum_change(b, by_weights["b"]),
        "largest change of an output": output_change(models[1], by_weights["b"], data.test_x),
        "accuracy of the networks, mean": float(np.mean([data.evaluate(model)[1] for model in models])),
        **{f"barrier, {name}": line.barrier for name, line in lines.items()},
        **{f"midpoint accuracy, {name}": line.midpoint_accuracy for name, line in lines.items()},
        "R(0.3) as trained": singular_alignment(a, b, gamma=0.3).score,
        "R(0) as trained": singular_alignment(a, b, gamma=0).score,
        "R(0.3) by activations": singular_alignment(a, by_outputs, gamma=0.3).score,
        "R(0.3) by straight-through": singular_alignment(a, by_gradient["b"], gamma=0.3).score,
        "R(0.3) of merged and a": singular_alignment(middle(a, by_weights["b"]), a, gamma=0.3).score,
        "barrier forecast by Taylor, as trained": forecast(models[0], a, b, data),
        "barrier forecast by Taylor, matched": forecast(models[0], a, by_weights["b"], data),
        "sweeps": found["b"].sweeps,
    }
    for mode in ("reference", "mean"):
        merged = merge_many(spec, [a, b, c], mode=mode, generator=run.generator("many"))
        models[0].load_state_dict(merged)
        figures[f"accuracy of three merged, {mode}"] = data.evaluate(models[0])[1]
    models[0].load_state_dict({name: torch.stack([a[name], b[name], c[name]]).mean(0) for name in a})
    figures["accuracy of three merged, as trained"] = data.evaluate(models[0])[1]
    if not run.smoke:
        for width, other in ((NARROW, build_narrow), (WIDE, build_wide)):
            figures |= at_width(run, data, width, zoo.Recipe(other, train))
    return Outcome(
        claim="permuting units removes nearly all of the loss barrier of plain averaging by aligning the large "
        "singular directions, although it shortens the distance only a little",
        level="mechanism",
        figures=figures,
        bars=[
            Bar("barrier left, share", at_most=0.10),
            Bar("distance cut, %", at_most=40),
            Bar("R(0.3) matched", at_least=0.35),
            Bar("R(0.3) over R(0), matched", at_least=3),
            Bar("barrier of b and c through a, share", at_most=0.25),
            Bar("largest change of a singular value", at_most=1e-4),
            Bar("largest change of an output", at_most=1e-3),
        ],
        controls=[
            Control("random permutations", "random", judged(a, b, by_chance, between(a, by_chance).barrier / naive)),
            Control("rows of the weights alone", "fake", judged(a, b, by_rows, between(a, by_rows).barrier / naive)),
        ],
        pictures={"The line between two networks, and their singular values": picture(lines, a)},
        notes=[
            "b and c are never matched to each other, only to a.",
            "The straight-through estimator is the published one with 60 epochs instead of 250.",
        ],
    )


def judged(a: dict[str, Tensor], b: dict[str, Tensor], permuted: dict[str, Tensor], left: float) -> dict[str, float]:
    """The figures that hold for one way to permute b."""
    large, every = (singular_alignment(a, permuted, gamma=gamma).score for gamma in (0.3, 0.0))
    return {
        "barrier left, share": left,
        "distance cut, %": distance_reduction(a, b, permuted),
        "R(0.3) matched": large,
        "R(0.3) over R(0), matched": large / every if every > 0 else float("nan"),
    }


def rows_only(spec: PermutationSpec) -> PermutationSpec:
    """What a lazy matching looks at: the rows of each weight, not the columns of the next nor the bias."""
    rows = {name: (perms[0], *[None] * (len(perms) - 1)) for name, perms in spec.axes_to_perm.items()}
    return PermutationSpec({n: p for n, p in rows.items() if n.endswith("weight") and p[0] is not None}, spec.sizes)


def spectrum_change(b: dict[str, Tensor], permuted: dict[str, Tensor]) -> float:
    """Largest change of a singular value under the permutation: none, in theory."""
    pairs = [(b[name].double(), permuted[name].double()) for name in b if b[name].ndim == 2]
    return max(float((torch.linalg.svdvals(x) - torch.linalg.svdvals(y)).abs().max()) for x, y in pairs)


def output_change(model: nn.Module, permuted: dict[str, Tensor], inputs: Tensor) -> float:
    """Largest change of an output under the permutation; leaves the model as it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        outputs = model(inputs)
        model.load_state_dict(permuted)
        change = float((model(inputs) - outputs).abs().max())
    model.load_state_dict(before)
    return change


def forecast(model: nn.Module, a: dict[str, Tensor], b: dict[str, Tensor], data: Data) -> float:
    """Barrier at the midpoint by second-order expansions around both ends."""
    return taylor_barrier(model, a, b, lambda network: cross_entropy(network(data.test_x), data.test_y))


def middle(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mean of two networks."""
    return {name: (a[name] + b[name]) / 2 for name in a}


def at_width(run: Run, data: Data, width: int, recipe: zoo.Recipe) -> dict[str, float]:
    """Barriers and the share of large singular values at another width."""
    run.step(f"width {width}")
    models = [zoo.trained(recipe, MEMBERS * run.seed + member) for member in range(2)]
    a, b = (dict(model.state_dict()) for model in models)
    spec = infer_spec(models[0], data.test_x[:2])
    permuted = apply_permutation(spec, match_weights(spec, a, b, generator=run.generator("order")).permutations, b)
    aligned = singular_alignment(a, permuted, gamma=0.3)
    kept = sum(pair[0] for pair in aligned.kept.values()) / sum(len(pair[0]) for pair in aligned.spectra.values())
    return {
        f"barrier, as trained, width {width}": barrier(models[0], a, b, data.evaluate, points=POINTS).barrier,
        f"barrier, weights, width {width}": barrier(models[0], a, permuted, data.evaluate, points=POINTS).barrier,
        f"distance cut, %, width {width}": distance_reduction(a, b, permuted),
        f"R(0.3) matched, width {width}": aligned.score,
        f"share of large singular values, width {width}": kept,
    }


def picture(lines: dict[str, BarrierResult], a: dict[str, Tensor]) -> Figure:
    """Losses along the line, and how fast singular values fall."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6.4), layout="constrained")
    above, below = figure.subplots(2, 1)
    t = next(iter(lines.values())).t
    draw.curve(above, t, {name: line.losses for name, line in lines.items()}, xlabel="t", ylabel="test loss")
    spectra = singular_alignment(a, a).spectra
    hidden = {name: values[0].numpy() for name, values in spectra.items() if len(values[0]) > 32}
    length = min(map(len, hidden.values()))
    draw.curve(
        below, np.arange(1, length + 1), {name: values[:length] for name, values in hidden.items()},
        xlabel="singular value", ylabel="share of the largest",
    )  # fmt: skip
    return figure
