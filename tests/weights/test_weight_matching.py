"""Weight matching: specifications, assignments against brute force, invariance, barriers, alignment."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from salience.errors import DataError, InputError, NothingToDo
from salience.model import logits_of, run
from salience.weights import (
    CifarResNet,
    PermutationSpec,
    apply_permutation,
    barrier,
    distance_reduction,
    infer_spec,
    interpolate,
    match_activations,
    match_straight_through,
    match_weights,
    merge_many,
    recalibrate_norms,
    singular_alignment,
    taylor_barrier,
)
from tiny import build, example, state_hash


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mlp(seed: int, sizes=(5, 6, 6, 3)) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def vgg(seed: int) -> nn.Sequential:
    """Convolutions, a flatten with blocks of 4 columns, and dense layers."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(5, 7, 3, padding=1),
        nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(28, 9), nn.GELU(), nn.Dropout(),
        nn.LayerNorm(9), nn.Linear(9, 4),
    )  # fmt: skip


class Wired(nn.Module):
    """Everything that a specification has to see through: sums, views, functional calls, reuse, depthwise kernels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.again = nn.Conv2d(6, 6, 1)
        self.scale = nn.Parameter(torch.rand(6, 1, 1))
        self.dense = nn.Linear(24, 8)
        self.twice = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x + self.scale * self.depthwise(x)
        x = x + torch.tanh(self.again(x))
        x = nn.functional.adaptive_avg_pool2d(x, (2, 2)).view(x.size(0), -1)
        x = torch.relu(self.dense(x))
        for _ in range(2):
            x = x + nn.functional.gelu(self.twice(x))
        return self.head(x)


def shuffled(spec: PermutationSpec, state, seed: int = 3):
    """The same network with its units in another order, and the order."""
    draw = generator(seed)
    orders = {name: torch.randperm(size, generator=draw) for name, size in spec.sizes.items()}
    return apply_permutation(spec, orders, state), orders


FAMILIES = ["plain", "resnet", "vit", "llama", "qwen2", "gpt2"]


def networks():
    images = torch.randn(4, 3, 16, 16, generator=generator())
    yield "mlp", mlp(0), torch.randn(4, 5, generator=generator())
    yield "vgg", vgg(0), images
    yield "wired", Wired(), images
    yield "cifar", CifarResNet(14, 4, generator=generator()), images
    for family in FAMILIES:
        yield family, build(family), example(family)


# specifications


def test_the_spec_of_an_mlp_by_hand():
    spec = infer_spec(mlp(0, (5, 6, 7, 3)), torch.randn(2, 5))
    assert spec.sizes == {"0": 6, "2": 7}
    assert spec.axes_to_perm == {
        "0.weight": ("0", None), "0.bias": ("0",), "2.weight": ("2", "0"), "2.bias": ("2",), "4.weight": (None, "2"),
    }  # fmt: skip
    assert spec.perm_to_axes["0"] == [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)]


def test_the_spec_of_a_flatten_moves_blocks():
    spec = infer_spec(vgg(0), torch.randn(2, 3, 16, 16))
    assert spec.axes_to_perm["8.weight"] == ("8", "4") and spec.sizes["4"] == 7
    assert spec.axes_to_perm["1.running_var"] == ("0",) and spec.axes_to_perm["11.weight"] == ("8",)


def test_a_residual_stream_has_one_permutation():
    spec = infer_spec(CifarResNet(14, 4), torch.randn(2, 3, 8, 8))
    stream = spec.axes_to_perm["conv.weight"][0]
    for block in (0, 1):
        assert spec.axes_to_perm[f"blocks.{block}.conv2.weight"][0] == stream
        assert spec.axes_to_perm[f"blocks.{block}.conv1.weight"][1] == stream
        assert spec.axes_to_perm[f"blocks.{block}.conv1.weight"][0] != stream
    assert spec.axes_to_perm["blocks.2.shortcut.0.weight"][0] == spec.axes_to_perm["blocks.2.conv2.weight"][0] != stream
    assert len(spec.sizes) == 3 + 6


def test_wired_networks_are_seen_through():
    spec = infer_spec(Wired(), torch.randn(2, 3, 16, 16))
    assert spec.sizes == {"stem": 6, "dense": 8}  # the sums and the reuse leave two
    assert spec.axes_to_perm["depthwise.weight"] == ("stem", None, None, None)
    assert spec.axes_to_perm["scale"] == ("stem", None, None) and spec.axes_to_perm["twice.weight"] == (
        "dense",
        "dense",
    )


def test_attention_is_left_alone():
    for family, layer in (("vit", "fc1"), ("llama", "gate_proj"), ("gpt2", "c_fc")):
        spec = infer_spec(build(family), example(family))
        assert len(spec.sizes) == 3 and all(layer in name for name in spec.sizes)


class Padded(nn.Module):
    """Channels joined and padded: units there must stay where they are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.inner = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 5, 1)
        self.out, self.head = nn.Conv2d(5, 8, 1), nn.Linear(8, 3)

    def forward(self, x):
        x = self.one(x)
        y = self.two(torch.relu(x)) + nn.functional.pad(x, (0, 0, 0, 0, 2, 2))
        y = torch.cat([y[:, :4], y[:, 4:]], 1) + self.out(torch.relu(self.inner(y)))
        return self.head(y.mean((2, 3)))


