"""Heuristic classification and the lexical scores that a shortcut would use."""

from __future__ import annotations

import numpy as np
import pytest
from pools import LAW, SEA, prose
from scipy.special import expit
from sklearn.exceptions import NotFittedError

from salience.data import HashedNgrams, HeuristicClassifier, lexical_overlap, mean_log_count
from salience.errors import InputError


@pytest.fixture(scope="module", params=["logistic", "fasttext"])
def fitted(request: pytest.FixtureRequest) -> HeuristicClassifier:
    return HeuristicClassifier(num_buckets=500, classifier=request.param).fit(prose(LAW, 80, 0), prose(SEA, 60, 1))


def probabilities(model: HeuristicClassifier, texts: list[str]) -> np.ndarray:
    buckets = HashedNgrams(model.ngrams, model.num_buckets, model.hash)(texts)
    return model.probability(buckets.sums(model.table_)[:, 0], np.diff(buckets.offsets))


def test_it_tells_new_documents_apart(fitted: HeuristicClassifier) -> None:
    sea, law = probabilities(fitted, prose(SEA, 50, 5)), probabilities(fitted, prose(LAW, 50, 6))
    assert np.mean(sea > 0.5) > 0.9 and np.mean(law < 0.5) > 0.9


def test_the_probability_is_a_sigmoid_of_the_mean_ngram_weight(fitted: HeuristicClassifier) -> None:
    for text in prose(SEA, 3, 7):
        counts = HashedNgrams(2, 500).counts(text)
        logit = fitted.table_[0] @ counts / counts.sum() + fitted.intercept_
        np.testing.assert_allclose(probabilities(fitted, [text]), [expit(logit)])
    np.testing.assert_allclose(probabilities(fitted, [""]), [expit(fitted.intercept_)])
    seen = HashedNgrams(2, 500)(prose(LAW, 60, 0) + prose(SEA, 60, 1)).counts(500) > 0
    assert fitted.table_.shape == (1, 500)
    assert (fitted.table_[0][~seen] == 0).all() or fitted.classifier == "fasttext"  # its embeddings begin at random


def official_draw(probability: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Rounds of ``numpy.random.pareto(9) > 1 - p`` until `count` distinct documents have passed."""
    passed = np.zeros(len(probability), bool)
    while True:
        fresh = ~passed & (generator.pareto(9, len(probability)) > 1 - probability)
        missing = count - passed.sum()
        if fresh.sum() >= missing:
            passed[generator.choice(np.flatnonzero(fresh), missing, replace=False)] = True
            return passed
        passed |= fresh


def test_keys_draw_as_repeated_pareto_rounds_do() -> None:
    """Inclusion frequencies against the official loop with the last round cut at random; top-k of p fails this."""
    probability, draws, count = np.array([0.01, 0.2, 0.5, 0.8, 0.97, 0.5]), 20_000, 3
    generator = np.random.default_rng(0)
    expected = np.mean([official_draw(probability, count, generator) for _ in range(draws)], axis=0)
    model = HeuristicClassifier()
    keys = model.keys(probability, generator.random((draws, 6)), generator.random((draws, 6)))
    found = np.bincount(np.argsort(-keys, axis=1)[:, :count].ravel(), minlength=6) / draws
    assert np.abs(found - expected).max() < 0.02
    assert np.abs(np.isin(np.arange(6), np.argsort(-probability)[:count]) - expected).max() > 0.1


def test_keys_of_extreme_draws_stay_ordered() -> None:
    keys = HeuristicClassifier().keys(np.array([1.0, 0.0, 0.5]), np.array([0.5, 1e-300, 1 - 1e-16]), np.full(3, 0.5))
    assert keys[0] == keys[2] == -0.5 and -1e7 < keys[1] < -100


def test_select(fitted: HeuristicClassifier) -> None:
    raw = [text for pair in zip(prose(LAW, 50, 8), prose(SEA, 50, 9)) for text in pair]
    drawn = fitted.select(raw, 30)
    assert (np.diff(drawn) > 0).all() and len(drawn) == 30 and np.mean(drawn % 2) > 0.55
    np.testing.assert_array_equal(drawn, fitted.select(raw, 30))
    best = fitted.select(raw, 30, top_k=True)
    np.testing.assert_array_equal(best, np.sort(np.argsort(-probabilities(fitted, raw), kind="stable")[:30]))
    assert set(fitted.set_params(random_state=1).select(raw, 30)) != set(drawn)
    fitted.set_params(random_state=0)
    for count, message in ((0, "count must be at least 1"), (101, "count 101 is more than the 100 eligible")):
        with pytest.raises(InputError, match=message):
            fitted.select(raw, count)


def test_what_is_refused() -> None:
    with pytest.raises(NotFittedError):
        HeuristicClassifier().select(["a"], 1)
    for raw, targets in (([], ["a"]), (["a"], [])):
        with pytest.raises(InputError, match="both raw and target texts are needed"):
            HeuristicClassifier().fit(raw, targets)
    with pytest.raises(InputError, match="num_buckets"):
        HeuristicClassifier(num_buckets=0).fit(["a"], ["b"])


def test_documents_without_words_do_no_harm() -> None:
    model = HeuristicClassifier(num_buckets=50).fit(["", "court judge", ""], ["", "wave tide", ""])
    assert np.isfinite(model.table_).all() and np.isfinite(probabilities(model, ["", "wave"])).all()


def test_lexical_scores_by_hand() -> None:
    texts, targets = ["The cat, the dog", "nothing here", ""], ["the cat sat", "THE cat"]
    np.testing.assert_allclose(lexical_overlap(texts, targets), [3 / 5, 0, 0])
    expected = (2 * np.log(3) + np.log(3)) / 5  # the: 2, cat: 2 occurrences
    np.testing.assert_allclose(mean_log_count(texts, targets), [expected, 0, 0])
