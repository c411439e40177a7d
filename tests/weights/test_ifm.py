"""Iterative feature merging: hand-worked merges, planted duplicates, the loop's rules, bad input."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from salience.errors import DataError, InputError
from salience.model import channel_groups, logits_of, run
from salience.model.narrowing import replace_tensors
from salience.weights import (
    allocate,
    channel_distance,
    equivalence_report,
    feature_complexity,
    iterative_feature_merging,
    prune_channels,
)
from tiny import build, example, state_hash


def mlp(*sizes: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [layer for i in range(len(sizes) - 1) for layer in (nn.Linear(sizes[i], sizes[i + 1]), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).double()


def doubled(model: nn.Module, inputs) -> nn.Module:
    """Each channel of each free group twice, what reads it halved: the same function."""
    twice = copy.deepcopy(model)
    tensors = {name: value.clone() for name, value in twice.state_dict().items()}
    for group in channel_groups(twice, inputs).groups:
        if group.fixed:
            continue
        for member in group.members:
            value = tensors[member.tensor]
            tensors[member.tensor] = torch.cat([value, value], member.axis) / (2 if member.role == "in" else 1)
    changed = {n: v for n, v in tensors.items() if v.shape != model.state_dict()[n].shape}
    replace_tensors(twice, changed)
    return twice.eval()


# The merge


def test_a_merge_by_hand() -> None:
    net = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 1)).double()
    replace_tensors(net, {
        "0.weight": torch.tensor([[1.0], [2.0], [9.0]]).double(), "0.bias": torch.tensor([0.0, 4.0, 1.0]).double(),
        "2.weight": torch.tensor([[1.0, 3.0, 5.0]]).double(),
    })  # fmt: skip
    x = torch.ones(1, 1).double()
    group = channel_groups(net, x).groups[0]
    # In and out: (1-2)^2 + (1-3)^2 = 5, (1-9)^2 + (1-5)^2 = 80, 49 + 4 = 53; biases do not count.
    expected = torch.tensor([[0, 5, 80], [5, 0, 53], [80, 53, 0]]).double()
    assert torch.equal(channel_distance(net.state_dict(), group), expected)
    result = iterative_feature_merging(net, example=x, beta=0.1)  # 5 <= 8
    assert result.widths == {"0": (3, 2)} and result.grouping == {"0": ((0, 1), (2,))}
    assert result.merges == [(1, "0", 0, 1, 5.0, 80.0)]
    assert result.model[0].weight.tolist() == [[1.5], [9.0]] and result.model[0].bias.tolist() == [2.0, 1.0]
    assert result.model[2].weight.tolist() == [[4.0, 5.0]]
    other = iterative_feature_merging(net, example=x, beta=0.1, rule="sum_in")
    assert other.model[0].weight.tolist() == [[3.0], [9.0]] and other.model[0].bias.tolist() == [4.0, 1.0]
    assert other.model[2].weight.tolist() == [[2.0, 5.0]]
    assert iterative_feature_merging(net, example=x, beta=0.06).widths == {"0": (3, 3)}  # 5 > 4.8


def test_counts_weigh_what_is_merged() -> None:
    net = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    replace_tensors(net, {
        "0.weight": torch.tensor([[0.0], [1.0], [3.0], [100.0]]).double(), "0.bias": torch.zeros(4).double(),
        "2.weight": torch.ones(1, 4).double(),
    })  # fmt: skip
    result = iterative_feature_merging(net, example=torch.ones(1, 1).double(), beta=2.0, max_ratio=0.5)
    # 0 and 1 first: (0.5, count 2, read by 2); then with 3: (2 * 0.5 + 3) / 3.
    assert result.model[0].weight[0].item() == pytest.approx(4 / 3) and result.model[2].weight.tolist() == [[3.0, 1.0]]
    assert result.grouping == {"0": ((0, 1, 2), (3,))}


@pytest.mark.parametrize("family", ["plain", "resnet", "vit", "gpt2", "llama", "qwen2"])
def test_planted_duplicates_come_back_to_their_widths(family: str) -> None:
    model, inputs = build(family), example(family)
    twice = doubled(model, inputs)
    free = {g.name: g.width for g in channel_groups(model, inputs).groups if not g.fixed}
    before = logits_of(run(model, inputs))
    scale = float(before.abs().max())
    assert torch.allclose(logits_of(run(twice, inputs)), before, rtol=1e-4, atol=1e-5 * scale)
    result = iterative_feature_merging(twice, example=inputs, beta=1e-7)
    assert result.widths == {name: (2 * width, width) for name, width in free.items()}
    assert all(
        cells == tuple((i, i + free[name]) for i in range(free[name])) for name, cells in result.grouping.items()
    )
    after = logits_of(run(result.model, inputs))
    assert torch.allclose(after, before, rtol=1e-4, atol=1e-5 * scale)
    assert result.params[1] < result.params[0] and result.flops[1] < result.flops[0]


def test_only_mean_in_is_exact_behind_gelu() -> None:
    net = mlp(5, 6, 3)
    net[1] = nn.GELU()
    x = torch.randn(40, 5).double()
    twice = doubled(net, x)
    gaps = {
        rule: float((iterative_feature_merging(twice, example=x, beta=1e-9, rule=rule).model(x) - net(x)).abs().max())
        for rule in ("mean_in", "sum_in")
    }
    assert gaps["mean_in"] < 1e-12 and gaps["sum_in"] > 1e-3
    relu = mlp(5, 6, 3)
    result = iterative_feature_merging(doubled(relu, x), example=x, beta=1e-9, rule="sum_in")
    assert torch.allclose(result.model(x), relu(x), atol=1e-12)


def test_duplicates_behind_batch_normalisation_that_stays() -> None:
    model, inputs = build("plain"), example("plain")
    result = iterative_feature_merging(doubled(model, inputs), example=inputs, beta=1e-7, fold_norm=False)
    assert result.widths == {"conv": (8, 4), "conv2": (12, 6)} and result.model.norm.num_features == 4
    assert torch.allclose(result.model(inputs), model(inputs), atol=1e-6)
    with pytest.raises(InputError, match="'norm'"):
        iterative_feature_merging(model, example=inputs, rule="sum_in", fold_norm=False)
    iterative_feature_merging(model, example=inputs, rule="sum_in")  # folded, so fine


def test_a_depthwise_layer_follows_its_channels() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 4, 4)
    tensors = {}
    for name, value in net.state_dict().items():
        if name == "5.weight":  # four places to each channel
            tensors[name] = torch.cat([value, value], 1) / 2
        elif name != "5.bias":
            tensors[name] = torch.cat([value, value])
    twice = copy.deepcopy(net)
    replace_tensors(twice, tensors)
    assert torch.allclose(twice(x), net(x), atol=1e-6)
    result = iterative_feature_merging(twice, example=x, beta=1e-7)
    assert result.widths == {"0": (8, 4)} and result.model[2].groups == 4
    assert torch.allclose(result.model(x), net(x), atol=1e-6)


# The loop


def slow(net: nn.Sequential, beta: float, max_ratio: float) -> list[tuple[int, int, int]]:
    """A readable twin for chains: everything is computed anew after each merge."""
    weights = [layer.weight.detach().clone() for layer in net if isinstance(layer, nn.Linear)]
    left = [list(range(len(w))) for w in weights[:-1]]
    counts = [[1.0] * len(w) for w in weights[:-1]]
    merges = []
    done = [0] * len(left)
    moved = True
    while moved:
        moved = False
        for g in range(len(left)):
            if len(left[g]) < 2 or done[g] >= math.ceil(max_ratio * len(counts[g]) - 1e-9) or len(left[g]) == 1:
                continue
            rows = torch.cat([weights[g], weights[g + 1].T], 1)
            d = torch.cdist(rows[None], rows[None], compute_mode="donot_use_mm_for_euclid_dist")[0] ** 2
            best = min((float(d[a, b]), a, b) for a in range(len(rows)) for b in range(a + 1, len(rows)))
            if best[0] > beta * float(d.max()):
                continue
            _, a, b = best
            ca, cb = counts[g][left[g][a]], counts[g][left[g][b]]
            weights[g][a] = (ca * weights[g][a] + cb * weights[g][b]) / (ca + cb)
            weights[g + 1][:, a] += weights[g + 1][:, b]
            keep = [i for i in range(len(rows)) if i != b]
            weights[g], weights[g + 1] = weights[g][keep], weights[g + 1][:, keep]
            counts[g][left[g][a]] += cb
            merges.append((g, left[g][a], left[g][b]))
            left[g].pop(b)
            done[g] += 1
            moved = True
    return merges


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("beta", "ratio"), [(0.4, 1.0), (math.inf, 0.6), (0.7, 0.5)])
def test_the_fast_loop_does_what_the_slow_one_does(seed: int, beta: float, ratio: float) -> None:
    net = mlp(7, 12, 9, 4, seed=seed)
    result = iterative_feature_merging(net, example=torch.ones(1, 7).double(), beta=beta, max_ratio=ratio)
    number = {"0": 0, "2": 1}
    expected = slow(net, beta, ratio)
    assert expected and [(number[m.group], m.kept, m.gone) for m in result.merges] == expected


def test_distances_are_those_of_the_unfolded_weights() -> None:
    model, inputs = build("resnet"), example("resnet")
    state = model.state_dict()
    for group in channel_groups(model, inputs).groups:
        if group.fixed:
            continue
        rows = torch.cat([
            state[m.tensor].movedim(m.axis, 0).reshape(group.width, -1).double() for m in group.members
            if state[m.tensor].ndim > 1
        ], 1)  # fmt: skip
        expected = torch.cdist(rows[None], rows[None])[0] ** 2
        assert torch.allclose(channel_distance(state, group), expected, rtol=1e-4, atol=1e-9)


def test_ties_go_to_the_lowest_pair_and_never_to_one_channel() -> None:
    net = mlp(2, 4, 1)
    with torch.no_grad():
        net[0].weight[:] = torch.tensor([[1.0, 0], [5, 5], [1, 0], [5, 5]])
        net[2].weight[:] = 1.0
    result = iterative_feature_merging(net, example=torch.ones(1, 2).double(), beta=1e-9)
    assert [(m.kept, m.gone) for m in result.merges] == [(0, 2), (1, 3)]
    assert result.widths == {"0": (4, 2)}
    # Of three duplicates the first two are then read twice as strongly as the third: it is no duplicate any more.
    with torch.no_grad():
        net[0].weight[:] = torch.tensor([[1.0, 0], [5, 5], [1, 0], [1, 0]])
    assert iterative_feature_merging(net, example=torch.ones(1, 2).double(), beta=1e-9).widths == {"0": (4, 3)}


def test_limits_of_the_loop() -> None:
    x = torch.ones(1, 4).double()
    net = mlp(4, 10, 6, 2)
    for ratio, left in ((0.0, (10, 6)), (0.25, (7, 4)), (0.5, (5, 3)), (0.99, (1, 1))):
        widths = iterative_feature_merging(net, example=x, beta=math.inf, max_ratio=ratio).widths
        assert tuple(after for _, after in widths.values()) == left
    assert iterative_feature_merging(net, example=x, beta=0).widths == {"0": (10, 10), "2": (6, 6)}
    single = mlp(4, 1, 2)
    assert iterative_feature_merging(single, example=x, beta=0.9).widths == {"0": (1, 1)}
    only = iterative_feature_merging(net, example=x, beta=math.inf, max_ratio=0.5, groups=["2"])
    assert only.widths == {"2": (6, 3)} and only.skipped == {"0": "not asked for", "4": "it is the network's output"}


def test_channels_that_nothing_reads_go_first_and_exactly() -> None:
    net = mlp(4, 6, 3)
    with torch.no_grad():
        net[2].weight[:, [1, 4]] = 0
    x = torch.randn(9, 4).double()
    result = iterative_feature_merging(net, example=x, beta=0)
    assert result.dead == {"0": (1, 4)} and result.widths == {"0": (6, 4)} and not result.merges
    assert torch.allclose(result.model(x), net(x), atol=1e-14)
    with torch.no_grad():
        net[0].weight[0], net[0].bias[0] = 0, 0  # makes nothing: legal
        net[2].weight.zero_()  # and a layer that is read by nobody keeps one channel
    assert iterative_feature_merging(net, example=x, beta=0).widths == {"0": (6, 1)}


def test_nothing_is_drawn_and_the_model_is_untouched() -> None:
    model, inputs = build("resnet").train(), example("resnet")
    before, random = state_hash(model), torch.get_rng_state()
    one = iterative_feature_merging(model, example=inputs, beta=0.5)
    two = iterative_feature_merging(model, example=inputs, beta=0.5)
    assert state_hash(model) == before and torch.equal(torch.get_rng_state(), random)
    assert one.merges == two.merges and state_hash(one.model) == state_hash(two.model)


def test_halves_are_merged_in_float32() -> None:
    model = build("llama").half()
    result = iterative_feature_merging(model, beta=2.0, max_ratio=0.5)  # the example is its own
    assert result.model.dtype == torch.float16
    assert all(torch.isfinite(value).all() for value in result.model.state_dict().values())


def test_what_attention_and_tying_hold_is_skipped_with_the_reason() -> None:
    for family in ("llama", "qwen2", "gpt2", "vit"):
        model, inputs = build(family), example(family)
        result = iterative_feature_merging(model, example=inputs, beta=math.inf, max_ratio=0.5)
        assert result.skipped and all(result.skipped.values()) and not set(result.skipped) & set(result.widths)
        assert all("mlp" in name or "fc1" in name or "intermediate" in name for name in result.widths)
        attention = [name for name in result.skipped if "attn" in name or "attention" in name]
        assert attention, family
        narrowed = {n for n, v in result.model.state_dict().items() if v.shape != model.state_dict()[n].shape}
        assert not any("attn" in n or "attention" in n or "embed" in n or "lm_head" in n for n in narrowed)
        if family == "qwen2":
            assert result.model.lm_head.weight is result.model.model.embed_tokens.weight


def test_channels_that_make_nothing_merge_first_and_exactly() -> None:
    net = mlp(4, 6, 3)
    with torch.no_grad():
        net[0].weight[[2, 5]], net[0].bias[[2, 5]] = 0, 0
        net[2].weight[:, 5] = net[2].weight[:, 2]
    x = torch.randn(9, 4).double()
    result = iterative_feature_merging(net, example=x, beta=0)
    assert [(m.kept, m.gone) for m in result.merges] == [(2, 5)] and not result.dead
    assert torch.allclose(result.model(x), net(x), atol=1e-14)


def test_distances_of_large_duplicates_are_not_below_zero() -> None:
    """a + a - 2a of large sums is not zero in floating point: a root of it, or its order, would be nonsense."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(300, 30), nn.ReLU(), nn.Linear(30, 7))
    with torch.no_grad():
        net[0].weight.mul_(1e4)
        net[0].weight[15:], net[2].weight[:, 15:] = net[0].weight[:15].clone(), net[2].weight[:, :15].clone()
    for model, x in ((net, torch.ones(1, 300)), (copy.deepcopy(net).half(), torch.ones(1, 300).half())):
        group = channel_groups(model, x).groups[0]
        distances = channel_distance(model.state_dict(), group)
        assert (distances >= 0).all() and (distances.diagonal(15) == 0).all()
        assert (distances + torch.eye(30) == 0).sum() == 30  # each with its twin alone