def test_padded_and_joined_channels_stay_in_place():
    spec = infer_spec(Padded(), torch.randn(2, 3, 4, 4))
    assert spec.sizes == {"inner": 5}


class Ordered(nn.Module):
    """Uses the order of its units in a way that no specification sees."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.two(self.one(x).abs().pow(torch.arange(1, 7)))


def test_a_model_that_orders_its_units_is_caught():
    with pytest.raises(DataError, match="changes the outputs"):
        infer_spec(Ordered(), torch.randn(3, 4))


def test_nothing_to_permute():
    with pytest.raises(NothingToDo, match="Linear"):
        infer_spec(nn.Linear(3, 2), torch.randn(2, 3))
    with pytest.raises(InputError, match="example"):
        infer_spec(mlp(0), "text")


@pytest.mark.parametrize(
    ("name", "model", "inputs"), list(networks()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_permuted_networks_compute_the_same(name, model, inputs):
    model.eval()
    before = state_hash(model)
    spec = infer_spec(model, inputs)
    assert state_hash(model) == before
    other = copy.deepcopy(model)
    permuted, _ = shuffled(spec, model.state_dict())
    other.load_state_dict(permuted)
    with torch.no_grad():
        one, two = (logits_of(run(each, inputs)) for each in (model, other))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    moved = [n for n, p in other.named_parameters() if not torch.equal(p, model.get_parameter(n))]
    assert moved


# matching


@pytest.mark.parametrize(
    ("name", "model", "inputs"), list(networks()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_shuffled_network_is_put_back(name, model, inputs):
    spec = infer_spec(model.eval(), inputs)
    state = {n: v.clone() for n, v in model.state_dict().items()}
    permuted, _ = shuffled(spec, state)
    for init in range(5):  # a local optimum may be met; another order of the layers then finds the way
        found = match_weights(spec, state, permuted, generator=generator(init))
        back = apply_permutation(spec, found.permutations, permuted)
        if all(torch.equal(back[n], state[n]) for n in state):
            break
    else:
        pytest.fail("never put back")
    squares = sum(float(state[n].double().square().sum()) for n in spec.axes_to_perm if "running" not in n)
    assert found.objective == pytest.approx(squares, rel=1e-5)


def brute(spec, a, b, perm, rest):
    """Best order of one layer by trying all, the others held."""
    best, chosen = -math.inf, None
    for order in itertools.permutations(range(spec.sizes[perm])):
        state = apply_permutation(spec, {**rest, perm: torch.tensor(order)}, b)
        value = sum(float((a[n] * state[n]).sum()) for n in spec.axes_to_perm)
        if value > best:
            best, chosen = value, order
    return best, chosen


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [2, 5, 6])
def test_one_hidden_layer_is_matched_as_by_brute_force(seed, size):
    one, two = mlp(seed, (4, size, 3)), mlp(seed + 50, (4, size, 3))
    spec = infer_spec(one, torch.randn(2, 4))
    a, b = one.state_dict(), two.state_dict()
    found = match_weights(spec, a, b)
    best, order = brute(spec, a, b, "0", {})
    assert found.objective == pytest.approx(best - 0, rel=1e-5) and found.permutations["0"].tolist() == list(order)


def test_every_layer_is_optimal_given_the_others():
    one, two = mlp(1), mlp(2)
    spec = infer_spec(one, torch.randn(2, 5))
    a, b = one.state_dict(), two.state_dict()
    found = match_weights(spec, a, b)
    for perm in spec.sizes:
        rest = {name: order for name, order in found.permutations.items() if name != perm}
        assert found.objective == pytest.approx(brute(spec, a, b, perm, rest)[0], rel=1e-5)


def published(axes_to_perm, sizes, a, b, orders):
    """The published coordinate ascent, written plainly: axes un-permuted one by one, gains summed in full."""
    perm = {name: np.arange(size) for name, size in sizes.items()}
    from scipy.optimize import linear_sum_assignment

    for order in orders:
        progress = False
        for name in order:
            gain = np.zeros((sizes[name], sizes[name]))
            for tensor, perms in axes_to_perm.items():
                for axis, carried in enumerate(perms):
                    if carried != name:
                        continue
                    w = b[tensor]
                    for other, p in enumerate(perms):
                        if other != axis and p is not None:
                            w = np.take(w, perm[p], other)
                    w_a = np.moveaxis(a[tensor], axis, 0).reshape(sizes[name], -1)
                    gain += w_a @ np.moveaxis(w, axis, 0).reshape(sizes[name], -1).T
            rows, columns = linear_sum_assignment(gain, maximize=True)
            old = gain[rows, perm[name]].sum()
            progress = progress or gain[rows, columns].sum() > old + 1e-12
            perm[name] = columns
        if not progress:
            break
    return perm


@pytest.mark.parametrize("kind", ["mlp", "cifar"])
def test_the_published_algorithm_reaches_the_same(kind):
    if kind == "mlp":
        one, two, x = mlp(1, (8, 16, 12, 3)), mlp(2, (8, 16, 12, 3)), torch.randn(2, 8)
    else:
        one, two = (CifarResNet(8, 4, generator=generator(seed)) for seed in (1, 2))
        x = torch.randn(2, 3, 8, 8)
    spec = infer_spec(one, x)
    a, b = one.state_dict(), two.state_dict()
    found = match_weights(spec, a, b, generator=generator(5))
    draw, names = generator(5), list(spec.sizes)
    orders = [[names[i] for i in torch.randperm(len(names), generator=draw).tolist()] for _ in range(100)]
    learned = {n: p for n, p in spec.axes_to_perm.items() if "running" not in n}
    arrays = [{n: state[n].double().numpy() for n in learned} for state in (a, b)]
    expected = published(learned, spec.sizes, *arrays, orders)
    for name, order in expected.items():
        np.testing.assert_array_equal(found.permutations[name].numpy(), order)


def test_both_sides_of_a_layer_decide():
    """Rows alone would keep the order; the columns of the next layer say otherwise."""
    a, b = mlp(0, (2, 2, 2)).state_dict(), mlp(0, (2, 2, 2)).state_dict()
    for state, columns in ((a, [[5.0, 0.0], [0.0, 5.0]]), (b, [[0.0, 5.0], [5.0, 0.0]])):
        state["0.weight"].copy_(torch.eye(2))
        state["0.bias"].zero_()
        state["2.weight"].copy_(torch.tensor(columns))
    spec = infer_spec(mlp(0, (2, 2, 2)), torch.randn(2, 2))
    assert match_weights(spec, a, b).permutations["0"].tolist() == [1, 0]


def test_matching_repeats_and_starts_where_it_is_told():
    one, two = mlp(1, (8, 32, 32, 3)).state_dict(), mlp(2, (8, 32, 32, 3)).state_dict()
    spec = infer_spec(mlp(1, (8, 32, 32, 3)), torch.randn(2, 8))
    before = torch.get_rng_state()
    first, second = match_weights(spec, one, two), match_weights(spec, one, two)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first.permutations[n], second.permutations[n]) for n in spec.sizes)
    again = match_weights(spec, one, two, init=first.permutations)
    assert again.sweeps == 1 and again.objective == pytest.approx(first.objective)
    with pytest.raises(InputError, match="init"):
        match_weights(spec, one, two, init={"0": torch.zeros(32, dtype=torch.long)})


def test_activations_put_a_shuffled_network_back():
    for name, model, inputs in networks():
        model.eval()
        if name in ("plain", "wired"):
            continue  # units that are dead on random inputs have no activation to go by
        spec = infer_spec(model, inputs)
        other = copy.deepcopy(model)
        permuted, orders = shuffled(spec, model.state_dict())
        other.load_state_dict(permuted)
        hashes = state_hash(model), state_hash(other)
        found = match_activations(spec, model, other, [inputs])
        assert (state_hash(model), state_hash(other)) == hashes
        good = sum(int((orders[n][order] == torch.arange(len(order))).sum()) for n, order in found.permutations.items())
        assert good >= 0.9 * sum(spec.sizes.values()), name


def test_straight_through_lowers_the_loss_of_the_midpoint():
    draw = generator()
    x = torch.randn(200, 6, generator=draw)
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    models = []
    for seed in (0, 1):
        model = mlp(seed, (6, 16, 16, 4))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(150):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
        models.append(model)
    spec = infer_spec(models[0], x[:2])
    hashes = [state_hash(model) for model in models]
    found = match_straight_through(spec, *models, x, y, cross_entropy, epochs=15, lr=0.05, batch_size=200)
    assert [state_hash(model) for model in models] == hashes
    a, b = (model.state_dict() for model in models)

    def loss_at(state):
        other = copy.deepcopy(models[0])
        other.load_state_dict(interpolate(a, state, 0.5))
        with torch.no_grad():
            return float(cross_entropy(other(x), y))

    permuted = apply_permutation(spec, found.permutations, b)
    assert loss_at(permuted) == pytest.approx(found.objective, rel=1e-4)
    assert found.objective < loss_at(b)
    assert found.objective <= loss_at(apply_permutation(spec, match_weights(spec, a, b).permutations, b)) + 1e-6
    with pytest.raises(InputError, match="rows"):
        match_straight_through(spec, *models, x, y[:3], cross_entropy)


# between networks


def test_barriers_by_hand():
    """One weight, loss w^2: from -1 to 1 the line dips to 0; from 1 to 3 it is convex; a hump is measured."""
    model = nn.Linear(1, 1, bias=False)
    states = {w: {"weight": torch.tensor([[float(w)]])} for w in (-1, 1, 3)}

    def square(network):
        w = float(network.weight.detach())
        return w * w, 0.5

    def hump(network):
        w = float(network.weight.detach())
        return 1 - w * w, 1.0 if abs(w) > 0.99 else 0.25

    assert barrier(model, states[1], states[3], square, points=5).barrier == 0
    result = barrier(model, states[-1], states[1], hump, points=5)
    assert result.barrier == pytest.approx(1) and result.accuracy_barrier == pytest.approx(0.75)
    assert result.midpoint_loss == 1 and result.midpoint_accuracy == 0.25
    np.testing.assert_allclose(result.losses, [0, 0.75, 1, 0.75, 0])
    for points in (2, 4):
        with pytest.raises(InputError, match="points"):
            barrier(model, states[1], states[3], square, points=points)
    with pytest.raises(DataError, match="not finite"):
        barrier(model, states[1], states[3], lambda network: (math.nan, 0.0), points=3)


def test_batch_norm_is_recalibrated_or_warned_of():
    one, two = vgg(0).eval(), vgg(1).eval()
    x = torch.randn(64, 3, 16, 16, generator=generator())
    with pytest.warns(UserWarning, match="recalibrate"):
        barrier(one, one.state_dict(), two.state_dict(), lambda model: (0.0, 0.0), points=3)
    seen = []

    def look(model):
        seen.append(model[1].running_mean.clone())
        return 0.0, 0.0

    barrier(one, one.state_dict(), two.state_dict(), look, points=3, recalibrate=[x])
    middle = copy.deepcopy(one)
    middle.load_state_dict(interpolate(one.state_dict(), two.state_dict(), 0.5))
    with torch.no_grad():
        expected = middle[0](x).mean((0, 2, 3))
    torch.testing.assert_close(seen[1], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(seen[0], one[1].running_mean) and torch.equal(seen[2], two[1].running_mean)


def test_recalibration_is_the_mean_over_batches_and_gives_flags_back():
    model = vgg(0)
    model[1].eval()
    x = torch.randn(60, 3, 16, 16, generator=generator())
    flags = [module.training for module in model.modules()]
    recalibrate_norms(model, x.split(20))
    assert [module.training for module in model.modules()] == flags and model[1].momentum == 0.1
    with torch.no_grad():
        out = model[0](x)
    torch.testing.assert_close(model[1].running_mean, out.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="none"):
        recalibrate_norms(model, [])


def test_interpolation_and_its_ends():
    a, b = mlp(0).state_dict(), mlp(1).state_dict()
    for name, value in interpolate(a, b, 0.25).items():
        torch.testing.assert_close(value, 0.75 * a[name] + 0.25 * b[name])
    assert all(torch.equal(value, a[name]) for name, value in interpolate(a, b, 0.0).items())
    half = {name: value.bfloat16() for name, value in a.items()}
    assert interpolate(half, half, 0.3)["0.weight"].dtype == torch.bfloat16
    with pytest.raises(DataError, match="has no tensor"):
        interpolate(a, {}, 0.5)


@pytest.mark.parametrize("mode", ["reference", "mean"])
def test_shuffled_copies_merge_to_the_original(mode):
    model = mlp(0, (8, 24, 24, 3))
    spec = infer_spec(model, torch.randn(2, 8))
    state = model.state_dict()
    copies = [shuffled(spec, state, seed)[0] for seed in range(3)]
    merged = merge_many(spec, [state, *copies], mode=mode)
    for name, value in merged.items():
        torch.testing.assert_close(value, state[name])
    with pytest.raises(InputError, match="mode"):
        merge_many(spec, [state, *copies], mode="middle")
    with pytest.raises(InputError, match="states"):
        merge_many(spec, [state])


# alignment


def test_equal_networks_align_and_independent_ones_do_not():
    a, b = mlp(0, (40, 64, 64, 10)).state_dict(), mlp(1, (40, 64, 64, 10)).state_dict()
    for gamma in (0, 0.3, 1):
        assert singular_alignment(a, a, gamma=gamma).score == pytest.approx(1, abs=1e-6)
    assert abs(singular_alignment(a, b, gamma=0).score) < 0.05
    result = singular_alignment(a, b, gamma=0.3)
    assert set(result.layers) == {"0.weight", "2.weight", "4.weight"} and result.spectra["0.weight"][0][0] == 1


def test_alignment_is_the_double_sum():
    a, b = torch.randn(4, 3, generator=generator()), torch.randn(4, 3, generator=generator(1))
    ua, sa, va = np.linalg.svd(a.double().numpy(), full_matrices=False)
    ub, sb, vb = np.linalg.svd(b.double().numpy(), full_matrices=False)
    total = 0.0
    large_a, large_b = ([i for i in range(3) if s[i] >= 0.5 * s[0]] for s in (sa, sb))
    for i in large_a:
        for j in large_b:
            total += (ua[:, i] @ ub[:, j]) * (va[i] @ vb[j])
    expected = total / min(len(large_a), len(large_b))
    found = singular_alignment({"w": a}, {"w": b}, gamma=0.5)
    assert found.score == pytest.approx(expected) and found.kept["w"] == (len(large_a), len(large_b))


def test_permutations_keep_singular_values_and_kernels_are_flattened():
    model = CifarResNet(8, 4, generator=generator())
    spec = infer_spec(model, torch.randn(2, 3, 8, 8))
    state = model.state_dict()
    permuted, _ = shuffled(spec, state)
    result = singular_alignment(state, permuted, gamma=0)
    for one, two in result.spectra.values():
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
    assert result.score < 0.9 and len(result.spectra["conv.weight"][0]) == 4


def test_distance_reduction_by_hand():
    a, b, c = ({"w": torch.tensor([value])} for value in (0.0, 4.0, 3.0))
    assert distance_reduction(a, b, c) == pytest.approx(25)
    with pytest.raises(DataError, match="equals"):
        distance_reduction(a, a, b)


def test_taylor_is_exact_for_a_quadratic():
    model = nn.Linear(3, 1)
    x, y = torch.randn(20, 3, generator=generator()), torch.randn(20, 1, generator=generator(1))
    a, b = ({n: v.clone() for n, v in nn.Linear(3, 1).state_dict().items()} for _ in range(2))

    def loss(network):
        return (network(x) - y).square().mean()

    def value(state):
        other = copy.deepcopy(model)
        other.load_state_dict(state)
        with torch.no_grad():
            return float(loss(other))

    measured = value(interpolate(a, b, 0.5)) - (value(a) + value(b)) / 2
    assert taylor_barrier(model, a, b, loss) == pytest.approx(measured, rel=1e-4)


# what is refused


def test_bad_input():
    one, two = mlp(0), mlp(1)
    spec = infer_spec(one, torch.randn(2, 5))
    a, b = one.state_dict(), two.state_dict()
    with pytest.raises(DataError, match=r"'0\.weight' has shape"):
        match_weights(spec, a, mlp(0, (5, 7, 6, 3)).state_dict())
    with pytest.raises(DataError, match=r"model b: has no tensor '4\.weight'"):
        match_weights(spec, a, mlp(0, (5, 6, 6)).state_dict())
    with pytest.raises(DataError, match="specification names"):
        match_weights(PermutationSpec({"9.weight": ("x", None)}, {"x": 6}), a, b)
    with pytest.raises(DataError, match="no multiple"):
        match_weights(PermutationSpec({"0.weight": ("x", None)}, {"x": 5}), a, b)
    for bad in (math.nan, math.inf):
        broken = {name: value.clone() for name, value in b.items()}
        broken["2.weight"][0, 0] = bad
        with pytest.raises(DataError, match=r"model b: '2\.weight' holds NaN"):
            match_weights(spec, a, broken)
        with pytest.raises(DataError, match="NaN"):
            singular_alignment(a, broken)
    with pytest.raises(InputError, match="max_iter"):
        match_weights(spec, a, b, max_iter=0)
    with pytest.raises(InputError, match="gamma"):
        singular_alignment(a, b, gamma=1.5)
    with pytest.raises(InputError, match="batches"):
        match_activations(spec, one, two, [])


def test_widths_of_one_and_duplicate_units_are_fine():
    one, two = mlp(0, (3, 1, 2)), mlp(1, (3, 1, 2))
    spec = infer_spec(one, torch.randn(2, 3))
    if spec.sizes:
        match_weights(spec, one.state_dict(), two.state_dict())
    twin = mlp(0, (3, 4, 2))
    with torch.no_grad():
        twin[0].weight[1], twin[0].bias[1] = twin[0].weight[0], twin[0].bias[0]
        twin[2].weight[:, 1] = twin[2].weight[:, 0]
    spec = infer_spec(twin, torch.randn(2, 3))
    found = match_weights(spec, twin.state_dict(), twin.state_dict())
    assert found.objective == pytest.approx(
        sum(float(twin.state_dict()[n].square().sum()) for n in spec.axes_to_perm), rel=1e-5
    )


class Reused(nn.Module):
    """One weight under two names, between layers of their own."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.one, self.up, self.down, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.down.weight = self.up.weight

    def forward(self, x):
        return self.head(torch.relu(self.down(torch.relu(self.up(torch.relu(self.one(x)))))))


