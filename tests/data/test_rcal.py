"""RCAL: outliers and Gaussians worked by hand, the published few-shot formula, each term of the losses, bad input."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import LocalOutlierFactor
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn
from torch.nn.functional import cross_entropy

from salience.data import (
    ClassGaussians,
    LossReweighter,
    RCALHead,
    RCALTrainer,
    calibrate_tail,
    calibrated_gaussians,
    contrastive_loss,
    flip_labels,
    label_trust,
    long_tail,
    moco_pretrain,
    robust_gaussians,
    shot_accuracy,
    strong_view,
    weak_view,
)
from salience.data.rcal.classifier import train_head
from salience.data.rcal.gaussians import local_outlier_factors, outvoted
from salience.errors import DataError, InputError


def blobs(seed: int = 0, counts: tuple[int, ...] = (60, 50, 40, 12), dim: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(len(counts)), counts)
    return 8 * np.eye(dim)[y % dim] + rng.normal(size=(len(y), dim)), y


def gaussians(mean: np.ndarray, cov: np.ndarray, count: list[int]) -> ClassGaussians:
    k, n = len(count), sum(count)
    return ClassGaussians(
        np.arange(k), mean, cov, np.array(count), np.ones(n, bool), np.ones(n), np.full(k, 0.0), np.zeros(k, bool)
    )


# Noise and long tails.


def test_class_sizes_fall_exponentially() -> None:
    y = np.repeat(np.arange(5), 200)
    rows = long_tail(y, 16, largest=160, random_state=3)
    counts = np.bincount(y[rows])
    assert sorted(counts.tolist(), reverse=True) == [160, 80, 40, 20, 10] and (np.diff(rows) > 0).all()
    orders = {tuple(np.argsort(-np.bincount(y[long_tail(y, 16, random_state=seed)]))) for seed in range(5)}
    assert len(orders) > 1  # the order of classes is drawn
    np.testing.assert_array_equal(rows, long_tail(y, 16, largest=160, random_state=3))
    assert np.bincount(y[long_tail(y, 1)]).tolist() == [200] * 5
    uneven = np.repeat([0, 1], [30, 300])
    assert all(len(long_tail(uneven, 10, random_state=seed)) in (33, 330) for seed in range(4))


@pytest.mark.parametrize("kind", ["joint", "class-prior", "symmetric", "asymmetric"])
def test_flips_have_the_probabilities_that_are_told(kind: str) -> None:
    counts = np.array([60_000, 30_000, 10_000])
    y, eta = np.repeat([0, 1, 2], counts), 0.4
    noisy = flip_labels(y, eta, kind=kind, random_state=0)
    found = np.array([np.bincount(noisy[y == k], minlength=3) / counts[k] for k in range(3)])
    n = counts.sum()
    expected = {
        "joint": [[0.6, 0.4 * 3 / 4, 0.4 * 1 / 4], [0.4 * 6 / 7, 0.6, 0.4 * 1 / 7], [0.4 * 6 / 9, 0.4 * 3 / 9, 0.6]],
        "class-prior": eta * counts / n + (1 - eta) * np.eye(3),
        "symmetric": [[0.6, 0.2, 0.2], [0.2, 0.6, 0.2], [0.2, 0.2, 0.6]],
        "asymmetric": [[0.6, 0.4, 0], [0, 0.6, 0.4], [0.4, 0, 0.6]],
    }[kind]
    np.testing.assert_allclose(found, expected, atol=0.02)
    np.testing.assert_array_equal(noisy, flip_labels(y, eta, kind=kind, random_state=0))
    np.testing.assert_array_equal(flip_labels(y, 0, kind=kind), y)
    names = flip_labels(np.array(["b", "a", "a"]), 0.9, kind=kind)
    assert set(names) <= {"a", "b"}


def test_accuracy_by_class_size() -> None:
    training = np.repeat(["big", "mid", "rare"], [101, 20, 19])
    targets = np.array(["big", "big", "mid", "mid", "rare", "new"])
    predicted = np.array(["big", "mid", "mid", "mid", "big", "new"])
    found = shot_accuracy(targets, predicted, training)
    assert found == pytest.approx((4 / 6, 0.5, 1.0, 0.5))
    assert math.isnan(shot_accuracy(targets[:1], predicted[:1], training).few)


# Gaussians without outliers.


def test_outliers_of_each_class_are_dropped_and_the_rest_gives_mean_and_covariance() -> None:
    z, y = blobs()
    z[[0, 1, 2]] = z[[60, 61, 62]] + 0.1  # labelled 0, among class 1: inside all rows, outside their class
    g = robust_gaussians(z, y, contamination=3 / 60, shrink=0.0)
    assert np.flatnonzero(~g.inlier[:60]).tolist() == [0, 1, 2]
    for k in range(4):
        kept = z[(y == k) & g.inlier]
        np.testing.assert_allclose(g.mean[k], kept.mean(axis=0))
        np.testing.assert_allclose(g.cov[k], np.cov(kept.T))
    assert g.count.tolist() == [60, 50, 40, 12] and g.classes.tolist() == [0, 1, 2, 3]
    shrunk = robust_gaussians(z, y, contamination=3 / 60, shrink=0.1)
    np.testing.assert_allclose(shrunk.cov[3], g.cov[3] + 0.1 * np.trace(g.cov[3]) / 4 * np.eye(4))
    wolf = robust_gaussians(z, y, contamination=3 / 60, shrink="ledoit-wolf")
    assert np.linalg.cond(wolf.cov[3]) < np.linalg.cond(g.cov[3])


def test_lof_by_hand_and_as_scikit_learn_has_it() -> None:
    """Points 0, 1, 2, 10 with one neighbour: lrd 1, 1, 1 and 1/8; the last has LOF 8."""
    found = local_outlier_factors(np.array([[0.0], [1.0], [2.0], [10.0]]), 1)
    np.testing.assert_allclose(found, [1, 1, 1, 8], rtol=1e-8)
    z = blobs()[0]
    expected = -LocalOutlierFactor(n_neighbors=20).fit(z).negative_outlier_factor_
    np.testing.assert_allclose(local_outlier_factors(z, 20), expected)
    same = local_outlier_factors(np.repeat(z[:60], 30, axis=0), 20)  # 30 equal rows: an infinite density each
    np.testing.assert_allclose(same, np.repeat(local_outlier_factors(z[:60], 20), 30))
    assert local_outlier_factors(np.zeros((9, 2)), 20).tolist() == [1.0] * 9


def test_the_rate_of_wrong_labels_is_estimated_class_by_class() -> None:
    z, y = blobs(counts=(200, 150, 100, 40))
    noisy = flip_labels(y, 0.3, random_state=0)
    true = np.array([(y[noisy == k] != k).mean() for k in range(4)])
    rates = outvoted(z, noisy, 20)
    np.testing.assert_allclose(rates, true, atol=0.01)  # classes lie far apart: neighbours know
    g = robust_gaussians(z, noisy)
    np.testing.assert_allclose(g.contamination, np.minimum(rates, 0.5))
    assert (y == noisy)[g.inlier].mean() > (y == noisy).mean() + 0.1
    auto = robust_gaussians(z, noisy, contamination="auto")
    assert np.isnan(auto.contamination).all()
    np.testing.assert_array_equal(auto.inlier, auto.lof <= 1.5)
    assert robust_gaussians(z, noisy, contamination=0.0).inlier.all()


def test_label_trust_names_the_suspects_and_feeds_a_loss() -> None:
    z, y = blobs()
    z[[3, 7]] = z[[70, 150]]
    trust = label_trust(z, y, ids=[f"row {i}" for i in range(len(y))])
    assert set(trust.ids[trust.values.argsort()][:2]) == {"row 3", "row 7"} and trust.unit == "sample"
    lof = robust_gaussians(z, y).lof
    np.testing.assert_allclose(trust.weights(), len(y) * (1 / lof) / (1 / lof).sum())
    weights = LossReweighter("uniform", burn_in=0, scores=trust).coefficients(torch.ones(2), ids=["row 0", "row 3"])
    assert weights[0] > 2 * weights[1]
    assert len(label_trust(z, y).combine(label_trust(z, y, neighbors=5))) == len(y)


# Calibration of the tail.


def test_tail_classes_borrow_from_the_nearest_heads_by_hand() -> None:
    """Heads 0 to 2 at 1, -2 and 9; class 3 at 0 has the two nearest: weights 40/1 to 20/4, that is 8/9 and 1/9."""
    mean = np.array([[1.0], [-2.0], [9.0], [0.0]])
    g = gaussians(mean, np.array([1.0, 4.0, 100.0, 2.0]).reshape(4, 1, 1), [40, 20, 30, 5])
    found = calibrate_tail(g, head=[0, 1, 2], q=2, gamma=0.25, alpha=0.5, mean=True)
    assert found.mean[3, 0] == pytest.approx(0.25 * (8 / 9 * 1 + 1 / 9 * -2))
    assert found.cov[3, 0, 0] == pytest.approx(0.25 * (8 / 9 * 1 + 1 / 9 * 4) + 0.75 * 2 + 0.5)
    np.testing.assert_array_equal(found.mean[:3], g.mean[:3])
    np.testing.assert_array_equal(found.cov[:3], g.cov[:3])
    assert found.tail.tolist() == [False, False, False, True]
    default = calibrate_tail(g, q=2)
    assert default.tail.tolist() == [False, True, False, True]  # heads are as large as the median class
    np.testing.assert_array_equal(default.mean, g.mean)  # the covariance alone is borrowed by default
    assert not np.array_equal(default.cov[1], g.cov[1])
    every = calibrate_tail(g, head=[0], q=3)  # fewer heads than q
    assert every.cov[3, 0, 0] == pytest.approx(0.5 * 1 + 0.5 * 2)
    same = calibrate_tail(replace(g, mean=np.zeros((4, 1))), head=[0, 1], q=2)  # heads at the very place
    assert same.cov[3, 0, 0] == pytest.approx(0.5 * (40 * 1 + 20 * 4) / 60 + 0.5 * 2)


def test_balanced_classes_have_no_tail() -> None:
    g = gaussians(np.arange(3.0)[:, None], np.ones((3, 1, 1)), [7, 7, 7])
    found = calibrate_tail(g, alpha=1.0, mean=True)
    assert not found.tail.any()
    np.testing.assert_array_equal(found.cov, g.cov)


@pytest.mark.parametrize("seed", range(5))
def test_it_holds_the_published_few_shot_calibration(seed: int) -> None:
    """Means of the 2 nearest base classes and the query averaged alike; their covariances averaged, plus 0.21."""
    rng = np.random.default_rng(seed)
    means, factors = rng.normal(size=(9, 6)), rng.normal(size=(9, 6, 6))
    covs = factors @ factors.transpose(0, 2, 1)
    g = gaussians(means, covs, [50, 20, 30, 40, 60, 25, 35, 45, 5])
    near = np.argsort([math.dist(means[8], base) for base in means[:8]])[:2]
    mean = (means[near[0]] + means[near[1]] + means[8]) / 3
    cov = (covs[near[0]] + covs[near[1]]) / 2 + 0.21
    ours = calibrate_tail(g, head=range(8), q=2, gamma=2 / 3, weighting="equal", mean=True, cov=False)
    np.testing.assert_allclose(ours.mean[8], mean, rtol=1e-12)
    ours = calibrate_tail(g, head=range(8), q=2, gamma=1.0, alpha=0.21, weighting="equal")
    np.testing.assert_allclose(ours.cov[8], cov, rtol=1e-12)


def test_samples_balance_the_classes_and_have_the_moments() -> None:
    g = gaussians(np.array([[0.0, 5.0], [1.0, 1.0]]), np.array([[[2.0, 1.0], [1.0, 1.0]], np.eye(2)]), [30, 10])
    points, labels = g.sample()
    assert points.shape == (80, 2) and np.bincount(labels).tolist() == [30, 50]  # 60 in all of either class
    points, labels = g.sample(20_000, random_state=1)
    assert np.bincount(labels).tolist() == [20_000, 20_000]
    for k in (0, 1):
        np.testing.assert_allclose(points[labels == k].mean(axis=0), g.mean[k], atol=0.05)
        np.testing.assert_allclose(np.cov(points[labels == k].T), g.cov[k], atol=0.06)
    np.testing.assert_array_equal(points, g.sample(20_000, random_state=1)[0])
    odd = replace(g, cov=np.array([np.diag([1.0, -4.0]), np.eye(2)]))  # no covariance
    points, labels = odd.sample(100)
    assert np.ptp(points[labels == 0], axis=0)[1] < 1e-12 and np.isfinite(points).all()


# The classifiers.


@parametrize_with_checks([RCALHead()])
def test_the_contract_of_scikit_learn(estimator, check) -> None:
    check(estimator)


def test_the_head_is_trained_on_mixed_rows_and_samples() -> None:
    z, y = blobs()
    noisy = flip_labels(y, 0.4, random_state=1)
    head = RCALHead(contamination=0.4, random_state=0).fit(z, noisy)
    expected = calibrate_tail(robust_gaussians(z, noisy, contamination=0.4))
    np.testing.assert_array_equal(head.gaussians_.cov, expected.cov)
    assert (head.predict(z) == y).mean() > 0.95 and head.predict_proba(z).shape == (162, 4)
    # Points of class 3 alone, where class 0 is: the head must follow them there.
    moved = replace(expected, mean=expected.mean[[3, 1, 2, 0]])
    assert (train_head(z, noisy, moved, np.random.default_rng(0), per_class=2000).predict(z[y == 0]) == 3).mean() > 0.9
    named = RCALHead(contamination=0.4).fit(z, np.array(list("abcd"))[noisy])
    assert set(named.predict(z)) <= set("abcd")


def test_mixup_without_mixing_is_plain_cross_entropy_on_rows_and_samples() -> None:
    from sklearn.linear_model import LogisticRegression

    z, y = blobs()
    g = robust_gaussians(z, y, contamination=0.1)
    found = train_head(z, y, g, np.random.default_rng(5), mixup=0.0)
    points, labels = g.sample(random_state=np.random.default_rng(5))
    plain = LogisticRegression(max_iter=1000).fit(np.concatenate([z, points]), np.concatenate([y, labels]))
    np.testing.assert_allclose(found.coef_, plain.coef_, atol=2e-3)


def test_contrastive_loss_by_hand() -> None:
    query, key = torch.eye(3)[:2], torch.tensor([[0.6, 0.8, 0.0], [0.0, 1.0, 0.0]])
    queue = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    e = math.exp
    first = -math.log(e(0.6 / 0.5) / (e(0.6 / 0.5) + e(0) + e(1 / 0.5)))
    second = -math.log(e(1 / 0.5) / (e(1 / 0.5) + 2 * e(0)))
    assert float(contrastive_loss(query, key, queue, 0.5)) == pytest.approx((first + second) / 2, rel=1e-6)
    ignore = torch.tensor([[False, True], [False, False]])
    first = -math.log(e(0.6 / 0.5) / (e(0.6 / 0.5) + e(0)))
    assert float(contrastive_loss(query, key, queue, 0.5, ignore)) == pytest.approx((first + second) / 2, rel=1e-6)
    key.requires_grad_()
    query.requires_grad_()
    contrastive_loss(query, key, queue).backward()
    assert key.grad is None and query.grad is not None


def encoder(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        )


def digits(rows: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    data = load_digits(n_class=4)
    return torch.tensor(data.images[:rows, None] / 16).float(), torch.tensor(data.target[:rows])


VIEW = partial(strong_view, flip=False, smallest=0.6)
WEAK = partial(weak_view, flip=False)


def test_pretraining_pulls_views_of_an_image_together() -> None:
    x, _ = digits()
    start = encoder()
    before = {name: value.clone() for name, value in start.state_dict().items()}

    def pretrained(seed: int, epochs: int = 15) -> nn.Module:
        return moco_pretrain(start, x, epochs=epochs, dim=16, queue=64, momentum=0.9, lr=0.1, batch_size=50, view=VIEW,
                             generator=torch.Generator().manual_seed(seed))  # fmt: skip

    state = torch.random.get_rng_state()
    trained = pretrained(0)
    assert torch.equal(state, torch.random.get_rng_state()) and not trained.training
    for name, value in start.state_dict().items():
        assert torch.equal(value, before[name]), "the given encoder was trained"
    for one, two in zip(trained.parameters(), pretrained(0).parameters(), strict=True):
        assert torch.equal(one, two)
    assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), pretrained(1).parameters(), strict=True))

    def contrast(model: nn.Module) -> float:
        with torch.no_grad():
            one, two = (nn.functional.normalize(model(VIEW(x, torch.Generator().manual_seed(s)))) for s in (1, 2))
        one, two = one - one.mean(0), two - two.mean(0)
        return float((one * two).sum() / (one.norm() * two.norm()))

    started = encoder().train()
    with torch.no_grad():
        started(x)
    assert contrast(trained) > contrast(started.eval()) + 0.05


def test_views() -> None:
    x = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for view in (strong_view, weak_view):
        one, again, other = (view(x, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
        assert one.shape == x.shape and torch.equal(one, again) and not torch.equal(one, other)
    left = torch.zeros(400, 1, 8, 8)
    left[..., :3] = 1.0
    shifted = weak_view(left, torch.Generator().manual_seed(0), flip=False)
    assert set(shifted[:, 0, 0].sum(1).tolist()) == {2.0, 3.0, 4.0} and bool((shifted[..., 0] == 1).all())
    mirrored = weak_view(left, torch.Generator().manual_seed(0), shift=0.0)
    assert 0.4 < float((mirrored[:, 0, 0, 0] == 0).float().mean()) < 0.6
    crops = strong_view(left, torch.Generator().manual_seed(0), flip=False, jitter=0.0)
    assert bool((crops.diff(dim=3) <= 1e-6).all())  # nothing is mirrored: bright stays left
    flat = strong_view(torch.full((4, 1, 8, 8), 0.5), torch.Generator().manual_seed(0))
    torch.testing.assert_close(flat, torch.full_like(flat, 0.5))


def trainer(**options) -> RCALTrainer:
    settings = {"beta": 0.1, "epochs": 3, "batch_size": 50, "view": WEAK, "random_state": 0,
                "calibrate": partial(calibrated_gaussians, contamination=0.3)}  # fmt: skip
    return RCALTrainer(encoder(), 4, **{**settings, **options})


def test_the_trainers_gaussians_are_those_of_the_start_and_anchors_hold() -> None:
    x, y = digits()
    noisy = torch.from_numpy(flip_labels(y.numpy(), 0.3, random_state=0))
    start = encoder().eval()
    with torch.no_grad():
        z = start(x)
    found = trainer().fit(x, noisy)
    expected = calibrated_gaussians(z.double().numpy(), noisy.numpy(), contamination=0.3)
    np.testing.assert_allclose(found.gaussians_.mean, expected.mean, rtol=1e-5)
    for one, two in zip(found.encoder.parameters(), encoder().parameters(), strict=True):
        assert torch.equal(one, two), "the given encoder was trained"
    again = trainer().fit(x, noisy)
    assert torch.equal(found.logits(x), again.logits(x)) and found.history_ == again.history_
    assert not torch.equal(found.logits(x), trainer(random_state=1).fit(x, noisy).logits(x))

    def moved(beta: float) -> float:
        fitted = trainer(beta=beta, epochs=10).fit(x, noisy)
        assert set(fitted.history_[-1]) == {"mix", "sampled", "ind"}
        return float((fitted.represent(x) - z).square().sum(1).mean())

    assert moved(1.0) < 0.7 * moved(0.0)


class Doubled(nn.Module):
    """f(x) = 2 x, exactly, with a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x.flatten(1)