# Bad input


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"beta": -0.1}, "beta"), ({"beta": math.nan}, "beta"), ({"beta": 1.0}, "max_ratio below 1"),
        ({"beta": math.inf}, "max_ratio below 1"), ({"max_ratio": 1.5}, "max_ratio"), ({"max_ratio": -1}, "max_ratio"),
        ({"rule": "median"}, "rule"), ({"groups": ["conv9"]}, "nearest names: 'conv', 'conv2'"), ({"example": None}, "dummy_inputs"),
    ],
)  # fmt: skip
def test_bad_options(options: dict, text: str) -> None:
    with pytest.raises(InputError, match=text):
        iterative_feature_merging(build("plain"), **{"example": example("plain"), **options})


def test_bad_models() -> None:
    broken = build("plain")
    with torch.no_grad():
        broken.conv2.weight[0, 0, 0, 0] = math.nan
    with pytest.raises(DataError, match=r"conv2\.weight"):
        iterative_feature_merging(broken, example=example("plain"))
    with pytest.raises(InputError, match="groups"):
        net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 2, 1))
        iterative_feature_merging(net, example=torch.randn(1, 4, 5, 5))
    with pytest.raises(InputError, match="Linear has no group"):
        iterative_feature_merging(nn.Linear(3, 2), example=torch.randn(1, 3))
    with pytest.raises(InputError, match="MixtralForCausalLM has no group"):
        iterative_feature_merging(build("moe"), example=example("moe", 1))


