"""INSET: utilities and mean-field steps against loops by hand, exact distributions, padding, training, bad input."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from salience.data import (
    INSET,
    DeepSetSelector,
    PGMSelector,
    RandomSelector,
    RecognitionNet,
    SetTransformerSelector,
    SetUtility,
    SubsetExamples,
    SubsetSelector,
    anomaly_sets,
    exact_distribution,
    fit_selector,
    gaussian_sets,
    mean_jaccard,
    pad_sets,
    registry_sets,
    top_value_sets,
    two_moons_sets,
)
from salience.data.inset import utility as utility_module
from salience.data.inset.model import mean_field_step
from salience.data.inset.recognition import Recognition
from salience.data.inset.selector import sampled_negatives, set_cross_entropy
from salience.errors import DataError, InputError, NothingToDo

SMALL = {"dim": 6, "hidden": 10}


def encoder() -> nn.Module:
    return nn.Linear(3, 6)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def a_utility(fuse: str = "hidden", seed: int = 0, **options) -> SetUtility:
    torch.manual_seed(seed)
    return SetUtility(encoder(), fuse=fuse, **{**SMALL, **options})


def some_sets(sets: int = 2, n: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(sets, n, 3, generator=generator(seed))


def all_valid(V: Tensor) -> Tensor:
    return torch.ones(V.shape[:2], dtype=torch.bool)


def selectors() -> dict[str, Callable[[], SubsetSelector]]:
    return {
        "copula": lambda: INSET(encoder, mode="copula", **SMALL),
        "ind": lambda: INSET(encoder, mode="ind", steps=2, fuse="scalar", **SMALL),
        "diffMF": lambda: INSET(encoder, mode="diffMF", fuse="none", **SMALL),
        "deepset": lambda: DeepSetSelector(encoder(), **SMALL),
        "transformer": lambda: SetTransformerSelector(encoder(), heads=2, **SMALL),
        "pgm": lambda: PGMSelector(encoder(), **SMALL),
        "random": RandomSelector,
    }


def selector(name: str, seed: int = 0) -> SubsetSelector:
    torch.manual_seed(seed)
    return selectors()[name]()


# The utility


@torch.no_grad()
def value_by_hand(utility: SetUtility, elements: Tensor, subset: Tensor) -> Tensor:
    """One F(S; V), from the sums as the paper writes them."""
    e = utility.encoder(elements)
    h_s = sum((e[i] for i in range(len(e)) if subset[i]), torch.zeros(6))
    h_v = sum(e)
    if utility.fuse == "none":
        return utility.of_subset(h_s)[0]
    if utility.fuse == "scalar":
        return torch.sigmoid(utility.of_subset(h_s) + utility.of_set(h_v))[0]
    weights = utility.out[1]
    return (torch.relu(utility.of_subset(h_s) + utility.of_set(h_v)) @ weights.weight[0]) + weights.bias[0]


@pytest.mark.parametrize("fuse", ["hidden", "scalar", "none"])
def test_the_utility_is_that_of_the_paper(fuse: str) -> None:
    utility, V = a_utility(fuse), some_sets()
    subsets = torch.rand(2, 4, 5, generator=generator(1)) < 0.5
    expected = torch.stack([torch.stack([value_by_hand(utility, v, s) for s in some]) for v, some in zip(V, subsets)])
    torch.testing.assert_close(utility(V, subsets), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(utility(V, subsets[:, 0]), expected[:, 0], rtol=0, atol=1e-6)
    torch.testing.assert_close(utility(V, subsets[:, :, None])[..., 0], expected, rtol=0, atol=1e-6)


def test_parameters_as_the_authors_count_them() -> None:
    """2,162,181 for INSET and 1,782,680 for EquiVSet: one more head of 256, 500, 500 and 1."""
    one, other = (
        sum(p.numel() for p in INSET(lambda: nn.Linear(3, 256), fuse=fuse).parameters()) for fuse in ("scalar", "none")
    )
    assert one - other == 2_162_181 - 1_782_680


@pytest.mark.parametrize("fuse", ["hidden", "scalar", "none"])
def test_order_does_not_matter_to_the_utility(fuse: str) -> None:
    utility, V = a_utility(fuse), some_sets()
    subsets = torch.rand(2, 4, 5, generator=generator(1)) < 0.5
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(utility(V[:, order], subsets[:, :, order]), utility(V, subsets), rtol=0, atol=1e-6)


def gains_for(utility: SetUtility, V: Tensor, uniforms: Tensor, q: float = 0.5) -> Tensor:
    return mean_field_step(utility, utility.encoder(V), torch.full(V.shape[:2], q), uniforms)


def test_the_set_cancels_without_a_nonlinearity_and_only_then() -> None:
    V, uniforms = some_sets(), torch.rand(2, 5, 5, 5, generator=generator(1))
    blind, additive = a_utility("none"), a_utility("scalar", sigma=nn.Identity())
    additive.of_subset, additive.encoder = blind.of_subset, blind.encoder
    torch.testing.assert_close(gains_for(additive, V, uniforms), gains_for(blind, V, uniforms), rtol=0, atol=1e-6)
    for fuse in ("hidden", "scalar"):
        utility = a_utility(fuse)
        before = gains_for(utility, V, uniforms)
        with torch.no_grad():
            utility.of_set[-1].bias += 1.0  # all that changes is what is made of V
        assert float((gains_for(utility, V, uniforms) - before).detach().abs().max()) > 1e-4, fuse


def test_sums_keep_the_size_of_the_set() -> None:
    """The same elements twice: means would be the same, sums are not."""
    V = some_sets(1)
    utility, subset = a_utility(), torch.tensor([[[1, 0, 1, 0, 0]]])
    twice = utility(V.repeat(1, 2, 1), torch.cat([subset, 0 * subset], 2))
    assert abs(float((twice - utility(V, subset)).detach())) > 1e-3


# The mean-field step


@pytest.mark.parametrize("fuse", ["hidden", "none"])
def test_the_mean_field_step_is_the_loop_by_hand(fuse: str) -> None:
    utility, V = a_utility(fuse), some_sets(n=4)
    q = torch.rand(2, 4, generator=generator(1))
    uniforms = torch.rand(2, 3, 4, 4, generator=generator(2))
    expected = torch.zeros(2, 4)
    for b in range(2):
        for i in range(4):
            for m in range(3):
                subset = uniforms[b, m, i] < q[b]
                above, below = subset.clone(), subset.clone()
                above[i], below[i] = True, False
                gain = value_by_hand(utility, V[b], above) - value_by_hand(utility, V[b], below)
                expected[b, i] += gain / 3
    found = mean_field_step(utility, utility.encoder(V), q, uniforms)
    torch.testing.assert_close(found.detach().sigmoid(), expected.sigmoid(), rtol=0, atol=1e-6)


def test_marginals_are_equivariant() -> None:
    utility, V = a_utility(), some_sets()
    q, uniforms = torch.rand(2, 5, generator=generator(1)), torch.rand(2, 3, 5, 5, generator=generator(2))
    order = torch.tensor([3, 0, 4, 1, 2])
    found = mean_field_step(utility, utility.encoder(V), q, uniforms)
    moved = mean_field_step(utility, utility.encoder(V[:, order]), q[:, order], uniforms[:, :, order][:, :, :, order])
    torch.testing.assert_close(moved, found[:, order], rtol=0, atol=1e-6)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    V, uniforms = some_sets(), torch.rand(2, 3, 5, 5, generator=generator(1))
    results = []
    for cells in (utility_module._CELLS, 10):  # all at once; two rows of five at a time
        monkeypatch.setattr(utility_module, "_CELLS", cells)
        utility = a_utility()
        found = gains_for(utility, V, uniforms)
        found.square().sum().backward()
        results.append((found.detach(), *(p.grad for p in utility.parameters())))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other)
    assert sum(float(gradient.abs().sum()) for gradient in results[0][1:]) > 0


def test_a_modular_utility_has_exact_marginals() -> None:
    """F(S) = sum of w'e_i: elements are independent, and one step from anywhere is exact."""
    torch.manual_seed(0)
    model = INSET(encoder, mode="ind", fuse="none", layers=0, **SMALL)
    V = some_sets()
    expected = model.utility.encoder(V) @ model.utility.of_subset[0].weight[0]
    found = model.values(V)
    torch.testing.assert_close(found, expected.detach())
    exact = exact_distribution(model.utility, V)
    torch.testing.assert_close(exact.marginals.float(), found.sigmoid())
    assert float(exact.kl_of(found).abs().max()) < 1e-5


