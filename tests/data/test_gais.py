"""GAIS: graphs, attention, importance, quotas, coverage; against figures worked by hand, dense twins and known packages."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from scipy.spatial.distance import cdist
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.utils.estimator_checks import check_estimator

from salience.data import (
    GAIS,
    GraphAttention,
    KMQSelector,
    LossReweighter,
    condensed_neighbours,
    drop3,
    edited_neighbours,
    evaluate_selection,
    lsh_edges,
    minibatch_edges,
    select_rows,
    stratified_random,
    tune_gais,
)
from salience.data.gais.hashing import HashGraph, hash_codes
from salience.data.gais.minibatches import MiniBatchGraph, stratified_batches
from salience.data.gais.network import AttentionLayer, received_attention
from salience.data.gais.selection import choose, importance_scores, reduced_sizes
from salience.data.gais.training import _split
from salience.errors import DataError, InputError
from salience.scores import Scores

RNG = np.random.default_rng(0)
WINE, WINES = load_wine(return_X_y=True)
GRAPHS = ("minibatch", "sl_lsh", "ml_lsh", "mv_lsh")
QUICK = {"epochs": 3, "hidden": 4, "heads": 2}


def quick(**settings) -> GAIS:
    return GAIS(**{**QUICK, **settings})


# Graphs.


@given(st.lists(st.integers(1, 60), min_size=2, max_size=6), st.integers(8, 40))
def test_every_batch_holds_each_class_in_proportion(sizes, batch_size) -> None:
    y = np.random.default_rng(1).permutation(np.repeat(np.arange(len(sizes)), sizes))
    batches = stratified_batches(y, batch_size, np.random.default_rng(0))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(y)))
    assert max(map(len, batches)) <= batch_size and max(map(len, batches)) - min(map(len, batches)) <= 1
    for rows in batches:
        off = np.bincount(y[rows], minlength=len(sizes)) - len(rows) * np.array(sizes) / len(y)
        assert (np.abs(off) < 2 + len(sizes)).all()


def test_batches_of_a_large_table_are_stratified_to_within_two_rows() -> None:
    y = RNG.permutation(np.repeat([0, 1, 2], [6000, 3000, 1000]))
    for rows in stratified_batches(y, 256, np.random.default_rng(0)):
        assert (np.abs(np.bincount(y[rows]) - len(rows) * np.array([0.6, 0.3, 0.1])) < 3).all()


def test_mini_batch_edges_by_hand() -> None:
    # Distances 1, 4, 3; similarities 1/2, 1/5, 1/4. Their median is 1/4, so that two pairs are edges.
    x = np.array([[0.0], [1.0], [4.0]])
    edges = minibatch_edges(x, theta_s=0.5, theta_r=0.0, rng=np.random.default_rng(0))
    found = {(int(j), int(i)): round(float(w), 6) for (j, i), w in zip(edges.index.T, edges.weight)}
    assert found == {(0, 1): 0.5, (1, 0): 0.5, (1, 2): 0.25, (2, 1): 0.25, (0, 0): 1, (1, 1): 1, (2, 2): 1}
    one = minibatch_edges(x[:1], rng=np.random.default_rng(0))
    assert one.index.tolist() == [[0], [0]] and one.weight.tolist() == [1]


def test_the_mask_takes_pairs_away_at_random_and_distances_stay_inside_a_batch() -> None:
    x = RNG.normal(size=(200, 3))
    whole = minibatch_edges(x, theta_s=0.9, theta_r=0.0, rng=np.random.default_rng(0))
    masked = minibatch_edges(x, theta_s=0.9, theta_r=0.3, rng=np.random.default_rng(0))
    pairs = 200 * 199 // 2
    assert len(whole.weight) - 200 == pytest.approx(2 * 0.1 * pairs, abs=3)
    assert (len(masked.weight) - 200) / (len(whole.weight) - 200) == pytest.approx(0.7, abs=0.05)
    edge = set(map(tuple, masked.index.T.tolist()))
    assert all((i, j) in edge for j, i in edge)  # undirected
    graph = MiniBatchGraph(x.astype(np.float32), np.arange(200) % 2, batch_size=50, theta_s=0.9, theta_r=0.3, seed=0)
    first, again, other = (list(graph.batches(number)) for number in (0, 0, 1))
    assert len(first) == 4 and all(batch.edges.index.max() < 50 for batch in first)
    for one, two in zip(first, again):
        np.testing.assert_array_equal(one.rows, two.rows)
        np.testing.assert_array_equal(one.edges.index, two.edges.index)
    assert not np.array_equal(first[0].rows, other[0].rows)


@pytest.mark.parametrize("bits", [1, 4])
def test_two_rows_collide_as_often_as_their_angle_says(bits) -> None:
    """(1 - phi / pi)^b, within 1 %."""
    angle = np.pi / 6
    x = np.array([[1.0, 0, 0], [np.cos(angle), np.sin(angle), 0]])
    x = np.concatenate([x, -x])  # so that the mean is 0
    codes = hash_codes(x, n_tables=40_000, bits=bits, rng=np.random.default_rng(0))
    assert np.mean(codes[0] == codes[1]) == pytest.approx((1 - angle / np.pi) ** bits, abs=0.01)


@pytest.mark.parametrize("options", [{}, {"levels": (2, 4, 6)}, {"n_views": 2}])
def test_hashed_weights_equal_those_of_all_pairs(options) -> None:
    """With buckets below the cap and room for all neighbours nothing is left out: compared with a double loop."""
    x = np.random.default_rng(2).normal(size=(40, 6))
    settings = {"n_tables": 4, "levels": (3,), **options}
    edges = lsh_edges(x, cap=64, max_neighbors=64, seed=5, **settings)
    levels, top = settings["levels"], max(settings["levels"])
    codes = hash_codes(x, n_tables=4, bits=top, n_views=settings.get("n_views", 1), rng=np.random.default_rng(5))
    wanted = np.eye(40)
    for i in range(40):
        for j in range(40):
            if i != j:
                agree = [[codes[i, t] >> (top - b) == codes[j, t] >> (top - b) for b in levels] for t in range(4)]
                wanted[i, j] = np.mean(agree @ 2.0 ** np.arange(len(levels))) / (2 ** len(levels) - 1)
    found = np.zeros((40, 40))
    found[edges.index[1], edges.index[0]] = edges.weight
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_views_see_half_of_the_features() -> None:
    x = RNG.normal(size=(300, 9))
    rng = np.random.default_rng(3)
    codes = hash_codes(x, n_tables=2, bits=8, n_views=2, rng=rng)
    changes = np.zeros((2, 9), dtype=bool)
    for feature in range(9):
        other = x.copy()
        other[:, feature] = RNG.permutation(other[:, feature])
        moved = hash_codes(other, n_tables=2, bits=8, n_views=2, rng=np.random.default_rng(3))
        changes[:, feature] = (moved != codes).any(axis=0)
    assert changes.sum(axis=1).tolist() == [5, 5]


def test_the_heaviest_neighbours_are_kept_and_identical_rows_are_capped() -> None:
    x = np.random.default_rng(4).normal(size=(500, 5)).astype(np.float32)
    graph = HashGraph(x, n_tables=8, levels=(4, 8, 12), n_views=1, cap=500, max_neighbors=500, seed=0)
    few = HashGraph(x, n_tables=8, levels=(4, 8, 12), n_views=1, cap=500, max_neighbors=8, seed=0)
    np.testing.assert_allclose(few.weights, graph.weights[:, -8:])
    same = lsh_edges(np.ones((300, 4)), n_tables=2, cap=16, max_neighbors=8)
    inward = np.bincount(same.index[1]) - 1
    assert inward.max() <= 8 and inward.min() >= 7 and (same.weight == 1).all()
    assert len(set(map(tuple, same.index.T.tolist()))) == same.index.shape[1]  # no edge twice
    single = lsh_edges(np.arange(3.0)[:, None], n_tables=1, levels=(1,))
    assert np.bincount(single.index[1]).min() == 1  # the row on its own side has its self loop


def test_hashing_finds_true_neighbours_more_often_than_chance() -> None:
    x = np.random.default_rng(6).normal(size=(2000, 8)) + 4 * np.random.default_rng(7).integers(0, 2, (2000, 8))
    near = NearestNeighbors(n_neighbors=5).fit(x).kneighbors(return_distance=False)
    recall = []
    for options in ({"levels": (8,)}, {"levels": (4, 8, 12)}, {"n_views": 4}):
        edges = lsh_edges(x, **options)
        at = csr_matrix((np.ones(len(edges.weight)), (edges.index[1], edges.index[0])), shape=(2000, 2000))
        recall.append(np.mean([at[i, j] for i, row in enumerate(near) for j in row]))
    assert min(recall) > 0.35 > 10 * 32 / 2000


def test_a_large_table_comes_in_batches_that_keep_most_heavy_edges(monkeypatch) -> None:
    monkeypatch.setattr("salience.data.gais.hashing._BLOCK", 100)
    x = RNG.normal(size=(1000, 6)).astype(np.float32)
    graph = HashGraph(x, n_tables=8, levels=(4, 8), n_views=1, cap=64, max_neighbors=16, seed=0)
    assert graph.rounds(4) == 4
    batches = list(graph.batches(0))
    assert sorted(np.concatenate([b.rows for b in batches]).tolist()) == list(range(1000)) and len(batches) == 10
    weight = {(int(graph.ids[i, k]), i): graph.weights[i, k] for i in range(1000) for k in range(16)}
    seen = [(int(b.rows[j]), int(b.rows[i]), w) for b in batches for (j, i), w in zip(b.edges.index.T, b.edges.weight)
            if j != i]  # fmt: skip
    assert all(weight[j, i] == w for j, i, w in seen)
    assert len(seen) / (graph.ids >= 0).sum() > 0.25  # 0.1 by chance


# The network.


def small_graph(n: int = 12, d: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = RNG.normal(size=(n, d))
    edges = minibatch_edges(x, theta_s=0.5, theta_r=0.2, rng=np.random.default_rng(0))
    return torch.tensor(x), torch.from_numpy(edges.index), torch.from_numpy(edges.weight).double()


def test_attention_equals_a_dense_twin_and_its_rows_sum_to_one() -> None:
    x, index, weight = small_graph()
    torch.manual_seed(0)
    layer = AttentionLayer(5, 3, heads=2).double()
    out, alpha = layer(x, index, weight)
    z = (x @ layer.linear.weight.T).view(12, 2, 3)
    dense = torch.full((12, 12, 2), -torch.inf, dtype=torch.float64)
    for (j, i), w in zip(index.T.tolist(), weight.tolist()):
        a = (layer.of_target * z[i] + layer.of_source * z[j]).sum(-1)
        dense[i, j] = torch.where(a > 0, a, 0.2 * a) + np.log(w)
    soft = torch.softmax(dense, 1)
    torch.testing.assert_close(alpha, soft[index[1], index[0]])
    torch.testing.assert_close(out, torch.einsum("ijh,jhf->ihf", soft, z).flatten(1) + layer.bias)
    sums = torch.zeros(12, 2, dtype=torch.float64).index_add(0, index[1], alpha)
    torch.testing.assert_close(sums, torch.ones_like(sums))


def test_attention_equals_that_of_pytorch_geometric() -> None:
    nn = pytest.importorskip("torch_geometric.nn", reason="parity with torch_geometric needs it installed")
    x, index, _ = small_graph()
    layer = AttentionLayer(5, 3, heads=2).double()
    theirs = nn.GATConv(5, 3, heads=2, add_self_loops=False).double()
    with torch.no_grad():
        theirs.lin.weight.copy_(layer.linear.weight)
        theirs.att_src.copy_(layer.of_source[None])
        theirs.att_dst.copy_(layer.of_target[None])
        theirs.bias.copy_(layer.bias)
    out, (_, alpha) = theirs(x, index, return_attention_weights=True)
    mine, my_alpha = layer(x, index, torch.ones(index.shape[1], dtype=torch.float64))
    torch.testing.assert_close(mine, out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(my_alpha, alpha, atol=1e-5, rtol=1e-5)


def test_a_node_with_its_self_loop_alone_and_gradients() -> None:
    layer = AttentionLayer(2, 3)
    index = torch.tensor([[0, 1, 1], [0, 1, 0]])
    out, alpha = layer(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), index, torch.ones(3))
    assert float(alpha[1].detach()) == 1.0
    torch.testing.assert_close(out[1], layer.linear(torch.tensor([3.0, 4.0])))
    out.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in layer.parameters())
    model = GraphAttention(4, 3, hidden=5, heads=2)
    logits, alphas = model(torch.randn(2, 4), index, torch.ones(3))
    assert logits.shape == (2, 3) and [a.shape for a in alphas] == [(3, 2), (3, 1)]


def test_attention_received_is_against_equal_attention() -> None:
    # 0 <- {0, 1, 2} at .2, .6, .2; 1 <- {0, 1} at .5, .5; 2 <- {2}. Self loops do not count.
    index = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 0, 0, 1, 1, 2]])
    alpha = torch.tensor([[0.2], [0.6], [0.2], [0.5], [0.5], [1.0]])
    total, times = received_attention([alpha, alpha], index, 3)
    np.testing.assert_allclose(total.numpy(), [0.5 * 2, 0.6 * 3, 0.2 * 3], rtol=1e-6)
    assert times.tolist() == [1, 1, 1]
    equal = torch.tensor([[1 / 3], [1 / 3], [1 / 3], [0.5], [0.5], [1.0]])
    np.testing.assert_allclose(received_attention([equal], index, 3)[0].numpy(), [1, 1, 1], rtol=1e-6)


def test_four_fifths_of_each_class_are_learnt_from() -> None:
    y = np.repeat([0, 1, 2], [50, 10, 2])
    learn = _split(y, np.random.default_rng(0))
    assert np.bincount(y[learn]).tolist() == [40, 8, 2]


def test_training_lowers_the_held_out_loss_and_keeps_the_best_epoch() -> None:
    model = GAIS().fit(WINE, WINES)
    assert min(model.losses_) < 0.5 * model.losses_[0] and len(model.losses_) - 1 - np.argmin(model.losses_) <= 15
    largest = GAIS(confidence="max").fit(WINE, WINES).confidence_
    assert largest.min() >= 1 / 3 - 1e-6 and largest.max() <= 1 and (model.confidence_ <= largest + 1e-12).all()
    wrong = WINES.copy()
    wrong[::9] = (wrong[::9] + 1) % 3
    sure = GAIS().fit(WINE, wrong)
    assert sure.confidence_[::9].mean() < 0.5 < np.delete(sure.confidence_, np.arange(0, 178, 9)).mean()
    assert not len(np.intersect1d(sure.selected_idx_, np.arange(0, 178, 9)))


# Scores and selection.


def test_importance_by_hand() -> None:
    y = np.array([0, 0, 1, 1, 1])
    attention, confidence = np.array([1.0, 3.0, 2.0, np.nan, 4.0]), np.array([0.9, 0.7, 0.5, 0.5, 0.5])
    np.testing.assert_allclose(importance_scores(attention, confidence, y, "attention"), [-1, 1, -1, 0, 1])
    np.testing.assert_allclose(importance_scores(attention, confidence, y, "confidence"), [1, -1, 0, 0, 0])
    np.testing.assert_allclose(importance_scores(attention, confidence, y, "attention+confidence"), [0, 0, -1, 0, 1],
                               atol=1e-12)  # fmt: skip


def test_sizes_keep_rare_classes() -> None:
    assert reduced_sizes(np.array([1000, 100, 10, 1]), 0.96, 2).tolist() == [40, 4, 2, 1]


def test_turns_over_buckets_by_hand() -> None:
    """Two clumps of one class: the best four scores are in the first, and turns take two of each."""
    x = np.concatenate([np.full((6, 2), 5.0), np.full((4, 2), -5.0)])
    scores, y = -np.arange(10.0), np.zeros(10, int)
    assert choose(scores, y, np.array([4])).tolist() == [0, 1, 2, 3]
    assert choose(scores, y, np.array([4]), x=x).tolist() == [0, 1, 6, 7]
    assert choose(scores, y, np.array([3]), x=x).tolist() == [0, 1, 6]  # the larger bucket comes first
    assert choose(np.zeros(10), y, np.array([4]), x=x).tolist() == [0, 1, 6, 7]  # ties: the earlier row


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("coverage", [True, False])
def test_classes_keep_their_shares_and_n_min(graph, coverage) -> None:
    x = RNG.normal(size=(305, 5))
    y = np.repeat(["a", "b", "c", "d"], [200, 100, 4, 1])
    model = quick(graph=graph, coverage=coverage, reduction=0.95, batch_size=64).fit(x, y)
    assert pd.Series(y[model.selected_idx_]).value_counts().to_dict() == {"a": 10, "b": 5, "c": 2, "d": 1}
    assert np.isfinite(model.scores_).all() and len(model.scores_) == 305
    assert model.graph_stats_["edges"] > 0 and 0 <= model.graph_stats_["isolated"] < 1
    again = quick(graph=graph, coverage=coverage, reduction=0.95, batch_size=64).fit(x, y)
    np.testing.assert_array_equal(model.scores_, again.scores_)  # bit for bit
    np.testing.assert_array_equal(model.selected_idx_, again.selected_idx_)
    other = quick(graph=graph, coverage=coverage, reduction=0.95, batch_size=64, random_state=1).fit(x, y)
    assert not np.array_equal(model.scores_, other.scores_)


def test_a_count_is_met_exactly_and_a_threshold_keeps_what_reaches_it() -> None:
    model = quick().fit(WINE, WINES)
    for count in (6, 17, 100, 178):
        assert len(model.select(count)) == count == len(set(model.select(count).tolist()))
    with pytest.raises(InputError, match="too small for 2 of each of 3 classes"):
        model.select(5)
    with pytest.raises(InputError, match=r"count must be a whole number in 1\.\.178"):
        model.select(0)
    by_score = quick(threshold=1.0).fit(WINE, WINES)
    assert set(np.flatnonzero(by_score.scores_ >= 1.0)) <= set(by_score.selected_idx_)
    assert len(quick(threshold=99.0).fit(WINE, WINES).selected_idx_) == 6  # n_min of each class


def test_fit_resample_gives_back_the_types_that_came() -> None:
    frame, labels = pd.DataFrame(WINE), pd.Series(WINES, name="kind")
    x, y = quick().fit_resample(frame, labels)
    assert isinstance(x, pd.DataFrame) and isinstance(y, pd.Series) and len(x) == len(y) == 7
    rows, codes = quick().fit_resample(WINE, WINES)
    np.testing.assert_array_equal(rows, x.to_numpy())
    np.testing.assert_array_equal(codes, y.to_numpy())


def test_shuffled_weights_choose_otherwise() -> None:
    """The scores come from what was learnt, not from degree or distance alone."""
    from salience.data.gais.training import read

    model = GAIS(epochs=30).fit(WINE, WINES)
    graph, rounds = model._graph(model.seed_)
    x = torch.from_numpy(model.x_)
    y = torch.from_numpy(model.y_)
    same = read(model.network_, x, graph, rounds=rounds, y=y)
    np.testing.assert_allclose(same.attention, model.attention_, equal_nan=True)
    state = {name: value.flatten()[torch.randperm(value.numel())].view_as(value)
             for name, value in model.network_.state_dict().items()}  # fmt: skip
    model.network_.load_state_dict(state)
    other = read(model.network_, x, graph, rounds=rounds, y=y)
    known = np.isfinite(same.attention)
    assert np.corrcoef(same.attention[known], other.attention[known])[0, 1] < 0.9
    assert np.mean(other.confidence) < np.mean(same.confidence)


def test_scale_and_constant_features_do_not_matter() -> None:
    with pytest.warns(UserWarning, match="1 constant features were left out"):
        padded = quick().fit(np.column_stack([np.full(178, 3.0), 1000 * WINE + 7]), WINES)
    np.testing.assert_array_equal(padded.selected_idx_, quick().fit(WINE, WINES).selected_idx_)


@pytest.mark.parametrize("graph", GRAPHS)
def test_rows_that_are_all_alike(graph) -> None:
    with pytest.warns(UserWarning, match="4 constant features"):
        model = quick(graph=graph, reduction=0.9).fit(np.ones((200, 4)), np.arange(200) % 2)
    assert len(model.selected_idx_) == 20 and np.isfinite(model.scores_).all()


def test_the_scikit_learn_contract() -> None:
    expected = {"check_dtype_object": "categories must be encoded by the user: objects are refused"}
    with pytest.warns(UserWarning):  # sparse input is made dense
        told = check_estimator(quick(), expected_failed_checks=expected, on_fail=None)
    assert not [check["check_name"] for check in told if check["status"] == "failed"]
    assert {check["check_name"] for check in told if check["status"] == "xfail"} == set(expected)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"graph": "knn"}, "graph must be one of minibatch, sl_lsh, ml_lsh, mv_lsh, not 'knn'"),
        ({"importance": "degree"}, "importance must be one of"),
        ({"confidence": "mean"}, "confidence must be one of label, max"),
        ({"reduction": 1.0}, r"reduction must lie in \[0, 1\), not 1.0"),
        ({"theta_r": -0.1}, "theta_r must lie in"),
        ({"n_min": 0}, "n_min must be a whole number of at least 1"),
        ({"epochs": 2.5}, "epochs must be a whole number"),
        ({"levels": (8, 4)}, "levels ascending"),
        ({"n_bits": 40}, "bits from 1 to 32"),
        ({"lr": 0}, "lr must be positive"),
        ({"batch_size": 2}, "batch_size is 2, smaller than the 3 classes"),
    ],
)
def test_bad_parameters(settings, words) -> None:
    with pytest.raises(InputError, match=words):
        quick(**settings).fit(WINE, WINES)


def test_bad_data() -> None:
    hole = WINE.copy()
    hole[7, 2] = np.nan
    with pytest.raises(DataError, match="NaN at row 7, column 2"):
        quick().fit(hole, WINES)
    with pytest.raises(DataError, match="encode them first"):
        quick().fit(pd.DataFrame({"a": ["x", "y"] * 50, "b": np.arange(100.0)}), np.arange(100) % 2)
    with pytest.raises(DataError, match="continuous"):
        quick().fit(WINE, RNG.normal(size=178))
    with pytest.raises(DataError, match="1 class"):
        quick().fit(WINE, np.zeros(178))
    with pytest.raises(DataError, match="target y is None"):
        quick().fit(WINE, None)
    with pytest.raises(DataError, match="inconsistent numbers of samples"):
        quick().fit(WINE, WINES[:-1])
    with pytest.warns(UserWarning, match="sparse X is made dense"):
        sparse = quick().fit(csr_matrix(WINE), WINES)
    np.testing.assert_array_equal(sparse.scores_, quick().fit(WINE, WINES).scores_)


def test_batches_smaller_than_the_table_hold_no_array_of_all_pairs() -> None:
    """100,000 rows: a matrix of all pairs would need 10 GB even at a byte each."""
    code = (
        "import numpy as np; from salience.data import GAIS, lsh_edges; rng = np.random.default_rng(0); "
        "x = rng.normal(size=(100_000, 8)); y = (x[:, 0] > 0).astype(int); "
        "model = GAIS(epochs=1, n_rounds=1, hidden=4, heads=1).fit(x, y); assert len(model.selected_idx_) == 4000; "
        "edges = lsh_edges(x.astype(np.float32), n_tables=2); assert np.bincount(edges.index[1]).max() <= 33; "
        "print(next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 2_000_000


# Measures, tuning, baselines.


def test_measures_by_hand() -> None:
    x = np.array([[0.0], [1.0], [10.0], [11.0]])
    found = evaluate_selection(x, [0, 0, 1, 1], [0, 2], [[0.4], [9.0], [4.0], [6.0]], [0, 1, 1, 1],
                               {"1-nn": KNeighborsClassifier(1)})  # fmt: skip
    assert found == {"reduction": 0.5, "accuracy": 0.75, "full accuracy": 0.75, "relative accuracy": 1.0,
                     "effectiveness": 0.375, "accuracy, 1-nn": 0.75}  # fmt: skip
    with pytest.raises(InputError, match="no row"):
        evaluate_selection(x, [0, 0, 1, 1], [], x, [0, 0, 1, 1])


def test_tuning_gives_the_trial_of_the_greatest_effectiveness() -> None:
    best, trials = tune_gais(WINE, WINES, trials=3, base=quick())
    assert len(trials) == 3 and trials[0]["effectiveness"] == max(trial["effectiveness"] for trial in trials)
    assert best.get_params()["reduction"] == trials[0]["reduction"] and best.epochs == 3
    again, _ = tune_gais(WINE, WINES, trials=3, base=quick())
    assert again.get_params() == best.get_params()
    with pytest.raises(InputError, match="trials"):
        tune_gais(WINE, WINES, trials=0)


def test_random_rows_are_stratified() -> None:
    y = np.repeat(["a", "b", "c"], [500, 100, 1])
    chosen = stratified_random(y)
    assert [(y[chosen] == kind).sum() for kind in "abc"] == [20, 4, 1]
    assert not np.array_equal(chosen, stratified_random(y, random_state=1))


def test_condensed_rows_classify_all_rows_and_edited_ones_agree_with_their_neighbours() -> None:
    x, y = load_breast_cancer(return_X_y=True)
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    chosen = condensed_neighbours(x, y)
    assert len(chosen) < 0.3 * len(y) and KNeighborsClassifier(1).fit(x[chosen], y[chosen]).score(x, y) == 1
    away = cdist(x, x)
    np.fill_diagonal(away, np.inf)
    agree = (y[np.argsort(away, axis=1)[:, :3]] == y[:, None]).sum(axis=1) >= 2
    np.testing.assert_array_equal(edited_neighbours(x, y), np.flatnonzero(agree))


def test_drop3_takes_the_inside_away_and_keeps_accuracy() -> None:
    x, y = load_breast_cancer(return_X_y=True)
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    train, test = np.arange(0, len(y), 2), np.arange(1, len(y), 2)
    chosen = train[drop3(x[train], y[train])]
    assert len(chosen) < 0.2 * len(train)
    full, part = (KNeighborsClassifier(3).fit(x[rows], y[rows]).score(x[test], y[test]) for rows in (train, chosen))
    assert part > full - 0.05
    line = np.concatenate([np.linspace(0, 1, 30), np.linspace(2, 3, 30)])[:, None]
    kept = drop3(line, np.repeat([0, 1], 30))
    assert np.abs(line[kept, 0] - 1.5).max() < 0.8 and len(kept) < 12  # what is near the border stays
    with pytest.raises(InputError, match="3 labels for 60 rows"):
        drop3(line, [0, 1, 0])


def test_condensed_and_edited_rows_are_near_those_of_imbalanced_learn() -> None:
    under = pytest.importorskip("imblearn.under_sampling", reason="parity with imbalanced-learn needs it installed")
    x, y = load_breast_cancer(return_X_y=True)
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    theirs = under.EditedNearestNeighbours(sampling_strategy="all", kind_sel="mode").fit(x, y)
    theirs.fit_resample(x, y)
    np.testing.assert_array_equal(np.sort(theirs.sample_indices_), edited_neighbours(x, y))


# Crossings.


def table(n: int = 300) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    kind = rng.choice(["x", "y", "z"], n, p=[0.6, 0.3, 0.1])
    frame = pd.DataFrame(
        rng.normal(size=(n, 4)) + 2 * (kind[:, None] == np.array(["x", "y", "z", "x"])), columns=list("abcd")
    )
    return frame.assign(kind=kind)


def test_scores_of_gais_choose_rows_and_combine_with_those_of_kmq_by_rank() -> None:
    frame, settings = table(), {"label": "kind", "hold_out": 0}
    gais = select_rows(frame, count=30, method="gais", model=quick(), **settings)
    assert len(gais.chosen) == 30 and gais.scores.provenance["method"] == "gais" and gais.proof is None
    kmq = select_rows(frame, count=30, method="kmq", model=KMQSelector(n_clusters=5), **settings)
    by_scores = select_rows(frame, count=30, scores=[gais.scores], hold_out=0)
    assert set(gais.scores.top(30).ids) == set(gais.records.ids.take(by_scores.chosen).to_pylist())
    both = select_rows(frame, count=30, scores=[gais.scores, kmq.scores], hold_out=0)
    ranks = (gais.scores.ranks() + kmq.scores.ranks()) / 2
    np.testing.assert_allclose(both.scores.values, ranks)
    assert ranks[both.chosen].min() >= np.delete(ranks, both.chosen).max() - 1e-12


def test_scores_of_gais_are_a_prior_of_loss_reweighting(tmp_path) -> None:
    found = select_rows(table(), count=30, method="gais", label="kind", model=quick(), hold_out=0)
    found.scores.save(tmp_path / "s.parquet")
    scores = Scores.load(tmp_path / "s.parquet")
    loss = LossReweighter("uniform", burn_in=0, scores=scores)
    losses, ids = torch.rand(6), list(scores.ids[:6])
    weights = np.exp(scores.values[:6]) / np.exp(scores.values[:6]).sum()
    assert float(loss(losses, ids=ids)) == pytest.approx(float((torch.tensor(weights) * losses).sum()), rel=1e-5)