# Complexity, equivalence


def test_complexity_falls_with_the_threshold_and_feeds_allocation() -> None:
    net = mlp(6, 16, 12, 3)
    measured = feature_complexity(net, (0.1, 0.3, 0.6), example=torch.ones(1, 6).double())
    assert measured.original == {"0": 16, "2": 12}
    for widths in measured.widths.values():
        assert list(widths) == sorted(widths, reverse=True)
    assert measured.fraction()[2] == sum(w[2] for w in measured.widths.values()) / 28
    assert list(measured.params) == sorted(measured.params, reverse=True)
    table = measured.to_pandas()
    assert len(table) == 6 and table.fraction.tolist()[0] == measured.fraction("0")[0]
    scores = measured.scores(0.6)
    assert scores.unit == "layer" and list(scores.ids) == ["0", "2"]
    shapes = {f"{i}.weight": tuple(net[i].weight.shape) for i in (0, 2, 4)}
    shares = allocate(shapes, 0.3, scores)
    assert shares["0.weight"] / shares["2.weight"] == pytest.approx(scores.values[0] / scores.values[1])
    with pytest.raises(InputError, match="measured were"):
        measured.scores(0.5)
    for betas in ((), (1.0,), (-0.1,), (math.nan,)):
        with pytest.raises(InputError, match="betas"):
            feature_complexity(net, betas, example=torch.ones(1, 6).double())


