"""Measures of saliency maps: figures worked by hand, parity with the package of the information curves, bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from salience.errors import InputError
from salience.features import (
    HIGHER_IS_BETTER,
    information_curves,
    perturbation_curve,
    score_maps,
)
from salience.measure import curve
from tiny import build, state_hash


class Sums(nn.Module):
    """Logits (s, 0), where s is the weighted sum of the pixels: every probability can be worked out by hand."""

    def __init__(self, weights: torch.Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)

    def forward(self, x):
        s = (x * self.weights).sum((1, 2, 3))
        return torch.stack([s, torch.zeros_like(s)], 1)


WEIGHTS = torch.tensor([[[4.0, 2.0], [1.0, -1.0]]])
IMAGE = torch.ones(1, 1, 2, 2)


def hill(images):
    rows, columns = (torch.linspace(-1, 1, side) for side in images.shape[2:])
    one = -(rows[:, None] ** 2 + (columns[None] - 0.3) ** 2)
    return one.expand(len(images), *one.shape) + 0.3 * images.mean(1)


ZERO = torch.zeros(1, dtype=torch.long)


def p(s: float) -> float:
    return 1 / (1 + np.exp(-s))


def test_areas_by_hand() -> None:
    model, maps = Sums(WEIGHTS), WEIGHTS  # the ideal map
    gone = [p(6), p(2), p(0), p(-1), p(0)]  # 4, then 2, then 1, then -1 removed
    kept = [p(6), p(7), p(6), p(4), p(0)]  # -1, then 1, then 2, then 4 removed
    areas = {"deletion": gone, "insertion": kept}
    for measure, heights in areas.items():
        expected = np.trapezoid(heights, dx=0.25)
        assert score_maps(model, IMAGE, maps, ZERO, measure, steps=4)[0] == pytest.approx(expected)
        half = np.trapezoid(heights[:3], dx=0.25) / 0.5
        assert score_maps(model, IMAGE, maps, ZERO, measure, steps=4, until=0.5)[0] == pytest.approx(half)
    # "Still predicted": s > 0 strictly, as argmax takes the first of equal logits s = 0 counts too.
    assert score_maps(model, IMAGE, maps, ZERO, "pos", steps=4)[0] == pytest.approx(np.trapezoid([1, 1, 1, 0, 1]) / 4)
    assert score_maps(model, IMAGE, maps, ZERO, "neg", steps=4)[0] == pytest.approx(1)
    fill = score_maps(model, IMAGE, maps, ZERO, "deletion", steps=4, fill=1.0)
    assert fill[0] == pytest.approx(p(6))  # a removed pixel looks like the one that was there


def test_masked_image_by_hand() -> None:
    model = Sums(WEIGHTS)
    maps = torch.tensor([[[3.0, 1.0], [2.0, 1.0]]])  # in 0..1: 1, 0, .5, 0
    masked = p(4 + 0.5)
    assert score_maps(model, IMAGE, maps, ZERO, "adp")[0] == pytest.approx((p(6) - masked) / p(6))
    assert score_maps(model, IMAGE, maps, ZERO, "pic")[0] == 0
    against = torch.tensor([[[1.0, 1.0], [1.0, 0.0]]])  # hides the pixel that speaks against the class
    assert score_maps(model, IMAGE, against, ZERO, "pic")[0] == 1
    assert score_maps(model, IMAGE, against, ZERO, "adp")[0] == 0


def test_a_probability_of_zero_does_not_drop() -> None:
    model = Sums(WEIGHTS * -1e4)
    assert score_maps(model, IMAGE, WEIGHTS, ZERO, "adp")[0] == 0


def test_flat_map_gives_a_number() -> None:
    for measure in ("insertion", "deletion", "pos", "neg", "pic", "adp"):
        assert np.isfinite(score_maps(Sums(WEIGHTS), IMAGE, torch.zeros(1, 2, 2), ZERO, measure, steps=4)).all()


def test_insertion_to_the_end_is_the_usual_insertion() -> None:
    """Pixels coming most important first are pixels going least important first, seen from the other end."""
    model, maps = build("plain"), torch.rand(5, 16, 16, generator=torch.Generator().manual_seed(0))
    images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    targets = torch.tensor([0, 1, 2, 0, 1])

    def probability(keep, rows):
        masked = images[rows] * torch.from_numpy(keep).reshape(-1, 1, 16, 16)
        with torch.no_grad():
            return model(masked).softmax(1).numpy()[np.arange(len(rows)), targets[rows].numpy()]

    order = np.argsort(-maps.flatten(1).numpy(), axis=1, kind="stable")
    usual = curve(probability, order, 16, mode="insertion")
    np.testing.assert_allclose(score_maps(model, images, maps, targets, steps=16), usual.area, atol=1e-6)
    share, followed = perturbation_curve(model, images, maps, targets, steps=16, internal_batch_size=7)
    np.testing.assert_allclose(followed, usual.scores, atol=1e-6)
    np.testing.assert_allclose(share, usual.changed)


def test_information_curves_equal_the_package_of_their_authors(monkeypatch) -> None:
    """Figures of pair-code's `saliency` 0.2.1 (compute_pic_metric) on the same pictures, maps and pixels."""
    expected = [0.47884962, 0.46448426, 0.45831639, 0.49038836]
    rng, found = np.random.default_rng(0), []
    y, x = np.mgrid[:32, :32]

    def score(images, rows):
        return torch.sigmoid((images.double().diff(dim=2).abs().mean((1, 2, 3)) - 0.03) * 40)

    for case in range(4):
        waves = [127 + 100 * np.sin(x / 3 + case + c) * np.cos(y / (4 + c)) for c in range(3)]
        picture = np.clip(np.rint(np.stack(waves, -1) + rng.normal(0, 12, (32, 32, 3))), 0, 255)
        picture[0, 0], picture[0, 1] = 0, 255
        maps = np.rint(1000 * np.exp(-((x - 10 - 2 * case) ** 2 + (y - 12) ** 2) / 60))
        maps = maps + np.arange(1024).reshape(32, 32) / 1e4
        mask = np.zeros(1024, dtype=bool)
        mask[np.random.default_rng(case + 20).choice(1024, 10, replace=False)] = True
        monkeypatch.setattr(information_curves, "_random_mask", lambda *a, m=mask: m.reshape(32, 32))
        image = torch.from_numpy(picture.transpose(2, 0, 1) / 255)[None]
        found += list(information_curves.information_scores(
            score, image, torch.from_numpy(maps)[None], generator=torch.Generator()
        ))  # fmt: skip
    np.testing.assert_allclose(found, expected, atol=2e-3)  # another WebP encoder may differ by some bytes


