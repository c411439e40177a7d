"""BEE: its parts against captum, hand-worked figures and laws; its learning; bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import nn

from salience.errors import InputError, NothingToDo
from salience.features import BEE, LogisticThompson, baseline_families, path_map
from salience.features.bee.families import ALPHA_BAR
from salience.model import Split
from salience.reproductions.worlds import nets
from tiny import build, state_hash


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


IMAGES = torch.rand(4, 1, 16, 16, generator=seeded(5))


@pytest.fixture
def model() -> nn.Module:
    return nets.small_cnn(0).eval()


# ---- paths ------------------------------------------------------------------------------------------------


def test_ig_is_the_mean_of_captums_left_and_right_sums(model) -> None:
    split = Split(model, "c2")
    a = split.encode(IMAGES).detach()
    b = torch.rand(a.shape, generator=seeded())
    target = torch.tensor([1, 2, 3, 4])
    ours = path_map(split, IMAGES, target, a, b, n_steps=6, integrand="ig", internal_batch_size=5)
    captum = IntegratedGradients(lambda v: split.decode(v, IMAGES[:1]))  # of what stands behind the layer

    def side(method):
        return captum.attribute(a, b, target, n_steps=6, method=method).sum(1)

    expected = (side("riemann_left") + side("riemann_right")) / 2
    torch.testing.assert_close(ours, expected.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", [name for name in baseline_families if name != "train"])
def test_ig_is_complete(model, family) -> None:
    """The map sums up to g(a) - g(b)."""
    split = Split(model, "c2")
    a = split.encode(IMAGES[:1]).detach()
    b = baseline_families[family](a[0], 3, seeded(), None)
    found = path_map(split, IMAGES[:1], 7, a.expand(3, -1, -1, -1), b, n_steps=64, integrand="ig").sum((1, 2))
    with torch.no_grad():
        change = split.decode(a, IMAGES[:1])[:, 7] - split.decode(b, IMAGES[:1])[:, 7]
    torch.testing.assert_close(found, change, rtol=0.01, atol=1e-4)


def test_other_integrands_by_hand() -> None:
    """g is linear with weights (2, -3): the gradient is known and the path is b + k/n (a - b)."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Identity()

        def forward(self, x):
            v = self.first(x)
            return torch.stack([2 * v[:, 0].sum((1, 2)) - 3 * v[:, 1].sum((1, 2)), v.sum((1, 2, 3))], 1)

    a = torch.tensor([[[[1.0]], [[4.0]]]])
    b = torch.tensor([[[[-1.0]], [[2.0]]]])
    split, x = Split(Net(), "first"), a.clone()
    one = path_map(split, x, 0, a, b, n_steps=2, integrand="grad_act")  # v: (-1, 2), (0, 3), (1, 4)
    assert one.item() == pytest.approx(2 * (-1 + 0 + 1) - 3 * (2 + 3 + 4))
    two = path_map(split, x, 0, a, b, n_steps=2)
    assert two.item() == pytest.approx(2 * (0 + 0 + 1))
    three = path_map(split, x, 0, a, b, n_steps=2, integrand="ig")
    assert three.item() == pytest.approx(2 * 2 - 3 * 2)


def test_points_in_a_pass_change_nothing_and_are_bounded(model) -> None:
    split, sizes = Split(model, "c2"), []
    a = split.encode(IMAGES[:1]).detach()
    b = baseline_families["normal"](a[0], 5, seeded(), None)
    whole = path_map(split, IMAGES[:1], 0, a.expand(5, -1, -1, -1), b, n_steps=10)
    model.c3.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    parts = path_map(split, IMAGES[:1], 0, a.expand(5, -1, -1, -1), b, n_steps=10, internal_batch_size=4)
    torch.testing.assert_close(parts, whole)
    assert max(sizes) == 4 and sum(sizes) == 5 * 11


def test_tokens_of_a_vision_transformer() -> None:
    model = nets.tiny_vit(0).eval()
    found = BEE(model, "vit.layers.1", random_state=0).attribute(torch.rand(2, 1, 32, 32), draws=2)
    assert found.shape == (2, 1, 32, 32) and torch.isfinite(found).all()


# ---- families ---------------------------------------------------------------------------------------------

A = torch.randn(6, 9, 11, generator=seeded(3))
BANK = torch.randn(4, 6, 9, 11, generator=seeded(4))