def test_equivalence_of_a_permuted_and_scaled_network() -> None:
    net = mlp(6, 8, 3)
    order = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
    scale = torch.linspace(0.5, 2, 8).double()
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[0].weight[:] = net[0].weight[order] * scale[:, None]
        other[0].bias[:] = net[0].bias[order] * scale
        other[2].weight[:] = net[2].weight[:, order] / scale
    x = torch.randn(60, 6).double()
    report = equivalence_report(net, other, x, ["1"])
    layer = report.layers["1"]
    expected = torch.zeros(8, 8).double()
    expected[order, torch.arange(8)] = scale
    assert torch.allclose(layer.map, expected, atol=1e-9) and layer.error < 1e-12 and layer.rank == 8
    assert report.largest_difference < 1e-12 and layer.cka < 1 - 1e-6  # CKA is fooled by scaling, the map is not
    stranger = equivalence_report(net, mlp(6, 8, 3, seed=5), x, ["1"])
    assert stranger.layers["1"].error > 0.1 and stranger.relative_difference > 0.1
    again = equivalence_report(build("resnet"), build("resnet"), example("resnet"), ["resnet.encoder.stages.0"])
    assert next(iter(again.layers.values())).error < 1e-6
    with pytest.raises(InputError, match="gives"):
        equivalence_report(net, mlp(6, 8, 4), x, ["1"])