def test_several_steps_start_from_the_marginals_before() -> None:
    torch.manual_seed(0)
    model = INSET(encoder, mode="diffMF", steps=2, samples=3, **SMALL)
    with torch.no_grad():
        model.utility.out[1].weight *= 8  # so that marginals move
    V = some_sets(1)
    drawn = model._draws(5, seed=4)
    q, features = torch.full((1, 5), 0.5), model.utility.encoder(V)
    for uniforms in drawn:
        log_odds = mean_field_step(model.utility, features, q, uniforms[None])
        q = log_odds.sigmoid()
    torch.testing.assert_close(model.values(V, seed=4), log_odds.detach())


def test_the_exact_distribution_by_hand() -> None:
    utility, V = a_utility("none", layers=1), some_sets(1, n=2)
    values = torch.stack([value_by_hand(utility, V[0], torch.tensor(s)) for s in ([0, 0], [1, 0], [0, 1], [1, 1])])
    p = values.detach().softmax(0)
    exact = exact_distribution(utility, V)
    torch.testing.assert_close(exact.log_p[0].exp().float(), p)
    torch.testing.assert_close(exact.marginals[0].float(), torch.stack([p[1] + p[3], p[2] + p[3]]))
    q = torch.tensor([0.3, 0.6])
    product = torch.tensor([0.7 * 0.4, 0.3 * 0.4, 0.7 * 0.6, 0.3 * 0.6])
    torch.testing.assert_close(exact.kl_of(torch.logit(q)[None])[0].float(), (product * (product / p).log()).sum())
    with pytest.raises(InputError, match="sets of 17 elements"):
        exact_distribution(utility, some_sets(1, n=17))


