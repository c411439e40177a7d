"""DESMIL: dependences against definitions, weights against the published code, extractors against plain loops."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from salience.data import (
    DESMIL,
    ComiRecDR,
    ComiRecSA,
    LossReweighter,
    StableWeights,
    history_and_truth,
    hsic,
    interest_dependence,
    ood_sequences,
    recall_ndcg_hit,
    rff,
)
from salience.data.desmil import dependence, weighting
from salience.errors import InputError
from salience.measure.ranking import hit_at_k, recall_at_k

OFFICIAL = json.loads((Path(__file__).parent / "desmil_official.json").read_text())


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def some_weights(n: int, seed: int = 0) -> torch.Tensor:
    return torch.softmax(normal(n, seed=100 + seed), 0)


# Dependence


def test_hsic_is_its_definition() -> None:
    x, y = normal(30, 3).double(), normal(30, 2, seed=1).double()
    y[:, 0] += x[:, 0] ** 2
    grams = []
    for side in (x, y):
        distance = torch.cdist(side, side)
        sigma = distance[torch.triu_indices(30, 30, 1).unbind()].median()
        grams.append(torch.exp(-(distance**2) / (2 * sigma**2)))
    h = torch.eye(30, dtype=torch.float64) - 1 / 30
    expected = torch.trace(grams[0] @ h @ grams[1] @ h) / 29**2
    torch.testing.assert_close(hsic(x, y), expected)
    torch.testing.assert_close(hsic(x, y, torch.full((30,), 1 / 30, dtype=torch.float64)), expected)
    fixed = torch.exp(-(torch.cdist(x, x) ** 2) / (2 * 0.7**2))
    torch.testing.assert_close(hsic(x, x, bandwidth=0.7), torch.trace(fixed @ h @ fixed @ h) / 29**2)


def test_whole_weights_are_repeated_samples() -> None:
    x, y = normal(12, 2), normal(12, 2, seed=1)
    times = torch.tensor([1, 2, 3] * 4)
    repeated = hsic(x.repeat_interleave(times, 0), y.repeat_interleave(times, 0), bandwidth=1.0)
    weights = times / times.sum()
    among = 1 - 1 / float(times.sum())  # both are sums over w; only the factor for the number of samples differs
    assert float(hsic(x, y, weights, 1.0) * (1 - weights.square().sum()) ** 2) == pytest.approx(
        float(repeated) * among**2, rel=1e-4
    )


def test_hsic_tells_dependent_from_independent() -> None:
    x, noise = normal(300, 2), normal(300, 2, seed=1)
    permuted = [float(hsic(x, noise[torch.randperm(300, generator=seeded(seed))])) for seed in range(40)]
    assert float(hsic(x, x**2 + 0.1 * noise)) > 5 * max(permuted)  # uncorrelated, but not independent
    assert np.mean(np.array(permuted) >= float(hsic(x, noise))) > 0.05


def test_hsic_of_samples_that_are_mostly_alike() -> None:
    same = normal(1, 3).expand(30, 3) * 100
    assert float(hsic(same, normal(30, 2))) == pytest.approx(0, abs=1e-7)
    few = torch.zeros(30, 1)
    few[:6] = 1.0
    assert float(hsic(few, few)) > 10 * abs(float(hsic(few, few.roll(15, 0)))) > 0
    same = same.clone().requires_grad_()
    hsic(same, normal(30, 2)).backward()
    assert bool(same.grad.isfinite().all())


def test_weights_that_undo_a_selection_undo_the_dependence() -> None:
    x = torch.tensor([[0.0], [0.0], [1.0], [1.0]])
    y = torch.tensor([[0.0], [1.0], [0.0], [1.0]])
    both = torch.tensor([4, 1, 1, 4])  # equal values four times as often
    a, b = x.repeat_interleave(both, 0), y.repeat_interleave(both, 0)
    undone = (1 / both.float()).repeat_interleave(both) / 4
    assert float(hsic(a, b, bandwidth=1.0)) > 0.01
    assert float(hsic(a, b, undone, 1.0)) == pytest.approx(0, abs=1e-7)
    alone = torch.eye(10)[0]
    assert float(hsic(a, b, alone)) == pytest.approx(0, abs=1e-6)
    z = torch.stack([a, b], 1)
    for method in ("rff", "hsic", "linear"):
        assert float(interest_dependence(z, undone, method, generator=seeded(0))) == pytest.approx(0, abs=1e-6)
        assert float(interest_dependence(z, None, method, generator=seeded(0))) > 1e-3


def test_fourier_features_multiply_to_the_kernel() -> None:
    x = normal(6, 3)
    squares = torch.cdist(x, x) ** 2
    joint = rff(x, 20_000, joint=True, generator=seeded(0))
    torch.testing.assert_close(joint @ joint.T, torch.exp(-squares / 2), atol=0.05, rtol=0)
    single = rff(x, 20_000, generator=seeded(0))
    expected = torch.exp(-((x[:, None] - x) ** 2) / 2).sum(2)  # one kernel for each coordinate
    torch.testing.assert_close(single @ single.T, expected, atol=0.1, rtol=0)
    assert single.shape == (6, 60_000) and rff(x, 2, generator=seeded(3)).equal(rff(x, 2, generator=seeded(3)))


def test_dependence_is_the_sum_over_pairs_of_vectors() -> None:
    z, w = normal(20, 3, 4).double(), some_weights(20).double()
    expected = 0.0
    for i, j in ((0, 1), (0, 2), (1, 2)):
        a, b = z[:, i], z[:, j]
        c = (w[:, None] * a).T @ b - torch.outer(w @ a, w @ b)
        expected += float(c.square().sum())
    assert float(interest_dependence(z, w, "linear")) == pytest.approx(expected)
    pairs = sum(float(hsic(z[:, i], z[:, j], w)) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert float(interest_dependence(z, w, "hsic")) == pytest.approx(pairs)
    within = z.clone()
    within[:, 0, 1] = within[:, 0, 0]  # coordinates of one vector may depend on each other
    alone = within[:, :1]
    assert float(interest_dependence(alone, w, "hsic")) == 0


def published_features(x: torch.Tensor) -> torch.Tensor:
    """The published code's features of n samples with r coordinates: cosine and sine of a scaled argument."""
    omega, phi = torch.randn(1, 1), 2 * math.pi * torch.rand(x.shape[1], 1)
    angle = x[:, :, None] * omega + phi
    angle = angle - angle.amin(1, keepdim=True)
    angle = angle / angle.amax(1, keepdim=True) * math.pi / 2
    return math.sqrt(2) * (angle.cos() + angle.sin())