def test_tied_weights_have_one_permutation():
    model = Reused(0)
    spec = infer_spec(model, torch.randn(2, 4))
    permuted, _ = shuffled(spec, model.state_dict())
    other = Reused(1)
    other.load_state_dict(permuted)
    assert other.down.weight is other.up.weight
    x = torch.randn(5, 4, generator=generator())
    torch.testing.assert_close(other(x), model(x), rtol=1e-5, atol=1e-5)
    assert set(spec.sizes) == {"one"} and spec.axes_to_perm["up.weight"] == ("one", "one")


def test_grouped_kernels_hold_their_units_in_place():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1, groups=2), nn.ReLU(), nn.Conv2d(4, 6, 1), nn.ReLU(),
        nn.Conv2d(6, 2, 1),
    )  # fmt: skip
    assert infer_spec(model, torch.randn(1, 3, 4, 4)).sizes == {"4": 6}
    with pytest.raises(NothingToDo, match="Sequential"):
        infer_spec(model[:3], torch.randn(1, 3, 4, 4))


def test_halves_are_matched_in_float32():
    one, two = mlp(0, (8, 24, 24, 3)), mlp(1, (8, 24, 24, 3))
    spec = infer_spec(one, torch.randn(2, 8))
    halves = [{n: v.half() for n, v in model.state_dict().items()} for model in (one, two)]
    wide = [{n: v.float() for n, v in half.items()} for half in halves]
    found, expected = (match_weights(spec, *states, generator=generator()) for states in (halves, wide))
    assert found.objective == expected.objective
    assert all(torch.equal(order, expected.permutations[name]) for name, order in found.permutations.items())
    assert apply_permutation(spec, found.permutations, halves[1])["0.weight"].dtype == torch.float16


