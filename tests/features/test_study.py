"""The study: nine methods against captum and hand-worked figures, attacks, recipes, pointing, the runner, bad input."""

from __future__ import annotations

import captum.attr
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, interpolate

from salience.errors import InputError
from salience.features import (
    CAM,
    RISE,
    BenchResult,
    ExplainabilityBench,
    MeaningfulPerturbation,
    adversarial_fit,
    attribution_suite,
    best_threshold,
    better_than_control,
    energy_inside,
    localised,
    pgd_attack,
    pointing,
)
from salience.features.study.adversarial import DualNorm
from salience.features.study.perturbing import _enlarged
from salience.features.study.suite import KINDS
from salience.reproductions.worlds import nets
from tiny import build, state_hash


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


IMAGES = torch.rand(6, 1, 16, 16, generator=seeded(1))
CLASSES = torch.tensor([0, 1, 2, 3, 4, 5])


@pytest.fixture
def model() -> nn.Module:
    return nets.small_cnn(0).eval()


# ---- methods ----------------------------------------------------------------------------------------------


def test_captums_methods_are_captums(model) -> None:
    suite = attribution_suite(
        model, ["gradient", "gradient x input", "integrated gradients", "grad-cam"], layer="c4", n_steps=8, batch_size=4
    )
    expected = {
        "gradient": captum.attr.Saliency(model).attribute(IMAGES, CLASSES),
        "gradient x input": captum.attr.InputXGradient(model).attribute(IMAGES, CLASSES),
        "integrated gradients": captum.attr.IntegratedGradients(model).attribute(IMAGES, target=CLASSES, n_steps=8),
        "grad-cam": interpolate(
            captum.attr.LayerGradCam(model, model.c4).attribute(IMAGES, CLASSES, relu_attributions=True), (16, 16),
            mode="bilinear",
        ),
    }  # fmt: skip
    for name, maps in expected.items():
        torch.testing.assert_close(suite[name](IMAGES, CLASSES), maps[:, 0].detach().float(), atol=1e-6, rtol=1e-5)