def batch(seed: int, n: int) -> torch.Tensor:
    x = np.random.default_rng(seed).standard_normal((n, 3))
    x[:, 1] += x[:, 0] ** 2
    return torch.from_numpy(x).float()


def test_single_coordinates_give_half_the_published_loss() -> None:
    torch.manual_seed(0)
    w = torch.softmax(batch(9, 16)[:, 0], 0)
    found = interest_dependence(published_features(batch(0, 16)), w, "linear")
    assert 2 * float(found) == pytest.approx(OFFICIAL["lossb"], rel=1e-4)


def test_the_same_weights_and_memory_as_the_published_learner(monkeypatch: pytest.MonkeyPatch) -> None:
    def grams(z: torch.Tensor, *options: object) -> torch.Tensor:
        return dependence.grams_of(published_features(z[:, :, 0]), "linear", 1, False, None)

    learner = StableWeights(lam=0.02 / 2, min_ess=0)  # theirs counts each pair twice
    learner.set_extra_state({"calls": 0, "z": torch.zeros(16, 3, 1), "omega": torch.ones(16)})
    torch.manual_seed(1)
    for (seed, n, epoch), theirs in zip(((0, 16, 0), (1, 16, 0), (2, 10, 1), (3, 16, 1)), OFFICIAL["calls"]):
        if epoch:
            learner.calls = 10
        z = batch(seed, n)[:, :, None]
        with monkeypatch.context() as patch:
            patch.setattr(weighting, "grams_of", grams)
            omega = learner._learn(z)
        learner._remember(z, omega)
        np.testing.assert_allclose(torch.softmax(omega, 0), theirs["weights"], atol=1e-5)
        np.testing.assert_allclose(learner.mem_z.flatten(), theirs["mem"], atol=1e-5)
        np.testing.assert_allclose(learner.mem_omega, theirs["omega"], atol=1e-4)
    assert max(theirs["weights"]) > 1.1 * min(theirs["weights"])