def test_one_step_by_hand() -> None:
    """All rows in one batch, no mixing: the gradient of L_mix + L_sampled + beta L_ind moves every weight."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(40, 1, 1, 3))).float()
    y = torch.arange(40) % 2
    asked = []

    class Fixed(ClassGaussians):
        def sample(self, per_class=None, *, random_state=0):
            asked.append(1)
            return np.ones((1, 3)), np.ones(1, dtype=np.int64)  # one point, of class 1

    def calibrate(z, labels):
        return Fixed(**vars(robust_gaussians(z, labels, contamination=0.0)))

    def shifted(images, generator):
        return images + 0.5

    model = RCALTrainer(Doubled(), 2, beta=0.3, mixup=0.0, epochs=1, batch_size=40, lr=0.1, weight_decay=0.0,
                        view=shifted, calibrate=calibrate)  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        head = nn.Linear(3, 2)
    weight = torch.tensor(2.0, requires_grad=True)
    z, views = 2 * x.flatten(1), x.flatten(1) + 0.5
    loss = (
        cross_entropy(head(weight * views), y)
        + cross_entropy(head(torch.ones(40, 3)), torch.ones(40, dtype=torch.int64))
        + 0.3 * (weight * views - z).square().sum(1).mean()
    )
    loss.backward()
    model.fit(x, y)
    assert len(asked) == 1
    torch.testing.assert_close(model.encoder_.weight.detach(), weight.detach() - 0.1 * weight.grad)
    torch.testing.assert_close(model.head_.weight.detach(), head.weight.detach() - 0.1 * head.weight.grad)
    assert sum(model.history_[0][term] * by for term, by in (("mix", 1), ("sampled", 1), ("ind", 0.3))) == (
        pytest.approx(float(loss.detach()), rel=1e-5)
    )
    asked.clear()
    RCALTrainer(Doubled(), 2, epochs=5, resample_every=2, calibrate=calibrate, view=shifted).fit(x, y)
    assert len(asked) == 3


def test_sampled_points_train_the_head_alone() -> None:
    x, y = digits(100)

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.rows = encoder(), 0

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.rows += len(images) if self.training else 0
            return self.inner(images)

    model = RCALTrainer(Counted(), 4, epochs=2, batch_size=50, view=WEAK).fit(x, y)
    assert model.encoder_.rows == 2 * 2 * 100  # per epoch, each image once mixed and once for its anchor


# Bad input.


def test_classes_that_keep_too_little_borrow_and_say_so() -> None:
    z, y = blobs(counts=(60, 50, 1))
    with pytest.warns(UserWarning, match=r"classes \[2\] keep fewer than two different rows"):
        g = robust_gaussians(z, y, contamination=0.2)
    np.testing.assert_array_equal(g.mean[2], z[-1])
    np.testing.assert_allclose(g.cov[2], (60 * g.cov[0] + 50 * g.cov[1]) / 110)
    z[60:110] = z[60]  # nothing but copies
    with pytest.warns(UserWarning, match=r"classes \[1, 2\]"):
        g = robust_gaussians(z, y)
    assert np.isfinite(g.cov).all() and np.isfinite(g.lof).all()
    with pytest.raises(DataError, match="no class has two different rows"):
        robust_gaussians([[0.0], [1.0]], [0, 1])


def test_a_class_whose_inliers_are_all_equal_has_the_mean_of_all_its_rows() -> None:
    z = np.array([0.0] * 5 + [3.0, 7.0, 12.0] + [50.0, 51.0, 53.0, 54.0, 58.0])[:, None]
    with pytest.warns(UserWarning, match=r"classes \['a'\]"):
        g = robust_gaussians(z, list("aaaaaaaabbbbb"), contamination=0.4)
    assert g.inlier[:8].tolist() == [True] * 5 + [False] * 3
    assert g.mean[0] == 22 / 8
    np.testing.assert_allclose(g.cov[0], g.cov[1])


def test_no_class_loses_all_its_rows() -> None:
    z = np.random.default_rng(0).standard_cauchy((300, 3))  # outliers wherever one looks
    for contamination in ("auto", "estimate", 0.5):
        g = robust_gaussians(z, np.arange(300) % 60, contamination=contamination)
        assert all(g.inlier[k::60].any() for k in range(60)) and np.isfinite(g.cov).all()


def test_half_of_a_class_stays_at_the_highest_rate() -> None:
    z, y = blobs()
    g = robust_gaussians(z, y, contamination=0.5)
    assert all(g.inlier[y == k].sum() >= (y == k).sum() / 2 for k in range(4))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"contamination": 0.6}, "contamination: got 0.6; a share in \\[0, 0.5\\]"),
        ({"contamination": "most"}, "contamination: got 'most'"),
        ({"contamination": math.nan}, "contamination: got nan"),
        ({"neighbors": 0}, "neighbors: got 0"),
        ({"shrink": -1.0}, "shrink: got -1.0"),
        ({"shrink": "oas"}, "shrink: got 'oas'"),
    ],
)
def test_bad_parameters_of_the_gaussians(options: dict, told: str) -> None:
    with pytest.raises(InputError, match=told):
        robust_gaussians(*blobs(), **options)


def test_bad_rows() -> None:
    z, y = blobs()
    bad = z.copy()
    bad[[5, 9], 0] = math.nan, math.inf
    for call in (robust_gaussians, label_trust):
        with pytest.raises(DataError, match=r"row 5 is not finite \(2 such rows of 162\)"):
            call(bad, y)
        with pytest.raises(DataError, match="one class, 0; at least two"):
            call(z, np.zeros(len(z), dtype=int))
        with pytest.raises(InputError, match=r"y: shape \(3,\); one label for each of 162"):
            call(z, y[:3])
        with pytest.raises(InputError, match=r"z: shape \(162,\)"):
            call(z[:, 0], y)
    with pytest.raises(DataError, match="z must be numbers"):
        robust_gaussians([["a"]], [0])
    with pytest.raises(DataError, match="NaN"):
        RCALHead().fit(bad, y)
    for options in ({"mixup": -1.0}, {"C": 0.0}, {"q": 0}, {"per_class": 0}, {"contamination": 0.7}):
        with pytest.raises(InputError, match=next(iter(options))):
            RCALHead(**options).fit(z, y)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"q": 0}, "q: got 0"),
        ({"gamma": 1.5}, "gamma: got 1.5"),
        ({"alpha": -0.1}, "alpha: got -0.1"),
        ({"weighting": "size"}, "weighting: got 'size'"),
        ({"head": [7]}, r"head: got \[7\]; at least one of the classes \[0, 1, 2\]"),
        ({"head": []}, r"head: got \[\]"),
    ],
)
def test_bad_calibration(options: dict, told: str) -> None:
    g = gaussians(np.arange(3.0)[:, None], np.ones((3, 1, 1)), [7, 5, 3])
    with pytest.raises(InputError, match=told):
        calibrate_tail(g, **options)
    with pytest.raises(InputError, match="cov: of class 0"):
        replace(g, cov=np.full((3, 1, 1), np.nan)).sample()


def test_bad_noise() -> None:
    y = np.repeat([0, 1], 10)
    with pytest.raises(InputError, match=r"rho: got 0\.5"):
        long_tail(y, 0.5)
    with pytest.raises(InputError, match="largest: got 11; the classes have rows for 1 to 10"):
        long_tail(y, 1, largest=11)
    with pytest.raises(InputError, match=r"eta: got 1\.0"):
        flip_labels(y, 1.0)
    with pytest.raises(InputError, match="kind: got 'pair'"):
        flip_labels(y, 0.1, kind="pair")
    for call in (lambda labels: flip_labels(labels, 0.1), lambda labels: long_tail(labels, 2)):
        with pytest.raises(DataError, match="1 class in 4 rows"):
            call(np.zeros(4))
        with pytest.raises(InputError, match=r"y: shape \(2, 2\)"):
            call(np.zeros((2, 2)))
    with pytest.raises(InputError, match="predicted: shape"):
        shot_accuracy([0, 1], [0], y)
    with pytest.raises(InputError, match="few: got 30"):
        shot_accuracy([0], [0], y, few=30, many=20)


def test_bad_pretraining() -> None:
    x, _ = digits(60)
    generator = torch.Generator().manual_seed(0)
    for options, told in (
        ({"batch_size": 60}, "no more than a batch of 60"),
        ({"epochs": 0}, "epochs, dim, queue"),
        ({"momentum": 1.0}, "momentum, temperature"),
        ({"temperature": 0.0}, "momentum, temperature"),
    ):
        with pytest.raises(InputError, match=told):
            moco_pretrain(encoder(), x, **{"epochs": 1, "batch_size": 20, "generator": generator, **options})
    with pytest.raises(InputError, match=r"encoder: gives shape \(2, 8, 4, 4\)"):
        moco_pretrain(encoder()[:3], x, epochs=1, batch_size=20, generator=generator)
    with pytest.raises(DataError, match="contrastive loss is nan"):
        moco_pretrain(encoder(), x * math.nan, epochs=1, batch_size=20, generator=generator)
    for view in (strong_view, weak_view):
        with pytest.raises(InputError, match=r"x: torch.float32 of shape \(60, 8, 8\)"):
            view(x[:, 0], generator)
    with pytest.raises(InputError, match="smallest, jitter"):
        strong_view(x, generator, smallest=0.0)


def test_bad_training() -> None:
    x, y = digits(100)
    for options, told in (
        ({"beta": -1.0}, "beta: got -1.0"), ({"mixup": math.nan}, "mixup: got nan"), ({"epochs": 0}, "epochs"),
        ({"resample_every": 0}, "resample_every"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=told):
            trainer(**options)
    with pytest.raises(InputError, match="call fit first"):
        trainer().predict(x)
    with pytest.raises(InputError, match="one whole number for each of 100 rows"):
        trainer().fit(x, y[:4])
    with pytest.raises(DataError, match="labels 0 to 5; with n_classes=4 they are 0 to 3"):
        trainer().fit(x, torch.where(y == 3, 5, y))
    with pytest.raises(DataError, match=r"classes \[3\] have no rows"):
        trainer().fit(x, torch.where(y == 3, 0, y))
    with pytest.raises(DataError, match="not finite"):
        trainer(lr=1e9).fit(x, y)
