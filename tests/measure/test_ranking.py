"""Ranking measures: hand-worked numbers, brute force over the orders of ties, parity with known libraries."""

from itertools import permutations

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score
from torchmetrics.functional.retrieval import (
    retrieval_hit_rate,
    retrieval_normalized_dcg,
    retrieval_precision,
    retrieval_recall,
    retrieval_reciprocal_rank,
)

from salience.errors import InputError
from salience.measure import (
    hit_at_k,
    kendall,
    ndcg_at_k,
    precision_at_k,
    recall_at_k,
    reciprocal_rank,
    spearman,
    target_ranks,
)

AT_K = [recall_at_k, precision_at_k, hit_at_k, ndcg_at_k]


def test_by_hand():
    scores, relevant = [[0.9, 0.8, 0.7, 0.1]], [[0, 1, 0, 1]]
    assert recall_at_k(scores, relevant, 3) == pytest.approx(0.5)
    assert precision_at_k(scores, relevant, 3) == pytest.approx(1 / 3)
    assert hit_at_k(scores, relevant, 1) == pytest.approx(0)
    assert hit_at_k(scores, relevant, 2) == pytest.approx(1)
    assert reciprocal_rank(scores, relevant) == pytest.approx(0.5)
    ideal = 1 + 1 / np.log2(3)
    assert ndcg_at_k(scores, relevant, 4) == pytest.approx((1 / np.log2(3) + 1 / np.log2(5)) / ideal)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_parity_without_ties(k):
    rng = np.random.default_rng(k)
    scores, relevant = (
        rng.random((20, 10)),
        rng.random((20, 10)) < 0.3,
    )
    relevant[:, 0] = True
    peers = [retrieval_recall, retrieval_precision, retrieval_hit_rate, retrieval_normalized_dcg]
    for ours, theirs in zip(AT_K, peers):
        expected = [theirs(torch.tensor(s), torch.tensor(r), top_k=k) for s, r in zip(scores, relevant)]
        np.testing.assert_allclose(ours(scores, relevant, k), expected, rtol=1e-5)
    expected = [retrieval_reciprocal_rank(torch.tensor(s), torch.tensor(r)) for s, r in zip(scores, relevant)]
    np.testing.assert_allclose(reciprocal_rank(scores, relevant), expected, rtol=1e-5)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=2, max_size=7), st.integers(1, 7))
def test_ndcg_parity_with_sklearn_under_ties(items, k):
    scores, gains = np.array(items, dtype=float).T[:, None, :]
    if not gains.any():
        gains[0, 0] = 1
    k = min(k, scores.shape[1])
    assert ndcg_at_k(scores, gains, k)[0] == pytest.approx(ndcg_score(gains, scores, k=k))


@given(
    st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=5).filter(
        lambda items: any(r for _, r in items)
    ),
    st.integers(1, 5),
)
def test_ties_are_the_mean_over_their_orders(items, k):
    scores, relevant = (np.array(column)[None] for column in zip(*items))
    k = min(k, scores.shape[1])
    everything = list(permutations(range(len(items))))
    for measure in AT_K:
        # adding a tiny tie-breaker turns each order of the columns into one order of the tied items
        broken = [measure(scores + 1e-6 * np.array(order), relevant, k)[0] for order in everything]
        assert measure(scores, relevant, k)[0] == pytest.approx(np.mean(broken))
    broken = [reciprocal_rank(scores + 1e-6 * np.array(order), relevant)[0] for order in everything]
    assert reciprocal_rank(scores, relevant)[0] == pytest.approx(np.mean(broken))


@given(st.permutations(range(6)), st.integers(1, 6))
def test_order_of_columns_changes_nothing(order, k):
    scores, relevant = np.array([[3, 1, 1, 1, 0, 0]]), np.array([[0, 1, 0, 0, 1, 0]])
    for measure in AT_K:
        expected = measure(scores, relevant, k)
        np.testing.assert_allclose(measure(scores[:, order], relevant[:, order], k), expected)


def test_constant_scores_earn_chance():
    relevant = np.zeros((1, 100), bool)
    relevant[0, 0] = True  # an argmax or a stable sort would find it
    assert hit_at_k(np.zeros((1, 100)), relevant, 10) == pytest.approx(0.1)
    assert recall_at_k(np.zeros((1, 100)), relevant, 10) == pytest.approx(0.1)
    assert target_ranks(np.zeros((1, 100)), [0]) == pytest.approx(50.5)


def test_filtered_ranks_by_hand():
    scores = np.array([[9.0, 8.0, 7.0, 7.0, 1.0], [1.0, 1.0, 1.0, 0.0, 0.0]])
    targets = np.array([2, 1])
    np.testing.assert_allclose(target_ranks(scores, targets), [3.5, 2.0])
    np.testing.assert_allclose(target_ranks(scores, targets, ties="worst"), [4.0, 3.0])
    known = np.array([[1, 0, 1, 1, 0], [0, 0, 1, 0, 0]])  # the target itself may be among the known
    np.testing.assert_allclose(target_ranks(scores, targets, known), [2.0, 1.5])


@given(st.lists(st.integers(0, 5), min_size=2, max_size=12), st.integers(0, 11))
def test_mean_rank_is_scipys_average_rank(values, target):
    target = min(target, len(values) - 1)
    expected = scipy.stats.rankdata(-np.array(values))[target]
    assert target_ranks([values], [target])[0] == expected


def test_correlations():
    a, b = [1, 2, 3, 4], [1, 3, 2, 4]
    assert spearman(a, b) == pytest.approx(0.8)
    assert kendall(a, b) == pytest.approx(4 / 6)  # five agreeing pairs, one not
    assert kendall([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / np.sqrt(2 * 3))
    for measure in (spearman, kendall):
        assert measure(a, np.exp(b)) == pytest.approx(measure(a, b))
        assert measure(a, -np.array(b)) == pytest.approx(-measure(a, b))
        with pytest.raises(InputError, match="b is constant"):
            measure(a, [5, 5, 5, 5])
        with pytest.raises(InputError, match="same shape"):
            measure(a, [1, 2])
        with pytest.raises(InputError, match="a must be finite"):
            measure([np.nan, 1], [1, 2])


@pytest.mark.parametrize("measure", AT_K)
def test_bad_input(measure):
    good, relevant = [[1.0, 2.0]], [[0, 1]]
    with pytest.raises(InputError, match="scores must be finite"):
        measure([[1.0, np.nan]], relevant, 1)
    with pytest.raises(InputError, match="k must be at most the number of items, 2; got 3"):
        measure(good, relevant, 3)
    for k in (0, -1, True):
        with pytest.raises(InputError, match="k must be a whole number of at least 1"):
            measure(good, relevant, k)
    with pytest.raises(InputError, match="at least one item in each row; 1 rows have none, first row 1"):
        measure([[1.0, 2.0]] * 2, [[0, 1], [0, 0]], 1)
    with pytest.raises(InputError, match="shape"):
        measure(good, [[0, 1, 0]], 1)


def test_bad_gains_and_targets():
    with pytest.raises(InputError, match="gains must not be negative"):
        ndcg_at_k([[1.0, 2.0]], [[-1, 1]], 1)
    with pytest.raises(InputError, match=r"targets must lie in 0\.\.1; got 2\.\.2"):
        target_ranks([[1.0, 2.0]], [2])
    with pytest.raises(InputError, match="targets must be whole numbers"):
        target_ranks([[1.0, 2.0]], [0.5])
    with pytest.raises(InputError, match="'mean' or 'worst'"):
        target_ranks([[1.0, 2.0]], [0], ties="best")
