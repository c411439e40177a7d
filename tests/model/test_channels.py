"""Channel groups: which tensors carry the same channels, and what holds them in place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from salience.errors import InputError
from salience.model import channel_groups, layer_flops, logits_of, run
from salience.model.narrowing import fold_norms
from tiny import build, example, state_hash


def groups(model: nn.Module, inputs) -> dict:
    return {group.name: group for group in channel_groups(model, inputs).groups}


def members(group) -> set[tuple[str, int, str, int]]:
    return {tuple(member) for member in group.members}


class Net(nn.Module):
    """Layers in a row whose forward pass is a function of the test."""

    def __init__(self, forward, **layers: nn.Module) -> None:
        super().__init__()
        self._forward = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self._forward(self, x)


def test_a_chain_with_normalisation_and_flattening() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 9, 5),
        nn.GELU(), nn.Linear(5, 2),
    )  # fmt: skip
    found = channel_groups(net, torch.randn(2, 3, 8, 8))
    conv, hidden, out = found.groups
    assert members(conv) == {
        ("0.weight", 0, "out", 1), ("0.bias", 0, "vector", 1), ("1.running_mean", 0, "vector", 1),
        ("1.running_var", 0, "vector", 1), ("1.weight", 0, "vector", 1), ("1.bias", 0, "vector", 1),
        ("5.weight", 1, "in", 9),
    }  # fmt: skip
    assert members(hidden) == {("5.weight", 0, "out", 1), ("5.bias", 0, "vector", 1), ("7.weight", 1, "in", 1)}
    assert not conv.fixed and not hidden.fixed and "output" in out.fixed
    assert found.norms == {"1": "0"}


def test_a_residual_stream_is_one_group() -> None:
    found = groups(build("resnet"), example("resnet", 1))
    stream = found["resnet.embedder.embedder.convolution"]
    assert not stream.fixed
    makers = {member.tensor for member in stream.members if member.role == "out"}
    readers = {member.tensor for member in stream.members if member.role == "in"}
    assert makers == {
        "resnet.embedder.embedder.convolution.weight",
        "resnet.encoder.stages.0.layers.0.layer.1.convolution.weight",
    }
    assert readers == {
        "resnet.encoder.stages.0.layers.0.layer.0.convolution.weight",
        "resnet.encoder.stages.1.layers.0.layer.0.convolution.weight",
        "resnet.encoder.stages.1.layers.0.shortcut.convolution.weight",
    }


@pytest.mark.parametrize(
    ("family", "free"),
    [("llama", "model.layers.{}.mlp.gate_proj"), ("qwen2", "model.layers.{}.mlp.gate_proj"),
     ("gpt2", "transformer.h.{}.mlp.c_fc"), ("vit", "vit.layers.{}.mlp.fc1")],
)  # fmt: skip
def test_of_a_transformer_the_feed_forward_parts_are_free(family: str, free: str) -> None:
    found = groups(build(family), example(family, 1))
    assert {name for name, group in found.items() if not group.fixed} == {free.format(i) for i in range(3)}
    assert all(group.fixed for name, group in found.items() if "attn" in name or "attention" in name)


def test_a_gated_part_is_one_group_and_a_transposed_weight_has_its_axes() -> None:
    gate = groups(build("llama"), example("llama", 1))["model.layers.0.mlp.gate_proj"]
    assert [m.role for m in gate.members] == ["out", "out", "in"]
    assert members(groups(build("gpt2"), example("gpt2", 1))["transformer.h.0.mlp.c_fc"]) == {
        ("transformer.h.0.mlp.c_fc.weight", 1, "out", 1), ("transformer.h.0.mlp.c_fc.bias", 0, "vector", 1),
        ("transformer.h.0.mlp.c_proj.weight", 0, "in", 1),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda n, x: n.b(n.a(x).flip(1)), "flip"),
        (lambda n, x: n.b(torch.softmax(n.a(x), 1)), "softmax"),
        (lambda n, x: n.b(n.a(x) * torch.arange(4.0)), "tells its channels apart"),
        (lambda n, x: n.b(torch.roll(n.a(x), 1, 1)), "roll"),
        (lambda n, x: n.b(n.a(x)[:, [0, 1, 2, 3]]), "cut out"),
        (lambda n, x: n.b(n.a(x).view(-1, 2, 2).flatten(1)), "cut into parts"),
        (lambda n, x: n.b(n.a(x) - n.a(x).mean(1, keepdim=True)), "mean over its channels"),
        (lambda n, x: n.b(nn.functional.layer_norm(n.a(x), (4,))), "layer_norm"),
        (lambda n, x: n.b(n.a(x)) + n.a.weight.sum(), "reads a.weight"),
        (lambda n, x: (n.b(h := n.a(x)), h), "output"),
        (lambda n, x: n.a(n.a(x)), "output"),
    ],
)
def test_what_holds_channels_in_place(forward, reason: str) -> None:
    net = Net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 2))
    assert reason in groups(net, torch.randn(3, 4))["a"].fixed


@pytest.mark.parametrize(
    "forward",
    [
        lambda n, x: n.b(torch.tanh(n.a(x) * 2 + 1)),
        lambda n, x: n.b(torch.relu_(n.a(x))),
        lambda n, x: n.b(n.a(x) * torch.sigmoid(n.a(x))),
        lambda n, x: n.b(n.a(x)[:2]),
        lambda n, x: n.b(n.a(x).view(1, -1, 4)),
        lambda n, x: n.b(n.a(x) * torch.ones(3, 1)),
    ],
)
def test_what_lets_channels_pass(forward) -> None:
    net = Net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 2))
    group = groups(net, torch.randn(3, 4))["a"]
    assert not group.fixed and ("b.weight", 1, "in", 1) in members(group)


def test_weights_of_a_layer_of_ones_own_are_held() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.scale = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.ones(4))

        def forward(self, x):
            return nn.functional.linear(x, self.w)

    net = Net(lambda n, x: n.b(torch.relu(n.own(x))), own=Own(), b=nn.Linear(4, 2))
    assert "no layer that can be resized" in groups(net, torch.randn(2, 4))["own"].fixed
    net = Net(lambda n, x: n.b(n.a(x) * n.own.scale), a=nn.Linear(4, 4), own=Own(), b=nn.Linear(4, 2))
    assert "tells its channels apart" in groups(net, torch.randn(2, 4))["a"].fixed


def test_tied_and_shared_weights() -> None:
    tied = Net(lambda n, x: n.c(n.b(n.a(x))), a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 2))
    tied.b.weight = tied.a.weight
    assert all(group.fixed for group in groups(tied, torch.randn(2, 4)).values())
    # One head reads two widths of the same size: they are one group.
    shared = Net(lambda n, x: n.h(n.a(x)) + n.h(n.b(x)), a=nn.Linear(4, 6), b=nn.Linear(4, 6), h=nn.Linear(6, 2))
    both = groups(shared, torch.randn(2, 4))["a"]
    assert not both.fixed and {m.tensor for m in both.members if m.role == "out"} == {"a.weight", "b.weight"}


def test_depthwise_belongs_to_its_channels_and_other_groups_are_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    group = groups(net, torch.randn(1, 3, 6, 6))["0"]
    assert ("1.weight", 0, "depthwise", 1) in members(group) and ("1.bias", 0, "vector", 1) in members(group)
    net[1] = nn.Conv2d(4, 4, 3, groups=2)
    with pytest.raises(InputError, match=r"layer '1'.*2 groups"):
        channel_groups(net, torch.randn(1, 3, 6, 6))


def test_padded_shortcuts_are_held() -> None:
    def forward(n, x):
        h = n.a(x)
        return n.d(n.c(torch.relu(n.b(h))) + nn.functional.pad(h[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))).mean((2, 3))

    net = Net(
        forward, a=nn.Conv2d(3, 4, 3, padding=1), b=nn.Conv2d(4, 8, 3, 2, 1), c=nn.Conv2d(8, 8, 3, 1, 1),
        d=nn.Conv2d(8, 2, 1),
    )  # fmt: skip
    found = groups(net, torch.randn(1, 3, 8, 8))
    assert "pad" in found["a"].fixed and "tells its channels apart" in found["c"].fixed and not found["b"].fixed


def test_the_model_is_left_as_it_was() -> None:
    model = build("resnet").train()
    before = state_hash(model)
    channel_groups(model, example("resnet", 1))
    assert state_hash(model) == before
    with pytest.raises(ValueError):
        channel_groups(model, {"pixel_values": torch.randn(1, 5, 4, 4)})
    assert state_hash(model) == before


@pytest.mark.parametrize("family", ["plain", "resnet"])
def test_folding_keeps_the_output(family: str) -> None:
    model, inputs = build(family), example(family)
    before = logits_of(run(model, inputs))
    fold_norms(model, channel_groups(model, inputs).norms)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    after = logits_of(run(model, inputs))
    assert torch.allclose(after, before, rtol=1e-4, atol=1e-6 * float(before.detach().abs().max()))


def test_a_norm_that_shares_its_input_is_not_folded() -> None:
    net = Net(
        lambda n, x: n.b((n.bn(h := n.a(x)) + h).mean((2, 3))),
        a=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4), b=nn.Linear(4, 2),
    )  # fmt: skip
    assert channel_groups(net, torch.randn(2, 3, 4, 4)).norms == {}
    net = Net(lambda n, x: n.b((n.bn(n.a(x)) + n.bn2(n.a(x))).mean((2, 3))), a=nn.Conv2d(3, 4, 1),
              bn=nn.BatchNorm2d(4), bn2=nn.BatchNorm2d(4), b=nn.Linear(4, 2))  # fmt: skip
    assert channel_groups(net, torch.randn(2, 3, 4, 4)).norms == {}


def test_operations_by_hand() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    # 4 x 3 x 9 weights at 8 x 8 places; 20 weights once; 2 operations each.
    assert layer_flops(net, torch.randn(1, 3, 8, 8)) == {"0": 2 * 108 * 64, "3": 40}
    deep = nn.Sequential(nn.Conv2d(4, 8, 3, groups=4))
    assert layer_flops(deep, torch.randn(1, 4, 5, 5)) == {"0": 2 * 8 * 9 * 9}
    text = layer_flops(build("gpt2"), example("gpt2", 1))
    assert text["transformer.h.0.mlp.c_fc"] == 2 * 32 * 128 * 9


def test_weights_that_are_used_without_their_layer_are_counted() -> None:
    def forward(net, x):
        y = nn.functional.linear(x, net.a.weight, net.a.bias) + x @ net.b.weight.T
        return y + nn.functional.conv2d(x.new_ones(1, 4, 5, 5), net.c.weight, groups=4).sum()

    layers = {"a": nn.Linear(6, 5), "b": nn.Linear(6, 5), "c": nn.Conv2d(4, 8, 3, groups=4), "rests": nn.Linear(3, 3)}
    net = Net(forward, **layers)
    before = state_hash(net)
    # 14 rows through 30 weights, twice; 8 x 9 weights at 9 places.
    assert layer_flops(net, torch.randn(2, 7, 6)) == {"a": 840, "b": 840, "c": 2 * 8 * 9 * 9, "rests": 0}
    assert state_hash(net) == before
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert layer_flops(encoder, torch.randn(1, 5, 8))["self_attn.out_proj"] == 2 * 64 * 5
    assert torch.backends.mha.get_fastpath_enabled()