def test_many_mean_field_steps_come_near_the_exact_marginals() -> None:
    torch.manual_seed(0)
    model = INSET(encoder, mode="diffMF", steps=20, samples=500, **SMALL)
    with torch.no_grad():
        model.utility.out[1].weight *= 6
    V = some_sets(3, n=6)
    exact, found = exact_distribution(model.utility, V), model.values(V)
    assert float((exact.marginals - 0.5).abs().max()) > 0.1
    assert float((exact.marginals - found.sigmoid()).abs().max()) < 0.03
    assert bool((exact.kl_of(found) < 0.5 * exact.kl_of(torch.zeros(3, 6))).all())


def test_differences_are_taken_in_single_precision() -> None:
    utility, V, uniforms = a_utility(), some_sets(), torch.rand(2, 3, 5, 5, generator=generator(1))
    with torch.no_grad():
        utility.out[1].bias += 1000.0  # bfloat16 could not tell apart values within 4 of each other
    features = utility.encoder(V).bfloat16()
    plain = utility.gains(features.float(), uniforms < 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = utility.gains(features, uniforms < 0.5)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain)


# The recognition network


def test_the_entropy_and_the_bound_by_hand() -> None:
    torch.manual_seed(0)
    net, utility, V = RecognitionNet(encoder(), **SMALL), a_utility("none"), some_sets()
    valid = all_valid(V)
    loss = net.negative_elbo(utility, V, valid, 3, generator(1))
    found = net(V, valid)
    subsets = net.sample(found, 3, generator(1))
    entropy = torch.distributions.Bernoulli(logits=found.log_odds).entropy().sum(1)
    torch.testing.assert_close(loss, -(utility(V, subsets).mean(1) + entropy).mean())


def test_drawn_subsets_are_bits_with_a_gradient() -> None:
    net = RecognitionNet(encoder(), **SMALL)
    V = some_sets()
    found = net(V, all_valid(V))
    drawn = net.sample(found, 4, generator())
    assert drawn.shape == (2, 4, 5) and bool(torch.isin(drawn, torch.tensor([0.0, 1.0])).all())
    drawn.sum().backward()
    for part in (net.to_log_odds, net.to_std, net.to_factors, net.encoder):
        assert float(part.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize("copula", [True, False])
def test_elements_are_drawn_with_their_probability(copula: bool) -> None:
    net = RecognitionNet(encoder(), copula=copula, rank=1, **SMALL)
    log_odds = torch.logit(torch.tensor([[0.1, 0.5, 0.9]]))
    # Of deviation 1 and without factors, g is standard normal and u uniform.
    found = (
        Recognition(log_odds, torch.ones(1, 3), torch.zeros(1, 3, 1)) if copula else Recognition(log_odds, None, None)
    )
    drawn = net.sample(found, 20_000, generator())[0]
    np.testing.assert_allclose(drawn.mean(0), [0.1, 0.5, 0.9], atol=0.02)
    assert abs(float(torch.corrcoef(drawn.T)[0, 1])) < 0.03


def test_factors_of_the_copula_bind_elements_together() -> None:
    net = RecognitionNet(encoder(), rank=1, **SMALL)
    factors = torch.tensor([[[0.9], [0.9], [-0.9]]])
    drawn = net.sample(Recognition(torch.zeros(1, 3), torch.full((1, 3), 0.1), factors), 5000, generator())[0]
    correlation = torch.corrcoef(drawn.T)
    assert correlation[0, 1] > 0.7 and correlation[0, 2] < -0.7


def test_noise_at_its_edges_is_finite() -> None:
    """A deviation so large that the normal distribution function is 0 or 1 in single precision."""
    net = RecognitionNet(encoder(), rank=1, **SMALL)
    log_odds = torch.zeros(1, 3, requires_grad=True)
    drawn = net.sample(Recognition(log_odds, torch.full((1, 3), 1e4), torch.zeros(1, 3, 1)), 50, generator())
    drawn.sum().backward()
    assert bool(torch.isfinite(drawn).all()) and bool(torch.isfinite(log_odds.grad).all())


# Losses


def test_negatives_are_as_many_and_no_members() -> None:
    S = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0]]).bool()
    valid = torch.ones(4, 6, dtype=torch.bool)
    valid[1, 3:] = False
    for ratio, counts in ((1, [2, 1, 0, 1]), (2, [4, 2, 0, 1]), (9, [4, 2, 0, 1])):
        found = sampled_negatives(S, valid, ratio, generator())
        assert found.sum(1).tolist() == counts
        assert not bool((found & S).any()) and not bool((found & ~valid).any())
    seen = sum(sampled_negatives(S[:1], valid[:1], 1, generator(seed))[0].long() for seed in range(400))
    np.testing.assert_allclose(seen[2:] / 400, [0.5] * 4, atol=0.1)