class OptionA(nn.Module):
    """The CIFAR ResNet-20 of He et al. with parameter-free shortcuts, under the names of the stored weights."""

    class Block(nn.Module):
        def __init__(self, narrow: int, wide: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(narrow, wide, 3, stride=wide // narrow, padding=1, bias=False)
            self.conv2 = nn.Conv2d(wide, wide, 3, padding=1, bias=False)
            self.bn1, self.bn2, self.more = nn.BatchNorm2d(wide), nn.BatchNorm2d(wide), (wide - narrow) // 2

        def forward(self, x):
            y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
            if self.more:
                x = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more, self.more))
            return torch.relu(x + y)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        widths = [16] * 4 + [32] * 3 + [64] * 3
        blocks = [self.Block(*pair) for pair in itertools.pairwise(widths)]
        self.layer1, self.layer2, self.layer3 = (nn.Sequential(*blocks[i : i + 3]) for i in (0, 3, 6))
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


@pytest.mark.realdata
def test_a_pretrained_resnet_is_shuffled_and_put_back():
    import os
    from pathlib import Path

    from safetensors.torch import load_file

    from salience.model import read_images

    if not os.environ.get("SALIENCE_DATA"):
        pytest.skip("SALIENCE_DATA names no data folder")
    folder = Path(os.environ["SALIENCE_DATA"])
    model = OptionA()
    model.load_state_dict(load_file(folder / "resnet20-cifar10" / "model.safetensors"), strict=False)
    model.eval()
    images = read_images(
        folder / "cifar10" / "test.parquet", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), limit=200
    )
    x = torch.stack([images[i][0] for i in range(200)])
    with torch.no_grad():
        before = model(x)
    assert (before.argmax(1) == images.labels).double().mean() > 0.7
    spec = infer_spec(model, x[:2])
    assert len(spec.sizes) == 9  # within each block; padded shortcuts fix the order of the streams
    state = {name: value.clone() for name, value in model.state_dict().items()}
    permuted, _ = shuffled(spec, state)
    other = copy.deepcopy(model)
    other.load_state_dict(permuted)
    with torch.no_grad():
        torch.testing.assert_close(other(x), before, rtol=1e-4, atol=1e-4)
    back = apply_permutation(spec, match_weights(spec, state, permuted).permutations, permuted)
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_a_last_batch_of_one_is_left_out_and_a_failure_leaves_the_statistics():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    x = torch.randn(9, 4, generator=generator())
    recalibrate_norms(model, x.split(4))  # 4, 4 and 1
    with torch.no_grad():
        out = model[0](x[:8])
    torch.testing.assert_close(model[1].running_mean, out.mean(0), rtol=1e-4, atol=1e-5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for batches, match in (([x[:1]], "of one example"), ([], "none"), ([x[:4], x[:4, :2]], "shapes")):
        with pytest.raises((InputError, RuntimeError), match=match):
            recalibrate_norms(model, batches)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name
    assert model[1].momentum == 0.1


def test_an_example_that_the_model_does_not_take():
    with pytest.raises(InputError, match=r"example: Sequential does not take shape \(2, 9\)"):
        infer_spec(mlp(0), torch.randn(2, 9))