@pytest.mark.parametrize("family", baseline_families)
def test_families_are_drawn_anew_and_stay_in_the_range_of_their_channel(family) -> None:
    draw = baseline_families[family]
    b = draw(A, 8, seeded(), BANK)
    assert b.shape == (8, *A.shape) and torch.equal(b, draw(A, 8, seeded(), BANK))
    assert not torch.equal(b, draw(A, 8, seeded(1), BANK))
    assert len({tuple(one.flatten().tolist()) for one in b}) > 2
    if family != "train":
        low, high = A.amin((1, 2)), A.amax((1, 2))
        assert (b.amin((2, 3)) >= low - 1e-5).all() and (b.amax((2, 3)) <= high + 1e-5).all()


def test_noise_is_nearly_all_noise_and_fills_the_range() -> None:
    assert pytest.approx(0.0064, abs=5e-4) == ALPHA_BAR
    for family in ("normal", "uniform"):
        b = baseline_families[family](A, 200, seeded(), None)
        torch.testing.assert_close(b.amin((2, 3)), A.amin((1, 2)).expand(200, -1))
        torch.testing.assert_close(b.amax((2, 3)), A.amax((1, 2)).expand(200, -1), atol=1e-5, rtol=1e-5)
        pairs = torch.stack([b.flatten(), A.expand(200, -1, -1, -1).flatten()])
        within = torch.corrcoef(pairs)[0, 1]
        assert within < 0.6  # the activations themselves are all but gone


def test_constant_is_flat_and_blur_keeps_flat_channels() -> None:
    b = baseline_families["const"](A, 5, seeded(), None)
    assert (b.amax((2, 3)) == b.amin((2, 3))).all() and b[:, 0, 0, 0].unique().numel() == 5
    flat = torch.full((2, 9, 11), 3.0)
    torch.testing.assert_close(baseline_families["blur"](flat, 3, seeded(), None), flat.expand(3, -1, -1, -1))
    blurred = baseline_families["blur"](A, 50, seeded(), None)
    assert (blurred.std((2, 3)) <= A.std((1, 2)) + 1e-5).all() and blurred.std() < 0.7 * A.std()
    torch.testing.assert_close(
        baseline_families["blur"](A.transpose(1, 2), 4, seeded(), None),
        baseline_families["blur"](A, 4, seeded(), None).transpose(2, 3),
    )


def test_a_map_of_one_pixel_is_no_trouble() -> None:
    for family, draw in baseline_families.items():
        assert torch.isfinite(draw(torch.ones(3, 1, 1), 2, seeded(), torch.ones(2, 3, 1, 1))).all(), family


# ---- bandit -----------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.sampled_from([1, -1]))
def test_update_is_the_laplace_approximation(seed, y) -> None:
    """Against a general minimiser of the stated objective."""
    rng = np.random.default_rng(seed)
    bandit = LogisticThompson(2, 4)
    bandit.mean[1], bandit.precision[1] = rng.normal(size=4), rng.uniform(0.3, 3, 4)
    m, q, phi = bandit.mean[1].copy(), bandit.precision[1].copy(), rng.normal(size=4) * 2
    bandit.update(1, phi, y)
    best = minimize(lambda w: (q * (w - m) ** 2).sum() / 2 + np.logaddexp(0, -y * w @ phi), m, tol=1e-12).x
    np.testing.assert_allclose(bandit.mean[1], best, atol=1e-4)
    p = 1 / (1 + np.exp(-best @ phi))
    np.testing.assert_allclose(bandit.precision[1], q + phi**2 * p * (1 - p), rtol=1e-3)
    assert (bandit.mean[0] == 0).all() and bandit.pulls.tolist() == [0, 1]


def test_bandit_learns_which_arm_suits_the_context() -> None:
    rng, bandit, hits = np.random.default_rng(0), LogisticThompson(3, 3, random_state=0), []
    for _ in range(600):
        phi = 2 * np.eye(3)[rng.integers(3)]
        arm = bandit.choose(phi)
        right = bool(phi[arm])
        hits.append(right)
        bandit.update(arm, phi, 1 if right else -1)
    assert np.mean(hits[:30]) < 0.75 < 0.95 < np.mean(hits[-200:])