def test_cross_entropy_by_hand_and_at_its_edges() -> None:
    q = torch.tensor([[0.9, 0.2, 0.4], [0.5, 0.5, 0.5]])
    S, counted = torch.tensor([[1, 0, 0], [0, 0, 1]]).bool(), torch.tensor([[1, 1, 0], [0, 0, 1]]).bool()
    expected = (-math.log(0.9) - math.log(0.8) - math.log(0.5)) / 2
    assert float(set_cross_entropy(torch.logit(q), S, counted)) == pytest.approx(expected, rel=1e-6)
    sure = torch.tensor([[200.0, -200.0, 200.0]], requires_grad=True)  # q is 1, 0 and 1 to the last digit
    loss = set_cross_entropy(sure, torch.tensor([[True, False, False]]), torch.ones(1, 3, dtype=torch.bool))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(200) and sure.grad.tolist() == [[0.0, 0.0, 1.0]]


def test_the_utility_loss_leaves_the_recognition_network_alone() -> None:
    model, V = selector("copula"), some_sets()
    S = torch.tensor([[1, 0, 0, 0, 0], [0, 1, 1, 0, 0]]).bool()
    model.utility_loss(V, S, all_valid(V), generator()).backward()
    assert all(p.grad is None for p in model.recognition.parameters())
    assert all(p.grad is not None for p in model.utility.parameters())
    loss = model.utility_loss(V, S, all_valid(V), generator(3))
    counted = S | sampled_negatives(S, all_valid(V), 1, again := generator(3))
    uniforms = torch.rand(2, 5, 5, 5, generator=again)
    q = model.recognition(V, all_valid(V)).log_odds.sigmoid()
    log_odds = mean_field_step(model.utility, model.utility.encoder(V), q, uniforms)
    torch.testing.assert_close(loss, set_cross_entropy(log_odds, S, counted))


def test_the_greedy_likelihood_by_hand() -> None:
    model = selector("pgm")
    V, S = some_sets(2, n=4), torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1]]).bool()

    def p_of(elements: Tensor, order: list[int]) -> float:
        taken, log_p = torch.zeros(4), 0.0
        for picked in order:
            free = [i for i in range(4) if not taken[i]]
            values = torch.stack(
                [
                    value_by_hand(model.utility, elements, taken + nn.functional.one_hot(torch.tensor(i), 4))
                    for i in free
                ]
            )
            log_p += float(values.log_softmax(0)[free.index(picked)].detach())
            taken[picked] = 1
        return log_p

    loss = float(model.objectives()[0].loss(V, S, all_valid(V), generator()).detach())
    either = [-(p_of(V[0], order) + p_of(V[1], [3])) / 2 for order in ([0, 2], [2, 0])]
    assert min(abs(loss - one) for one in either) < 1e-5
    # The choice is greedy: the first is the best single element, the second the best beside it.
    first, second = model.select(V[:1], 2)[0].tolist()
    alone = [float(value_by_hand(model.utility, V[0], nn.functional.one_hot(torch.tensor(i), 4))) for i in range(4)]
    assert first == int(np.argmax(alone))
    pair = {i: float(value_by_hand(model.utility, V[0], torch.zeros(4).index_fill(0, torch.tensor([first, i]), 1.0)))
            for i in range(4) if i != first}  # fmt: skip
    assert second == max(pair, key=pair.get)


# All selectors