# Weights


def correlated(n: int = 128, seed: int = 0) -> torch.Tensor:
    """Three vectors, of which the first two share a coordinate in four of five samples."""
    z = normal(n, 3, 2, seed=seed)
    same = torch.rand(n, generator=seeded(seed + 50)) < 0.8
    z[same, 1, 0] = z[same, 0, 0]
    return z


@pytest.mark.parametrize(("method", "lam"), [("rff", 1.0), ("hsic", 0.1)])
def test_weights_make_vectors_independent_and_stay_spread(method: str, lam: float) -> None:
    z = correlated(400)
    learner = StableWeights(60, 100.0, lam, method=method, generator=seeded(0))
    w = learner(z)
    assert float(w.sum()) == pytest.approx(1) and not w.requires_grad and float(w.min()) >= 0
    assert learner.last["ess"] == pytest.approx(float(1 / w.square().sum() / 400)) and learner.last["ess"] >= 0.3
    assert float(interest_dependence(z, w, "hsic")) < 0.6 * float(interest_dependence(z, method="hsic"))
    again = StableWeights(60, 100.0, lam, method=method, generator=seeded(0))(z)
    assert torch.equal(w, again)
    even = StableWeights(60, 100.0, 1e6, method=method, generator=seeded(0))(z)
    assert float((even - 1 / 400).abs().max()) < 1e-4


def test_the_guard_stops_a_collapse() -> None:
    z = correlated()
    free = StableWeights(50, 2000.0, 1e-3, min_ess=0, method="hsic")
    free(z)
    assert free.last["ess"] < 0.1 and free.last["shrunk"] == 1
    guarded = StableWeights(50, 2000.0, 1e-3, min_ess=0.4, method="hsic")
    guarded(z)
    assert guarded.last["ess"] == pytest.approx(0.4, abs=1e-3) and 0 < guarded.last["shrunk"] < 1


def test_identical_interests_end_at_the_guard_at_worst() -> None:
    z = normal(64, 1, 4).expand(64, 3, 4)
    learner = StableWeights(50, 300.0, 1e-3, method="hsic")
    w = learner(z)
    assert bool(w.isfinite().all()) and learner.last["ess"] >= 0.3 - 1e-6
    assert float(interest_dependence(z, w, "hsic")) > 0.1 * float(interest_dependence(z, None, "hsic"))  # cannot vanish


def test_memory_keeps_rows_of_smaller_batches() -> None:
    learner = StableWeights(generator=seeded(0))
    first, second = normal(8, 2, 3), normal(8, 2, 3, seed=1)
    learner(first)
    learner(second)
    torch.testing.assert_close(learner.mem_z, (first + second) / 2)  # a plain mean at first
    learner.calls = 10
    third = normal(5, 2, 3, seed=2)
    learner(third)
    torch.testing.assert_close(learner.mem_z[:5], 0.9 * (first + second)[:5] / 2 + 0.1 * third)
    torch.testing.assert_close(learner.mem_z[5:], (first + second)[5:] / 2)
    other = StableWeights(generator=seeded(0))
    other.load_state_dict(learner.state_dict())
    assert other.calls == 11 and torch.equal(other.mem_z, learner.mem_z)
    learner(normal(20, 2, 3))  # larger than the memory
    assert learner.mem_z.shape == (8, 2, 3)
    with pytest.raises(InputError, match=r"vectors \(3, 3\), but those of earlier batches are \(2, 3\)"):
        learner(normal(8, 3, 3))
    forgetful = StableWeights(memory=0)
    forgetful(first)
    assert forgetful.mem_z is None


