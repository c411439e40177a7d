"""DARE and DAREx in memory: closed forms, the bound, the search, AdamR, and what is refused."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.exceptions import NotFittedError
from torch import nn

from salience.errors import DataError, InputError
from salience.weights import (
    AdamR,
    DeltaPruner,
    add_delta,
    analytic_q,
    dare,
    delta_stats,
    deviation_bound,
    importance_delta,
    load_delta,
    lora_deltas,
    recommend,
    save_delta,
)
from salience.weights.darex.deltas import BLOCK, keep_block, keep_mask, prunable
from salience.weights.darex.rescaling import phi, search
from tiny import build, example, pair, state_hash


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def moved(model: nn.Module, size: float = 0.01) -> nn.Module:
    """A fine-tuned copy: every parameter moved at random."""
    tuned, draw = copy.deepcopy(model), generator(7)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=draw))
    return tuned


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


# dropping entries


def test_dare_is_the_closed_form():
    delta = torch.randn(300, 200, generator=generator())
    for p, q in ((0.9, None), (0.9, 0.3), (0.5, 1.0), (0.0, None)):
        out = dare(delta, p, q=q, generator=generator(3))
        kept = out != 0
        torch.testing.assert_close(out[kept], delta[kept] / (q or 1 - p))
        assert abs(kept.double().mean() - (1 - p)) < 4 * math.sqrt(p * (1 - p) / delta.numel()) + 1e-12
    assert torch.equal(dare(delta, 0.0), delta)


def test_dare_keeps_the_mean_and_a_larger_q_shrinks_it():
    delta = torch.ones(400, 400)
    assert abs(dare(delta, 0.8, generator=generator()).mean() - 1) < 0.02
    assert abs(dare(delta, 0.8, q=0.5, generator=generator()).mean() - 0.4) < 0.01


def test_structured_dropping_takes_whole_columns():
    delta = torch.randn(20, 1000, generator=generator())
    out = dare(delta, 0.7, dim=1, generator=generator(1))
    columns = (out != 0).sum(0)
    assert set(columns.tolist()) == {0, 20} and abs((columns > 0).double().mean() - 0.3) < 0.06
    torch.testing.assert_close(out[:, columns > 0], delta[:, columns > 0] / 0.3)
    rows = (dare(delta, 0.7, dim=-2, generator=generator(1)) != 0).sum(1)
    assert set(rows.tolist()) <= {0, 1000}


def test_the_same_generator_gives_the_same_mask_and_the_global_one_is_left_alone():
    delta = torch.randn(50, 50, generator=generator())
    before = torch.get_rng_state()
    one, two, three = (dare(delta, 0.9, generator=generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, three)
    assert torch.equal(torch.get_rng_state(), before)


def test_half_precision_is_computed_in_float32():
    delta = torch.full((64, 64), 1e-3, dtype=torch.bfloat16)
    out = dare(delta, 0.97, generator=generator())
    assert out.dtype == torch.bfloat16
    assert set(out.unique().tolist()) == {0.0, float((delta[0, 0].float() / 0.03).bfloat16())}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**63), st.floats(0, 1), st.integers(1, 5000))
def test_masks_are_prefixes_of_themselves(seed, keep, count):
    whole = keep_block(seed, "layer.weight", 0, 5000, keep)
    np.testing.assert_array_equal(whole[:count], keep_block(seed, "layer.weight", 0, count, keep))
    if keep in (0.0, 1.0):
        assert (whole == bool(keep)).all()


def test_a_mask_is_made_of_its_blocks_and_each_tensor_has_its_own():
    mask = keep_mask(5, "a", [3, BLOCK], 0.25).flatten().numpy()
    for block in range(3):
        part = mask[block * BLOCK : (block + 1) * BLOCK]
        np.testing.assert_array_equal(part, keep_block(5, "a", block, BLOCK, 0.25))
        assert abs(part.mean() - 0.25) < 0.005
    blocks = mask.reshape(3, BLOCK)
    assert abs((blocks[0] & blocks[1]).mean() - 0.0625) < 0.003  # independent
    assert not np.array_equal(blocks[0], keep_block(5, "b", 0, BLOCK, 0.25))


def test_small_shares_are_exact():
    """16 bits alone would round a share of 1e-5 to 0 or to 1.5e-5."""
    share = 1e-5
    hits = sum(int(keep_block(1, "w", block, BLOCK, share).sum()) for block in range(200))
    expected = share * 200 * BLOCK
    assert abs(hits - expected) < 4 * math.sqrt(expected)


def test_importance_keeps_the_largest():
    delta = torch.tensor([[1.0, -5.0, 2.0, 0.5], [-3.0, 0.1, 4.0, -0.2]])
    expected = torch.tensor([[0.0, -5.0, 0.0, 0.0], [-3.0, 0.0, 4.0, 0.0]])
    assert torch.equal(importance_delta(delta, 0.625), expected)
    norms = torch.tensor([10.0, 1.0, 1.0, 30.0])
    # sizes: 10, 5, 2, 15 and 30, .1, 4, 6: two of each row
    wanda = torch.tensor([[1.0, 0.0, 0.0, 0.5], [-3.0, 0.0, 0.0, -0.2]])
    assert torch.equal(importance_delta(delta, 0.5, act_norm=norms), wanda)
    assert (importance_delta(delta, 0.999) != 0).sum() == 1


def test_lora_deltas_multiply_out():
    a, b = torch.randn(2, 5, generator=generator()), torch.randn(7, 2, generator=generator(1))
    state = {
        "base_model.model.layers.0.q.lora_A.weight": a, "base_model.model.layers.0.q.lora_B.weight": b,
        "base_model.model.layers.0.q.base_layer.weight": torch.zeros(7, 5),
    }  # fmt: skip
    deltas = lora_deltas(state, alpha=16)
    assert list(deltas) == ["layers.0.q.weight"]
    torch.testing.assert_close(deltas["layers.0.q.weight"], 8 * b @ a)
    torch.testing.assert_close(lora_deltas(state, 16, 4, fan_in_fan_out=True)["layers.0.q.weight"], 4 * (b @ a).T)
    with pytest.raises(InputError, match="lora_A"):
        lora_deltas({"x": a}, 16)
    with pytest.raises(InputError, match="has no"):
        lora_deltas({"m.lora_A.weight": a}, 16)


def test_what_is_pruned():
    encoder = ["bert.embeddings.w", "bert.layer.0.attention.q.weight", "bert.norm.bias", "classifier.weight"]
    assert prunable(encoder, decoder=False) == encoder[:3]
    decoder = ["model.embed_tokens.weight", "model.layers.0.self_attn.q.weight", "model.layers.0.mlp.up.weight",
               "model.layers.0.input_layernorm.weight", "lm_head.weight"]  # fmt: skip
    assert prunable(decoder, decoder=True) == decoder[1:3]
    assert prunable(["bn.weight", "bn.running_var", "bn.num_batches_tracked"], decoder=False) == ["bn.weight"]
    assert prunable(["a.fc.weight", "b.weight"], decoder=False, exclude=["fc"]) == ["b.weight"]
    assert prunable(["a.fc.weight", "b.weight"], decoder=False, exclude=["b.*"]) == ["a.fc.weight"]


# the bound and its best q


def test_phi_has_its_limits():
    assert phi(0.5) == 0.5 and phi(0.5 + 1e-5) == pytest.approx(0.5, abs=1e-6) and phi(0) == 0
    assert phi(0.99) == pytest.approx(0.98 / math.log(99)) == phi(0.01)


@pytest.mark.parametrize("p", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("factor", [1, 2, 4])
def test_the_bound_covers_95_percent_of_the_masks(p, factor):
    rng, q = np.random.default_rng(0), min(1.0, factor * (1 - p))
    c = torch.from_numpy(rng.normal(0.05, 1, (3, 512)))
    bound = deviation_bound(c, p, q).numpy()
    masks = rng.random((4000, 512)) < 1 - p
    h = np.abs(c.sum(1).numpy() - (masks @ c.numpy().T) / q)
    quantile = np.quantile(h, 0.95, axis=0)
    assert (quantile <= bound).all()
    assert (bound <= 12 * quantile).all()  # a bound that holds for everything says nothing


def test_the_bound_is_the_minimum_over_eta():
    c = torch.randn(4, 30, generator=generator()).double()
    p, q, gamma = 0.9, 0.25, 0.1
    etas = torch.logspace(-4, 4, 40001, dtype=torch.float64)
    s2 = c.square().sum(1, keepdim=True)
    tail = (etas * phi(p) * s2 / (4 * q**2) + math.log(2 / gamma) / etas).min(1).values
    expected = (1 - (1 - p) / q) * c.sum(1).abs() + tail
    torch.testing.assert_close(deviation_bound(c, p, q, gamma=gamma), expected, rtol=1e-5, atol=0)


def reference_q(c: torch.Tensor, p: float, eta: float, stop: float) -> torch.Tensor:
    """The published loop, row by row: first to last grid point, ties to the later one, ended by the share passed."""
    grid = np.arange(1 - p, 0.999, 0.001)
    best, q, passed = [math.inf] * len(c), [1 - p] * len(c), [False] * len(c)
    for point in grid:
        for i, row in enumerate(c.tolist()):
            bias = (1 - (1 - p) / point) * math.fsum(row)
            spread = phi(p) * math.fsum(x * x for x in row) / (4 * point**2)
            value = abs(eta * bias + eta**2 * spread + math.log(2 / 0.05))
            if value >= best[i]:
                passed[i] = True
            if value <= best[i]:
                best[i], q[i] = value, point
        if np.mean(passed) >= stop:
            break
    return torch.tensor(q)


@pytest.mark.parametrize(("p", "eta", "stop"), [(0.99, 0.37, 0.8), (0.9, 1.0, 0.8), (0.99, 0.2, 1.0), (0.5, 20.0, 0.5)])
def test_analytic_q_follows_the_published_loop(p, eta, stop):
    c = torch.randn(40, 60, generator=generator()) * 0.03 + 0.02
    found, expected = analytic_q(c, p, eta, stop=stop), reference_q(c, p, eta, stop)
    assert (abs(found - expected) < 1e-9).double().mean() > 0.99
    assert found.min() >= 1 - p - 1e-9 and len(found.unique()) > 3


def test_analytic_q_is_the_minimum_of_its_objective():
    c, p, eta = torch.randn(5, 30, generator=generator()) + 0.3, 0.9, 0.8
    found = analytic_q(c, p, eta, stop=1.1)
    grid = torch.arange(0.1, 0.999, 0.001, dtype=torch.float64)
    s1, s2 = c.double().sum(1, keepdim=True), c.double().square().sum(1, keepdim=True)
    value = (eta * (1 - 0.1 / grid) * s1 + eta**2 * phi(p) * s2 / (4 * grid**2) + math.log(40)).abs()
    torch.testing.assert_close(found, grid[value.argmin(1)], rtol=0, atol=1e-9)


def test_search_refines_around_the_best_and_gives_up():
    calls: list[float] = []

    def peak(x: float) -> float:
        calls.append(x)
        return -abs(x - 0.137)

    found = search(peak, 0.01, 1.0, 0.05)
    assert found.best == pytest.approx(0.135, abs=0.0051) and found.score == -abs(found.best - 0.137)
    coarse = [x for x in calls if abs((x - 0.01) / 0.05 - round((x - 0.01) / 0.05)) < 1e-6]
    assert max(calls) < 0.4  # more than 3 points without gain end it
    assert calls[:3] == pytest.approx([0.01, 0.06, 0.11]) and len(coarse) >= 6
    assert search(lambda x: x, 0.5, 1.0, 0.1).best == pytest.approx(1.0)  # never beyond the end
    with pytest.raises(InputError, match="low"):
        search(peak, 1.0, 0.5, 0.1)


# AdamR


def train(optimizer: torch.optim.Optimizer, model: nn.Module, steps: int = 12) -> None:
    x, y = torch.randn(32, 6, generator=generator(1)), torch.arange(32) % 3
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def test_without_decay_it_is_adam():
    one, two = mlp(), mlp()
    train(AdamR(one.named_parameters(), one.state_dict(), lr=1e-2, weight_decay=0), one)
    train(torch.optim.Adam(two.parameters(), lr=1e-2), two)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_a_step_by_hand(norm):
    w = nn.Parameter(torch.tensor([1.0, -2.0]))
    head = nn.Parameter(torch.tensor([3.0]))
    base = torch.tensor([0.5, -2.5])
    optimizer = AdamR([("w", w), ("head", head)], {"w": base}, lr=0.1, weight_decay=0.2, norm=norm)
    w.grad, head.grad = torch.tensor([0.3, -0.4]), torch.tensor([1.2])
    optimizer.step()
    # after one step vhat = g^2, so s = rms of all gradients, the head's among them, and mhat / sqrt(vhat) = sign(g)
    s = math.sqrt((0.09 + 0.16 + 1.44) / 3)
    away = torch.tensor([1.0, -2.0]) - base
    decay = 0.1 * 0.2 / s * (away if norm == "l2" else away.sign())
    torch.testing.assert_close(w.data, torch.tensor([1.0 - 0.1, -2.0 + 0.1]) - decay)
    torch.testing.assert_close(head.data, torch.tensor([2.9]))  # no reference, no decay


def test_it_stays_near_the_base_and_not_near_zero():
    base = mlp()
    plain, pulled = copy.deepcopy(base), copy.deepcopy(base)
    reference = pulled.state_dict()  # the live one: a copy must be taken
    train(torch.optim.Adam(plain.parameters(), lr=1e-2), plain, 40)
    train(AdamR(pulled.named_parameters(), reference, lr=1e-2, weight_decay=0.1), pulled, 40)
    before = dict(base.named_parameters())

    def distance(model: nn.Module) -> float:
        return math.sqrt(sum(float((p - before[n]).detach().square().sum()) for n, p in model.named_parameters()))

    assert 0 < distance(pulled) < 0.5 * distance(plain)
    norms = [sum(float(p.detach().square().sum()) for p in model.parameters()) for model in (pulled, base)]
    assert norms[0] > 0.9 * norms[1]


def test_it_resumes_from_its_state():
    one, two = mlp(), mlp()
    reference = {name: value.clone() for name, value in one.state_dict().items()}
    first = AdamR(one.named_parameters(), reference, lr=1e-2, weight_decay=0.05)
    train(first, one, 6)
    two.load_state_dict(one.state_dict())
    second = AdamR(two.named_parameters(), reference, lr=1e-2, weight_decay=0.05)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(first, one, 3)
    train(second, two, 3)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_no_gradient_no_change():
    model = mlp()
    optimizer = AdamR(model.named_parameters(), mlp().state_dict(), weight_decay=0.1)
    before = state_hash(model)
    optimizer.step()
    assert state_hash(model) == before
    for parameter in model.parameters():  # s = 0 counts as 1
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "match"),
    [({"lr": -1}, "lr"), ({"eps": math.nan}, "eps"), ({"weight_decay": -0.1}, "weight_decay"),
     ({"betas": (1.0, 0.9)}, "betas"), ({"norm": "l3"}, "norm")],
)  # fmt: skip
def test_adamr_checks_its_options(options, match):
    model = mlp()
    with pytest.raises(InputError, match=match):
        AdamR(model.named_parameters(), model.state_dict(), **options)


def test_adamr_checks_its_reference():
    model = mlp()
    with pytest.raises(InputError, match="names"):
        AdamR(model.parameters(), model.state_dict())
    with pytest.raises(InputError, match="none of the parameters"):
        AdamR(model.named_parameters(), {"other": torch.zeros(1)})
    with pytest.raises(InputError, match="shape"):
        AdamR(model.named_parameters(), {"0.weight": torch.zeros(2)})


# the estimator


def test_a_pruned_model_is_base_plus_what_transform_gives():
    base = mlp()
    tuned = moved(base)
    hashes = state_hash(base), state_hash(tuned)
    pruner = DeltaPruner(rate=0.8, rescale=0.4, exclude=("4",), random_state=3).fit(base, tuned)
    model, deltas = pruner.apply(), pruner.transform()
    assert (state_hash(base), state_hash(tuned)) == hashes
    for name, parameter in model.named_parameters():
        before, after = base.get_parameter(name), tuned.get_parameter(name)
        if name.startswith("4."):
            assert torch.equal(parameter, after) and name not in deltas
            continue
        assert deltas[name].is_sparse
        torch.testing.assert_close(parameter, before + deltas[name].to_dense())
        kept = deltas[name].to_dense() != 0
        torch.testing.assert_close(deltas[name].to_dense()[kept], ((after - before) / 0.4)[kept])
        assert 0.02 < kept.double().mean() < 0.5 or kept.numel() < 20


def test_no_dropping_returns_the_tuned_model():
    base = mlp()
    tuned = moved(base)
    pruned = DeltaPruner(rate=0.0).fit(base, tuned).apply()
    for a, b in zip(pruned.parameters(), tuned.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_delta_of_zero_returns_the_base_and_says_so():
    base = mlp()
    pruner = DeltaPruner(rate=0.9).fit(base, copy.deepcopy(base))
    assert "delta is zero" in pruner.branch_ and state_hash(pruner.apply()) == state_hash(base)


def test_q_by_validation_maximises_the_score():
    base = mlp()
    tuned = moved(base)
    target = {name: value.clone() for name, value in tuned.named_parameters()}

    def near(model: nn.Module) -> float:  # the q with which the weights come nearest
        return -sum(float((p - target[n]).detach().square().sum()) for n, p in model.named_parameters())

    pruner = DeltaPruner(rate=0.9, rescale="global", exclude=(), random_state=1).fit(base, tuned, score=near)
    assert len(pruner.search_) > 5 and pruner.q_ == max(pruner.search_, key=lambda trial: trial[1])[0]
    # the squared error of m D / q is (1-p)(1/q - 1)^2 + p per entry: the smaller the change the better, q = 1
    assert pruner.q_ == pytest.approx(1.0, abs=0.06)
    assert "validation" in pruner.branch_


def test_q_by_outputs_needs_no_labels_and_repeats():
    base = mlp()
    tuned, x = moved(base, 0.3), torch.randn(64, 6, generator=generator())
    one, two = (DeltaPruner(rate=0.9, rescale="global").fit(base, tuned, batches=[x]) for _ in range(2))
    assert one.q_ == two.q_ and one.search_ == two.search_ and "outputs" in one.branch_
    outputs = {q: DeltaPruner(rate=0.9, rescale=q).fit(base, tuned).apply()(x) for q in (0.1, one.q_)}
    error = {q: float((out - tuned(x)).abs().mean()) for q, out in outputs.items()}
    assert one.q_ > 0.1 and error[one.q_] < error[0.1]


def test_selection_masks_are_not_the_final_one():
    pruner = DeltaPruner(random_state=0)
    assert pruner._final_seed not in {pruner._mask_seed(number) for number in range(10)}


def test_per_layer_q_takes_biases_along_and_the_mean_elsewhere():
    base = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    x = torch.randn(40, 6, generator=generator())
    pruner = DeltaPruner(rate=0.9, rescale="layer", exclude=()).fit(base, moved(base, 0.5), batches=[x])
    q = pruner.q_
    assert q["0.weight"] == q["0.bias"] and q["2.weight"] == q["2.bias"]
    assert q["1.weight"] == q["1.bias"] == pytest.approx((q["0.weight"] + q["2.weight"]) / 2)
    assert pruner.eta_ in [eta for eta, _ in pruner.search_]
    mean = x.double().mean(0)
    delta = pruner.weights_["0.weight"][1]
    c = torch.cat([delta * mean.float(), pruner.weights_["0.bias"][1][:, None]], 1)
    assert q["0.weight"] == pytest.approx(float(analytic_q(c, 0.9, pruner.eta_).mean()))


def test_wanda_weighs_by_the_inputs_of_the_layer():
    base = mlp()
    tuned, x = moved(base), torch.randn(50, 6, generator=generator()) * torch.tensor([100.0, 1, 1, 1, 1, 1])
    deltas = DeltaPruner(rate=5 / 6, method="wanda", exclude=()).fit(base, tuned, batches=[x]).transform()
    kept = deltas["0.weight"].to_dense() != 0
    assert kept[:, 0].all() and kept.sum() == 16  # one entry a row, that of the loud input


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "vit"])
@pytest.mark.parametrize(
    "options",
    [{"masks": 1, "step": 0.3}, {"rescale": "gradient"}, {"method": "wanda"}, {"rescale": 0.2, "structured": True}],
)
def test_families(family, options):
    if family == "vit" and options.get("rescale") == "gradient":
        pytest.skip("of decoders")
    base = build(family)
    tuned = moved(base, 0.02)
    hashes = state_hash(base), state_hash(tuned)
    batches = [example(family), example(family, seed=2)]
    pruner = DeltaPruner(rate=0.9, **options).fit(base, tuned, batches=batches)
    model = pruner.apply()
    assert (state_hash(base), state_hash(tuned)) == hashes
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, tuned.get_parameter(n))}
    assert changed == set(pruner.names_) and not any("head" in n or "classifier" in n for n in changed)
    if family != "vit":
        assert all("attn" in n or "mlp" in n for n in changed)
    if family == "qwen2":
        assert model.lm_head.weight is model.model.embed_tokens.weight
    if options.get("structured"):
        name = next(n for n in sorted(changed) if ("mlp" in n or "output" in n) and n.endswith("weight"))
        kept = pruner.transform()[name].to_dense() != 0
        inputs = kept.any(1 if family == "gpt2" else 0)
        assert (kept == (inputs[:, None] if family == "gpt2" else inputs)).all() and not inputs.all()


def test_gradient_lowers_the_change_of_the_outputs():
    base = build("llama")
    tuned = moved(base, 0.05)
    pruner = DeltaPruner(rate=0.9, rescale="gradient").fit(base, tuned, batches=[example("llama")])
    assert pruner.search_[-1][1] >= pruner.search_[0][1] and min(pruner.q_.values()) >= 0.1


def test_grown_embeddings_keep_their_new_rows():
    base, tuned = (
        nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2)),
        nn.Sequential(nn.Embedding(13, 4), nn.Linear(4, 2)),
    )
    pruned = DeltaPruner(rate=0.5, method="dare", exclude=("1",)).fit(base, tuned).apply()
    assert torch.equal(pruned[0].weight[10:], tuned[0].weight[10:])
    assert not torch.equal(pruned[0].weight[:10], tuned[0].weight[:10])
    with pytest.raises(DataError, match="shape"):
        DeltaPruner(method="dare", exclude=("1",)).fit(tuned, base)


def test_bad_input():
    base = mlp()
    tuned = moved(base)
    for rate in (-0.1, 1.0, math.nan):
        with pytest.raises(InputError, match="p: got"):
            DeltaPruner(rate=rate).fit(base, tuned)
        with pytest.raises(InputError, match="p: got"):
            dare(torch.ones(2), rate)
    for q in (0.0, -1.0, math.inf):
        with pytest.raises(InputError, match="q: got"):
            dare(torch.ones(2), 0.5, q=q)
    with pytest.warns(UserWarning, match="below 1 - p"):
        dare(torch.ones(2), 0.5, q=0.4)
    with pytest.raises(InputError, match="dequantise"):
        dare(torch.ones(2, dtype=torch.int8), 0.5)
    with pytest.raises(DataError, match="NaN"):
        dare(torch.tensor([1.0, math.nan]), 0.5)
    with pytest.raises(InputError, match="act_norm"):
        importance_delta(torch.ones(2, 3), 0.5, act_norm=torch.ones(2))
    with pytest.raises(InputError, match="eta"):
        analytic_q(torch.ones(2, 2), 0.5, 0.0)
    with pytest.raises(InputError, match="gamma"):
        deviation_bound(torch.ones(2, 2), 0.5, gamma=1.0)
    for options, match in (
        ({"method": "dar"}, "'dare'"), ({"selection": "x"}, "selection"), ({"rescale": "x"}, "rescale"),
        ({"masks": 0}, "masks"), ({"exclude": ("0", "2", "4")}, "exclude"), ({"rescale": 0.0}, "q: got"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=match):
            DeltaPruner(**options).fit(base, tuned)
    with pytest.raises(InputError, match="batches"):
        DeltaPruner(method="wanda").fit(base, tuned)
    with pytest.raises(InputError, match="batches"):
        DeltaPruner(rescale="layer").fit(base, tuned, score=lambda model: 0.0)
    with pytest.raises(InputError, match="score"):
        DeltaPruner(selection="validation").fit(base, tuned, batches=[torch.ones(1, 6)])
    with pytest.raises(DataError, match="score: gave nan"):
        DeltaPruner().fit(base, tuned, score=lambda model: math.nan)
    with pytest.raises(DataError, match=r"has no '4\.weight'"):
        DeltaPruner(method="dare").fit(base[:3], tuned)
    with pytest.raises(DataError, match="not finite"):
        broken = moved(base)
        broken[0].weight.data[0, 0] = math.inf
        DeltaPruner(method="dare").fit(base, broken)
    with pytest.raises(NotFittedError):
        DeltaPruner().transform()


def test_quantised_models_are_refused_and_tied_weights_are_pruned_once():
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    tuned = copy.deepcopy(base)
    for model in (base, tuned):
        model[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(InputError, match=r"0\.weight.*dequantise|dequantise.*0\.weight"):
        DeltaPruner(method="dare", exclude=("1",)).fit(base, tuned)
    base = pair()
    tuned = moved(base, 0.5)
    pruner = DeltaPruner(rate=0.5, rescale=0.5, method="darex", exclude=()).fit(base, tuned)
    model = pruner.apply()
    assert pruner.names_ == ("one.weight",) or list(pruner.names_) == ["one.weight"]
    assert model.two.weight is model.one.weight
    delta = (tuned.one.weight - base.one.weight).detach()
    kept = pruner.transform()["one.weight"].to_dense() != 0
    torch.testing.assert_close(model.one.weight.detach(), base.one.weight.detach() + kept * delta / 0.5)


# diagnosis and files


def test_stats_by_hand():
    base = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.0]), "other": torch.zeros(2)}
    tuned = {"a": torch.tensor([3.0, 6.0]), "b": torch.tensor([1.0]), "other": torch.zeros(3)}
    stats = delta_stats(base, tuned)
    assert stats.entries == 3 and stats.mean == pytest.approx(1) and stats.mean_abs == pytest.approx(1)
    assert stats.std == pytest.approx(math.sqrt(5 / 3 - 1)) and stats.unchanged == pytest.approx(1 / 3)
    assert stats.relative == pytest.approx(math.sqrt(5) / 5) and stats.tensors["b"] == (1.0, 0.0, math.inf)
    with pytest.raises(InputError, match="in common"):
        delta_stats({"a": torch.zeros(1)}, {"b": torch.zeros(1)})


def test_the_flow_chart():
    small = delta_stats({"a": torch.ones(4)}, {"a": torch.ones(4) + 0.01})
    large = delta_stats({"a": torch.ones(4)}, {"a": torch.ones(4) + 3})
    rest = {"has_labels": True, "decoder": False}
    assert recommend(small, can_train=True, **rest).method == "adamr"
    assert recommend(large, can_train=False, **rest).method == "magnitude"
    assert recommend(small, can_train=False, **rest).method == "darex validation layer"
    assert recommend(small, can_train=False, has_labels=False, decoder=True).method == "darex output global"
    assert recommend(small, can_train=False, **rest, large=0.001).method == "magnitude"
    assert "relative size 0.01" in recommend(small, can_train=False, **rest).branch[1]


def test_delta_files_round_trip(tmp_path):
    base = mlp()
    tuned = moved(base)
    pruner = DeltaPruner(rate=0.9, rescale=0.2, exclude=("4",)).fit(base, tuned)
    head = {name: value for name, value in tuned.named_parameters() if name.startswith("4.")}
    save_delta(tmp_path / "d.safetensors", pruner.transform(), whole=head, record={"rate": 0.9})
    deltas, whole, record = load_delta(tmp_path / "d.safetensors")
    assert record == {"rate": 0.9} and set(whole) == set(head)
    rebuilt = add_delta(copy.deepcopy(base), deltas, whole)
    expected = pruner.apply()
    for a, b in zip(rebuilt.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert (tmp_path / "d.safetensors").stat().st_size < 6000


def test_delta_files_are_checked(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(InputError, match="none to write"):
        save_delta(tmp_path / "x.safetensors", {})
    with pytest.raises(InputError, match="not a file"):
        load_delta(tmp_path / "none")
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="not a delta file"):
        load_delta(tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(DataError, match="cut"):
        load_delta(tmp_path / "cut.safetensors")
    with pytest.raises(InputError, match="float16"):
        save_delta(tmp_path / "x.safetensors", {"a": torch.tensor([1e9])}, dtype=torch.float16)
    model = mlp()
    before = state_hash(model)
    for deltas in ({"9.weight": torch.ones(2)}, {"0.bias": torch.ones(16), "0.weight": torch.ones(2)}):
        with pytest.raises(DataError, match="Sequential"):
            add_delta(model, deltas)
    assert state_hash(model) == before


def test_scalars_survive_a_delta_file(tmp_path):
    save_delta(tmp_path / "d.safetensors", {"scale": torch.tensor(0.5), "none": torch.zeros(3)})
    deltas, _, _ = load_delta(tmp_path / "d.safetensors")
    assert deltas["scale"].to_dense() == 0.5 and deltas["none"].to_dense().tolist() == [0, 0, 0]


def test_a_rate_that_leaves_no_grid_gives_one_minus_p():
    for p in (0.0, 0.0005, 0.001):
        assert torch.allclose(analytic_q(torch.randn(3, 4), p, 0.5), torch.tensor(1 - p).double(), atol=1e-3)


def test_padding_does_not_count():
    """A batch that is padded gives the statistics and changes of its texts alone."""
    from salience.weights.darex.observing import input_statistics, outputs_before, outputs_of

    base, draw = build("gpt2"), generator()
    tuned = moved(base)
    short, long = (torch.randint(1, 300, (1, length), generator=draw) for length in (3, 9))
    padded = torch.zeros(2, 9, dtype=torch.long)
    padded[0, :3], padded[1] = short[0], long[0]
    mask = torch.tensor([[1] * 3 + [0] * 6, [1] * 9])
    together, alone = [{"input_ids": padded, "attention_mask": mask}], [{"input_ids": short}, {"input_ids": long}]
    for norm in (False, True):
        one, two = (input_statistics(tuned, batches, norm=norm) for batches in (together, alone))
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-6, msg=name)
    before = outputs_before(outputs_of(tuned, together[0], True), together[0], True)
    assert before.values.shape == (12, 5)  # of 12 real tokens, and not the whole vocabulary
    apart = [outputs_before(outputs_of(tuned, batch, True), batch, True) for batch in alone]
    changes = [each.change(outputs_of(base, batch, True)) for each, batch in zip(apart, alone, strict=True)]
    expected = (3 * changes[0] + 9 * changes[1]) / 12
    torch.testing.assert_close(before.change(outputs_of(base, together[0], True)), expected, rtol=1e-4, atol=1e-7)


def test_masks_of_different_uses_are_independent():
    from salience.weights.darex.deltas import mask_seed

    seeds = [mask_seed(state, *use) for state in range(4) for use in ((0,), (1, 0), (1, 1), (1, 2), (2,))]
    assert len(set(seeds)) == len(seeds)
    masks = torch.stack([keep_mask(seed, "w", (4000,), 0.5) for seed in seeds]).float()
    assert (torch.corrcoef(masks) - torch.eye(len(seeds))).abs().max() < 0.09
    with pytest.raises(InputError, match="seed"):
        mask_seed(-1, 0)