@pytest.mark.parametrize("name", selectors())
def test_padding_and_batches_change_nothing(name: str) -> None:
    model = selector(name)
    sets = [some_sets(1, n=n, seed=n)[0] for n in (5, 1, 3, 5)]
    V, valid = pad_sets(sets)
    assert valid.sum(1).tolist() == [5, 1, 3, 5]
    V = torch.where(valid[:, :, None], V, math.nan)  # padding may hold anything
    found = model.values(V, valid)
    for row, alone in enumerate(sets):
        torch.testing.assert_close(found[row, : len(alone)], model.values(alone[None])[0], rtol=0, atol=1e-6)
    assert bool(torch.isneginf(found[~valid]).all())
    torch.testing.assert_close(model.values(V, valid, batch_size=1), found, rtol=0, atol=1e-6)
    # Padding in front is as good as behind.
    front = torch.cat([V[2:3, 3:], V[2:3, :3]], 1)
    moved = model.values(front, torch.tensor([[False, False, True, True, True]]))
    torch.testing.assert_close(moved[0, 2:], found[2, :3], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["deepset", "transformer", "pgm"])
def test_rankings_move_with_the_elements(name: str) -> None:
    model, V, order = selector(name), some_sets(), torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(model.values(V[:, order]), model.values(V)[:, order], rtol=0, atol=1e-5)


def test_sets_in_training_may_be_padded() -> None:
    V, valid = pad_sets([some_sets(1, n=n, seed=n)[0] for n in (5, 3)])
    S = torch.tensor([[1, 0, 0, 0, 0], [0, 1, 0, 0, 0]]).bool()
    model = selector("copula")
    before = [float(o.loss(V, S, valid, generator()).detach()) for o in model.objectives()]
    other = torch.where(valid[:, :, None], V, 100.0)
    assert [float(o.loss(other, S, valid, generator()).detach()) for o in model.objectives()] == pytest.approx(before)


@pytest.mark.parametrize("name", selectors())
def test_choices_and_scores(name: str) -> None:
    model, V = selector(name), some_sets(3)
    values = model.values(V)
    chosen = model.select(V, [2, 0, 5])
    assert [len(row) for row in chosen] == [2, 0, 5]
    assert chosen[0].tolist() == values[0].topk(2).indices.tolist()
    scores = model.scores(V[1], ids=list("abcde"))
    assert scores.unit == "sample" and scores.provenance["method"] == type(model).__name__
    assert list(scores.top(1).ids) == ["abcde"[int(model.select(V[1:2], 1)[0])]]
    np.testing.assert_allclose(scores.values, values[1], rtol=0, atol=1e-6)
    if model.has_marginals:
        marginals = model.marginals(V)
        torch.testing.assert_close(marginals, values.sigmoid())
        assert [sorted(row.tolist()) for row in model.select(V)] == [
            row.nonzero().flatten().tolist() for row in marginals > 0.5
        ]
    else:
        with pytest.raises(InputError, match="say how many to choose"):
            model.select(V)
        with pytest.raises(InputError, match="has no probabilities"):
            model.marginals(V)


@pytest.mark.parametrize("name", selectors())
def test_a_set_of_one(name: str) -> None:
    model, V = selector(name), some_sets(2, n=1)
    assert model.values(V).shape == (2, 1) and [row.tolist() for row in model.select(V, 1)] == [[0], [0]]
    S = torch.tensor([[True], [False]])
    for objective in model.objectives():
        objective.loss(V, S, all_valid(V), generator()).backward()


def test_draws_follow_the_seed() -> None:
    model, V = selector("diffMF"), some_sets()
    assert torch.equal(model.values(V), model.values(V))
    assert not torch.equal(model.values(V), model.values(V, seed=1))
    assert not torch.equal(RandomSelector().values(V), RandomSelector().values(V, seed=1))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    model.values(V)
    assert torch.equal(torch.get_rng_state(), state), "the global random state moved"


# Training


def easy(count: int = 60, seed: int = 0) -> SubsetExamples:
    """The two elements with the largest first number."""
    V = torch.randn(count, 6, 3, generator=generator(seed))
    S = torch.zeros(count, 6, dtype=torch.bool).scatter(1, V[:, :, 0].topk(2).indices, True)
    return SubsetExamples(V, S)


@pytest.mark.parametrize("name", [name for name in selectors() if name != "random"])
def test_every_selector_learns(name: str) -> None:
    model = selector(name)
    history = fit_selector(model, easy(), easy(seed=1), generator=generator(), lr=0.01, epochs=15, batch_size=20)
    test = easy(100, seed=2)
    found = mean_jaccard(model.select(test.V, 2), test.S)
    assert found > 0.7 > 0.4 > mean_jaccard(RandomSelector().select(test.V, 2), test.S)
    validation = easy(seed=1)
    again = mean_jaccard(model.select(validation.V, 2), validation.S)
    assert again == max(history.jaccard) == history.jaccard[history.best], "not the best epoch's weights"
    assert {len(losses) for losses in history.loss.values()} == {len(history.jaccard)}