def test_too_little_to_weigh() -> None:
    learner = StableWeights()
    for z in (normal(1, 4, 2), normal(2, 4, 2), normal(9, 1, 2)):
        torch.testing.assert_close(learner(z), torch.full((len(z),), 1 / len(z)))
    assert learner.mem_z is None and not learner.last
    assert learner(normal(0, 4, 2)).shape == (0,)


def test_half_precision_is_weighed_in_single() -> None:
    z = correlated().half()
    w = StableWeights(method="hsic", lam=0.1, lr=30.0)(z)
    assert w.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        cast = StableWeights(method="hsic", lam=0.1, lr=30.0)(z)
    assert torch.equal(w, cast)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: hsic(normal(3, 2), normal(4, 2)), r"x and y: shapes \(3, 2\) and \(4, 2\)"),
        (lambda: hsic(normal(1, 2), normal(1, 2)), "at least 2"),
        (lambda: hsic(normal(3, 2), normal(3, 2), bandwidth=0.0), "bandwidth: got 0.0"),
        (lambda: hsic(normal(3, 2), normal(3, 2), torch.ones(3)), "weights: sum 3"),
        (lambda: hsic(normal(3, 2), normal(3, 2), torch.tensor([1.5, -0.5, 0.0])), "smallest -0.5"),
        (lambda: hsic(normal(3, 2), normal(3, 2), torch.ones(2) / 2), r"weights: shape \(2,\) for 3"),
        (lambda: hsic(normal(3, 2) / 0, normal(3, 2)), "x: 6 of 6 values are NaN or infinite"),
        (lambda: rff(normal(3, 2), 0), "features: got 0"),
        (lambda: rff(normal(3)), r"x: shape \(3,\)"),
        (lambda: interest_dependence(normal(3, 2)), r"z: shape \(3, 2\)"),
        (lambda: interest_dependence(normal(1, 2, 2)), "1 samples"),
        (lambda: interest_dependence(normal(3, 2, 2), method="rbf"), "method: got 'rbf'"),
        (lambda: interest_dependence(torch.ones(3, 2, 2, dtype=torch.int64)), "z: got torch.int64"),
        (lambda: StableWeights(steps=0), "steps: got 0"),
        (lambda: StableWeights(lam=0.0), "lam: got 0.0"),
        (lambda: StableWeights(lr=math.nan), "lr: got nan"),
        (lambda: StableWeights(memory=1.0), "memory, min_ess: got 1.0"),
        (lambda: StableWeights(min_ess=1.5), "memory, min_ess: got 0.9, 1.5"),
        (lambda: StableWeights(method="rbf"), "method: got 'rbf'"),
        (lambda: StableWeights()(normal(4, 3)), r"z: shape \(4, 3\)"),
        (lambda: StableWeights()(normal(4, 3, 2) / 0), "the first in sample 0"),
    ],
)  # fmt: skip
def test_bad_vectors_and_parameters(call, told: str) -> None:
    with pytest.raises(InputError, match=told):
        call()


# Extractors

HISTORY = torch.tensor([[3, 1, 2, 0, 0], [4, 5, 6, 7, 8], [9, 0, 0, 0, 0]])


def test_attention_is_that_of_a_plain_loop() -> None:
    model = ComiRecSA(12, 6, 5, 3, 2, generator=seeded(0))
    assert model.w1.weight.shape == (8, 6) and model.w1.bias is not None
    with torch.no_grad():
        for parameter in (model.w1.bias, model.w2.bias):
            parameter.copy_(normal(*parameter.shape, seed=5))
        z = model(HISTORY).numpy()
    table, pos = model.item_embedding.weight.detach().numpy(), model.position[0].detach().numpy()
    w1, b1, w2, b2 = (p.detach().numpy() for p in (model.w1.weight, model.w1.bias, model.w2.weight, model.w2.bias))
    for row, items in enumerate(HISTORY.tolist()):
        real = [at for at, item in enumerate(items) if item]
        logit = np.array([w2 @ np.tanh(w1 @ (table[items[at]] + pos[at]) + b1) + b2 for at in real])
        for k in range(3):
            share = np.exp(logit[:, k]) / np.exp(logit[:, k]).sum()
            expected = sum(s * table[items[at]] for s, at in zip(share, real))  # no positions in the interests
            np.testing.assert_allclose(z[row, k], expected, atol=1e-5)