# Channels removed, the baseline


def test_channels_are_removed_by_their_norm() -> None:
    net = mlp(3, 4, 2)
    with torch.no_grad():
        net[0].weight[:] = torch.tensor([[1.0, 1, 1], [3, 0, 0], [2, 2, 2], [0, 0, 0.1]])
    x = torch.randn(5, 3).double()
    pruned = prune_channels(net, 0.5, by="l1", example=x)
    assert pruned.kept == {"0": (0, 2)}  # of 3 and 3 the first
    assert prune_channels(net, 0.5, by="l2", example=x).kept == {"0": (1, 2)}
    h = torch.relu(net[0](x))[:, [0, 2]]
    assert torch.allclose(pruned.model(x), h @ net[2].weight[:, [0, 2]].T + net[2].bias)
    same = prune_channels(net, {"0": 3}, by="random", example=x, generator=torch.Generator().manual_seed(0))
    assert same.widths == {"0": (4, 3)}


def test_channels_by_activation_and_by_scale() -> None:
    net = mlp(3, 4, 2)
    x = torch.randn(30, 3).double()
    hidden = torch.relu(net[0](x))
    expected = (hidden.norm(dim=0) * net[2].weight.abs().sum(0)).topk(2).indices.sort().values
    pruned = prune_channels(net, 0.5, by="activation", example=x, batches=[(x[:10], 0), (x[10:], 0)])
    assert pruned.kept["0"] == tuple(expected.tolist())
    model, inputs = build("resnet"), example("resnet")
    with torch.no_grad():
        name = "resnet.encoder.stages.0.layers.0.layer.0"
        model.get_submodule(name).normalization.weight[:] = torch.arange(8.0)
    pruned = prune_channels(model, 0.5, by="gamma", example=inputs)
    assert pruned.kept[f"{name}.convolution"] == (4, 5, 6, 7)
    assert logits_of(run(pruned.model, inputs)).shape == (3, 3)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"keep": 0}, "keep"), ({"keep": 1.5}, "keep"), ({"keep": {"conv": 9}}, r"1\.\.4"), ({"keep": {"x": 1}}, "groups"),
        ({"keep": 0.5, "by": "l3"}, "by"), ({"keep": 0.5, "by": "random"}, "generator"),
        ({"keep": 0.5, "by": "activation"}, "batches"), ({"keep": {"conv2": 2}, "by": "gamma"}, "nothing to go by"),
    ],
)  # fmt: skip
def test_bad_pruning(options: dict, text: str) -> None:
    with pytest.raises(InputError, match=text):
        prune_channels(build("plain"), options.pop("keep"), example=example("plain"), **options)


