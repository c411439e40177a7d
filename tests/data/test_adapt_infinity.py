"""Gradient vectors against vmap, scores and entropies by hand, budgets, CCS, pruning by brute force, rounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from salience.data import (
    AdaptSelector,
    RandomProjection,
    Signals,
    balanced_budget,
    ccs_sample,
    choose_score,
    forgetting,
    gradient_features,
    in_layers,
    measure_samples,
    prune_redundant,
    relative_gain,
    sample_scores,
    score_entropy,
    select_stream,
)
from salience.data.adapt_infinity.choosing import earlier_similarity
from salience.data.adapt_infinity.signals import embed
from salience.errors import DataError, InputError, NothingToDo
from tiny import build


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def rows(n: int = 12, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 6, generator=generator), torch.randint(0, 3, (n,), generator=generator))


class Answering(nn.Module):
    """A causal model whose logits are those of a table, so that scores can be worked out by hand."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> tuple[torch.Tensor]:
        return (self.logits[input_ids],)


class Seeing(nn.Module):
    """An image-text classifier: logits of the question, plus those of the image where it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.see = nn.Embedding(4, 3), nn.Linear(2, 3, bias=False)

    def forward(self, pixel_values: torch.Tensor, question: torch.Tensor) -> torch.Tensor:
        uses = (question < 2).float()[:, None]
        return self.words(question) + uses * self.see(pixel_values)


# Vectors.


def exact_gradients(model: nn.Module, data: TensorDataset, names: list[str]) -> torch.Tensor:
    values = {name: value.detach() for name, value in model.named_parameters()}

    def loss(values: dict, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return cross_entropy(functional_call(model, values, (x[None],)), y[None])

    found = vmap(grad(loss), in_dims=(None, 0, 0))(values, *data.tensors)
    return torch.cat([found[name].reshape(len(data), -1) for name in names], dim=1)


@pytest.mark.parametrize("vectorize", [False, True])
def test_vectors_are_the_projected_gradients_of_each_sample(vectorize: bool) -> None:
    model, data, projection = net(), rows(), RandomProjection(64, 3)
    exact = exact_gradients(model, data, ["2.weight", "2.bias"])
    found = gradient_features(
        model, data, params=in_layers(2), projection=projection, batch_size=5, vectorize=vectorize
    )
    torch.testing.assert_close(found.norms, exact.double().norm(dim=1), rtol=1e-5, atol=1e-6)
    projected = projection(exact)
    torch.testing.assert_close(found.vectors, projected / projected.norm(dim=1, keepdim=True), rtol=1e-5, atol=1e-5)
    assert all(value.grad is None for value in model.parameters()) and model.training


def test_the_projection_is_one_matrix_that_keeps_inner_products() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = nn.functional.normalize(torch.randn(40, 3000, generator=generator), dim=1)
    vectors[1] = nn.functional.normalize(vectors[0] + 0.5 * vectors[2], dim=0)
    project = RandomProjection(2048, 1)
    found = project(vectors)
    error = (found @ found.T - vectors @ vectors.T).numpy()
    assert 0.5 < error[np.triu_indices(40)].std() * math.sqrt(2048) < 1.5
    torch.testing.assert_close(found[7:9], RandomProjection(2048, 1)(vectors[7:9]))  # another object, another batch
    assert not torch.allclose(found, RandomProjection(2048, 2)(vectors))
    signs = RandomProjection(16)(torch.eye(50)) * 4  # the matrix itself
    torch.testing.assert_close(signs.abs(), torch.ones(50, 16))
    assert 0.4 < (signs > 0).float().mean() < 0.6


def test_half_precision_is_projected_in_single() -> None:
    found = RandomProjection(8)(torch.full((1, 4096), 6e4, dtype=torch.float16))
    assert found.dtype == torch.float32 and found.isfinite().all()


def test_signs_and_moments_by_hand() -> None:
    model, data, project = net(), rows(), RandomProjection(32)
    names = [name for name, _ in model.named_parameters()]
    exact = exact_gradients(model, data, names)
    unit = lambda vectors: nn.functional.normalize(project(vectors), dim=1)  # noqa: E731
    torch.testing.assert_close(
        gradient_features(model, data, projection=project, method="sign").vectors, unit(exact.sign())
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    cross_entropy(model(data.tensors[0]), data.tensors[1]).backward()
    optimizer.step()
    exact = exact_gradients(model, data, names)
    first, second = (
        torch.cat([optimizer.state[p][key].flatten() for p in model.parameters()]) for key in ("exp_avg", "exp_avg_sq")
    )
    moved = (0.9 * first + 0.1 * exact) / (0.999 * second + 0.001 * exact**2 + 1e-8).sqrt()
    found = gradient_features(model, data, projection=project, method="adam", optimizer=optimizer)
    torch.testing.assert_close(found.vectors, unit(moved), rtol=1e-4, atol=1e-5)


def test_two_point_estimates_come_near_to_the_gradient() -> None:
    model, data, project = net(), rows(), RandomProjection(512)
    exact = gradient_features(model, data, projection=project).vectors

    def cosine(k: int) -> float:
        found = gradient_features(model, data, projection=project, method="mezo", perturbations=k)
        return float((found.vectors * exact).sum(dim=1).mean())

    assert cosine(400) > 0.85 > 0.6 > cosine(4)


def test_a_sample_without_an_answer_has_no_vector() -> None:
    table = Answering(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)))
    ids = torch.tensor([[0, 1, 2], [3, 4, 0]])
    labels = torch.tensor([[-100, 1, 2], [-100, -100, -100]])
    data = [{"input_ids": ids[i], "labels": labels[i]} for i in range(2)]
    found = gradient_features(table, data, projection=RandomProjection(4))
    assert found.vectors[0].isfinite().all() and found.vectors[1].isnan().all() and found.norms[1].isnan()
    assert sample_scores(table, data)["nll"][1].isnan()


def test_a_language_model_of_transformers() -> None:
    model = build("llama")
    ids = torch.randint(5, 50, (4, 7), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(7) < 3, -100)
    data = [
        {"input_ids": ids[i], "attention_mask": torch.ones(7, dtype=torch.long), "labels": labels[i]} for i in range(4)
    ]
    found = measure_samples(model, data, params=in_layers(1), projection=RandomProjection(32), layer="model.norm")
    assert found.vectors.shape == (4, 32) and set(found.scores) == {"nll", "el2n", "entropy", "grad_norm"}
    with torch.no_grad():
        expected = [float(model(input_ids=ids[i : i + 1], labels=labels[i : i + 1]).loss) for i in range(4)]
    np.testing.assert_allclose(found.scores["nll"], expected, rtol=1e-5)
    assert found.embeddings is not None and found.embeddings.shape[0] == 4


# Scores.


def test_scores_by_hand_count_answer_tokens_only() -> None:
    model = Answering(torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])))
    # Position 0 (token 0) predicts the prompt's token 2, position 1 (token 2) predicts the answer 1.
    data = [{"input_ids": torch.tensor([0, 2, 1]), "labels": torch.tensor([-100, -100, 1])}]
    found = sample_scores(model, data)
    entropy = lambda p: -sum(x * math.log(x) for x in p)  # noqa: E731
    assert float(found["nll"][0]) == pytest.approx(-math.log(0.2))
    assert float(found["el2n"][0]) == pytest.approx(math.sqrt(0.2**2 + 0.8**2 + 0.6**2))
    assert float(found["entropy"][0]) == pytest.approx((entropy([0.5, 0.25, 0.25]) + entropy([0.2, 0.2, 0.6])) / 2)


def test_padding_does_not_count() -> None:
    model = Answering(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))
    short = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[-100, 2, 3]])}
    padded = {"input_ids": torch.tensor([[1, 2, 3, 0, 0]]), "labels": torch.tensor([[-100, 2, 3, -100, -100]]), "attention_mask": torch.tensor([[1, 1, 1, 0, 0]])}  # fmt: skip
    one, two = (sample_scores(model, [{k: v[0] for k, v in batch.items()}]) for batch in (short, padded))
    for name in one:
        torch.testing.assert_close(one[name], two[name])


def test_image_grounding_is_the_ratio_of_perplexities_with_only_the_image_changed() -> None:
    torch.manual_seed(0)
    model = Seeing()
    pixels, question, labels = torch.randn(6, 2), torch.tensor([0, 1, 2, 3, 0, 2]), torch.tensor([0, 1, 2, 0, 1, 2])
    pixels[4] = 0  # has no image
    data = [{"pixel_values": pixels[i], "question": question[i], "labels": labels[i]} for i in range(6)]
    found = sample_scores(model, data, kinds=["image_grounding"], batch_size=4)["image_grounding"]
    with torch.no_grad():
        seen = cross_entropy(model(pixels, question), labels, reduction="none")
        blind = cross_entropy(model.words(question), labels, reduction="none")
    torch.testing.assert_close(found[:4], (blind - seen).exp().double()[:4], rtol=1e-5, atol=1e-6)
    assert found[2] == found[3] == 1.0 and abs(float(found[0]) - 1) > 1e-3  # words alone
    assert found[4].isnan()


def test_embeddings_are_the_mean_over_real_tokens() -> None:
    model = build("llama")
    ids = torch.tensor([5, 6, 7, 0])
    mask = torch.tensor([1, 1, 1, 0])
    padded = embed(model, [{"input_ids": ids, "attention_mask": mask, "labels": ids}], "model.norm")
    short = embed(model, [{"input_ids": ids[:3], "attention_mask": mask[:3], "labels": ids[:3]}], "model.norm")
    torch.testing.assert_close(padded, short, rtol=1e-4, atol=1e-5)


# The choice of a score.


def test_entropy_of_a_histogram_by_hand() -> None:
    assert score_entropy([-1.0, 1.0] * 8) == pytest.approx(1.0)  # z = -1 and 1: two bins
    assert score_entropy([0, 1, 2, 3], bins=8, lim=2.0) == pytest.approx(2.0)  # z = -1.34, -0.45, 0.45, 1.34
    assert score_entropy([3.0] * 9) == 0.0 and score_entropy([np.nan] * 3) == 0.0
    assert score_entropy([0.1 + 0.2, 0.3, 0.3]) == 0.0  # a difference of rounding is none
    values = np.random.default_rng(0).normal(size=500)
    assert score_entropy(values) == pytest.approx(score_entropy(1e6 * values + 3))  # bins are of z
    outlier = np.append(np.tile([-1.0, 1.0], 500), 1e3)
    counts = np.array([500, 500, 1])  # far beyond the limit: in the outer bin
    assert score_entropy(outlier) == pytest.approx(-(counts / 1001 * np.log2(counts / 1001)).sum())


def test_the_score_that_spreads_most_is_taken_in_each_cluster() -> None:
    rng = np.random.default_rng(0)
    scores = {"lumpy": np.repeat([0.0, 1.0], 50), "spread": rng.uniform(size=100), "flat": np.ones(100)}
    name, entropies = choose_score(scores)
    assert name == "spread" and entropies["flat"] == 0 and entropies["lumpy"] == pytest.approx(1.0)
    scores["spread"][:51] = np.nan
    name, entropies = choose_score(scores)
    assert name == "lumpy" and np.isnan(entropies["spread"])
    assert choose_score({"flat": np.ones(9)})[0] is None and choose_score({})[0] is None


# Budgets and draws.


@pytest.mark.parametrize(
    ("sizes", "total", "expected"),
    [
        ([100, 100, 100], 30, [10, 10, 10]),
        ([100, 4, 100], 30, [13, 4, 13]),
        ([2, 100, 7], 30, [2, 21, 7]),
        ([3, 0, 2], 10, [3, 0, 2]),
        ([50, 50, 50], 4, [2, 1, 1]),
        ([5, 5], 0, [0, 0]),
    ],
)
def test_equal_shares_with_overflow(sizes: list[int], total: int, expected: list[int]) -> None:
    assert balanced_budget(sizes, total).tolist() == expected


@pytest.mark.parametrize("seed", range(20))
def test_budgets_add_up_and_favour_no_large_cluster(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes, total = rng.integers(0, 60, 9), int(rng.integers(0, 400))
    found = balanced_budget(sizes, total)
    assert found.sum() == min(total, sizes.sum()) and (found <= sizes).all()
    short = found < sizes  # those that are not taken whole have the same, but for rounding
    assert not short.any() or (np.ptp(found[short]) <= 1 and found.max() - found[short].min() <= 1)


def test_ccs_covers_the_range_without_its_ends() -> None:
    values = np.arange(1000) / 10
    found = ccs_sample(values, 100, generator=np.random.default_rng(0))
    assert len(found) == 100 and values[found].min() >= 5 and values[found].max() <= 95
    assert np.bincount(np.minimum((95 - values[found]) / 1.8, 49).astype(int)).tolist() == [2] * 50
    # A dense and a sparse half: covered alike, where top-k or a uniform draw would not.
    skewed = np.concatenate([np.random.default_rng(1).uniform(0, 1, 950), np.random.default_rng(2).uniform(1, 2, 150)])
    half = skewed[ccs_sample(skewed, 100, cut=0.0, generator=np.random.default_rng(0))] > 1
    assert 45 <= half.sum() <= 55


def test_ccs_takes_small_bins_whole_and_spreads_what_they_lack() -> None:
    # Four bins of width 1 from high to low hold 1, 2, 10 and 30 rows; of 20: 1, then ceil(19/3), ceil(17/2) and the rest.
    values = np.concatenate([[4.0], [2.9, 2.8], np.linspace(1.1, 1.9, 10), np.linspace(0.0, 0.9, 30)])
    found = values[ccs_sample(values, 20, bins=4, cut=0.0, generator=np.random.default_rng(3))]
    assert np.histogram(found, [0, 1, 2, 3, 4.1])[0].tolist() == [8, 9, 2, 1]


@pytest.mark.parametrize("k", [0, 1, 7, 45, 49, 50, 80])
def test_ccs_draws_exactly_as_many_as_asked(k: int) -> None:
    rng = np.random.default_rng(k)
    for values in (rng.normal(size=50), np.ones(50), np.where(rng.random(50) < 0.4, np.nan, rng.normal(size=50)), np.full(50, np.nan), rng.exponential(size=50) ** 4):  # fmt: skip
        found = ccs_sample(values, k, generator=np.random.default_rng(0))
        assert len(found) == min(k, 50) == len(set(found.tolist()))


def test_rows_without_a_score_come_last() -> None:
    values = np.where(np.arange(20) % 2 == 0, np.nan, np.arange(20.0))
    assert (ccs_sample(values, 10, generator=np.random.default_rng(0)) % 2 == 1).all()


def test_a_constant_score_gives_a_uniform_draw() -> None:
    drawn = np.concatenate([ccs_sample(np.ones(10), 3, generator=np.random.default_rng(s)) for s in range(600)])
    assert np.abs(np.bincount(drawn, minlength=10) - 180).max() < 50


# Pruning.


@pytest.mark.parametrize("seed", range(5))
def test_pruning_keeps_what_brute_force_keeps(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, keep = 60, 25
    embeddings, labels = rng.normal(size=(n, 4)), rng.integers(0, 3, n)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    closest = [max([0.0] + [unit[i] @ unit[j] for j in range(i) if labels[j] == labels[i]]) for i in range(n)]
    expected = []
    for cluster, share in enumerate(balanced_budget(np.bincount(labels), keep)):
        members = [i for i in range(n) if labels[i] == cluster]
        expected += sorted(members, key=lambda i: (closest[i], i))[:share]
    np.testing.assert_allclose(earlier_similarity(embeddings, labels), closest, atol=1e-12)
    assert prune_redundant(embeddings, labels, keep).tolist() == sorted(expected)


def test_of_copies_the_first_stays_and_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    originals = rng.normal(size=(20, 6))
    embeddings = np.concatenate([originals, originals + 1e-4 * rng.normal(size=(20, 6))])
    kept = prune_redundant(embeddings, np.zeros(40, dtype=int), 20)
    assert kept.tolist() == list(range(20))
    assert prune_redundant(embeddings[::-1], np.zeros(40, dtype=int), 20).tolist() == list(range(20))
    whole = earlier_similarity(embeddings, np.zeros(40, dtype=int))
    monkeypatch.setattr("salience.data.adapt_infinity.choosing._ROWS", 7)
    np.testing.assert_allclose(earlier_similarity(embeddings, np.zeros(40, dtype=int)), whole)


# Rounds.


def signals_of(seed: int = 0, n: int = 400) -> Signals:
    """Three directions of very different size, and a lumpy and a spread score."""
    rng = np.random.default_rng(seed)
    group = np.repeat([0, 1, 2], [n - n // 8 - 10, n // 8, 10])
    vectors = 5 * np.eye(3)[group] + 0.1 * rng.normal(size=(n, 3))
    scores = {"a": rng.uniform(size=n), "b": np.where(group == 1, rng.uniform(size=n), rng.integers(0, 2, n))}
    return Signals(vectors, scores, rng.normal(size=(n, 5)))


def at(signals: Signals, which: np.ndarray) -> Signals:
    where = which.astype(int)
    assert signals.embeddings is not None
    return Signals(signals.vectors[where], {k: v[where] for k, v in signals.scores.items()}, signals.embeddings[where])


def test_a_round_shares_out_equally_and_takes_small_clusters_whole() -> None:
    signals = signals_of()
    step = AdaptSelector(n_clusters=3, budget=90).step(range(400), lambda ids: at(signals, ids))
    sizes = sorted((one.size, one.chosen) for one in step.clusters)
    assert sizes == [(10, 10), (50, 40), (340, 40)]
    assert {390, 399} <= set(step.chosen) and len(step.chosen) == len(set(step.chosen)) == 90
    large = next(one for one in step.clusters if one.size == 340)
    assert large.scorer == "a" and large.entropies["b"] == pytest.approx(1.0, abs=0.01)
    assert len(step.pool) == 400 and not len(step.pruned)


def test_pruned_rows_never_return_and_the_pool_is_measured_anew() -> None:
    asked = []
    signals = signals_of(n=600)
    selector = AdaptSelector(n_clusters=3, budget=30, pool_limit=100)

    def measure(ids: np.ndarray) -> Signals:
        asked.append(ids.tolist())
        return at(signals, ids)

    first = selector.step(range(400), measure)
    assert len(first.pool) == 100 and len(first.pruned) == 300 and not set(first.pool) & set(first.pruned)
    second = selector.step(range(400, 600), measure)
    assert asked[1] == first.pool.tolist() + list(range(400, 600))
    assert not set(first.pruned) & (set(second.seen) | set(second.chosen)) and len(second.pool) == 100
    with pytest.raises(InputError, match="sample 3 came before"):
        selector.step([3], measure)


def test_the_same_seed_gives_the_same_rounds() -> None:
    signals = signals_of(n=500)

    def chosen(seed: int) -> list:
        selector = AdaptSelector(n_clusters=4, budget=50, pool_limit=200, random_state=seed)
        return [
            selector.step(part, lambda ids: at(signals, ids)).chosen.tolist() for part in (range(300), range(300, 500))
        ]

    assert chosen(1) == chosen(1) != chosen(2)


def test_rows_without_a_vector_or_any_score_are_dropped_and_told() -> None:
    signals = signals_of()
    signals.vectors[5] = np.nan
    signals.scores["a"][7] = signals.scores["b"][7] = signals.scores["a"][8] = np.nan
    step = AdaptSelector(n_clusters=3, budget=400).step(range(400), lambda ids: at(signals, ids))
    assert step.dropped.tolist() == [5, 7] and len(step.pool) == 398 and 8 in step.chosen
    assert step.labels[5] == -1 and sum(one.size for one in step.clusters) == 398


def test_a_budget_above_the_pool_takes_all_and_no_scores_draw_uniformly() -> None:
    signals = signals_of()
    assert len(AdaptSelector(n_clusters=3, budget=900).step(range(400), lambda ids: at(signals, ids)).chosen) == 400
    step = AdaptSelector(n_clusters=3, budget=60).step(range(400), lambda ids: Signals(signals.vectors, {}))
    assert len(step.chosen) == 60 and all(one.scorer is None for one in step.clusters)
    few = AdaptSelector(n_clusters=10, budget=5).step(range(4), lambda ids: Signals(signals.vectors[:4], {}))
    assert len(few.chosen) == 4


def test_a_pool_of_an_earlier_run_is_taken_over() -> None:
    signals = signals_of()
    selector = AdaptSelector(n_clusters=3, budget=60)
    selector.start(range(100))
    step = selector.step(range(100, 400), lambda ids: at(signals, ids))
    assert len(step.seen) == 400
    with pytest.raises(InputError, match="before the first round"):
        selector.start(range(3))


# Measures.


def test_forgetting_and_relative_gain_by_hand() -> None:
    table = [[0.8, np.nan, np.nan], [0.4, 0.5, np.nan], [0.6, 0.9, 0.3]]
    assert forgetting(table) == pytest.approx((0.25 + 0.0) / 2)  # 0.8 -> 0.6; 0.5 -> 0.9 is no drop; no earlier third
    assert np.isnan(forgetting([[np.nan], [0.4]]))
    assert relative_gain([0.5, 0.9], [1.0, 0.6]) == pytest.approx(100.0)


# Bad input.


@pytest.mark.parametrize(
    ("call", "error", "told"),
    [
        (lambda: gradient_features(net(), rows(), method="newton"), InputError, "method must be one of sgd"),
        (lambda: gradient_features(net(), rows(), params=in_layers(7)), InputError, "params chooses none of the 4"),
        (lambda: gradient_features(net().requires_grad_(False), rows()), InputError, "no parameter of Sequential"),
        (lambda: gradient_features(net(), rows(), method="adam"), InputError, "needs an optimizer"),
        (
            lambda: gradient_features(
                m := net(), rows(), method="adam", optimizer=torch.optim.SGD(m.parameters(), 1.0)
            ),
            InputError,
            "SGD holds no moments of '0.weight'",
        ),
        (lambda: gradient_features(net(), rows(), method="mezo", perturbations=0), InputError, "perturbations"),
        (lambda: gradient_features(net(), [{"x": torch.ones(6)}]), InputError, "no 'labels'"),
        (lambda: gradient_features(net(), TensorDataset(torch.ones(2, 6))), InputError, "inputs followed by labels"),
        (lambda: sample_scores(net(), rows(), kinds=["ppl"]), InputError, "kinds must be among nll"),
        (lambda: sample_scores(net(), rows(), kinds=["image_grounding"]), InputError, "image_grounding needs `blank`"),
        (
            lambda: sample_scores(net(), TensorDataset(torch.ones(2, 6), torch.ones(2, 2).long())),
            InputError,
            "labels: shape \\(2, 2\\)",
        ),
        (lambda: RandomProjection(0), InputError, "dim must be"),
        (lambda: score_entropy([0, np.inf]), DataError, "score of row 1 is infinite"),
        (lambda: score_entropy(["a"]), DataError, "must be numbers"),
        (lambda: balanced_budget([1.5], 2), InputError, "whole numbers"),
        (lambda: balanced_budget([3], 2.0), InputError, "total must be a whole number"),
        (lambda: ccs_sample([1.0], -1, generator=np.random.default_rng(0)), InputError, "k must be"),
        (lambda: ccs_sample([1.0], 1, cut=0.5, generator=np.random.default_rng(0)), InputError, "cut in"),
        (lambda: prune_redundant(np.ones((2, 2)), [0, 0], 0.9), InputError, "keep_total must be a whole number"),
        (lambda: prune_redundant(np.ones((2, 2)), [0], 1), InputError, "a cluster number for each of 2 rows"),
        (lambda: AdaptSelector(budget=2.5), InputError, "budget must be a whole number"),
        (lambda: AdaptSelector(pool_limit=0), InputError, "pool_limit"),
        (lambda: AdaptSelector().step([], lambda ids: None), NothingToDo, "nothing has arrived"),
        (lambda: AdaptSelector().step(["a", "a"], lambda ids: None), InputError, "sample 'a' came before"),
        (
            lambda: AdaptSelector().step([1, 2], lambda ids: Signals(np.ones((3, 2)), {})),
            InputError,
            "a row for each of 2",
        ),
        (
            lambda: AdaptSelector().step([1], lambda ids: Signals(np.ones((1, 2)), {"a": [1, 2]})),
            InputError,
            "score 'a' must have one",
        ),
        (
            lambda: AdaptSelector().step([1], lambda ids: Signals(np.ones((1, 2)), {"a": [np.inf]})),
            DataError,
            "score 'a' of sample 0 is infinite",
        ),
        (
            lambda: AdaptSelector().step([1], lambda ids: Signals(np.full((1, 2), np.nan), {})),
            DataError,
            "none of 1 samples",
        ),
        (lambda: forgetting([[0.5]]), InputError, "at least two steps"),
        (lambda: relative_gain([0.5], [0.0]), DataError, "reference above 0"),
        (lambda: select_stream([], 5), InputError, "there is no data set"),
    ],
)
def test_bad_input_is_named(call, error: type, told: str) -> None:
    with pytest.raises(error, match=told):
        call()


def test_layers_of_different_sizes_make_one_vector() -> None:
    found = gradient_features(net(), rows(), params=in_layers(0, 2), projection=RandomProjection(16))
    assert found.vectors.shape == (12, 16)