def test_routing_is_that_of_a_plain_loop() -> None:
    model = ComiRecDR(12, 4, 5, 3, generator=seeded(0))
    z = model(HISTORY).detach().numpy()
    table = model.item_embedding.weight.detach().numpy()
    weight = model.weight.detach().numpy().reshape(5, 3, 4, 4)  # place, capsule, to, from

    def squash(s: np.ndarray) -> np.ndarray:
        return (s @ s) / (1 + s @ s) * s / np.sqrt(s @ s + 1e-9)

    for row, items in enumerate(HISTORY.tolist()):
        real = [at for at, item in enumerate(items) if item]
        hat = {at: weight[at] @ table[items[at]] for at in real}
        b = {at: np.zeros(3) for at in real}
        for _ in range(3):
            c = {at: np.exp(b[at]) / np.exp(b[at]).sum() for at in real}
            found = np.stack([squash(sum(c[at][k] * hat[at][k] for at in real)) for k in range(3)])
            for at in real:
                b[at] = b[at] + (hat[at] * found).sum(1)
        np.testing.assert_allclose(z[row], found, atol=1e-5)


def test_routing_logits_carry_no_gradient() -> None:
    model = ComiRecDR(12, 4, 5, 3, generator=seeded(0)).double()
    history, seen = HISTORY[1:2], []
    model(history)[0, 0, 0].backward()
    through = model.weight.grad.clone()
    with torch.no_grad():  # couplings held at their last value, by finite differences of the last round alone
        from salience.data.desmil import extractors as module

        embedded, mask = model.item_embedding(history), history != 0
        routed = module._routed

        def record(b, mask, hat):
            seen.append(b)
            return routed(b, mask, hat)

        module._routed = record
        try:
            model.extract(embedded, mask)
        finally:
            module._routed = routed
        step = 1e-6
        for index in ((0, 0, 0), (2, 1, 3), (4, 3, 2)):
            values = []
            for sign in (1, -1):
                model.weight[index] += sign * step
                hat = torch.einsum("lod,bld->blo", model.weight, embedded).unflatten(2, (3, 4)).transpose(1, 2)
                values.append(float(module._squash(module._routed(seen[-1], mask, hat))[0, 0, 0]))
                model.weight[index] -= sign * step
            assert float(through[index]) == pytest.approx((values[0] - values[1]) / (2 * step), abs=1e-6)


def test_the_readout_is_hard() -> None:
    model = ComiRecSA(4, 2, 3, 2, 1)
    with torch.no_grad():
        model.item_embedding.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
    z = torch.tensor([[[2.0, 1.0], [1.0, 5.0]]] * 3)
    expected = torch.tensor([[2.0, 1.0], [1.0, 5.0], [1.0, 5.0]])
    torch.testing.assert_close(model.readout(z, torch.tensor([1, 2, 3])), expected)
    scores = model.scores(torch.tensor([[1, 1, 1]]))
    assert scores[0, 0] == -math.inf and scores.argmax() == 1
    assert model.recommend(torch.tensor([[1, 1, 1]]), 3).tolist() == [[1, 2, 3]]


def test_recommending_is_merging_what_each_interest_retrieves() -> None:
    model = ComiRecSA(40, 4, 5, 3, 2, generator=seeded(0))
    history = torch.randint(1, 40, (6, 5), generator=seeded(1))
    with torch.no_grad():
        each = model(history) @ model.item_embedding.weight.T
    for row, found in enumerate(model.recommend(history, 7).tolist()):
        pairs = []
        for k in range(3):
            pairs += [(float(each[row, k, item]), int(item)) for item in each[row, k].argsort(descending=True)[:7]]
        merged = list(dict.fromkeys(item for _, item in sorted(pairs, reverse=True) if item))[:7]
        assert found == merged


