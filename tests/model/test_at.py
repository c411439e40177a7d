from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from salience.errors import InputError
from salience.model import capture, eager_attention, layer, logits_of, replace, run, training_mode
from tiny import FAMILIES, LAYER, build, example, state_hash

ALL = ["plain", *FAMILIES]


def logits(model, inputs):
    with torch.no_grad():
        return logits_of(run(model, inputs))


def test_layers_are_found_by_name():
    model = build("plain")
    assert layer(model, "relu") is model.relu
    with pytest.raises(InputError, match="nearest names: 'conv', 'conv2'"):
        layer(model, "conv3")


@pytest.mark.parametrize("family", ALL)
def test_capture_changes_nothing_and_leaves_nothing(family):
    model, inputs, name = build(family), example(family), LAYER[family]
    before, expected = state_hash(model), logits(model, inputs)
    with capture(model, [name]) as captured:
        assert torch.equal(logits(model, inputs), expected)
    assert captured[name].shape[0] == 3
    assert state_hash(model) == before


@pytest.mark.parametrize("family", ALL)
def test_replacing_by_what_was_captured_is_the_identity(family):
    model, inputs, name = build(family), example(family), LAYER[family]
    expected = logits(model, inputs)
    with torch.no_grad(), capture(model, name) as captured:
        run(model, inputs)
    with replace(model, name, lambda own: captured[name]):
        assert torch.equal(logits(model, inputs), expected)
    with replace(model, name, torch.zeros_like):
        assert not torch.allclose(logits(model, inputs), expected)


def test_capture_is_not_falsified_by_operations_in_place():
    model, images = build("plain"), example("plain")
    with torch.no_grad(), capture(model, ["norm", "relu", "conv2"]) as captured:
        model(images)
        conv2 = model.conv2(captured["relu"])
    assert (captured["norm"] < 0).any()  # the ReLU behind it works in place
    assert torch.equal(captured["relu"], captured["norm"].relu())
    assert torch.equal(captured["conv2"], conv2)


def test_gradients_at_a_captured_layer():
    model, images = build("plain"), example("plain")
    with capture(model, ["norm", "conv2"]) as captured:
        model(images)[:, 1].sum().backward(retain_graph=True)
        model.zero_grad()
        score = model(images)[:, 1].sum()
    at_conv2, at_norm = torch.autograd.grad(score, [captured["conv2"], captured["norm"]])
    # d score / d conv2 by hand: the mean over 16 x 16 positions spreads the head's weight where ReLU is open.
    expected = (captured["conv2"] > 0) * model.head.weight[1].view(1, -1, 1, 1) / 256
    torch.testing.assert_close(at_conv2, expected)
    with torch.no_grad():
        x = captured["norm"].detach()
    direct = x.clone().requires_grad_()
    hidden = model.conv2(direct.relu()).relu().mean((2, 3))
    (expected,) = torch.autograd.grad(model.head(hidden)[:, 1].sum(), direct)
    torch.testing.assert_close(at_norm, expected)


def test_hooks_go_when_the_model_or_the_block_fails():
    model, images = build("plain"), example("plain")
    before = state_hash(model)

    def broken(own):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), capture(model, ["conv"]), replace(model, "conv2", broken):
        model(images)
    with pytest.raises(RuntimeError), capture(model, ["conv"]):
        model(images[:, :1])
    with pytest.raises(InputError), replace(model, "conv", lambda own: None):
        model(images)
    with pytest.raises(InputError), capture(model, ["conv", "nowhere"]):
        pass
    with pytest.raises(KeyboardInterrupt), replace(model, "conv", lambda own: own):
        raise KeyboardInterrupt
    assert state_hash(model) == before


def test_a_layer_that_was_not_reached_is_named():
    model = build("plain")
    with capture(model, ["conv"]) as captured:
        pass
    with pytest.raises(InputError, match="'conv'"):
        captured["conv"]


class Both(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


OUTPUTS = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x, x + 1),
    "none first": lambda x: (None, x, x + 1),
    "list": lambda x: [x, x + 1],
    "named tuple": lambda x: Both(x, x + 1),
    "dict": lambda x: {"text": "a", "x": x, "y": x + 1},
    "model output": lambda x: BaseModelOutput(last_hidden_state=x, attentions=(x + 1,)),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_structure_is_kept(kind):
    class Inner(nn.Module):
        def forward(self, x):
            return OUTPUTS[kind](x)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            return {"kept": self.inner(x)}

    model, x = Outer(), torch.tensor([1.0, 2.0])
    with capture(model, "inner") as captured:
        model(x)
    assert torch.equal(captured["inner"], x)
    with replace(model, "inner", lambda own: own * 10):
        got = model(x)["kept"]
    expected = OUTPUTS[kind](x * 10)
    assert type(got) is type(expected)

    def flat(value):
        if isinstance(value, torch.Tensor):
            return [*value.tolist()]
        if isinstance(value, dict):
            return [f for v in value.values() for f in flat(v)]
        return [f for v in value for f in flat(v)] if isinstance(value, tuple | list) else [value]

    got_flat, other = flat(got), flat(OUTPUTS[kind](x))
    count = next(i for i, v in enumerate(got_flat) if v == 10.0)
    assert got_flat[count : count + 2] == [10.0, 20.0]
    assert got_flat[:count] + got_flat[count + 2 :] == other[:count] + other[count + 2 :]


def test_outputs_without_a_tensor_are_refused():
    class Words(nn.Module):
        def forward(self, x):
            return "words"

    with pytest.raises(InputError, match="the model"):
        logits_of(run(Words(), torch.ones(1)))
    model = nn.Sequential(nn.Identity(), Words())
    with pytest.raises(InputError, match="'1' returns str"), capture(model, "1"):
        model(torch.ones(1))


def test_training_mode_gives_every_module_its_own_flag_back():
    model = build("plain")
    model.train()
    model.norm.eval()
    before = state_hash(model)
    with training_mode(model, False):
        assert not any(module.training for module in model.modules())
    with pytest.raises(ZeroDivisionError), training_mode(model, True):
        assert model.norm.training
        raise ZeroDivisionError
    assert state_hash(model) == before


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "moe", "t5", "vit"])
def test_eager_attention_gives_weights_and_is_undone(family):
    model, inputs = build(family), example(family)
    model.set_attn_implementation("sdpa")
    expected = logits(model, inputs)
    with torch.no_grad(), eager_attention(model):
        output = run(model, dict(inputs, output_attentions=True))
    attentions = output.encoder_attentions if family == "t5" else output.attentions
    weights = attentions[0]
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    torch.testing.assert_close(logits_of(output), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ZeroDivisionError), eager_attention(model):
        raise ZeroDivisionError
    configs = {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")}
    assert configs == {"sdpa"}
    assert torch.equal(logits(model, inputs), expected)


def test_eager_attention_refuses_what_cannot_switch(monkeypatch):
    with pytest.raises(InputError, match="Plain"), eager_attention(build("plain")):
        pass
    model = build("llama")
    model.set_attn_implementation("sdpa")
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    with pytest.raises(InputError, match="cannot switch"), eager_attention(model):
        pass
