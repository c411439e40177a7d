"""kMQ: quotas, draws, rounds of feedback, score gaps, baselines; against figures worked by hand and brute force."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score

from salience.data import (
    IterativeSelector,
    KMQSelector,
    choose_k,
    deita_filter,
    k_center_greedy,
    kmeans_medoids,
    qdit,
    refine,
    selection_report,
)
from salience.data.kmq import clustering
from salience.data.kmq.quotas import class_quotas, cluster_quotas, take_first
from salience.errors import DataError, InputError, NothingToDo

RNG = np.random.default_rng(0)
BLOBS = np.concatenate([RNG.normal(size=(size, 3)) * 0.1 + 5 * place for place, size in enumerate((60, 30, 10))])


def blobs(**settings) -> KMQSelector:
    return KMQSelector(**{"n_clusters": 3, **settings}).fit(BLOBS)


@given(
    st.lists(st.tuples(st.integers(0, 30), st.floats(0, 10)), min_size=1, max_size=12),
    st.integers(0, 200),
)
def test_quotas_add_up_and_no_cluster_is_overdrawn(clusters, budget) -> None:
    capacity, weights = np.array([c for c, _ in clusters]), np.array([w for _, w in clusters])
    given_ = cluster_quotas(budget, weights, capacity)
    assert given_.sum() == min(budget, capacity.sum()) and (given_ >= 0).all() and (given_ <= capacity).all()
    heavy = weights > 1e-9
    if capacity[heavy].sum() >= budget:
        assert not given_[weights == 0].any()


@given(st.lists(st.integers(1, 500), min_size=1, max_size=20), st.floats(0.01, 1))
def test_quotas_are_within_one_of_the_exact_share(sizes, share) -> None:
    sizes = np.array(sizes)
    budget = max(1, int(share * sizes.sum()))
    given_ = cluster_quotas(budget, sizes.astype(float), sizes)
    assert (np.abs(given_ - budget * sizes / sizes.sum()) < 1 + 1e-6).all()


def test_quotas_by_hand() -> None:
    # Shares 3.6, 1.8, 0.6: the remainders .8 and .6 get a row each, the earlier of two equal ones first.
    assert cluster_quotas(6, np.array([60.0, 30.0, 10.0]), np.array([60, 30, 10])).tolist() == [3, 2, 1]
    # A full cluster gives its share to the others by weight: 10 of (2 | 6, 2).
    assert cluster_quotas(10, np.array([0.6, 0.3, 0.1]), np.array([2, 50, 50])).tolist() == [2, 6, 2]
    # Once those with a weight are full, the rest goes by what is left.
    assert cluster_quotas(10, np.array([1.0, 0.0, 0.0]), np.array([4, 9, 3])).tolist() == [4, 5, 1]


def test_class_quotas_keep_rare_classes() -> None:
    assert class_quotas(np.array([90, 8, 1]), 10).tolist() == [7, 2, 1]
    with pytest.raises(InputError, match="too small for 2 of each of 3 classes: 5"):
        class_quotas(np.array([90, 8, 1]), 4)


def test_the_largest_of_each_cluster_are_taken() -> None:
    keys, labels = np.array([0.1, 0.9, 0.5, 0.7, -np.inf]), np.array([0, 0, 1, 0, 1])
    assert take_first(keys, labels, np.array([2, 2])).tolist() == [1, 2, 3]


def test_the_budget_follows_cluster_sizes_and_is_spent_exactly() -> None:
    model = blobs()
    sizes = np.bincount(model.labels_)
    for budget in (10, 37, 99):
        chosen = model.select(budget)
        assert len(chosen) == budget == len(set(chosen.tolist()))
        assert (np.abs(np.bincount(model.labels_[chosen]) - budget * sizes / 100) < 1).all()
    equal = blobs(allocation="equal")
    assert sorted(np.bincount(equal.labels_[equal.select(27)])) == [9, 9, 9]
    assert sorted(np.bincount(equal.labels_[equal.select(60)])) == [10, 25, 25]  # the small one is full: 10 rows


def test_draws_follow_the_softmax_of_quality() -> None:
    """20,000 single draws from a cluster against exp(q) / sum exp(q)."""
    quality = np.array([0.0, 1.0, 2.0, 0.5, -1.0])
    counts = np.zeros(5)
    model = KMQSelector(n_clusters=1).fit(np.zeros((5 * 4000, 2)))
    model.labels_, model.cluster_centers_ = np.repeat(np.arange(4000), 5), np.zeros((4000, 2))  # 4,000 such clusters
    for seed in range(5):
        model.seed_ = seed
        counts += np.bincount(model.select(4000, np.tile(quality, 4000)) % 5)
    expected = np.exp(quality) / np.exp(quality).sum()
    assert chisquare(counts, 20_000 * expected).pvalue > 1e-3
    assert chisquare(counts, 20_000 * np.full(5, 0.2)).pvalue < 1e-6


def test_quality_and_temperature() -> None:
    quality = np.where(np.arange(100) % 2, 6.0, 1.0)
    good = [quality[blobs(temperature=t).select(30, quality)].mean() for t in (0.1, 1.0, 100.0)]
    assert good[0] == 6.0 and good[0] >= good[1] > good[2]
    model = blobs()
    np.testing.assert_array_equal(model.select(30, quality), model.select(30, quality + 1e6))  # no overflow
    np.testing.assert_array_equal(model.select(30, np.full(100, 3.0)), model.select(30))  # constant: uniform
    with pytest.warns(UserWarning, match="quality of 100 rows is missing"):
        np.testing.assert_array_equal(model.select(30, np.full(100, np.nan)), model.select(30))


def test_earlier_rows_are_left_out_and_draws_go_on() -> None:
    model = blobs()
    first = model.select(20)
    second = model.select(20, exclude=first)
    assert not np.intersect1d(first, second).size
    np.testing.assert_array_equal(np.sort(np.concatenate([first, second])), model.select(40))
    np.testing.assert_array_equal(model.select(500, exclude=first), np.setdiff1d(np.arange(100), first))


def test_log_weights_are_probabilities_of_the_next_draw() -> None:
    model, quality = blobs(), RNG.integers(1, 7, 100).astype(float)
    p = np.exp(model.log_weights(quality))
    assert p.sum() == pytest.approx(1)
    for j in range(3):
        mine = model.labels_ == j
        assert p[mine].sum() == pytest.approx(mine.mean())
        np.testing.assert_allclose(p[mine] / p[mine].sum(), np.exp(quality[mine]) / np.exp(quality[mine]).sum())
    off = model.log_weights(weights=[1, 0, 1])
    assert np.isfinite(off).all() and np.exp(off)[model.labels_ == 1].sum() == 0


def test_variants() -> None:
    distance = np.linalg.norm(BLOBS - blobs().cluster_centers_[blobs().labels_], axis=1)
    closest, median = (blobs(within=within).select(10) for within in ("closest", "median"))
    for j in range(3):
        mine = np.flatnonzero(blobs().labels_ == j)
        quota = len(np.intersect1d(closest, mine))
        assert set(np.intersect1d(closest, mine)) == set(mine[np.argsort(distance[mine])][:quota])
        off = np.abs(distance[mine] - np.median(distance[mine]))
        assert set(np.intersect1d(median, mine)) == set(mine[np.argsort(off)][:quota])
    quality = np.arange(100.0)
    np.testing.assert_array_equal(blobs(within="random").select(10, quality), blobs(within="random").select(10))


def test_clusters_are_those_of_scikit_learn_and_large_pools_come_close(monkeypatch) -> None:
    x = np.random.default_rng(1).normal(size=(3000, 4))
    model = KMQSelector(n_clusters=10, random_state=3).fit(x)
    peer = KMeans(10, n_init=5, random_state=model.seed_).fit(x)
    np.testing.assert_array_equal(model.labels_, peer.labels_)
    monkeypatch.setattr(clustering, "_LLOYD_ROWS", 1000)
    large = KMQSelector(n_clusters=10, random_state=3).fit(x.astype(np.float32) + 1000)  # far from the origin
    inertia = ((x + 1000 - large.cluster_centers_[large.labels_]) ** 2).sum()
    assert inertia < 1.1 * peer.inertia_
    exact = np.linalg.norm((x + 1000)[:, None] - large.cluster_centers_[None], axis=2).argmin(axis=1)
    assert (exact == large.labels_).mean() > 0.995


def test_k_is_chosen_by_the_silhouette() -> None:
    found = choose_k(BLOBS, [2, 3, 5, 8])
    assert max(found, key=found.__getitem__) == 3
    labels = KMeans(3, n_init=5, random_state=0).fit(BLOBS).labels_
    assert found[3] == pytest.approx(silhouette_score(BLOBS, labels))
    many = np.concatenate([RNG.normal(size=(12, 2)) * 0.01 + place for place in itertools.product(range(4), range(4))])
    model = KMQSelector(n_clusters="silhouette").fit(many)
    assert len(model.cluster_centers_) == 16 and model.silhouettes_[16] == max(model.silhouettes_.values())
    with pytest.raises(InputError, match=r"candidates must lie in 2..99, not 1"):
        choose_k(BLOBS, [1])


def test_the_same_seed_gives_the_same_rows_whatever_the_threads() -> None:
    from threadpoolctl import threadpool_limits

    x = np.random.default_rng(2).normal(size=(4000, 8)).astype(np.float32)
    found = []
    for threads in (1, 2, 4):
        with threadpool_limits(threads):
            found.append(KMQSelector(n_clusters=30, random_state=5).fit(x).select(200))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_iterations_by_hand() -> None:
    base = blobs()
    rounds = IterativeSelector(base, 31, rounds=3)
    first = rounds.next_batch()
    assert (
        len(first) == 10
        and np.bincount(base.labels_[first]).tolist() == np.bincount(base.labels_[base.select(10)]).tolist()
    )
    gap = np.choose(base.labels_[first], [np.log(4), 0.0, 0.0])
    np.testing.assert_allclose(rounds.feedback(first, gap), [4 / 6, 1 / 6, 1 / 6])
    assert len(rounds.next_batch()) == 10 and len(rounds.next_batch()) == 11
    assert len(np.unique(rounds.issued)) == 31
    with pytest.raises(NothingToDo, match="all 3 rounds are done"):
        rounds.next_batch()
    # The second feedback multiplies: 4/6 * 1/4 against 1/6.
    np.testing.assert_allclose(rounds.feedback(first, -gap), [1 / 3, 1 / 3, 1 / 3])


def test_what_is_not_scored_keeps_its_weight() -> None:
    base = blobs()
    rounds = IterativeSelector(base, 30)
    first = rounds.next_batch()
    two = first[base.labels_[first] != 2]
    gap = np.where(base.labels_[two] == 0, np.log(3), 0.0)
    np.testing.assert_allclose(rounds.feedback(two, gap), [1 / 2, 1 / 6, 1 / 3])


@pytest.mark.parametrize(
    ("update", "gaps", "weights"),
    [
        ("paper", [3.0, 1.0, -5.0], [3 / 4, 1 / 4, 0]),
        ("code", [np.log(2), 0.0, 0.0], [1 / 2, 1 / 4, 1 / 4]),
        ("exp", [2 * np.log(2), 0.0, 0.0], [1 / 2, 1 / 4, 1 / 4]),  # tau = 2
    ],
)
def test_updates(update, gaps, weights) -> None:
    base = blobs()
    rounds = IterativeSelector(base, 30, update=update, tau=2.0)
    first = rounds.next_batch()
    np.testing.assert_allclose(rounds.feedback(first, np.array(gaps)[base.labels_[first]]), weights)
    if update == "code":  # earlier weights are forgotten
        np.testing.assert_allclose(rounds.feedback(first, np.zeros(10)), np.full(3, 1 / 3))
    if update == "paper":
        with pytest.warns(UserWarning, match="no gap is above 0"):
            np.testing.assert_allclose(rounds.feedback(first, np.full(10, -1.0)), weights)


def test_a_cluster_that_runs_out_gives_its_budget_away() -> None:
    base = blobs()
    small = int(np.argmin(np.bincount(base.labels_)))
    rounds = IterativeSelector(base, 90, rounds=3)
    first = rounds.next_batch()
    rounds.feedback(first, np.where(base.labels_[first] == small, 50.0, 0.0))
    second = rounds.next_batch()
    assert len(second) == 30 and (base.labels_[np.union1d(first, second)] == small).sum() == 10
    whole = IterativeSelector(base, 300, rounds=2)
    assert len(whole.next_batch()) == 100
    with pytest.raises(NothingToDo, match="every row"):
        whole.next_batch()


def test_refine_trains_on_all_so_far_and_asks_before_each_further_round() -> None:
    seen: list[int] = []

    def train(model, rows):
        seen.append(len(rows))
        return (model or 0) + 1

    def gap(model, rows):
        assert model == len(seen) and len(rows) == seen[-1]
        return np.zeros(len(rows))

    done = refine(IterativeSelector(blobs(), 30), train, gap)
    assert seen == [10, 20, 30] and done.model == 3 and len(done.chosen) == 30 and len(done.weights) == 3


def test_refine_ends_where_the_pool_runs_out() -> None:
    selector = IterativeSelector(blobs(), 240)  # 80 rows a round, of 100
    with pytest.warns(UserWarning, match="ends after 2 of 3 rounds: every row of the pool"):
        done = refine(selector, lambda model, rows: len(rows), lambda model, rows: np.zeros(len(rows)))
    assert [len(batch) for batch in done.batches] == [80, 20] and done.model == 100
    np.testing.assert_array_equal(done.chosen, np.arange(100))
    with pytest.raises(NothingToDo):
        refine(selector, lambda model, rows: None, lambda model, rows: np.zeros(len(rows)))


def test_labels_do_not_depend_on_the_rows_held_at_once(monkeypatch) -> None:
    centres = np.random.default_rng(1).normal(size=(40, 3))
    whole = clustering._assign(BLOBS, centres)
    monkeypatch.setattr(clustering, "_PRODUCTS", 7)
    np.testing.assert_array_equal(clustering._assign(BLOBS, centres), whole)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_clusters": 0}, "n_clusters must be"), ({"n_clusters": "many"}, "n_clusters must be"),
        ({"n_clusters": 101}, "more than the 100 rows"), ({"allocation": "even"}, "allocation must be one of"),
        ({"within": "best"}, "within must be one of"), ({"temperature": 0}, "temperature must be positive"),
        ({"n_init": 0}, "n_init must be"), ({"max_iter": True}, "max_iter must be"),
    ],
)  # fmt: skip
def test_bad_settings(settings, words) -> None:
    with pytest.raises(InputError, match=words):
        blobs(**settings)


@pytest.mark.parametrize("rows", [np.full((3, 2), np.nan), np.array([[1.0, np.inf]]), np.empty((0, 3)), [["a", "b"]]])
def test_bad_embeddings(rows) -> None:
    with pytest.raises(DataError):
        KMQSelector(n_clusters=1).fit(rows)


def test_bad_use() -> None:
    model = blobs()
    for budget in (0, -1, 2.5, True):
        with pytest.raises(InputError, match="budget must be a whole number of at least 1"):
            model.select(budget)
    for quality, error, words in (
        (np.ones(5), InputError, "one value for each of 100 rows"),
        (np.full(100, np.inf), DataError, "infinite"),
        (["good"] * 100, DataError, "must be numbers"),
    ):
        with pytest.raises(error, match=words):
            model.select(5, quality)
    for weights in (np.ones(4), [-1, 1, 1], [0, 0, 0], [np.nan, 1, 1]):
        with pytest.raises(InputError, match="weights must be 3 finite numbers"):
            model.select(5, weights=weights)
    with pytest.raises(InputError, match=r"exclude must be row numbers in 0..99"):
        model.select(5, exclude=[100])
    with pytest.raises(InputError, match="matrix"):
        KMQSelector(n_clusters=1).fit(np.ones(4))
    with pytest.warns(UserWarning, match="most clusters get no row"):
        assert len(KMQSelector(n_clusters=50).fit(BLOBS).select(5)) == 5
    assert model.select(100).tolist() == model.select(10**6).tolist() == list(range(100))


def test_copies_and_single_rows() -> None:
    same = KMQSelector(n_clusters=4).fit(np.ones((20, 3)))
    assert len(same.select(8)) == 8 and np.isfinite(same.log_weights()).all()
    assert KMQSelector(n_clusters=1).fit([[1.0, 2.0]]).select(1).tolist() == [0]
    assert KMQSelector(n_clusters="silhouette").fit(np.ones((20, 3))).select(3).size == 3


def test_bad_feedback() -> None:
    rounds = IterativeSelector(blobs(), 30)
    with pytest.raises(InputError, match="never chosen"):
        rounds.feedback([0], [1.0])
    first = rounds.next_batch()
    other = np.setdiff1d(np.arange(100), first)[:1]
    with pytest.raises(InputError, match=f"row {other[0]} was never chosen"):
        rounds.feedback(other, [1.0])
    with pytest.raises(InputError, match="not finite"):
        rounds.feedback(first[:1], [np.nan])
    with pytest.raises(InputError, match="equally many"):
        rounds.feedback(first, [1.0])
    for settings in ({"rounds": 0}, {"rounds": 31}, {"update": "sum"}, {"tau": 0}, {"budget": 0}):
        with pytest.raises(InputError):
            IterativeSelector(blobs(), **{"budget": 30, **settings})


def test_k_center_is_within_twice_the_best_radius() -> None:
    for seed in range(5):
        x = np.random.default_rng(seed).normal(size=(11, 2))
        far = np.linalg.norm(x[:, None] - x[None], axis=2)
        best = min(far[list(centres)].min(axis=0).max() for centres in itertools.combinations(range(11), 3))
        assert far[k_center_greedy(x, 3, random_state=seed)].min(axis=0).max() <= 2 * best + 1e-9
    assert sorted(k_center_greedy(np.ones((4, 2)), 4)) == [0, 1, 2, 3]


def test_qdit_is_the_greedy_of_its_definition() -> None:
    x, quality = RNG.normal(size=(12, 3)), RNG.normal(size=12)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    chosen: list[int] = []
    for _ in range(4):

        def gained(i: int) -> float:
            return 0.7 * (unit @ unit[[*chosen, i]].T).max(axis=1).sum() + 0.3 * quality[i]

        chosen.append(max(set(range(12)) - set(chosen), key=gained))
    assert qdit(x, quality, 4, alpha=0.3).tolist() == chosen
    assert qdit(x, quality, 4, alpha=1.0).tolist() == np.argsort(-quality)[:4].tolist()


def test_deita_leaves_copies_out() -> None:
    x = np.array([[1.0, 0.0], [2.0, 0.01], [0.0, 1.0], [-1.0, 0.0]])
    assert deita_filter(x, [1, 4, 3, 2], 3).tolist() == [1, 2, 3]
    assert deita_filter(x, [1, 4, 3, 2], 4).tolist() == [1, 2, 3]  # the fourth is a copy
    assert deita_filter(x, [1, 4, 3, 2], 4, threshold=1.01).tolist() == [1, 2, 3, 0]


def test_medoids_and_bad_counts() -> None:
    chosen = kmeans_medoids(BLOBS, 3)
    assert len(chosen) == 3 and sorted(chosen // 30) in ([0, 2, 3], [1, 2, 3], [0, 2, 3])
    for choose in (kmeans_medoids, k_center_greedy, lambda x, n: qdit(x, np.ones(100), n)):
        for count in (0, 101, 1.5):
            with pytest.raises(InputError, match=r"count must be a whole number in 1..100"):
                choose(BLOBS, count)


def test_report_by_hand() -> None:
    x, labels = np.array([[0.0], [1.0], [10.0], [12.0]]), np.array([0, 0, 1, 2])
    found = selection_report(x, labels, [0, 2], quality=[0, 0, 1, 4], other=[0, 3])
    assert found["clusters hit"] == pytest.approx(2 / 3)
    assert found["distance to the nearest chosen"] == pytest.approx(3 / 4)
    assert found["mean quality"] == 0.5 and found["overlap"] == pytest.approx(1 / 3)
    assert found["clusters of low quality"] == pytest.approx(2 / 3)  # means 0, 1/4, 1
    with pytest.raises(InputError, match="chosen holds no row"):
        selection_report(x, labels, [])


def test_no_warning_without_a_reason() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        blobs().select(10, np.arange(100.0))
        IterativeSelector(KMQSelector(n_clusters=20).fit(BLOBS), 30).next_batch()