def test_sampled_softmax_worked_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ComiRecSA(5, 2, 3, 1, 1)
    table = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 0.0]])
    with torch.no_grad():
        model.item_embedding.weight.copy_(table)
    z, target = torch.tensor([[[1.0, 0.5]], [[0.0, 2.0]]]), torch.tensor([1, 3])
    monkeypatch.setattr(model, "_draw", lambda count, generator: torch.tensor([2, 3, 3]))
    often = {item: 3 * math.log((item + 1) / item) / math.log(5) for item in range(1, 5)}
    expected = []
    for user, own in zip(z[:, 0], target.tolist()):
        score = {item: math.exp(float(user @ table[item])) / often[item] for item in (own, 2, 3)}
        others = sum(score[item] for item in (2, 3, 3) if item != own)
        expected.append(-math.log(score[own] / (score[own] + others)))
    np.testing.assert_allclose(model.loss(z, target, 3).detach(), expected, rtol=1e-5)
    exact = torch.nn.functional.cross_entropy(z[:, 0] @ table[1:].T, target - 1, reduction="none")
    torch.testing.assert_close(model.loss(z, target), exact)  # 20 negatives, but 4 items


def test_true_probabilities_are_where_the_sampled_softmax_rests() -> None:
    model = ComiRecSA(61, 60, 3, 1, 1)
    with torch.no_grad():
        model.item_embedding.weight[1:] = torch.eye(60)
    p = torch.softmax(0.5 * normal(60), 0)
    logits = p.log().requires_grad_()
    generator = seeded(1)
    for _ in range(1200):  # negatives are far from uniform: item 1 is drawn 40 times as often as item 60
        target = 1 + torch.multinomial(p, 100, replacement=True, generator=generator)
        (model.loss(logits.expand(100, 1, 60), target, 15, generator).mean() / 1200).backward()
    assert float(logits.grad.abs().max()) < 0.006, "uncorrected, the largest push would be 0.09"
    drawn = model._draw(200_000, seeded(0))
    assert int(drawn.min()) == 1 and int(drawn.max()) == 60
    assert float((drawn == 1).double().mean()) == pytest.approx(math.log(2) / math.log(61), abs=0.005)


def test_padding_and_positions() -> None:
    model = ComiRecSA(12, 6, 5, 3, 2, generator=seeded(0))
    with pytest.warns(UserWarning, match="1 histories are all padding"):
        z = model(torch.tensor([[0, 0, 0, 0, 0], [1, 2, 0, 0, 0]]))
    assert not z[0].any() and z[1].any()
    history = torch.tensor([[1, 2, 3, 4, 5]])
    masked = model(history, torch.tensor([[1, 1, 0, 0, 0]]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(masked, model(torch.tensor([[1, 2, 0, 0, 0]])))
    assert not torch.allclose(model(history), model(history.flip(1)))
    blind = ComiRecSA(12, 6, 5, 3, 2, positions=False, generator=seeded(0))
    torch.testing.assert_close(blind(history), blind(history.flip(1)))
    assert not blind.position.requires_grad


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda m: m(torch.tensor([[1, 2, 3]])), r"history: shape \(1, 3\); \(batch, 5\)"),
        (lambda m: m(torch.tensor([[1, 2, 3, 12, 0]])), "history: 12 is no item .* 1 to 11, 0 is padding"),
        (lambda m: m(torch.ones(1, 5)), "history: got torch.float32"),
        (lambda m: m(HISTORY, torch.ones(3, 4)), r"mask: shape \(3, 4\)"),
        (lambda m: m.loss(normal(1, 3, 6), torch.tensor([0])), "target: 0 is no item"),
        (lambda m: m.loss(normal(1, 3, 6), torch.tensor([1]), 0), "negatives: got 0"),
        (lambda m: m.recommend(HISTORY, 12), "n: got 12; 1 to 11"),
        (lambda m: ComiRecSA(1), "items, dim, length, interests: got 1"),
        (lambda m: ComiRecSA(12, hidden=0), "hidden: got 0"),
        (lambda m: ComiRecDR(12, routing=0), "routing: got 0"),
    ],
)
def test_bad_histories(call, told: str) -> None:
    with pytest.raises(InputError, match=told):
        call(ComiRecSA(12, 6, 5, 3, 2))