def test_bandit_refuses() -> None:
    with pytest.raises(InputError, match="dim"):
        LogisticThompson(2, 0)
    with pytest.raises(InputError, match="phi"):
        LogisticThompson(2, 3).choose(np.ones(2))
    with pytest.raises(InputError, match="phi"):
        LogisticThompson(2, 1).choose(np.array([np.nan]))
    with pytest.raises(InputError, match="y: got 0"):
        LogisticThompson(2, 1).update(0, np.ones(1), 0)
    bandit = LogisticThompson(2, 2)
    bandit.update(0, np.zeros(2), 1)  # a context of zeros teaches nothing
    assert (bandit.mean == 0).all()


# ---- the whole --------------------------------------------------------------------------------------------


def test_same_seed_same_result_and_neighbours_do_not_matter(model) -> None:
    bee = BEE(model, "c2", random_state=3).fit(IMAGES)
    one, again = bee.attribute(IMAGES, draws=5), bee.attribute(IMAGES, draws=5)
    assert torch.equal(one, again)
    torch.testing.assert_close(bee.attribute(IMAGES[2:], draws=5), one[2:])
    tuned = bee.attribute(IMAGES, draws=5, finetune=True)
    torch.testing.assert_close(bee.attribute(IMAGES, draws=5, finetune=True), tuned)
    torch.testing.assert_close(bee.attribute(IMAGES, draws=5), one)  # tuning leaves what was learned alone
    fresh = BEE(model, "c2", random_state=3).fit(IMAGES)
    assert torch.equal(fresh.attribute(IMAGES, draws=5), one) and fresh.pulled_ == bee.pulled_


def test_best_is_best_of_its_draws_and_of_its_layers(model) -> None:
    for metric, pick in (("insertion", np.max), ("deletion", np.min)):
        bee = BEE(model, ["c2", "c3"], metric=metric, families=["normal", "const"], random_state=0)
        for result in bee.explain(IMAGES[:2], draws=6):
            assert result.score == pick(result.scores) and len(result.scores) == 6
            assert result.layer in ("c2", "c3") and result.family in ("normal", "const")
            assert result.map.min() == 0 and result.map.max() == 1
            assert result.all_metrics[metric] == pytest.approx(result.score, abs=1e-6)
            assert set(result.all_metrics) == {
                "insertion", "deletion", "pos", "neg", "pic", "adp", "aic", "sic"
            }  # fmt: skip
        both = np.array([r.score for r in bee.explain(IMAGES[:2], draws=6)])
        alone = [
            [
                r.score
                for r in BEE(model, layer, metric=metric, families=["normal", "const"]).explain(IMAGES[:2], draws=1)
            ]
            for layer in ("c2", "c3")
        ]
        assert both.shape == np.shape(alone)[1:]


def test_more_draws_never_do_worse(model) -> None:
    few, many = (
        BEE(model, "c2", families=["const"], random_state=1).explain(IMAGES, draws=n, all_metrics=False) for n in (1, 8)
    )
    assert all(m.score >= f.score - 1e-12 for f, m in zip(few, many))


def test_a_family_that_always_wins_is_pulled_most(model) -> None:
    """A measure that likes bright maps of one family: the bandit must find it, and tell it from the others."""
    calls: list[int] = []

    def metric(model, images, maps, targets):
        calls.append(len(maps))
        return np.arange(len(maps), dtype=float)  # in `fit` the last family always scores highest

    bee = BEE(model, "c2", metric=metric, families=["normal", "const", "blur"], reward="image", random_state=0)
    bee.fit(IMAGES.repeat(60, 1, 1, 1))
    assert bee.pulled_[-60:].count("blur") > 45 and set(calls) == {3}
    worst = BEE(
        model, "c2", metric=lambda *a: -metric(*a), families=["normal", "const", "blur"], reward="image", random_state=0
    ).fit(IMAGES.repeat(60, 1, 1, 1))
    assert worst.pulled_[-60:].count("normal") > 45


def test_nan_of_a_metric_is_left_out(model) -> None:
    def metric(model, images, maps, targets):
        return np.where(np.arange(len(maps)) % 2, np.nan, 0.5)

    bee = BEE(model, "c2", metric=metric, families=["normal", "const"], random_state=0).fit(IMAGES)
    assert bee.history_ == [0.5] * 4 and bee.bandit_.pulls[1] == 0
    result = bee.explain(IMAGES[:1], draws=4)[0]
    assert result.score == 0.5 and np.isnan(result.scores).sum() == 2
    nothing = BEE(model, "c2", metric=lambda m, x, maps, t: np.full(len(maps), np.nan), families=["const"])
    found = nothing.explain(IMAGES[:1], draws=2, all_metrics=False)[0]
    assert np.isnan(found.score) and torch.isfinite(found.map).all()


