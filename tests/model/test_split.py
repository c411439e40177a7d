from __future__ import annotations

import pytest
import torch
from torch import nn

from salience.errors import InputError
from salience.model import Split, logits_of, run
from tiny import FAMILIES, LAYER, build, example, state_hash


@pytest.mark.parametrize("family", ["plain", *FAMILIES])
def test_decode_of_encode_is_the_model(family):
    model, inputs = build(family), example(family)
    split, before = Split(model, LAYER[family]), state_hash(model)
    with torch.no_grad():
        expected = logits_of(run(model, inputs))
        activations = split.encode(inputs)
        kept = activations.clone()
        assert torch.equal(split.decode(activations, inputs), expected)
        if family != "t5":  # its decoder reads the inputs again
            assert torch.equal(split.decode(activations, example(family, seed=9)), expected)
    assert torch.equal(activations, kept)
    assert state_hash(model) == before


@pytest.mark.parametrize("family", ["plain", "resnet", "vit", "gpt2", "llama"])
def test_inputs_of_one_row_do_for_many_activations(family):
    model, inputs = build(family), example(family, rows=5)
    split = Split(model, LAYER[family])
    one = example(family, rows=1)
    with torch.no_grad():
        got = split.decode(split.encode(inputs), one)
        torch.testing.assert_close(got, logits_of(run(model, inputs)))


def test_every_layer_in_front_of_an_operation_in_place():
    model, images = build("plain"), example("plain")
    expected = model(images)
    for name in ("conv", "norm", "relu", "conv2", "relu2", "head"):
        split = Split(model, name)
        activations = split.encode(images)
        kept = activations.detach().clone()
        assert torch.equal(split.decode(activations, images), expected)
        assert torch.equal(activations, kept)


def test_encode_stops_at_the_layer():
    model, images = build("plain"), example("plain")
    reached = []
    model.head.register_forward_hook(lambda *args: reached.append(1))
    assert Split(model, "conv").encode(images).shape == (3, 4, 16, 16)
    assert reached == []


def test_gradients_flow_through_decode():
    model, images = build("plain"), example("plain")
    split = Split(model, "relu2")
    activations = split.encode(images).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(split.decode(activations, images)[:, 2].sum(), activations)
    expected = model.head.weight[2].view(1, -1, 1, 1).expand_as(gradient) / 256
    torch.testing.assert_close(gradient, expected)


def test_what_cannot_be_cut_is_refused():
    model, images = build("plain"), example("plain")
    with pytest.raises(InputError, match="nearest"):
        Split(model, "con")
    split = Split(model, "conv2")
    activations = split.encode(images)
    for wrong, inputs in [(activations[:, :2], images), (activations[:2], images), (activations[0], images)]:
        with pytest.raises(InputError, match="activations"):
            split.decode(wrong, inputs)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.map, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.map(self.map(x))

    twice, x = Twice(), torch.ones(1, 2)
    with pytest.raises(InputError, match="runs 2 times"):
        Split(twice, "map").decode(x, x)
    with pytest.raises(InputError, match="does not run"):
        Split(twice, "unused").encode(x)
    with pytest.raises(InputError, match="runs 0 times"):
        Split(twice, "unused").decode(x, x)


def test_errors_of_the_model_pass_through_and_leave_no_hook():
    model = build("plain")
    before = state_hash(model)
    with pytest.raises(RuntimeError, match="channels"):
        Split(model, "conv2").encode(torch.ones(1, 5, 16, 16))
    assert state_hash(model) == before