# Sequences and measures


def test_measures_worked_by_hand() -> None:
    recommended = torch.tensor([[4, 2, 9, 7], [1, 2, 3, 4], [5, 6, 7, 8]])
    truth = [[2, 7, 11, 2], [1], [1, 2]]
    found = recall_ndcg_hit(recommended, truth, 4)
    assert found.recall == pytest.approx((2 / 3 + 1 + 0) / 3) and found.hit == pytest.approx(2 / 3)
    first = (1 / math.log2(3) + 1 / math.log2(5)) / (1 + 1 / math.log2(3))
    assert found.ndcg == pytest.approx((first + 1 + 0) / 3)
    assert recall_ndcg_hit(recommended, truth, 2).recall == pytest.approx((1 / 3 + 1) / 3)


def test_measures_agree_with_those_on_scores() -> None:
    scores = np.random.default_rng(0).standard_normal((7, 30))
    relevant = np.random.default_rng(1).random((7, 30)) < 0.2
    relevant[:, 0] = True
    lists = np.argsort(-scores, axis=1)
    found = recall_ndcg_hit(lists, [np.flatnonzero(row) for row in relevant], 10)
    assert found.recall == pytest.approx(recall_at_k(scores, relevant, 10).mean())
    assert found.hit == pytest.approx(hit_at_k(scores, relevant, 10).mean())


def test_history_is_the_first_four_fifths() -> None:
    histories, truth = history_and_truth([[1, 2, 3, 4, 5], list(range(1, 11))], 6)
    assert histories.tolist() == [[1, 2, 3, 4, 0, 0], [3, 4, 5, 6, 7, 8]]
    assert truth == [[5], [9, 10]]


def test_shifted_test_users_hold_unusual_pairs() -> None:
    sequences = [[1, 11], [2, 12], [3, 13]] * 10 + [[1, 12], [3, 11, 11]] + [[1, 1]]
    train, test = ood_sequences(sequences, {item: item for item in range(20)}, 2 / 33)
    assert test == [30, 31] and train == [*range(30), 32]
    assert ood_sequences([[1, 2], [1, 3]], [0, 0, 0, 1], 0.01)[1] in ([0], [1])  # at least one on each side


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: recall_ndcg_hit([[1, 2]], [[1], [2]], 2), "for 2 users"),
        (lambda: recall_ndcg_hit([[1, 2]], [[1]], 3), "k = 3"),
        (lambda: recall_ndcg_hit([[1, 2]], [[]], 2), "truth: user 0 has no items"),
        (lambda: recall_ndcg_hit([[2, 2]], [[1]], 2), "stands twice in the list of user 0"),
        (lambda: history_and_truth([], 3), "there are none"),
        (lambda: history_and_truth([[1, 2], [1]], 3), "number 1 has 1 items"),
        (lambda: history_and_truth([[1, 2]], 3, 1.0), "share: got 1.0"),
        (lambda: ood_sequences([[1], [7]], {1: 0}), "an item of sequence 1 has none"),
        (lambda: ood_sequences([[1], []], {1: 0}), "number 1 is empty"),
        (lambda: ood_sequences([[1]], {1: 0}), "got 1 and 0.2"),
    ],
)
def test_bad_sequences(call, told: str) -> None:
    with pytest.raises(InputError, match=told):
        call()


# Training


def two_tastes(n: int, seed: int) -> list[list[int]]:
    """Items 1 to 20 or 21 to 40: what follows is of the same kind."""
    rng = np.random.default_rng(seed)
    return [(1 + 20 * int(rng.integers(2)) + rng.integers(20, size=10)).tolist() for _ in range(n)]