def test_a_batch_is_one_step_of_each_network_in_turn() -> None:
    model, train = selector("copula"), easy(8)
    by_hand = copy.deepcopy(model)
    fit_selector(
        model, train, train, generator=generator(5), lr=0.01, weight_decay=0.1, clip=0.5, epochs=1, batch_size=8
    )
    draws = generator(5)
    torch.randint(2**62, (), generator=draws)
    rows = torch.randperm(8, generator=draws)
    V, S, valid = train.V[rows], train.S[rows], all_valid(train.V)
    for loss_of, network in (
        (by_hand.recognition_loss, by_hand.recognition), (by_hand.utility_loss, by_hand.utility),
    ):  # fmt: skip
        optimizer = torch.optim.Adam(network.parameters(), lr=0.01, weight_decay=0.1)
        by_hand.zero_grad()
        loss_of(V, S, valid, draws).backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in by_hand.parameters() if p.grad is not None))
        for p in by_hand.parameters():
            if p.grad is not None:
                p.grad *= min(1.0, 0.5 / norm)
        optimizer.step()
    for (name, ours), theirs in zip(model.state_dict().items(), by_hand.state_dict().values()):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5, msg=name)


def test_the_same_seed_twice() -> None:
    states = []
    for _ in range(2):
        model = selector("copula")
        fit_selector(model, easy(), easy(seed=1), generator=generator(), epochs=2, batch_size=20)
        states.append(model.state_dict())
    assert all(torch.equal(one, other) for one, other in zip(states[0].values(), states[1].values()))


def test_training_ends_when_validation_does_not_improve() -> None:
    model = selector("diffMF")
    history = fit_selector(model, easy(), easy(seed=1), generator=generator(), lr=1e-12, epochs=50, patience=3)
    assert len(history.jaccard) == 4 and history.best == 0


class Breaking(nn.Linear):
    """Gives NaN from its fifth batch on."""

    batches = 0

    def forward(self, x: Tensor) -> Tensor:
        self.batches += self.training
        return super().forward(x) + (math.nan if self.training and self.batches >= 5 else 0.0)


def test_a_loss_that_is_not_finite_stops_training() -> None:
    def train(layer: type[nn.Linear], epochs: int) -> SubsetSelector:
        torch.manual_seed(0)
        model = INSET(lambda: layer(3, 6), mode="diffMF", **SMALL)
        fit = {"generator": generator(), "lr": 0.01, "batch_size": 20}
        if layer is Breaking:
            with pytest.raises(InputError, match=r"lr: the loss of the utility is nan in epoch 2; lower .* 0.01"):
                fit_selector(model, easy(), easy(seed=1), epochs=epochs, **fit)
        else:
            fit_selector(model, easy(), easy(seed=1), epochs=epochs, **fit)
        return model

    broken, whole = train(Breaking, 9).state_dict(), train(nn.Linear, 1).state_dict()
    assert all(torch.equal(one, other) for one, other in zip(broken.values(), whole.values())), "not its best state"


def test_best_subsets_without_a_side_are_told() -> None:
    train = easy(12)
    S = train.S.clone()
    S[0], S[1:3] = False, True
    with pytest.warns(UserWarning) as told:
        fit_selector(selector("diffMF"), SubsetExamples(train.V, S), train, generator=generator(), epochs=1)
    texts = [str(one.message) for one in told]
    assert any("1 of 12 best subsets are empty" in text for text in texts)
    assert any("2 of 12 best subsets are whole sets" in text for text in texts)


def test_the_measure_by_hand() -> None:
    S = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]).bool()
    chosen = [torch.tensor([0, 2]), torch.tensor([3]), torch.tensor([], dtype=torch.long), torch.tensor([0])]
    assert mean_jaccard(chosen, S) == pytest.approx((1 / 3 + 1 + 1 + 0) / 4)
    with pytest.raises(InputError, match="1 choices for 4 sets"):
        mean_jaccard(chosen[:1], S)


# Makers of examples


