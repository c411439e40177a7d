"""Sparse networks: densities, scores and masks against hand-worked figures, peers and the published algorithms."""

from __future__ import annotations

import copy
import math
import warnings

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize, prune

from salience.errors import InputError, NothingToDo
from salience.scores import Scores
from salience.weights import (
    SRSTE,
    allocate,
    apply_masks,
    densities_of,
    finalize,
    lottery_ticket,
    mask_from_scores,
    measure_latency,
    parametrize_masks,
    prunable,
    random_masks,
    score_grasp,
    score_magnitude,
    score_random,
    score_snip,
    score_synflow,
    score_wanda,
    shuffle_masks,
    sparsity_report,
    synflow_masks,
    taxonomy,
)
from tiny import build, example, state_hash

SHAPES = {"a": (300, 64), "b": (100, 300), "c": (10, 100)}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mlp(*sizes: int, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        layer for i in range(len(sizes) - 1) for layer in (nn.Linear(sizes[i], sizes[i + 1], bias=bias), nn.ReLU())
    ]
    return nn.Sequential(*layers[:-1])


def lesson(rows: int = 24) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = torch.randn(rows, 5, generator=generator(3))
    return [(x[: rows // 2], torch.arange(rows // 2) % 3), (x[rows // 2 :], torch.arange(rows - rows // 2) % 3)]


def kept(masks) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


# What can be pruned, and how much of each layer


def test_prunable_weights() -> None:
    assert list(prunable(build("plain"))) == ["conv.weight", "conv2.weight", "head.weight"]
    names = list(prunable(build("gpt2")))
    assert "transformer.h.0.mlp.c_fc.weight" in names and not any("ln" in n or "wpe" in n for n in names)
    assert prunable(build("gpt2"))["transformer.h.0.mlp.c_fc.weight"].in_axis == 0
    tied = [n for n in prunable(build("qwen2")) if "embed" in n or "lm_head" in n]
    assert tied == ["model.embed_tokens.weight"]  # one mask for the tied pair, under the first of its names
    assert list(prunable(build("plain"), exclude=["conv*"])) == ["head.weight"]
    with pytest.raises(InputError, match=r"nearest names: 'conv\.weight'"):
        prunable(build("plain"), exclude=["conv.wight"])
    with pytest.raises(NothingToDo, match="BatchNorm2d"):
        prunable(nn.BatchNorm2d(3))


def erk(shapes, density: float) -> dict[str, float]:
    """The solution by bisection instead of the loop."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    low, high = 0.0, 1e9
    for _ in range(200):
        eps = (low + high) / 2
        shares = {name: min(1.0, eps * sum(s) / math.prod(s)) for name, s in shapes.items()}
        total = sum(shares[n] * sizes[n] for n in shapes)
        low, high = (eps, high) if total < density * sum(sizes.values()) else (low, eps)
    return shares


@pytest.mark.parametrize("density", [0.01, 0.05, 0.1, 0.3, 0.6, 0.9, 1.0])
@pytest.mark.parametrize(
    "shapes", [SHAPES, {"s": (16, 3, 3, 3), "m": (32, 16, 3, 3), "l": (64, 32, 1, 1), "h": (10, 64)}]
)
def test_erk_against_bisection_and_its_total(shapes, density: float) -> None:
    shares = allocate(shapes, density)
    assert shares == pytest.approx(erk(shapes, density), abs=1e-9)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    assert sum(shares[n] * sizes[n] for n in shapes) == pytest.approx(density * sum(sizes.values()))
    assert max(shares.values()) <= 1 + 1e-12


def test_allocations_by_hand() -> None:
    assert allocate(SHAPES, 0.1, "uniform") == pytest.approx(dict.fromkeys(SHAPES, 0.1))
    # er: raw 364/19200, 400/30000, 110/1000; eps (364 + 400 + 110) = 0.05 * 50200 -> eps = 2.8719
    eps = 0.05 * 50200 / 874
    assert allocate(SHAPES, 0.05, "er") == pytest.approx(
        {"a": eps * 364 / 19200, "b": eps * 400 / 30000, "c": eps * 0.11}
    )
    plus = allocate(SHAPES, 0.5, "uniform+")
    assert plus["a"] == 1 and plus["b"] == plus["c"] == pytest.approx((25100 - 19200) / 31000)
    small = allocate({"s": (4, 4), "b": (100, 300), "c": (10, 100)}, 0.05, "uniform+")
    assert small["s"] == 1 and small["c"] == 0.2 and small["b"] == pytest.approx((0.05 * 31016 - 216) / 30000)
    layers = allocate(SHAPES, 0.1, Scores([1.0, 3.0], ["a", "b"], "layer"))
    assert layers["b"] / layers["a"] == pytest.approx(3) and layers["c"] / layers["a"] == pytest.approx(2)  # the mean
    crowded = allocate(SHAPES, 0.5, Scores([1.0, 1.0, 100.0], ["a", "b", "c"], "layer"))
    assert crowded["c"] == 1 and crowded["a"] == pytest.approx(crowded["b"])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((SHAPES, 0), "density"), ((SHAPES, 1.1), "density"), ((SHAPES, math.nan), "density"), (({}, 0.1), "shapes"),
        ((SHAPES, 0.1, "erc"), "mode"), ((SHAPES, 0.1, "erk", ["d"]), "dense"),
        ((SHAPES, 0.1, "erk", ["a"]), r"smallest possible is 0\.382471"),
        ((SHAPES, 0.1, Scores([1.0], ["z"], "layer")), "nearest|there are"),
        ((SHAPES, 0.1, Scores([-1.0], ["a"], "layer")), "not be negative"),
        ((SHAPES, 0.1, "uniform+"), "smallest possible"),
    ],
)  # fmt: skip
def test_bad_allocations(arguments, text: str) -> None:
    with pytest.raises(InputError, match=text):
        allocate(*arguments)
    assert allocate(SHAPES, 0.382471, "erk", ["a"])["a"] == 1


# Masks


def test_counts_are_exact_and_ties_go_by_position() -> None:
    scores = {"a": torch.zeros(3, 4), "b": torch.ones(2, 3)}
    masks = mask_from_scores(scores, 0.5)  # 9 of 18: all of b, then the first 3 zeros
    assert masks["b"].all() and masks["a"].flatten().tolist() == [True] * 3 + [False] * 9
    for density in (0.01, 0.11, 0.5, 0.97, 1.0):
        drawn = {n: torch.rand(s, generator=generator()) for n, s in SHAPES.items()}
        assert kept(mask_from_scores(drawn, density)) == round(density * 50200)
        shares = allocate(SHAPES, density)
        by_layer = random_masks(shares, SHAPES, generator())
        assert {n: int(m.sum()) for n, m in by_layer.items()} == {
            n: round(shares[n] * math.prod(s)) for n, s in SHAPES.items()
        }
    assert all(
        torch.equal(random_masks(shares, SHAPES, generator(1))[n], random_masks(shares, SHAPES, generator(1))[n])
        for n in SHAPES
    )


def test_masks_are_those_of_torch_prune() -> None:
    net = mlp(8, 16, 4)
    ours = mask_from_scores(score_magnitude(net), 0.3)
    theirs = copy.deepcopy(net)
    parts = [(theirs[0], "weight"), (theirs[2], "weight")]
    prune.global_unstructured(parts, pruning_method=prune.L1Unstructured, amount=192 - round(0.3 * 192))
    assert torch.equal(ours["0.weight"], theirs[0].weight_mask.bool()) and torch.equal(
        ours["2.weight"], theirs[2].weight_mask.bool()
    )
    layer = mask_from_scores(score_magnitude(net), 0.25, scope="layer")
    structured = mask_from_scores({"0.weight": net[0].weight.detach().abs()}, 0.5, scope="layer", grain="channel")
    theirs = copy.deepcopy(net)
    prune.l1_unstructured(theirs[0], "weight", amount=96)
    assert torch.equal(layer["0.weight"], theirs[0].weight_mask.bool())
    theirs = copy.deepcopy(net)
    prune.ln_structured(theirs[0], "weight", amount=8, n=1, dim=0)
    assert torch.equal(structured["0.weight"], theirs[0].weight_mask.bool())


def test_rows_kernels_and_n_of_m() -> None:
    score = torch.tensor([[4.0, 3, 2, 1], [1, 2, 3, 4]])
    row = mask_from_scores({"w": score}, 0.5, scope="row")["w"]
    assert row.tolist() == [[True, True, False, False], [False, False, True, True]]
    column = mask_from_scores({"w": score}, 0.5, scope="row", transposed=["w"])["w"]
    assert column.tolist() == [[True, True, False, False], [False, False, True, True]]
    two_of_four = mask_from_scores({"w": score}, n_m=(2, 4))["w"]
    assert torch.equal(two_of_four, row)
    assert mask_from_scores({"w": score.T.contiguous()}, n_m=(2, 4), transposed=["w"])["w"].equal(row.T)
    conv = torch.rand(3, 8, 3, 3, generator=generator())
    masks = mask_from_scores({"w": conv}, n_m=(1, 4))["w"]  # along input channels at each place
    assert (masks.view(3, 2, 4, 3, 3).sum(2) == 1).all()
    assert torch.equal(
        masks, conv == conv.view(3, 2, 4, 3, 3).amax(2, keepdim=True).expand(3, 2, 4, 3, 3).reshape(3, 8, 3, 3)
    )
    kernels = mask_from_scores({"w": conv}, 0.25, grain="kernel")["w"].flatten(2)
    assert ((kernels.sum(2) == 0) | (kernels.sum(2) == 9)).all() and kernels.all(2).sum() == 6


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        ((0,), {}, "density"), ((1.5,), {}, "density"), ((None,), {}, "density"), ((0.5,), {"n_m": (2, 4)}, "either"),
        ((0.5,), {"scope": "block"}, "scope"), ((0.5,), {"grain": "pixel"}, "grain"), (({"w": 0.5},), {}, "scope 'layer'"),
        (({"v": 0.5},), {"scope": "layer"}, "different weights"), ((None,), {"n_m": (2, 5)}, "not a multiple of 5"),
        ((None,), {"n_m": (5, 4)}, "N must"),
    ],
)  # fmt: skip
def test_bad_masks(arguments, options, text: str) -> None:
    with pytest.raises(InputError, match=text):
        mask_from_scores({"w": torch.rand(3, 4)}, *arguments, **options)


def test_scores_must_be_finite_and_collapse_is_told() -> None:
    with pytest.raises(InputError, match="not finite"):
        mask_from_scores({"w": torch.tensor([[math.nan, 1.0]])}, 0.5)
    with pytest.warns(UserWarning, match="layer collapse: a"):
        mask_from_scores({"a": torch.zeros(2, 2), "b": torch.ones(2, 2)}, 0.5)


def test_shuffled_masks_keep_each_layers_count() -> None:
    masks = random_masks(allocate(SHAPES, 0.1), SHAPES, generator())
    shuffled = shuffle_masks(masks, generator(1))
    assert densities_of(shuffled) == densities_of(masks) and not torch.equal(shuffled["a"], masks["a"])


# Scores


def test_snip_is_the_gradient_of_the_mask() -> None:
    net, batches = mlp(5, 7, 3), lesson()
    masks = {name: torch.ones_like(e.weight, requires_grad=True) for name, e in prunable(net).items()}

    def masked(x):
        h = torch.relu(nn.functional.linear(x, net[0].weight * masks["0.weight"], net[0].bias))
        return nn.functional.linear(h, net[2].weight * masks["2.weight"], net[2].bias)

    sum(cross_entropy(masked(x), y) for x, y in batches).backward()
    expected = {name: mask.grad.abs() for name, mask in masks.items()}
    total = sum(e.sum() for e in expected.values())
    net.zero_grad()
    before = state_hash(net)
    scores = score_snip(net, batches)
    assert state_hash(net) == before  # no gradient is left, no flag changed
    for name in expected:
        assert torch.allclose(scores[name], expected[name] / total, rtol=1e-5, atol=1e-9)


def test_grasp_is_weight_times_hessian_times_gradient() -> None:
    net, batches = mlp(3, 4, 3).double(), [(torch.randn(6, 3, generator=generator()).double(), torch.arange(6) % 3)]
    names = list(prunable(net))
    shapes = [net.get_parameter(name).shape for name in names]

    def loss(flat):
        parts = flat.split([s.numel() for s in shapes])
        first, second = (part.view(shape) for part, shape in zip(parts, shapes))
        h = torch.relu(nn.functional.linear(batches[0][0], first, net[0].bias.detach()))
        return cross_entropy(nn.functional.linear(h, second, net[2].bias.detach()) / 200, batches[0][1])

    flat = torch.cat([net.get_parameter(name).detach().flatten() for name in names]).requires_grad_()
    gradient = torch.autograd.grad(loss(flat), flat)[0]
    hessian = torch.autograd.functional.hessian(loss, flat)
    expected = flat.detach() * (hessian @ gradient)
    scores = score_grasp(net, batches)
    ours = torch.cat([scores[name].flatten() for name in names])
    assert torch.allclose(ours, expected / (expected.sum().abs() + 1e-10), rtol=1e-5)
    assert (ours < 0).any() and (ours > 0).any()
    masks = mask_from_scores(scores, 0.25)
    picked = torch.cat([masks[name].flatten() for name in names])
    assert expected[picked].min() >= expected[~picked].max()  # the largest signed ones, not the largest in size
    with pytest.raises(InputError, match="temperature"):
        score_grasp(net, batches, temperature=0)


def test_synflow_is_the_flow_and_is_conserved() -> None:
    net = mlp(4, 6, 5, 2, bias=False)
    before = state_hash(net)
    scores = score_synflow(net, torch.randn(2, 4))
    assert state_hash(net) == before
    a, b, c = (net[i].weight.detach().double().abs() for i in (0, 2, 4))
    into = a.sum(1)
    assert torch.allclose(scores["4.weight"], c * (b @ into)[None])
    assert torch.allclose(scores["2.weight"], b * c.sum(0)[:, None] * into[None])
    totals = [float(score.sum()) for score in scores.values()]
    assert totals == pytest.approx([totals[0]] * 3)
    deep = mlp(*[64] * 60, bias=False)
    with torch.no_grad():
        for parameter in deep.parameters():
            parameter.mul_(100)
    assert all(torch.isfinite(score).all() for score in score_synflow(deep, torch.zeros(1, 64)).values())


def test_synflow_in_a_hundred_rounds_does_not_cut_the_network() -> None:
    net = mlp(20, 30, 30, 30, 30, 5, bias=False)
    many = synflow_masks(net, torch.zeros(1, 20), 0.01)
    assert kept(many) == round(0.01 * sum(e.weight.numel() for e in prunable(net).values()))
    assert all(mask.any() for mask in many.values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        once = synflow_masks(net, torch.zeros(1, 20), 0.01, rounds=1)
    flow = {name: float(sum(s.sum() for s in score_synflow(net, torch.zeros(1, 20), m).values())) for name, m in
            (("many", many), ("once", once))}  # fmt: skip
    assert flow["many"] > flow["once"]
    for arguments in ((0.0,), (0.1, 0)):
        with pytest.raises(InputError, match="density and rounds"):
            synflow_masks(net, torch.zeros(1, 20), *arguments)
    with pytest.raises(InputError, match="no flow"):
        score_synflow(build("vit"), torch.zeros(1, 3, 16, 16))
    found = score_synflow(build("plain"), torch.zeros(1, 3, 8, 8))
    assert all(score.shape == build("plain").get_parameter(name).shape for name, score in found.items())


@pytest.mark.parametrize("family", ["llama", "gpt2", "vit", "resnet", "plain"])
def test_wanda_is_weight_times_the_size_of_its_input(family: str) -> None:
    model, batches = build(family), [example(family, 2, seed) for seed in (1, 2)]
    before = state_hash(model)
    scores = score_wanda(model, batches)
    assert state_hash(model) == before
    name, entry = next((n, e) for n, e in prunable(model).items() if family != "gpt2" or "c_fc" in n)
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(entry.layer).register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))
    with torch.no_grad():
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
    handle.remove()
    axis = 1 if seen[0].ndim == 4 else seen[0].ndim - 1
    rows = torch.cat([x.movedim(axis, -1).reshape(-1, x.shape[axis]) for x in seen])
    norms = rows.double().norm(dim=0).float()
    shape = [-1 if a == entry.in_axis else 1 for a in range(entry.weight.ndim)]
    assert torch.allclose(scores[name], entry.weight.detach().abs() * norms.view(shape), rtol=1e-5)
    with pytest.raises(NothingToDo):
        score_wanda(model, [])


def test_wanda_of_a_convolution_in_groups() -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 1, groups=2))
    x = torch.zeros(1, 4, 2, 2)
    x[:, 0] = 1.0  # only channel 0 is on: the first input of the first group, outputs 0..3
    scores = score_wanda(net, [x])["0.weight"][:, :, 0, 0]
    expected = torch.zeros(8, 2)
    expected[:4, 0] = net[0].weight.detach().abs()[:4, 0, 0, 0] * 2  # sqrt of 4 ones
    assert torch.allclose(scores, expected)


def test_scores_of_nothing_and_random_scores() -> None:
    net = mlp(5, 7, 3)
    for score in (score_snip, score_grasp):
        with pytest.raises(NothingToDo, match="batches"):
            score(net, [])
    one, again = (score_random(net, generator(4)) for _ in range(2))
    assert all(torch.equal(one[name], again[name]) for name in one)


@pytest.mark.parametrize("score", [score_snip, score_grasp])
def test_flags_come_back_after_an_exception(score) -> None:
    net = mlp(5, 7, 3).train()
    net[0].weight.requires_grad_(False)
    before = state_hash(net)
    with pytest.raises(RuntimeError):
        score(net, [(torch.randn(2, 4), torch.zeros(2, dtype=torch.long))])
    assert state_hash(net) == before


# Masks over a model


@pytest.mark.parametrize("family", ["plain", "llama", "qwen2", "gpt2", "vit", "resnet"])
def test_a_masked_model_survives_saving(family: str, tmp_path) -> None:
    from salience.model import load, logits_of, run

    model = build(family)
    masks = mask_from_scores(score_magnitude(model), 0.4)
    apply_masks(model, masks)
    zeros = sum(int((e.weight == 0).sum()) for e in prunable(model).values())
    assert zeros == sum(m.numel() for m in masks.values()) - kept(masks)
    if family == "plain":
        state = copy.deepcopy(model.state_dict())
        fresh = build("plain")
        fresh.load_state_dict(state)
        assert torch.equal(fresh(example("plain")), model(example("plain")))
        return
    model.save_pretrained(tmp_path)
    back = load(tmp_path).model
    with torch.no_grad():
        assert torch.equal(logits_of(run(back, example(family))), logits_of(run(model, example(family))))
    if family == "qwen2":
        assert back.lm_head.weight is back.model.embed_tokens.weight


def test_a_parametrised_mask_trains_and_survives_saving() -> None:
    net = mlp(5, 8, 3)
    masks = mask_from_scores(score_magnitude(net), 0.3)
    parametrize_masks(net, masks)
    optimizer = torch.optim.AdamW(net.parameters(), 0.05, weight_decay=0.1)
    for x, y in lesson() * 5:
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        optimizer.step()
        assert all((net[i].weight[~masks[f"{i}.weight"]] == 0).all() for i in (0, 2))
    fresh = mlp(5, 8, 3)
    parametrize_masks(fresh, {name: torch.ones_like(mask) for name, mask in masks.items()})
    fresh.load_state_dict(net.state_dict())
    x = lesson()[0][0]
    assert torch.equal(fresh(x), net(x))
    parametrize.remove_parametrizations(fresh[0], "weight")
    assert torch.equal(fresh[0].weight != 0, masks["0.weight"] & (net[0].weight != 0))
    tied = build("qwen2")
    with pytest.raises(InputError, match="tied"):
        parametrize_masks(tied, {"model.embed_tokens.weight": torch.ones_like(tied.lm_head.weight, dtype=torch.bool)})


def test_srste_by_hand() -> None:
    layer = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        layer.weight[:] = torch.tensor([[4.0, -3.0, 2.0, 1.0]])
    parametrize.register_parametrization(layer, "weight", SRSTE((2, 4), decay=0.5))
    assert layer.weight.tolist() == [[4.0, -3.0, 0.0, 0.0]]
    layer(torch.tensor([[1.0, 1.0, 1.0, 1.0]])).sum().backward()
    original = layer.parametrizations.weight.original
    assert original.grad.tolist() == [[1.0, 1.0, 1.0 + 0.5 * 2.0, 1.0 + 0.5 * 1.0]]


def test_formats_give_the_same_function() -> None:
    net, x = mlp(6, 8, 3), torch.randn(4, 6)
    masks = mask_from_scores(score_magnitude(net), 0.3)
    before = state_hash(net)
    dense, csr, pruned = (finalize(net, masks, form) for form in ("dense", "csr", "prune"))
    assert state_hash(net) == before
    assert torch.allclose(csr(x), dense(x), atol=1e-6) and torch.equal(pruned(x), dense(x))
    assert csr[0].weight.layout == torch.sparse_csr and hasattr(pruned[0], "weight_mask")
    for form, text in (("coo", "format"), ("2:4", "GPU")):
        with pytest.raises(InputError, match=text):
            finalize(net, masks, form)


def test_masks_must_fit() -> None:
    net = mlp(5, 7, 3)
    for masks, text in [
        ({"0.wieght": torch.ones(7, 5, dtype=torch.bool)}, r"nearest names: '0\.weight'"),
        ({"0.weight": torch.ones(5, 7, dtype=torch.bool)}, "must be bool"),
        ({"0.weight": torch.ones(7, 5)}, "must be bool"),
    ]:
        with pytest.raises(InputError, match=text):
            apply_masks(net, masks)


# The account


def test_the_account_by_hand() -> None:
    net = mlp(10, 20, 4)
    masks = random_masks({"0.weight": 0.1, "2.weight": 0.5}, {"0.weight": (20, 10), "2.weight": (4, 20)}, generator())
    report = sparsity_report(net, masks, torch.zeros(1, 10))
    assert report.density == 60 / 280 and report.dense_flops == 560 and report.flops == 2 * 60
    assert report.layers["0.weight"] == (200, 20, 400, 40.0) and report.layers["2.weight"].density == 0.5
    assert report.bytes == {"dense": 1120, "csr": 60 * 8 + 4 * (21 + 5), "bitmask": 240 + 25 + 10}
    matrices = [scipy.sparse.csr_matrix((net[i].weight.detach() * masks[f"{i}.weight"]).numpy()) for i in (0, 2)]
    assert report.bytes["csr"] == sum(m.data.nbytes + m.indices.nbytes + m.indptr.nbytes for m in matrices)
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].weight[0, 0] = -0.0
    counted = sparsity_report(net, None, torch.zeros(1, 10))
    assert counted.layers["0.weight"].kept == 0 and counted.collapsed == ("0.weight",)
    assert np.isfinite(measure_latency(net, torch.zeros(1, 10), rounds=2))


def test_the_taxonomy() -> None:
    assert taxonomy("rigl")["when"] == "during" and taxonomy("snip")["mask"] == "static"
    assert set(taxonomy("lottery")) == {"when", "start", "mask", "allocation", "cost"}
    with pytest.raises(InputError, match="nearest names: 'rigl'"):
        taxonomy("rig")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_of_half_precision_are_taken_in_float32(dtype: torch.dtype) -> None:
    """In float16 the gradients of GraSP at temperature 200 are all zero, and SNIP's shares of a large model, too."""
    torch.manual_seed(0)
    half = nn.Sequential(nn.Linear(20, 60), nn.ReLU(), nn.Linear(60, 5)).to(dtype)
    full = copy.deepcopy(half).float()
    x, y = torch.randn(30, 20, dtype=dtype), torch.arange(30) % 5
    for score in (score_snip, score_grasp):
        expected = score(full, [(x.float(), y)])
        found = score(half, [(x, y)])
        assert all(found[name].dtype == torch.float32 for name in found)
        assert all(torch.allclose(found[name], expected[name]) for name in expected)
    large = score_wanda(half, [1000 * x])
    assert all(torch.isfinite(score).all() and score.dtype == torch.float32 for score in large.values())
    assert half[0].weight.dtype == dtype and half[0].weight.grad is None


def test_a_layer_that_does_not_run_is_named() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    with pytest.raises(InputError, match="layer 'idle' did not run"):
        score_wanda(Idle(), [torch.randn(2, 4)])
    assert set(score_wanda(Idle(), [torch.randn(2, 4)], exclude=["idle.*"])) == {"used.weight"}


@pytest.mark.parametrize("mode", ["uniform", "er", "erk"])
def test_layers_add_up_to_the_density_exactly(mode: str) -> None:
    shapes = {f"l{n}": (7 + n, 11 + 3 * n) for n in range(12)}
    total = sum(math.prod(shape) for shape in shapes.values())
    for density in (0.02, 0.05, 0.13, 0.5):
        shares = allocate(shapes, density, mode)
        masks = random_masks(shares, shapes, torch.Generator().manual_seed(0))
        assert sum(int(mask.sum()) for mask in masks.values()) == round(density * total)
        assert all(abs(int(mask.sum()) - shares[name] * mask.numel()) < 1 for name, mask in masks.items())


def test_tickets_of_few_weights_end() -> None:
    ticket = lottery_ticket(lambda: nn.Linear(8, 5), lambda model, masks, on_step: on_step(0), density=0.1, rate=0.05)
    assert int(ticket.masks["weight"].sum()) == 4 and ticket.trainings <= 36


def test_channels_of_unequal_size_keep_the_density() -> None:
    """Means are compared, as sums would favour wide rows, and weights are counted, not channels."""
    torch.manual_seed(0)
    scores = {"wide": torch.rand(20, 400), "narrow": torch.rand(60, 10)}
    masks = mask_from_scores(scores, 0.5, grain="channel")
    kept, total = sum(int(mask.sum()) for mask in masks.values()), sum(score.numel() for score in scores.values())
    assert abs(kept - 0.5 * total) <= 400 and all(mask.any() for mask in masks.values())
    means = torch.cat([score.mean(1) for score in scores.values()])
    chosen = torch.cat([mask.any(1) for mask in masks.values()])
    assert means[chosen].min() >= means[~chosen].max()


def test_layers_without_a_score_take_what_has_no_room_elsewhere() -> None:
    shares = allocate({"a": (10, 10), "b": (10, 10)}, 0.9, Scores([1.0, 0.0], ["a", "b"], "layer"))
    assert shares == {"a": 1.0, "b": pytest.approx(0.8)}


def test_a_row_keeps_one_weight_at_least() -> None:
    masks = mask_from_scores({"w": torch.rand(50, 10)}, 0.05, scope="row")
    assert masks["w"].sum(1).tolist() == [1] * 50


def test_synflow_within_layers_ranks_every_weight_of_a_layer() -> None:
    net, example = mlp(20, 30, 30, 5, bias=False), torch.zeros(1, 20)
    masks = synflow_masks(net, example, 0.3, rounds=1, scope="layer")
    assert all(
        torch.equal(mask, each)
        for mask, each in zip(
            masks.values(), mask_from_scores(score_synflow(net, example), 0.3, scope="layer").values(), strict=True
        )
    )
    shares = {name: share for name, share in zip(masks, (0.1, 0.2, 0.4))}
    many = synflow_masks(net, example, shares, scope="layer")
    sizes = {name: mask.numel() for name, mask in many.items()}
    assert {name: int(mask.sum()) for name, mask in many.items()} == {n: round(shares[n] * sizes[n]) for n in sizes}
    # Rounds see what the last one left: fewer weights of the middle start where nothing arrives, or end where nothing
    # goes on, than after a single cut.
    assert blocked(many) < blocked(synflow_masks(net, example, shares, rounds=1, scope="layer"))


def blocked(masks: dict[str, torch.Tensor]) -> int:
    first, middle, last = masks.values()
    return int((middle & ~(first.any(1)[None] & last.any(0)[:, None])).sum())