def recommender(seed: int = 0, **options: object) -> DESMIL:
    model = ComiRecSA(41, 8, 8, 2, 4, generator=seeded(seed))
    learner = StableWeights(method="hsic", lam=0.5, lr=30.0, generator=seeded(seed + 1))
    options = {"lr": 0.02, "epochs": 6, "warmup": 2, "batch_size": 32, "negatives": 20, **options}
    return DESMIL(model, learner, generator=seeded(seed + 2), **options)


def test_it_learns_what_follows() -> None:
    sequences, others = two_tastes(160, 0), two_tastes(40, 1)
    trained = recommender().fit(sequences)
    z = trained.model(torch.randint(1, 41, (9, 8), generator=seeded(3))).detach()
    w = some_weights(9)
    for told, alone in zip(dependence.hsic_with_and_without(z, w), (None, w)):
        assert told == pytest.approx(float(interest_dependence(z, alone, "hsic")), rel=1e-4)
    assert [told["ess"] == pytest.approx(1) for told in trained.history_] == [True, True, False, False, False, False]
    for told in trained.history_[2:]:
        assert told["weighted hsic"] < told["hsic"] and told["ess"] >= 0.3
    histories, truth = history_and_truth(others, 8)
    assert recall_ndcg_hit(trained.recommend(histories, 20), truth, 20).recall > 0.8
    again = recommender().fit(sequences)
    assert again.history_ == trained.history_
    assert torch.equal(again.recommend(histories, 5), trained.recommend(histories, 5))
    assert trained.weights_.mean() == pytest.approx(1) and np.ptp(trained.weights_) > 0.01
    scores = trained.sample_scores([f"user {row}" for row in range(160)])
    weigher = LossReweighter("uniform", burn_in=0, scores=scores, temperature=1.0)
    assert weigher.coefficients(torch.ones(2), ids=["user 0", "user 1"]).sum() == pytest.approx(1)


def test_a_step_weighs_the_losses() -> None:
    trained = recommender()
    z, target, w = normal(4, 2, 8), torch.tensor([1, 2, 3, 4]), some_weights(4)
    trained.generator.manual_seed(0)
    losses = trained.model.loss(z, target, 20, seeded(0))
    torch.testing.assert_close(trained.batch_loss(z, target, w), (w * losses).sum())
    uniform = trained.batch_loss(z, target, torch.full((4,), 0.25))
    trained.generator.manual_seed(0)
    trained.model.loss(z, target, 20, trained.generator)
    torch.testing.assert_close(uniform, trained.model.loss(z, target, 20, trained.generator).mean())


def test_validation_keeps_the_best_epoch() -> None:
    trained = recommender(epochs=12, patience=2, lr=0.3).fit(two_tastes(60, 0), two_tastes(30, 1))
    recalls = [told["recall"] for told in trained.history_]
    best = int(np.argmax(recalls))
    assert len(recalls) == 12 or len(recalls) == best + 3
    histories, truth = history_and_truth(two_tastes(30, 1), 8)
    assert recall_ndcg_hit(trained.recommend(histories, 40), truth, 40).recall == pytest.approx(max(recalls))


def test_capsules_train_too() -> None:
    model = ComiRecDR(41, 8, 8, 2, generator=seeded(0))
    before = model.weight.detach().clone()
    trained = DESMIL(model, lr=0.02, epochs=8, warmup=4, batch_size=30, generator=seeded(1)).fit(two_tastes(61, 0))
    assert trained.history_[-1]["loss"] < trained.history_[0]["loss"]  # the last batch has one row
    assert not torch.equal(before, model.weight)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: recommender(epochs=0), "epochs: got 0"),
        (lambda: recommender(warmup=-1), "warmup: got -1"),
        (lambda: recommender(batch_size=0), "batch_size: got 0"),
        (lambda: recommender(lr=0.0), "lr: got 0.0"),
        (lambda: recommender().fit([]), "there are none"),
        (lambda: recommender().fit([[1, 2], [3]]), "number 1 has 1 items"),
        (lambda: recommender().fit([[1, 2], [3, 41]]), "target: 41 is no item"),
    ],
)
def test_bad_training(call, told: str) -> None:
    with pytest.raises(InputError, match=told):
        call()