@pytest.mark.parametrize("maker", [two_moons_sets, gaussian_sets])
def test_points_of_the_other_kind_are_the_best_subset(maker: Callable) -> None:
    found = maker(40, n=50, size=5, random_state=3)
    assert found.V.shape == (40, 50, 2) and found.V.dtype == torch.float32
    assert set(found.S.sum(1).tolist()) == {5}
    assert torch.equal(found.V, maker(40, n=50, size=5, random_state=3).V)
    assert not torch.equal(found.V, maker(40, n=50, size=5, random_state=4).V)
    assert int(found.S.any(0).sum()) > 40, "the best subset keeps to some places"
    sides = set()
    for V, S in zip(found.V, found.S):
        apart = V[S].mean(0) - V[~S].mean(0)
        assert float(apart.norm()) > 0.5
        sides.add(bool(apart[1] > 0))
    assert sides == {True, False}, "the background is always the same"


def test_the_scale_of_the_papers_points() -> None:
    blobs = gaussian_sets(60, n=80, size=1).V
    np.testing.assert_allclose(blobs.mean(1).abs().mean(0), math.sqrt(0.5), atol=0.05)
    np.testing.assert_allclose((blobs - blobs.mean(1, keepdim=True)).std((0, 1)), 0.5, atol=0.05)
    moons = two_moons_sets(60).V  # make_moons spans -1..2 and -0.5..1; twice that, less 1 and 0.2
    np.testing.assert_allclose(moons.mean((0, 1)), [0.0, 0.3], atol=0.15)
    assert -4 < float(moons[..., 0].min()) < -2.5 and 2.5 < float(moons[..., 0].max()) < 4


def test_anomalies_have_none_of_the_shared_attributes() -> None:
    rng = np.random.default_rng(0)
    attributes = rng.random((200, 5)) < 0.5
    found = anomaly_sets(attributes.astype(np.float32), attributes, 50, random_state=1)
    assert set(found.S.sum(1).tolist()) == {2, 3} and found.V.shape == (50, 8, 5)
    for V, S in zip(found.V.bool(), found.S):
        both = V[~S].all(0) & ~V[S].any(0)
        assert int(both.sum()) >= 2
    classes = rng.integers(0, 4, 200)
    digits = anomaly_sets(classes[:, None].astype(np.float32), classes, 20, n=6, sizes=(1, 1), random_state=1)
    for V, S in zip(digits.V[..., 0], digits.S):
        assert len(V[~S].unique()) == 1 and V[S][0] != V[~S][0]
    with pytest.raises(NothingToDo, match="no 8 images that share 1"):
        anomaly_sets(np.zeros((5, 2)), np.zeros(5, dtype=int), 3)
    with pytest.raises(InputError, match="5 images, 4 labels"):
        anomaly_sets(np.zeros((5, 2)), np.zeros(4, dtype=int), 3)


def test_registries_are_filled_with_what_is_least_like_them() -> None:
    rng = np.random.default_rng(0)
    items = rng.standard_normal((40, 4))
    registries = [[0, 1, 2], [5, 6], list(range(30)), [7, 8, 9, 10]]  # the second and third are too small and too large
    found = registry_sets(items, registries, n=10)
    assert found.S.sum(1).tolist() == [3, 4]
    for V, S, registry in zip(found.V.numpy(), found.S.numpy(), ([0, 1, 2], [7, 8, 9, 10])):
        assert {tuple(row) for row in V[S]} == {tuple(items[i]) for i in registry}
        mean = items[registry].mean(0)
        likeness = {tuple(row): row @ mean / np.linalg.norm(row) for i, row in enumerate(items) if i not in registry}
        least = sorted(likeness, key=likeness.get)[: 10 - len(registry)]
        assert {tuple(row) for row in V[~S]} == set(least)
    with pytest.raises(NothingToDo, match="none of 1 has 3 to 9"):
        registry_sets(items, [[1]], n=10)
    with pytest.raises(InputError, match="registry 0 names item 40"):
        registry_sets(items, [[1, 2, 40]], n=10)
    with pytest.raises(InputError, match="40 items cannot fill a set of 50"):
        registry_sets(items, [[1, 2, 3]], n=50)


def test_highest_values_are_the_best_subset() -> None:
    values = np.random.default_rng(0).standard_normal(60)
    found = top_value_sets(values[:, None], values, 10, n=12, size=3)
    for V, S in zip(found.V[..., 0], found.S):
        assert len(V.unique()) == 12 and V[S].min() > V[~S].max() and int(S.sum()) == 3
    with pytest.raises(InputError, match="at least 12 of each"):
        top_value_sets(values[:8, None], values[:8], 10, n=12, size=3)


# Bad input


@pytest.mark.parametrize(
    ("k", "told"),
    [
        (6, "k: 6 for set 0, which has 5 elements"),
        (-1, "k: -1 for set 0"),
        ([2, 4], "k: 4 for set 1, which has 3 elements"),
        ([2, 2, 2], r"k: torch.int64 of shape \(3,\)"),
        (0.5, "k: torch.float32"),
        (True, "k: torch.bool"),
    ],
)
def test_bad_counts(k: object, told: str) -> None:
    V, valid = pad_sets([some_sets(1, n=n)[0] for n in (5, 3)])
    with pytest.raises(InputError, match=told):
        selector("diffMF").select(V, k, valid)