def test_information_curve_is_undefined_where_the_blurred_picture_says_as_much() -> None:
    noise = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    maps = hill(noise)

    def scores(value):
        return information_curves.information_scores(
            lambda images, rows: torch.full((len(images),), value), noise, maps, generator=torch.Generator()
        )

    assert np.isnan(scores(0.9)).all()  # blurred scores as high as whole
    assert np.isnan(scores(0.3)).all()  # below the least score


@pytest.mark.parametrize("measure", HIGHER_IS_BETTER)
def test_model_is_left_as_it_was_whatever_happens(measure) -> None:
    model = build("plain").train()
    before = state_hash(model)
    images = torch.rand(2, 3, 16, 16)
    score_maps(model, images, hill(images), torch.tensor([0, 1]), measure)
    assert state_hash(model) == before

    def broken(*args):
        raise RuntimeError("broken")

    model.head.forward = broken
    with pytest.raises(RuntimeError, match="broken"):
        score_maps(model, images, hill(images), torch.tensor([0, 1]), measure)
    assert state_hash(model) == before


def test_batches_change_nothing() -> None:
    model, images = build("resnet"), torch.randn(3, 3, 16, 16)
    maps, targets = hill(images), torch.tensor([0, 1, 2])
    one = score_maps(model, images, maps, targets, internal_batch_size=1)
    np.testing.assert_allclose(one, score_maps(model, images, maps, targets, internal_batch_size=64), atol=1e-6)


def test_memory_that_runs_out_halves_the_batch() -> None:
    model = build("plain")
    inner, sizes = model.forward, []

    def small(x):
        sizes.append(len(x))
        if len(x) > 5:
            raise torch.OutOfMemoryError("out of memory")
        return inner(x)

    images = torch.randn(2, 3, 16, 16)
    expected = score_maps(model, images, hill(images), torch.tensor([0, 1]))
    model.forward = small
    with pytest.warns(UserWarning, match="memory"):
        found = score_maps(model, images, hill(images), torch.tensor([0, 1]))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert max(sizes) > 5 and sizes[-1] <= 5


def test_multi_label_looks_at_the_class_alone() -> None:
    model = Sums(WEIGHTS)
    found = score_maps(model, IMAGE, WEIGHTS, ZERO + 1, "deletion", steps=4, multi_label=True)
    assert found[0] == pytest.approx(0.5)  # the second logit is always 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"measure": "insrtion"}, "nearest names: 'insertion'"),
        ({"maps": torch.full((1, 2, 2), torch.nan)}, "NaN"),
        ({"maps": torch.zeros(1, 3, 2)}, r"one of \(2, 2\)"),
        ({"targets": torch.zeros(1)}, "class index"),
        ({"targets": torch.zeros(2, dtype=torch.long)}, "class index"),
        ({"until": 0.0}, "until"),
        ({"until": 1.5}, "until"),
        ({"steps": 5}, "at most the number of units"),
        ({"fill": torch.zeros(3)}, "3 values for images of 1 channels"),
        ({"inputs": torch.ones(2, 2)}, "is needed"),
    ],
)  # fmt: skip
def test_bad_input(change, message) -> None:
    right = {"inputs": IMAGE, "maps": WEIGHTS, "targets": ZERO, "measure": "insertion", "steps": 4}
    with pytest.raises(InputError, match=message):
        score_maps(Sums(WEIGHTS), **{**right, **change})