def test_the_groups_are_those_of_torch_pruning() -> None:
    """The peer's dependency graph narrows the same tensors of a residual network to the same shapes."""
    peer = pytest.importorskip("torch_pruning")
    from salience.weights import CifarResNet

    model, x = CifarResNet(8, 8, generator=torch.Generator().manual_seed(0)).eval(), torch.randn(1, 3, 16, 16)
    ours = prune_channels(model, 0.5, example=x).model
    theirs = copy.deepcopy(model)
    importance = peer.importance.MagnitudeImportance(p=1)
    peer.pruner.MetaPruner(theirs, x, importance, pruning_ratio=0.5, ignored_layers=[theirs.fc]).step()
    assert {n: v.shape for n, v in ours.state_dict().items()} == {n: v.shape for n, v in theirs.state_dict().items()}


@pytest.mark.parametrize(("ratio", "left"), [(0.07, 93), (0.55, 45), (1 - 0.7, 70)])
def test_ratios_are_not_rounded_up_by_float_noise(ratio: float, left: int) -> None:
    net = mlp(3, 100, 2)
    merged = iterative_feature_merging(net, example=torch.ones(1, 3).double(), beta=math.inf, max_ratio=ratio)
    assert merged.widths == {"0": (100, left)}


def test_groups_to_prune_must_exist() -> None:
    x = torch.ones(1, 3).double()
    for keep in ({"0*": 2}, {"0": 2, "9": 1}):
        with pytest.raises(InputError, match="no group"):
            prune_channels(mlp(3, 6, 2), keep, by="l1", example=x)