@pytest.mark.parametrize(
    ("V", "valid", "error", "told"),
    [
        (torch.zeros(4, 3), None, InputError, r"V: shape \(4, 3\)"),
        (torch.zeros(0, 4, 3), None, NothingToDo, "there is no set"),
        (torch.zeros(2, 0, 3), None, InputError, "set 0 has no elements"),
        (torch.zeros(2, 4, 3), torch.tensor([[True] * 4, [False] * 4]), InputError, "set 1 has no elements"),
        (torch.zeros(2, 4, 3), torch.ones(2, 3, dtype=torch.bool), InputError, r"valid: torch.bool of shape \(2, 3\)"),
        (torch.zeros(2, 4, 3), torch.ones(2, 4), InputError, "valid: torch.float32"),
        (torch.tensor([[[0.0] * 3, [math.inf] * 3]]), None, DataError, "element 1 of set 0 holds a number that is not"),
        (torch.zeros(2, 4, 7), None, RuntimeError, "shapes cannot be multiplied"),
    ],
)
def test_bad_sets(V: Tensor, valid: Tensor | None, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        selector("diffMF").values(V, valid)


def test_bad_examples() -> None:
    good = easy(4)
    fit = {"generator": generator(), "epochs": 1}
    bits = good.S.long()
    bits[2, 1] = 2
    valid = all_valid(good.V)
    valid[3, int(good.S[3].nonzero()[0])] = False
    for bad, error, told in (
        (SubsetExamples(good.V, good.S[:, :3]), InputError, r"train.S: shape \(4, 3\)"),
        (SubsetExamples(good.V, bits), InputError, "train.S: must hold bits"),
        (SubsetExamples(good.V, good.S, valid), DataError, "of set 3 holds an element that valid calls padding"),
    ):
        with pytest.raises(error, match=told):
            fit_selector(selector("diffMF"), bad, good, **fit)
    with pytest.raises(InputError, match=r"val\.S: shape"):
        fit_selector(selector("diffMF"), good, SubsetExamples(good.V, good.S[:2]), **fit)
    with pytest.raises(InputError, match="epochs, patience, batch_size, clip: got 0"):
        fit_selector(selector("diffMF"), good, good, generator=generator(), epochs=0)
    with pytest.raises(InputError, match="RandomSelector has nothing to train"):
        fit_selector(RandomSelector(), good, good, **fit)
    with pytest.raises(InputError, match="sets: shapes"):
        pad_sets([torch.zeros(3, 2), torch.zeros(3, 4)])


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: INSET(encoder, mode="gauss", **SMALL), "mode: got 'gauss'"),
        (lambda: INSET(encoder, fuse="sum", **SMALL), "fuse: got 'sum'"),
        (lambda: INSET(encoder, samples=0, **SMALL), "steps, samples, neg_num: got 1, 0, 1"),
        (lambda: INSET(encoder(), **SMALL), "encoder: a function that gives a new network"),
        (lambda: INSET(encoder, tau=0.0, **SMALL), "rank and tau: got 5 and 0.0"),
        (lambda: SetUtility(encoder(), layers=0, **SMALL), "dim, hidden, layers: got 6, 10, 0"),
        (lambda: SetUtility(encoder(), sigma=nn.Sigmoid(), **SMALL), "sigma: is of fuse='scalar' only"),
        (lambda: SetUtility(encoder(), dim=7)(some_sets(), torch.ones(2, 5)), r"encoder: gave shape \(10, 6\)"),
        (lambda: a_utility()(some_sets(), torch.ones(2, 3, 4)), r"subsets: shape \(2, 3, 4\) for sets of shape \(2, 5\)"),
        (lambda: SetTransformerSelector(encoder(), dim=6, heads=4), "heads: got 4; it must divide dim = 6"),
        (lambda: DeepSetSelector(encoder(), neg_num=0), "neg_num: got 0"),
        (lambda: PGMSelector(encoder(), gamma=0.0), "gamma: got 0.0"),
        (lambda: two_moons_sets(3, n=4, size=5), "count, n, size: got 3, 4, 5"),
        (lambda: gaussian_sets(0), "count, n, size: got 0"),
        (lambda: selector("diffMF").recognition_loss(None, None, None, None), "has no recognition network"),
    ],
)  # fmt: skip
def test_bad_parameters(make: Callable, told: str) -> None:
    with pytest.raises(InputError, match=told):
        make()
