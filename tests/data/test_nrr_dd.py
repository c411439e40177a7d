"""NRR-DD: maps, patches, refinement, views, labels and the set on disk, by hand and against what they build on."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from captum.attr import LayerGradCam
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, log_softmax

from salience.data import (
    NRRDD,
    DBRLabels,
    DistilledSet,
    HardLabels,
    SoftLabels,
    Views,
    bn_distance,
    class_activation_map,
    dbr_loss,
    discover_patches,
    refine_noncritical,
    train_student,
)
from salience.data.nrr_dd.activation import last_map
from salience.data.nrr_dd.discovery import choose, confidence, crop, mosaic
from salience.data.nrr_dd.distilled import on_grid
from salience.data.nrr_dd.views import draw_seeds
from salience.errors import DataError, InputError
from salience.features import GradCAM
from salience.model import read_images
from tiny import build

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Net(nn.Module):
    """Convolutions with batch normalisation, global average, linear head."""

    def __init__(self, classes: int = 3, norm: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AvgPool2d(2)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.relu2 = nn.ReLU(inplace=True)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.norm(self.conv(x))))
        x = self.relu2(self.norm2(self.conv2(x)))
        return self.head(self.average(x).flatten(1))


def scenes(n: int = 60, seed: int = 0, size: int = 8, strength: float = 0.7) -> tuple[Tensor, Tensor]:
    """Noise with a patch in the colour of the class; normalised."""
    g = generator(seed)
    y = torch.arange(n) % 3
    raw = 0.2 * torch.rand(n, 3, size, size, generator=g)
    at = torch.randint(size - 3, (n, 2), generator=g)
    for i, (row, column) in enumerate(at.tolist()):
        raw[i, y[i], row : row + 3, column : column + 3] += strength
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return (raw - mean) / std, y


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    model, (x, y) = Net(), scenes(90)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    model.eval()
    assert float((model(x).argmax(1) == y).float().mean()) > 0.9
    return model


def distiller(teacher: nn.Module, ipc: int = 2, **options) -> NRRDD:
    return NRRDD(teacher, ipc, **{"mean": MEAN, "std": STD, "steps": 20, "views": 4, **options})


# Stage 1


def test_the_map_is_the_head_times_the_features_and_gradcam(teacher: nn.Module) -> None:
    x, y = scenes(6)
    assert last_map(teacher, x[:1]) == "relu2"
    features = teacher.relu2(teacher.norm2(teacher.conv2(teacher.pool(teacher.relu(teacher.norm(teacher.conv(x)))))))
    cam = torch.einsum("bc,bchw->bhw", teacher.head.weight[y], features)[:, None].detach()
    low, high = cam.amin((2, 3), keepdim=True), cam.amax((2, 3), keepdim=True)
    expected = interpolate((cam - low) / (high - low), size=(8, 8), mode="bilinear")
    found = class_activation_map(teacher, x, y)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    captum = LayerGradCam(teacher, teacher.relu2).attribute(x, target=y, relu_attributions=False)
    ours = GradCAM(teacher, "relu2", relu=False, upsample=False).attribute(x, target=y)
    for other in (captum.detach(), ours):
        torch.testing.assert_close(_scaled(other), _scaled(cam), atol=1e-5, rtol=1e-4)


def _scaled(maps: Tensor) -> Tensor:
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    return (maps - low) / (high - low)


def test_a_constant_map_has_nothing_critical_and_another_layer_can_be_named(teacher: nn.Module) -> None:
    x, y = scenes(3)
    flat = copy.deepcopy(teacher)
    nn.init.zeros_(flat.head.weight)
    assert not class_activation_map(flat, x, y).any()
    assert class_activation_map(teacher, x, y, "conv").shape == (3, 1, 8, 8)
    resnet = build("resnet")
    assert last_map(resnet, torch.zeros(1, 3, 16, 16)).startswith("resnet.encoder.stages")
    maps = class_activation_map(resnet, torch.rand(2, 3, 16, 16), torch.tensor([0, 1]))
    assert maps.shape == (2, 1, 16, 16) and float(maps.min()) >= 0 and float(maps.max()) <= 1
    with pytest.raises(InputError, match="no layer that gives a map"):
        last_map(nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), torch.zeros(1, 3, 4, 4))


LOGS = torch.tensor([[-3.0, -1.0, -2.0], [-0.5, -0.1, -4.0], [-6.0, -0.2, -0.3]])
RATIO = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [2.0, 3.0, 1.0]])
RIGHT = torch.ones(3, 3, dtype=torch.bool)


def test_low_confidence_is_sought_among_high_maps_alone() -> None:
    # The best crop by ratio of each image is 2, 0, 1 with -2, -0.5, -0.2: the least sure image comes first.
    assert choose(LOGS, RIGHT, RATIO, 3, top=1).tolist() == [[0, 2], [1, 0], [2, 1]]
    # Of the best two the less sure one: -2 (2), -0.5 (0), -6 (0).
    assert choose(LOGS, RIGHT, RATIO, 3, top=2).tolist() == [[2, 0], [0, 2], [1, 0]]
    assert choose(LOGS, RIGHT, RATIO, 2, top=3).tolist() == [[2, 0], [1, 2]]
    wrong = RIGHT.clone()
    wrong[2, 0] = False
    assert choose(LOGS, wrong, RATIO, 3, drop_wrong=True).tolist() == [[1, 2], [0, 0], [2, 2]]
    with pytest.warns(UserWarning, match="3 images of a class for 5 patches"):
        assert choose(LOGS, RIGHT, RATIO, 5, top=1)[:, 0].tolist() == [0, 1, 2, 0, 1]


def test_without_maps_and_from_the_top_it_is_the_selector_of_rded() -> None:
    logs = -torch.rand(40, 5, generator=generator())
    losses = (-logs).numpy().T  # RDED: (crops, images), the least loss of each image, then the least of all
    best = losses.argmin(0)
    order = losses[best, np.arange(40)].argsort()[:7]
    found = choose(logs, torch.ones(40, 5, dtype=torch.bool), torch.ones(40, 5), 7, top=None, order="high")
    assert found.tolist() == [[int(i), int(best[i])] for i in order]


def test_patches_are_scored_with_zeros_around_them(teacher: nn.Module) -> None:
    x, y = scenes(4)
    patches = x[:, None, :, 2:6, 2:6].contiguous()
    padded = torch.zeros_like(x)
    padded[:, :, 2:6, 2:6] = x[:, :, 2:6, 2:6]
    logs, right = confidence(teacher, patches, y, (8, 8))
    logits = teacher(padded).detach()
    torch.testing.assert_close(logs[:, 0], log_softmax(logits, 1)[range(4), y])
    assert right[:, 0].tolist() == (logits.argmax(1) == y).tolist()


def test_mosaics_take_every_ipc_th_patch_and_fill_sizes_that_do_not_divide() -> None:
    patches = torch.arange(8.0)[:, None, None, None].expand(8, 1, 2, 2)
    made = mosaic(patches, 2, 2, (4, 4))
    assert made[0, 0].tolist() == [[0, 0, 2, 2], [0, 0, 2, 2], [4, 4, 6, 6], [4, 4, 6, 6]]
    odd = mosaic(patches, 2, 2, (5, 5))[1, 0]
    assert odd[0].tolist() == [1, 1, 1, 3, 3] and odd[:, 0].tolist() == [1, 1, 1, 5, 5]


def test_crops_gather_where_the_map_is_high() -> None:
    x = torch.rand(50, 3, 16, 16, generator=generator())
    cam = torch.zeros(50, 1, 16, 16)
    cam[:, :, 10:14, 2:6] = 1
    whole, ratio = crop(x, cam, 2, (1.0, 1.0), 1, generator())
    assert torch.equal(whole[:, 0], x) and torch.equal(ratio, torch.ones(50, 2))
    near = crop(x, cam, 5, (0.1, 0.2), 2, generator())
    far = crop(x, None, 5, (0.1, 0.2), 2, generator())
    assert near[0].shape == (50, 5, 3, 8, 8) and torch.equal(far[1], torch.ones(50, 5))
    assert float(near[1].min()) > 1  # each crop sees more of the map than the image does on average
    again = crop(x, cam, 5, (0.1, 0.2), 2, generator())
    assert torch.equal(near[0], again[0]) and torch.equal(near[1], again[1])


def test_discovery_gives_the_classes_in_turn_from_real_images(teacher: nn.Module) -> None:
    x, y = scenes(30)
    made, classes = discover_patches(teacher, x, y, 4, generator=generator())
    assert classes.tolist() == [0, 1, 2] * 4
    for image, label in zip(made, classes.tolist(), strict=True):
        assert any(torch.equal(image, own) for own in x[y == label])
    # From the other end come other images; the least sure ones are less sure.
    high, _ = discover_patches(teacher, x, y, 4, order="high", generator=generator())
    with torch.no_grad():
        assert cross_entropy(teacher(made), classes) > cross_entropy(teacher(high), classes)


# Stage 2


def test_critical_pixels_keep_their_bits_and_the_rest_learns_the_class(teacher: nn.Module) -> None:
    x, y = scenes(12, seed=3, strength=0.15)  # faint, so that there is something to learn
    weights = {name: value.clone() for name, value in teacher.state_dict().items()}
    teacher.train()
    teacher.conv.weight.requires_grad_(False)
    refined = refine_noncritical(teacher, x, y, steps=40, alpha_bn=0.05)
    assert teacher.training and not teacher.conv.weight.requires_grad and teacher.head.weight.requires_grad
    teacher.eval().requires_grad_(True)
    assert all(torch.equal(value, weights[name]) for name, value in teacher.state_dict().items())
    critical = (class_activation_map(teacher, x, y) >= 0.6).expand_as(x)
    assert 0.1 < float(critical.float().mean()) < 0.9
    assert torch.equal(refined[critical], x[critical]) and not torch.equal(refined, x)
    with torch.no_grad():
        assert cross_entropy(teacher(refined), y) < 0.2 * cross_entropy(teacher(x), y)
        assert bn_distance(teacher, refined) <= bn_distance(teacher, x)
        # Without the statistics the class is reached as well, by pixels that real images do not have.
        bare = refine_noncritical(teacher, x, y, steps=40, alpha_bn=0.0)
        assert bn_distance(teacher, bare) > bn_distance(teacher, refined)


def test_one_step_is_the_mask_times_adam(teacher: nn.Module) -> None:
    x, y = scenes(6, seed=1)
    mask = (0.6 - class_activation_map(teacher, x, y)).clamp(min=0)
    image = x.clone().requires_grad_()
    (cross_entropy(teacher(image), y) + 0.05 * bn_distance(teacher, image)).backward()
    moved = x - 0.1 * mask * image.grad.sign()  # Adam's first step is lr whatever the size of the gradient
    clear = image.grad.abs() * mask > 1e-6  # except where it is as small as Adam's own epsilon
    found = refine_noncritical(teacher, x, y, steps=1, lr=0.1, alpha_bn=0.05)
    assert float(clear.float().mean()) > 0.2
    torch.testing.assert_close(found[clear], moved[clear], atol=2e-3, rtol=0)
    assert torch.equal(refine_noncritical(teacher, x, y, steps=0), x)


def test_the_distance_of_statistics_by_hand(teacher: nn.Module) -> None:
    x, _ = scenes(6, seed=1)
    first = teacher.conv(x)
    second = teacher.conv2(teacher.pool(teacher.relu(teacher.norm(first.clone()))))
    expected = 0.0
    for layer, into in ((teacher.norm, first), (teacher.norm2, second)):
        mean, variance = into.mean((0, 2, 3)), into.var((0, 2, 3), unbiased=False)
        expected += float(((mean - layer.running_mean).norm() + (variance - layer.running_var).norm()).detach())
    assert float(bn_distance(teacher, x)) == pytest.approx(expected, rel=1e-5)
    assert float(bn_distance(Net(norm=False), x)) == 0


def test_pixels_stay_in_range_and_the_mask_may_follow(teacher: nn.Module) -> None:
    x, y = scenes(6, seed=2)
    low, high = x.amin((0, 2, 3)), x.amax((0, 2, 3))
    far = refine_noncritical(teacher, x, y, steps=15, lr=3.0, low=low, high=high)
    assert bool((far.amin((0, 2, 3)) >= low).all()) and bool((far.amax((0, 2, 3)) <= high).all())
    fixed = refine_noncritical(teacher, x, y, steps=8)
    assert not torch.equal(fixed, refine_noncritical(teacher, x, y, steps=8, recompute_every=2))
    assert torch.equal(fixed, refine_noncritical(teacher, x, y, steps=8))


def test_without_batch_normalisation_it_is_said() -> None:
    x, y = scenes(6)
    with pytest.warns(UserWarning, match="no batch normalisation"):
        refine_noncritical(Net(norm=False).eval(), x, y, steps=1)


# Stage 3


@pytest.mark.parametrize("mix", ["cutmix", "mixup"])
def test_views_come_back_from_their_seed_and_tell_what_they_mixed(mix: str) -> None:
    x = torch.arange(6.0)[:, None, None, None].expand(6, 3, 8, 8).contiguous()
    y = torch.arange(6)
    views = Views((7, 8), 2, 0.5, True, mix)
    view, other = views.view(x, y, 0), views.view(x, y, 1)
    assert torch.equal(view.x, views.view(x, y, 2).x) and not torch.equal(view.x, other.x)
    # Images of one value: what is left of the own value is the share.
    for i in range(6):
        mean = float(view.share[i]) * i + (1 - float(view.share[i])) * int(view.partner[i])
        assert float(view.x[i].mean()) == pytest.approx(mean, abs=1e-4)
    mixed = view.mixed(6)
    torch.testing.assert_close(mixed.sum(1), torch.ones(6))
    for i in range(6):
        if view.partner[i] != i:
            assert mixed[i, i] == pytest.approx(float(view.share[i]))


def test_shuffling_moves_whole_strips_and_loses_nothing() -> None:
    from salience.data.nrr_dd.views import _crops, _shuffled

    x = torch.arange(50.0).view(2, 1, 5, 5)
    moved = _shuffled(x, 2, generator(3))
    assert all(sorted(one.flatten().tolist()) == sorted(was.flatten().tolist()) for one, was in zip(moved, x))
    rows = [sorted(row.tolist()) for row in moved[0, 0]]
    assert all(sorted(row.tolist()) in rows for row in x[0, 0])  # columns stay together within a row
    smooth = torch.linspace(0, 1, 16).expand(4, 1, 16, 16)
    cut = _crops(smooth, 0.5, generator())
    assert cut.shape == smooth.shape and float(cut.min()) >= 0 and float(cut.max()) <= 1
    assert torch.all(cut.diff(dim=3) >= -1e-6)  # cut out and enlarged, not shuffled


def test_the_loss_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25]]))
    y, y_aug = torch.tensor([0]), torch.tensor([[0.6, 0.4, 0.0]])
    mixed = -(0.6 * math.log(0.5) + 0.4 * math.log(0.25))
    d_org, d_aug = torch.tensor([0.1]), torch.tensor([1.5])
    one = mixed + 2 * (abs(math.log(2) - 0.1) + abs(mixed - 1.5))
    two = mixed + 2 * ((math.log(2) - 0.1) ** 2 + (mixed - 1.5) ** 2)
    assert float(dbr_loss(logits, y, y_aug, d_org, d_aug, 2.0, 1)) == pytest.approx(one, rel=1e-5)
    assert float(dbr_loss(logits, y, y_aug, d_org, d_aug, 2.0, 2)) == pytest.approx(two, rel=1e-5)
    assert float(dbr_loss(logits, y, y_aug, d_org, d_aug, 0.0)) == pytest.approx(mixed, rel=1e-5)


def test_the_second_distance_tells_the_partner_class() -> None:
    y, partner = torch.tensor([0]), torch.tensor([[0.5, 0.5, 0.0]])
    sure, unsure = torch.log(torch.tensor([[0.4, 0.5, 0.1]])), torch.log(torch.tensor([[0.4, 0.1, 0.5]]))
    own = torch.tensor([-math.log(0.4)])
    mixed = -(partner * sure).sum(1)
    same = dbr_loss(sure, y, partner, own, mixed) - dbr_loss(sure, y, partner, own, mixed, 0.0)
    apart = dbr_loss(unsure, y, partner, own, mixed) - dbr_loss(unsure, y, partner, own, mixed, 0.0)
    assert float(same) == pytest.approx(0, abs=1e-6) and float(apart) == pytest.approx(0.5 * math.log(5), rel=1e-5)


def test_distances_are_those_of_the_teacher_on_the_same_views(teacher: nn.Module) -> None:
    x, y = scenes(6, seed=4)
    views = Views(draw_seeds(3, generator()), 1, 0.7)
    labels = DBRLabels.from_teacher(teacher, x, y, views)
    soft = SoftLabels.from_teacher(teacher, x, y, views, temperature=2.0)
    assert labels.d_org.shape == labels.d_aug.shape == (6, 3) and soft.q.shape == (6, 3, 3)
    view = views.view(x, y, 1)
    with torch.no_grad():
        logits = teacher(view.x)
    torch.testing.assert_close(labels.d_org[:, 1], cross_entropy(logits, y, reduction="none"))
    torch.testing.assert_close(labels.d_aug[:, 1], cross_entropy(logits, view.mixed(3), reduction="none"))
    torch.testing.assert_close(soft.q[:, 1], torch.softmax(logits / 2, 1))
    # A student that says what the teacher says has nothing to learn from either.
    assert float(soft.loss(logits, soft.targets(view, 1))) == pytest.approx(0, abs=1e-6)
    extra = labels.loss(logits, labels.targets(view, 1)) - cross_entropy(logits, view.mixed(3))
    assert float(extra) == pytest.approx(0, abs=1e-5)


def test_a_teacher_that_is_certain_and_wrong_gives_finite_distances(teacher: nn.Module) -> None:
    sure = copy.deepcopy(teacher)
    with torch.no_grad():
        sure.head.bias += torch.tensor([1e6, 0.0, 0.0])
    x, y = scenes(6)
    labels = DBRLabels.from_teacher(sure, x, y, Views((1,)))
    assert float(labels.d_org.max()) == 50 and bool(labels.d_aug.isfinite().all())


def test_two_numbers_weigh_less_than_all_classes(teacher: nn.Module) -> None:
    views = Views(tuple(range(10)))
    labels = DBRLabels(views, 1000, torch.zeros(4, 10), torch.zeros(4, 10))
    soft = SoftLabels(views, torch.zeros(4, 10, 1000))
    seeds = HardLabels(views, 1000).nbytes
    assert (soft.nbytes - seeds) / (labels.nbytes - seeds) == 500


# All of it


@pytest.mark.parametrize("knowledge", ["dbr", "soft", "hard"])
def test_a_student_learns_from_what_stands_on_disk(knowledge: str, teacher: nn.Module, tmp_path: Path) -> None:
    x, y = scenes(60, seed=5)
    teacher = copy.deepcopy(teacher)
    made = distiller(teacher, ipc=4, knowledge=knowledge, drop_wrong=True).distill(x, y, ["red", "green", "a/b"])
    made.save(tmp_path)
    del teacher
    back = DistilledSet.load(tmp_path)
    assert torch.equal(back.x, made.x) and torch.equal(back.y, made.y) and back.class_names == ("red", "green", "a/b")
    assert back.labels.nbytes == made.labels.nbytes and back.labels.views == made.labels.views
    if knowledge == "dbr":
        assert torch.equal(back.labels.d_aug, made.labels.d_aug)
    # The house's own reader sees the same pixels and classes.
    images = read_images(tmp_path / "images", mean=MEAN, std=STD)
    assert images.class_names == ["a_b", "green", "red"] and len(images) == 12
    assert torch.equal(images[0][0], back.x[back.y == 2][0])
    student, test = Net(), scenes(90, seed=6)
    torch.manual_seed(1)
    for layer in (student.conv, student.conv2, student.head):
        layer.reset_parameters()
    history = train_student(
        student, back.x, back.y, back.labels, epochs=80, lr=0.01, batch_size=6, generator=generator()
    )
    assert len(history.loss) == 80 and history.steps == 160
    student.eval()
    assert float((student(test[0]).argmax(1) == test[1]).float().mean()) > 0.6


def test_the_same_seed_gives_the_same_set_and_rounding_spares_what_stays(teacher: nn.Module) -> None:
    x, y = scenes(60, seed=5)
    first, second = distiller(teacher).distill(x, y), distiller(teacher).distill(x, y)
    assert torch.equal(first.x, second.x) and torch.equal(first.labels.d_org, second.labels.d_org)
    # Of mosaics the crops are smaller than the image, so that the draw counts.
    one, other = (distiller(teacher, factor=2, random_state=seed).distill(x, y).x for seed in (0, 1))
    assert not torch.equal(one, other)
    patches, classes = distiller(teacher).discover(x, y)
    assert torch.equal(on_grid(patches, MEAN, STD), patches)
    critical = (class_activation_map(teacher, patches, classes) >= 0.6).expand_as(patches)
    assert torch.equal(first.x[critical], patches[critical])
    assert torch.equal(on_grid(first.x, MEAN, STD), first.x)


def test_mosaics_of_grey_images_whose_size_does_not_divide() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                          nn.Flatten(), nn.Linear(4, 2)).eval()  # fmt: skip
    x = torch.rand(40, 1, 7, 7, generator=generator())
    x = 2 * x - 1
    with torch.no_grad():
        model[5].bias += torch.tensor([0.0, float((model(x)[:, 0] - model(x)[:, 1]).median())])  # both classes occur
        y = model(x).argmax(1)
    made = NRRDD(model, 2, mean=(0.5,), std=(0.5,), factor=2, steps=2, views=2).distill(x, y)
    assert made.x.shape[1:] == (1, 7, 7) and made.labels.views.tiles == 2 and made.labels.views.crop == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ipc": 0}, "ipc: got 0; it must be a whole number"),
        ({"factor": 9}, "9 patches do not fit into images of 8 x 8"),
        ({"top": 6}, "top: got 6; it must lie between 1 and the number of crops, 5"),
        ({"scale": (0.5, 0.2)}, "scale: got"),
        ({"order": "most"}, "order: got 'most'"),
        ({"eps": 0.0}, "eps: got 0.0"),
        ({"steps": -1}, "steps: got -1"),
        ({"lr": 0.0}, "lr and alpha_bn"),
        ({"alpha_bn": -1.0}, "lr and alpha_bn"),
        ({"recompute_every": 0}, "recompute_every: got 0"),
        ({"knowledge": "some"}, "knowledge: got 'some'"),
        ({"views": 0}, "views: got 0"),
        ({"mix": "paste"}, "mix 'paste'"),
        ({"temperature": 0.0, "knowledge": "soft"}, "temperature: got 0.0"),
        ({"mean": (0.5,), "std": (0.5,)}, "mean and std: 1 and 1 channels, the images have 3"),
    ],
)
def test_options_out_of_range_are_named(options: dict, message: str, teacher: nn.Module) -> None:
    x, y = scenes(30)
    with pytest.raises(InputError, match=message):
        distiller(teacher, **{"steps": 1, **options}).distill(x, y)


def test_bad_images_labels_and_teachers_are_named(teacher: nn.Module) -> None:
    x, y = scenes(30)
    blind = copy.deepcopy(teacher)
    nn.init.zeros_(blind.head.weight)
    with pytest.raises(InputError, match="teacher: right on 33% of 30 of these images, where chance is 33%"):
        distiller(blind).distill(x, y)
    with pytest.raises(InputError, match="one class, 0 or more, for each of the 30 images"):
        distiller(teacher).distill(x, y[:-1])
    with pytest.raises(InputError, match=r"labels: 5 to 5, but the network gives logits of shape \(3,\)"):
        discover_patches(teacher, x, torch.full((30,), 5), 1, generator=generator())
    with pytest.raises(InputError, match=r"images: got torch\.int64"):
        refine_noncritical(teacher, x.long(), y, steps=1)
    with pytest.raises(InputError, match="labels: got"):
        class_activation_map(teacher, x, y.float())
    with pytest.raises(InputError, match="the loss is nan in step 1"):
        refine_noncritical(teacher, x * math.nan, y, steps=1)
    with pytest.raises(InputError, match="alpha and p: got -1"):
        dbr_loss(torch.zeros(1, 3), y[:1], torch.zeros(1, 3), torch.zeros(1), torch.zeros(1), -1)
    with pytest.raises(InputError, match="a single one cannot be mixed"):
        train_student(Net(), x[:1], y[:1], HardLabels(Views((1,)), 3), generator=generator())
    few = torch.cat([x[y == label][:1] for label in range(3)])
    with pytest.warns(UserWarning, match="1 images of a class for 2 patches: some are repeated"):
        discover_patches(teacher, few, torch.arange(3), 2, generator=generator())


def test_a_damaged_set_is_named(teacher: nn.Module, tmp_path: Path) -> None:
    x, y = scenes(30)
    with pytest.raises(InputError, match=r"holds no set\.json"):
        DistilledSet.load(tmp_path)
    distiller(teacher, steps=0).distill(x, y).save(tmp_path)
    record = json.loads((tmp_path / "set.json").read_text())
    for change in ({"files": ["../x.png"]}, {"y": [0]}, {"labels": {"kind": "other"}}, {"views": {}}):
        (tmp_path / "set.json").write_text(json.dumps(record | change))
        with pytest.raises(DataError, match="no distilled set that can be read"):
            DistilledSet.load(tmp_path)
    (tmp_path / "set.json").write_text(json.dumps(record))
    DistilledSet.load(tmp_path)
    Image.new("RGBA", (8, 8)).save(tmp_path / record["files"][0])
    with pytest.raises(DataError, match="mode RGBA"):
        DistilledSet.load(tmp_path)
    (tmp_path / "labels.safetensors").write_bytes(b"no")
    with pytest.raises(DataError, match="no distilled set"):
        DistilledSet.load(tmp_path)