def test_train_is_left_out_before_fit_with_a_word(model) -> None:
    with pytest.warns(UserWarning, match="'train' is left out"):
        results = BEE(model, "c2").explain(IMAGES[:1], draws=20, all_metrics=False)
    assert "train" not in results[0].families
    with pytest.raises(InputError, match="call fit first"):
        BEE(model, "c2", families=["train"]).attribute(IMAGES, draws=1)


def test_train_is_the_mean_over_training_images(model) -> None:
    bee = BEE(model, "c2", families=["train"], train_draws=3, random_state=0).fit(IMAGES[:1])
    thrice = bee._drawn(IMAGES[1:2], 0, np.array(["train"]), seeded())[0]
    bee.train_draws = 1  # one image in the bank: the mean of three maps is that map
    torch.testing.assert_close(bee._drawn(IMAGES[1:2], 0, np.array(["train"]), seeded())[0], thrice)


def test_model_is_left_as_it_was_whatever_happens() -> None:
    model = build("plain").train()  # with ReLU in place and batch normalisation
    model.norm.weight.grad = torch.ones(4)
    before, mode = state_hash(model), torch.is_grad_enabled()
    images = torch.rand(3, 3, 16, 16)
    bee = BEE(model, "conv2", random_state=0).fit(images)
    bee.attribute(images, draws=3, finetune=True)
    assert state_hash(model) == before and torch.is_grad_enabled() is mode
    assert torch.equal(model.norm.weight.grad, torch.ones(4))

    def broken(*args):
        raise RuntimeError("broken")

    model.head.forward = broken
    for call in (lambda: bee.fit(images), lambda: bee.attribute(images, draws=3)):
        with pytest.raises(RuntimeError, match="broken"):
            call()
        assert state_hash(model) == before


def test_needs_no_grad_mode_of_the_caller_and_serves_transformers_output() -> None:
    model = build("resnet")
    with torch.no_grad():
        found = BEE(model, "resnet.encoder.stages.0", random_state=0).attribute(torch.rand(2, 3, 16, 16), draws=2)
    assert found.shape == (2, 1, 16, 16) and not found.requires_grad


def test_bad_input(model) -> None:
    for options, message in (
        ({"layer": "c9"}, "has no layer 'c9'"),
        ({"metric": "inserton"}, "nearest names: 'insertion'"),
        ({"families": ["gauss"]}, "families: got 'gauss'"),
        ({"families": []}, "at least one"),
        ({"reward": "rank"}, "reward"),
    ):
        with pytest.raises(InputError, match=message):
            BEE(model, **{"layer": "c2", **options})
    bee = BEE(model, "c2", families=["const"])
    for call, message in (
        (lambda: bee.attribute(IMAGES, draws=0), "draws: got 0"),
        (lambda: bee.attribute(IMAGES[0], draws=1), "inputs"),
        (lambda: bee.attribute(IMAGES, 10, draws=1), r"0\.\.9"),
        (lambda: bee.attribute(IMAGES, 1, (1,), draws=1), "additional_forward_args"),
        (lambda: bee.attribute(IMAGES, draws=1, finetune=True), "call fit first"),
        (lambda: bee.fit(torch.rand(2, 16, 16)), "must give images"),
        (lambda: BEE(model, "head", families=["const"]).attribute(IMAGES, draws=1), "layer"),
        (lambda: BEE(model, "c2", metric=lambda *a: [1.0, 2.0]).attribute(IMAGES, draws=1), "one score per map"),
        (lambda: BEE(model, "c2", families=["const"], n_steps=0).attribute(IMAGES, draws=1), "n_steps"),
        (lambda: BEE(model, "c2", families=["const"], integrand="x").attribute(IMAGES, draws=1), "integrand"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    with pytest.raises(NothingToDo):
        bee.fit(IMAGES[:0])
    convolutional = nn.Sequential(nn.Conv2d(1, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(InputError, match="no linear output layer"):
        BEE(convolutional, "0").fit(IMAGES)
    BEE(convolutional, "0", context=lambda x: x.flatten(1), families=["const"]).fit(IMAGES).attribute(IMAGES, draws=1)
