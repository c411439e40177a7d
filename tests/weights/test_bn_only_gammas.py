"""The scales of batch normalisation: how they start, what they say; and the network that starts at random."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from salience.errors import InputError
from salience.weights import CifarResNet, dead_channels, gamma_report, init_bn, zero_small_gammas
from tiny import state_hash

IMAGES = torch.randn(48, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def resnet(depth: int = 8, width: int = 4) -> CifarResNet:
    return CifarResNet(depth, width, in_channels=1, num_classes=3, generator=generator())


def test_the_resnet_has_the_shapes_of_the_paper() -> None:
    model = resnet(14, 8)
    shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, a, out, name=name: shapes.update({name: tuple(out.shape[1:])}))
    assert model(IMAGES).shape == (48, 3)
    assert shapes["conv"] == (8, 8, 8) and shapes["blocks.1.conv2"] == (8, 8, 8)
    assert shapes["blocks.2.conv1"] == shapes["blocks.2.shortcut.0"] == (16, 4, 4)
    assert shapes["blocks.4.conv1"] == shapes["blocks.5.conv2"] == (32, 2, 2)
    assert len(shapes) == 1 + 12 + 2  # the stem, two in each block, two shortcuts


def test_the_resnet_starts_as_random_features() -> None:
    model = CifarResNet(20, 32, generator=generator())
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            deviation = (2 / module.weight[0].numel()) ** 0.5  # He
            assert module.weight.std().item() == pytest.approx(deviation, rel=0.1)
    scales = gamma_report(model).values
    assert scales.min() >= 0 and scales.max() <= 1 and scales.mean().item() == pytest.approx(0.5, abs=0.03)
    assert all((m.bias == 0).all() for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    again = CifarResNet(20, 32, generator=generator())
    assert state_hash(model) == state_hash(again)


def test_batch_normalisation_schemes() -> None:
    model = resnet(14, 8)
    for scheme, low, high, beta in [("uniform", 0, 1, 0), ("positivenegative", -1, 1, 0), ("fixed", 1, 1, 0),
                                    ("oneone", 1, 1, 1)]:  # fmt: skip
        init_bn(model, scheme, generator())
        scales = gamma_report(model).values
        assert low <= scales.min() <= low + 0.05 and high - 0.05 <= scales.max() <= high
        assert all((m.bias == beta).all() for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_small_scales_by_hand() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([0.009, -0.009, 0.01, 0.5]))
        model[1].weight.copy_(torch.tensor([0.0, -0.4]))
    report = gamma_report(model)
    assert report.fraction_by_layer == {"0": 0.5, "1": 0.5} and report.fraction_disabled == 0.5
    assert report.values.tolist() == pytest.approx([0.009, -0.009, 0.01, 0.5, 0.0, -0.4])
    assert gamma_report(model, threshold=0.45).fraction_by_layer == {"0": 0.75, "1": 1.0}
    assert zero_small_gammas(model) == 3
    assert model[0].weight.tolist() == pytest.approx([0, 0, 0.01, 0.5]) and model[1].weight[0] == 0
    assert report.values[0] != 0  # the report is a copy
    # A channel that is off gives its shift everywhere, whatever comes in.
    out = model[0].eval()(torch.randn(3, 4, 5, 5))
    assert (out[:, :2] == 0).all() and (out[:, 3] != 0).all()


class Reused(nn.Module):
    """Four channels, shifted so that the second never fires; the same ReLU twice."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x):
        first = self.relu(x + torch.tensor([0.0, -9.0, 0.0, 0.0]).view(4, 1, 1))
        return self.relu(-first + torch.tensor([1.0, 1.0, 0.0, 1.0]).view(4, 1, 1)).mean((2, 3))


def test_dead_channels_of_a_made_network() -> None:
    x = torch.rand(10, 4, 3, 3, generator=generator())
    x[:, 3] = 0
    x[7, 3, 1, 2] = 0.1  # a single pixel of a single image makes the last channel fire
    model = Reused()
    dead = dead_channels(model, x, batch_size=4)
    assert {name: mask.tolist() for name, mask in dead.items()} == {
        "relu": [False, True, False, False],
        "relu:1": [False, False, True, False],
    }
    assert dead_channels(model, x[:7])["relu"].tolist() == [False, True, False, True]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.zeros(10)), batch_size=3)
    assert all(torch.equal(mask, dead[name]) for name, mask in dead_channels(model, loader).items())
    assert model.training and not model.relu._forward_hooks


def test_a_shift_far_below_zero_kills_its_channel() -> None:
    model = resnet()
    with torch.no_grad():
        model.bn.weight[2], model.bn.bias[2] = 0, -1
    before = state_hash(model)
    dead = dead_channels(model, IMAGES)
    assert dead["relu"].tolist() == [False, False, True, False]
    assert len(dead) == 1 + 2 * 3 and state_hash(model) == before


def test_bad_options_are_named() -> None:
    model = resnet()
    with pytest.raises(InputError, match=r"scheme: got 'ones'.*'oneone'"):
        init_bn(model, "ones")
    with pytest.raises(InputError, match="has no batch normalisation"):
        init_bn(nn.Linear(2, 2))
    for threshold in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="threshold: got"):
            gamma_report(model, threshold)
    with pytest.raises(InputError, match="LayerNorm has no batch normalisation"):
        zero_small_gammas(nn.LayerNorm(3))
    with pytest.raises(InputError, match=r"Linear runs no nn\.ReLU"):
        dead_channels(nn.Linear(2, 2), torch.ones(3, 2))


@pytest.mark.parametrize("depth", [2, 7, 15, 16])
def test_depths_are_six_times_something_and_two(depth: int) -> None:
    with pytest.raises(InputError, match=f"depth: got {depth}; it must be 6 D"):
        CifarResNet(depth)
    with pytest.raises(InputError, match="width, in_channels and num_classes: got 0, 3, 10"):
        CifarResNet(8, width=0)