def test_shap_and_lime_are_captums_from_a_seed(model) -> None:
    suite = attribution_suite(model, ["gradient shap", "lime"], samples=30, n_steps=5, batch_size=7, random_state=3)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    found = {name: maps(IMAGES[:2], CLASSES[:2]) for name, maps in suite.items()}
    assert torch.equal(torch.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()
    squares = (torch.arange(16) // 2)[:, None] * 8 + torch.arange(16) // 2
    with torch.random.fork_rng():
        torch.manual_seed(3)
        np.random.seed(3)
        shap = captum.attr.GradientShap(model).attribute(
            IMAGES[:1], torch.zeros(1, 1, 16, 16), n_samples=5, stdevs=0.1, target=0
        )
        torch.manual_seed(3)
        np.random.seed(3)
        lime = captum.attr.Lime(lambda x: model(x).softmax(1)).attribute(
            IMAGES[:1], target=0, feature_mask=squares[None, None], n_samples=30, perturbations_per_eval=7
        )
    torch.testing.assert_close(found["gradient shap"][0], shap[0, 0].float(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found["lime"][0], lime[0, 0].float(), atol=1e-6, rtol=1e-5)
    # What is drawn for an image does not depend on its neighbours.
    torch.testing.assert_close(suite["lime"](IMAGES[1:2], CLASSES[1:2]), found["lime"][1:])


def test_cam_by_hand_and_only_where_it_is_defined(model) -> None:
    with torch.no_grad():
        a = model[:8](IMAGES)
    expected = torch.einsum("bchw,bc->bhw", a, model.head.weight[CLASSES])
    maps = CAM(model, "relu4").attribute(IMAGES, CLASSES)
    torch.testing.assert_close(
        maps, interpolate(expected[:, None], (16, 16), mode="bilinear").detach(), atol=1e-6, rtol=1e-5
    )
    # The mean of the map is the logit but for the bias.
    torch.testing.assert_close(
        expected.mean((1, 2)), model(IMAGES).gather(1, CLASSES[:, None])[:, 0] - model.head.bias[CLASSES]
    )
    with pytest.raises(InputError, match="does not read the average of 'relu2'"):
        CAM(model, "relu2").attribute(IMAGES, CLASSES)
    deep = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 196, 10))
    with pytest.raises(InputError, match="CAM is not defined"):
        CAM(deep, "0").attribute(IMAGES, CLASSES)
    assert "cam" not in attribution_suite(deep, layer="0", example=IMAGES)  # all methods: left out
    with pytest.raises(InputError, match="not defined"):
        attribution_suite(deep, ["cam"], layer="0", example=IMAGES)
    with pytest.raises(InputError, match="no linear"):
        CAM(nn.Sequential(nn.Conv2d(1, 4, 3)), "0")


class Corner(nn.Module):
    """Sees the upper left quarter alone."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(4.0))

    def forward(self, x):
        s = self.scale * (x[:, :, :8, :8].mean((1, 2, 3)) - 0.5)
        return torch.stack([s, -s], 1)


@pytest.mark.parametrize("kind", [RISE, MeaningfulPerturbation])
def test_perturbation_methods_find_what_is_looked_at(kind) -> None:
    images = torch.zeros(2, 1, 16, 16)
    images[:, :, 2:7, 2:7] = 2.0
    method = kind(Corner(), **({"masks": 800} if kind is RISE else {"iterations": 60}))
    maps = method.attribute(images, 0)[:, 0]
    assert maps.shape == (2, 16, 16)
    assert (maps[:, 2:7, 2:7].mean((1, 2)) > maps[:, 9:, 9:].mean((1, 2)) + 0.05).all()
    torch.testing.assert_close(method.attribute(images, 0, internal_batch_size=1)[:, 0], maps, atol=1e-4, rtol=1e-3)


def test_rise_is_the_weighted_mean_of_its_masks() -> None:
    grids, shifts = torch.ones(2, 1, 3, 3), torch.zeros(2, 2)
    grids[1, 0, 0] = 0
    drawn = _enlarged(grids, shifts, 16, 16)
    assert drawn.shape == (2, 16, 16) and (drawn[0] == 1).all()
    assert (drawn[1, :2] == 0).all() and (drawn[1, 12:] == 1).all() and 0 < drawn[1, 7, 0] < 1
    model, method = Corner(), RISE(Corner(), masks=5, cells=3, chance=0.4, random_state=2)
    generator = seeded(2)
    grids = (torch.rand((5, 1, 3, 3), generator=generator) < 0.4).float()
    masks = _enlarged(grids, torch.rand((5, 2), generator=generator), 16, 16)
    with torch.no_grad():
        weight = torch.stack([model(IMAGES[:1] * mask).softmax(1)[0, 1] for mask in masks])
    expected = (weight[:, None, None] * masks).sum(0) / (5 * 0.4)
    torch.testing.assert_close(method.attribute(IMAGES[:1], 1)[0, 0], expected)


def test_suite_is_whole_deterministic_and_leaves_the_model_alone() -> None:
    model = build("plain").train()
    before = state_hash(model)
    images = torch.rand(2, 3, 16, 16, generator=seeded())
    suite = attribution_suite(model, example=images, samples=10, n_steps=3)
    assert set(suite) == set(KINDS)
    for name, maps in suite.items():
        found = maps(images, torch.tensor([0, 2]))
        assert found.shape == (2, 16, 16) and not found.requires_grad and torch.isfinite(found).all(), name
        assert torch.equal(found, maps(images, torch.tensor([0, 2]))), name
        assert state_hash(model) == before, name


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind != "control"])
def test_suite_leaves_the_model_alone_after_an_exception(name) -> None:
    model = build("plain").train()
    before, images = state_hash(model), torch.rand(2, 3, 16, 16)
    maps = attribution_suite(model, [name], layer="relu2", samples=10, n_steps=3)[name]

    def broken(*args):
        raise ValueError("broken")

    model.head.forward = broken
    with pytest.raises(ValueError, match="broken"):
        maps(images, torch.tensor([0, 2]))
    del model.head.forward
    assert state_hash(model) == before


def test_suite_refuses(model) -> None:
    with pytest.raises(InputError, match="nearest names: 'rise'"):
        attribution_suite(model, ["risse"])
    with pytest.raises(InputError, match="give example images"):
        attribution_suite(model, ["grad-cam"])
    for make in (
        lambda: RISE(model, masks=0),
        lambda: RISE(model, chance=1.0),
        lambda: MeaningfulPerturbation(model, cells=1),
        lambda: RISE(model).attribute(IMAGES[0]),
        lambda: RISE(model).attribute(IMAGES, 10),
        lambda: RISE(model).attribute(IMAGES, 0, (1,)),
    ):
        with pytest.raises(InputError):
            make()


# ---- attacks and recipes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_attack_reaches_the_known_optimum_of_a_linear_model(norm) -> None:
    """With logits (w . x, 0) the worst point of the ball is known."""
    w = torch.tensor([[3.0, -1.0, 0.5], [0, 0, 0]])
    linear = nn.Linear(3, 2, bias=False)
    linear.weight.data = w
    x = torch.full((4, 3), 0.5)
    y = torch.zeros(4, dtype=torch.long)
    adv = pgd_attack(linear, x, y, eps=0.2, steps=40, alpha=0.1, norm=norm, generator=seeded())
    expected = -0.2 * (w[0].sign() if norm == "linf" else w[0] / w[0].norm())
    torch.testing.assert_close(adv - x, expected.expand(4, -1), atol=0.02, rtol=0)
    size = (adv - x).abs().amax(1) if norm == "linf" else (adv - x).norm(dim=1)
    assert (size <= 0.2 + 1e-6).all()


def test_attack_stays_in_pixels_also_of_normalised_inputs() -> None:
    model = build("plain")
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    pixels = torch.rand(5, 3, 16, 16, generator=seeded()).round()  # at the two ends of the range
    shift, scale = torch.tensor(mean).view(1, 3, 1, 1), torch.tensor(std).view(1, 3, 1, 1)
    y = torch.zeros(5, dtype=torch.long)
    adv = pgd_attack(model, (pixels - shift) / scale, y, eps=0.1, mean=mean, std=std, generator=seeded())
    back = adv * scale + shift
    assert back.min() > -1e-5 and back.max() < 1 + 1e-5
    assert (back - pixels).abs().max() < 0.1 + 1e-5
    with torch.no_grad():
        assert cross_entropy(model(adv), y) > cross_entropy(model((pixels - shift) / scale), y)


def test_attack_leaves_model_alone_and_repeats_itself() -> None:
    model = build("plain").train()
    before = state_hash(model)
    x, y = torch.rand(3, 3, 16, 16), torch.tensor([0, 1, 2])
    one = pgd_attack(model, x, y, eps=0.1, generator=seeded(4))
    assert torch.equal(one, pgd_attack(model, x, y, eps=0.1, generator=seeded(4)))
    assert state_hash(model) == before
    torch.testing.assert_close(pgd_attack(model, x, y, eps=0.0, generator=seeded()), x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": 8.0}, "is it in 0..255"),
        ({"inputs": torch.rand(3, 3, 16, 16) * 255}, "outside of bounds"),
        ({"inputs": torch.randn(3, 3, 16, 16)}, "give the mean and std"),
        ({"norm": "l1"}, "norm"),
        ({"steps": 0}, "steps"),
        ({"eps": float("nan")}, "eps"),
        ({"mean": (0.5,)}, "give both"),
        ({"bounds": (1.0, 0.0)}, "bounds"),
    ],
)
def test_attack_refuses(change, message) -> None:
    right = {"inputs": torch.rand(3, 3, 16, 16), "targets": torch.tensor([0, 1, 2]), "eps": 0.1}
    with pytest.raises(InputError, match=message):
        pgd_attack(build("plain"), **{**right, **change}, generator=seeded())


def two_blobs() -> tuple[torch.Tensor, torch.Tensor]:
    """Classes told apart by a robust pixel (far apart) and by twenty frail ones (near, and more exact)."""
    y = torch.arange(400) % 2
    side = (2.0 * y - 1)[:, None]
    strong = 0.5 * side + 0.35 * torch.randn(400, 1, generator=seeded())
    frail = 0.1 * side + 0.02 * torch.randn(400, 20, generator=seeded(1))
    return torch.cat([strong, frail], 1), y


def trained(recipe: str) -> nn.Module:
    x, y = two_blobs()
    model = nets.mlp([21, 2], 0)
    adversarial_fit(
        model, x, y, recipe=recipe, optimizer=lambda p: torch.optim.Adam(p, lr=0.02), epochs=30, generator=seeded(),
        eps=0.2, steps=3, bounds=None, batch_size=50,
    )  # fmt: skip
    return model.eval()


def test_training_against_attacks_withstands_them_and_noise_does_not() -> None:
    x, y = two_blobs()
    held = {}
    for recipe in ("vanilla", "noise", "pgd"):
        model = trained(recipe)
        adv = pgd_attack(model, x, y, eps=0.2, steps=10, bounds=None, generator=seeded(9))
        with torch.no_grad():
            held[recipe] = (model(adv).argmax(1) == y).double().mean().item()
    assert held["pgd"] > 0.7 and held["pgd"] > max(held["vanilla"], held["noise"]) + 0.3


def test_advprop_trains_two_normalisations_and_leaves_the_main_one() -> None:
    model = build("plain").train()
    names = list(model.state_dict())
    seen: list[tuple[bool, int]] = []
    x, y = torch.rand(16, 3, 16, 16, generator=seeded()), torch.arange(16) % 3

    def watched(logits, targets):
        dual = next(m for m in model.modules() if isinstance(m, DualNorm))
        seen.append((dual.use_aux, int(dual.main.num_batches_tracked), int(dual.aux.num_batches_tracked)))
        return cross_entropy(logits, targets)

    adversarial_fit(
        model, x, y, recipe="advprop", optimizer=lambda p: torch.optim.SGD(p, lr=0.1), epochs=2, generator=seeded(),
        eps=0.05, steps=2, ramp=0, loss=watched, batch_size=8,
    )  # fmt: skip
    assert list(model.state_dict()) == names and model.training and isinstance(model.norm, nn.BatchNorm2d)
    assert int(model.norm.num_batches_tracked) == 4  # clean batches alone
    assert {aux for aux, *_ in seen} == {True, False}  # attacks and the attacked loss ran on the other one
    assert max(own for *_, own in seen) == 4
    with pytest.raises(InputError, match="no BatchNorm2d"):
        adversarial_fit(
            nets.mlp([4, 2], 0), torch.rand(8, 4), torch.zeros(8, dtype=torch.long), recipe="advprop", epochs=1,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1), generator=seeded(), batch_size=8,
        )  # fmt: skip


def test_recipes_refuse() -> None:
    x, y = torch.rand(8, 4), torch.zeros(8, dtype=torch.long)
    right = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.1), "epochs": 1, "generator": seeded(), "batch_size": 8}
    for change, message in (
        ({"recipe": "madry"}, "recipe"), ({"ramp": 2.0}, "ramp"), ({"eps": 8.0}, "0..255"),
        ({"loss": lambda logits, targets: logits.sum() * float("nan")}, "lower the learning rate"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            adversarial_fit(nets.mlp([4, 2], 0), x, y, **{"eps": 0.1, **right, **change})


# ---- pointing ---------------------------------------------------------------------------------------------


def test_pointing_counts_the_box_alone_and_flat_maps_as_misses() -> None:
    maps = torch.zeros(4, 8, 8)
    maps[0, 2, 3] = 1
    maps[1, 2, 5] = 1  # one past the end
    maps[3, 0, 0] = -1  # the rest is the largest value: its first pixel is outside
    boxes = np.array([[3, 2, 5, 4]] * 4)
    found = pointing(maps, boxes)
    assert found.hits.tolist() == [True, False, False, False] and found.flat.tolist() == [False, False, True, False]
    assert pointing(maps, boxes, margin=1).hits.tolist() == [True, True, False, False]
    corner = pointing(torch.zeros(1, 8, 8), np.array([[0, 0, 4, 4]]))
    assert not corner.hits[0] and corner.flat[0]  # its argmax lies in the box by accident


def test_localisation_takes_the_largest_part_and_a_threshold_from_elsewhere() -> None:
    maps = torch.zeros(1, 10, 10)
    maps[0, 1:5, 1:5] = 0.6
    maps[0, 8, 8] = 1.0  # brighter and small
    box = np.array([[1, 1, 5, 5]])
    assert localised(maps, box, 0.5)[0] and not localised(maps, box, 0.9)[0]
    assert localised(maps, np.array([[1, 1, 5, 8]]), 0.5)[0]  # 16 / 28 > 0.5
    assert not localised(maps, np.array([[1, 1, 5, 9]]), 0.5)[0]  # 16 / 32 is not above 0.5
    assert best_threshold(maps, box) <= 0.6
    assert not localised(torch.zeros(1, 10, 10), box, 0.5)[0]


def test_energy_by_hand() -> None:
    maps = torch.tensor([[[1.0, -3.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    mask = torch.tensor([[[False, True], [False, False]]] * 2)
    found = energy_inside(maps, mask)
    assert found[0] == 0.75 and np.isnan(found[1])


@pytest.mark.parametrize("box", [[0, 0, 9, 4], [-1, 0, 4, 4], [2, 2, 2, 4], [4, 2, 3, 4]])
def test_boxes_outside_of_the_image_are_named(box) -> None:
    boxes = np.array([[0, 0, 4, 4], box])
    for measure in (pointing, lambda m, b: localised(m, b, 0.5)):
        with pytest.raises(InputError, match="number 1"):
            measure(torch.rand(2, 8, 8), boxes)
    with pytest.raises(InputError, match=r"\(n, 4\)"):
        pointing(torch.rand(2, 8, 8), boxes[:1])


# ---- the runner -------------------------------------------------------------------------------------------


def suite_of(model: nn.Module) -> dict:
    return attribution_suite(model, ["gradient", "random", "centre"])


def bench_on(models: dict, measures=("insertion", "insertion, normalised", "deletion", "pointing"), n=40, **options):
    images = torch.rand(n, 1, 16, 16, generator=seeded(2))
    boxes = np.tile([2, 2, 10, 10], (n, 1))
    targets = torch.arange(n) % 10
    bench = ExplainabilityBench(models, suite_of, measures, steps=4, **options)
    return bench.run(images, targets, boxes, other_sets={"dark": (0.5 * images, targets)})


def test_bench_scores_every_cell_and_equal_models_do_not_differ(model) -> None:
    result = bench_on({"a": model, "b": model})
    assert set(result.scores) == {
        (name, method, measure) for name in "ab" for method in ("gradient", "random", "centre")
        for measure in ("insertion", "insertion, normalised", "deletion", "pointing")
    }  # fmt: skip
    for difference in result.robust_minus_plain({"b": "a"}):
        assert not difference.mean > 0 and not difference.mean < 0
    assert set(result.accuracy) == {(name, which) for name in "ab" for which in ("clean", "dark")}
    assert result.pareto() == ["a", "b"]
    assert result.to_markdown().count("\n") == 7 and "| a | gradient |" in result.to_markdown()
    with pytest.raises(InputError, match="no model 'c'"):
        result.robust_minus_plain({"c": "a"})
    with pytest.raises(InputError, match="was not run"):
        result.pareto("energy")


def made_up(scores: dict, confidence: dict, correct: dict | None = None) -> BenchResult:
    n = len(next(iter(confidence.values())))
    right = correct or {name: np.ones(n, dtype=bool) for name in confidence}
    return BenchResult(
        scores, {(m, k): torch.zeros(n, 1, 1) for m, k, _ in scores}, confidence, right,
        {(name, which): 0.5 for name in confidence for which in ("clean", "dark")}, {},
    )  # fmt: skip


def test_confidence_bias_tells_a_measure_that_follows_confidence() -> None:
    sure = np.linspace(0.2, 0.9, 50)
    noise = np.random.default_rng(0).normal(size=50)
    scores = {("a", "m", "insertion"): 0.5 * sure, ("a", "m", "pointing"): noise, ("a", "m", "adp"): np.ones(50)}
    bias = made_up(scores, {"a": sure}).confidence_bias()
    assert bias["a", "m", "insertion"] == pytest.approx(1) and abs(bias["a", "m", "pointing"]) < 0.4
    assert np.isnan(bias["a", "m", "adp"])
    three = {(name, "m", "insertion"): np.full(3, level) for name, level in zip("abc", (0.1, 0.5, 0.7))}
    across = made_up(three, {name: np.full(3, level) for name, level in zip("abc", (0.2, 0.6, 0.8))}).confidence_bias()
    assert across["across models", "m", "insertion"] == pytest.approx(1)


def test_ranks_and_directions_by_hand() -> None:
    values = {"good": (0.9, 0.1), "even": (0.5, 0.3), "bad": (0.5, 0.7)}
    scores = {}
    for method, (insertion, deletion) in values.items():
        scores["a", method, "insertion"] = np.full(4, insertion)
        scores["a", method, "deletion"] = np.full(4, deletion)
    result = made_up(scores, {"a": np.ones(4)})
    assert result.method_ranks() == {"good": 1.0, "even": 2.25, "bad": 2.75}


def test_few_common_images_come_without_intervals() -> None:
    right = {"a": np.arange(40) < 35, "b": np.arange(40) < 20}
    scores = {(name, "m", "insertion"): np.random.default_rng(i).random(40) for i, name in enumerate("ab")}
    result = made_up(scores, {"a": np.ones(40), "b": np.ones(40)}, right)
    assert result.common.sum() == 20
    (few,) = result.robust_minus_plain({"b": "a"}, common=True)
    assert few.n == 20 and np.isnan([few.low, few.high, few.p_value]).all() and np.isfinite(few.mean)
    (all_,) = result.robust_minus_plain({"b": "a"})
    assert all_.n == 40 and np.isfinite(all_.p_value)


def test_one_model_alone_is_compared_with_none() -> None:
    result = made_up({("a", "m", "insertion"): np.linspace(0, 1, 40)}, {"a": np.ones(40)})
    assert result.robust_minus_plain({}) == [] and result.pareto("insertion") == ["a"]
    assert ("across models", "m", "insertion") not in result.confidence_bias()
    with pytest.raises(InputError, match="no model 'b'"):
        result.robust_minus_plain({"b": "a"})


def test_no_single_winner_and_a_clear_one() -> None:
    scores = {(name, "m", "pointing"): np.full(4, worth) for name, worth in zip("ab", (0.2, 0.9))}
    result = made_up(scores, {"a": np.ones(4), "b": np.ones(4)})
    assert result.pareto() == ["b"]
    result.accuracy["a", "clean"] = 0.9
    assert result.pareto() == ["a", "b"]


def test_control_comparison_turns_measures_the_right_way() -> None:
    better = np.random.default_rng(0).random(40) * 0.1
    scores = {("a", "m", "deletion"): better, ("a", "random", "deletion"): better + 0.5,
              ("a", "m", "insertion"): better, ("a", "random", "insertion"): better + 0.5}  # fmt: skip
    found = better_than_control(made_up(scores, {"a": np.ones(40)}), "a")
    assert found["m", "deletion"][0] == pytest.approx(0.5) and found["m", "insertion"][0] == pytest.approx(-0.5)
    assert ("random", "deletion") not in found


def test_normalised_areas_do_not_know_confidence(model) -> None:
    """Halving every probability halves the area and leaves the normalised one."""

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            p = 0.5 * self.inner(x).softmax(1)
            return torch.cat([p, 1 - p.sum(1, keepdim=True)], 1).clamp_min(1e-9).log()

    sharp = nets.small_cnn(0).eval()
    with torch.no_grad():
        sharp.head.weight.mul_(300)
    model = sharp
    result = bench_on({"whole": sharp, "half": Half()}, ("insertion", "insertion, normalised"), batch_size=16)
    whole, half = (result.scores[name, "centre", "insertion"] for name in ("whole", "half"))
    np.testing.assert_allclose(half, whole / 2, atol=1e-6)
    whole, half = (result.scores[name, "centre", "insertion, normalised"] for name in ("whole", "half"))
    known = np.isfinite(whole) & np.isfinite(half)
    assert known.any()
    np.testing.assert_allclose(half[known], whole[known], atol=1e-5)


def test_collapsed_model_is_named(model) -> None:
    with torch.no_grad():
        model.head.bias[3] = 100
    assert any("a predicts one class for 100% of the images" in warning for warning in bench_on({"a": model}).warnings)


def test_bench_refuses(model) -> None:
    images, targets = torch.rand(3, 1, 16, 16), torch.tensor([0, 1, 2])
    with pytest.raises(InputError, match="at least one"):
        ExplainabilityBench({}, suite_of)
    with pytest.raises(InputError, match="nearest names: 'insertion'"):
        ExplainabilityBench({"a": model}, suite_of, ["insertoin"])
    with pytest.raises(InputError, match="need the box"):
        ExplainabilityBench({"a": model}, suite_of, ["pointing"]).run(images, targets)
    with pytest.raises(InputError, match="other cannot take images"):
        ExplainabilityBench({"a": model, "other": build("plain")}, suite_of, ["insertion"]).run(images, targets)
    with pytest.raises(InputError, match=r"lie in 0\.\.12"):
        ExplainabilityBench({"a": model}, suite_of, ["insertion"]).run(images, torch.tensor([0, 1, 12]))


def test_bench_keeps_sigmoid_probabilities(model) -> None:
    images, targets = torch.rand(3, 1, 16, 16), torch.tensor([0, 1, 2])
    result = ExplainabilityBench({"a": model}, suite_of, ["insertion"], multi_label=True, steps=2).run(images, targets)
    with torch.no_grad():
        expected = model(images).sigmoid().gather(1, targets[:, None])[:, 0]
    np.testing.assert_allclose(result.confidence["a"], expected, atol=1e-6)
