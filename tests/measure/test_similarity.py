"""Similarity measures: identities, hand-worked numbers, parity with scipy and with the textbook formulas."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from salience.errors import InputError
from salience.measure import cosine, kl_divergence, linear_cka, mmd_squared, rsa, total_variation

seeds = st.integers(0, 2**32 - 1)


def rotation(rng, d):
    return np.linalg.qr(rng.normal(size=(d, d)))[0]


def hsic_cka(a, b):
    """CKA by its definition with centred Gram matrices."""
    n = len(a)
    centre = np.eye(n) - 1 / n
    gram_a, gram_b = centre @ a @ a.T @ centre, centre @ b @ b.T @ centre
    return np.trace(gram_a @ gram_b) / np.sqrt(np.trace(gram_a @ gram_a) * np.trace(gram_b @ gram_b))


@given(seeds, st.integers(1, 12), st.integers(1, 12))
def test_cka_is_its_definition_in_both_branches(seed, p, q):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(6, p)) + 5, rng.normal(size=(6, q))
    value = linear_cka(a, b)
    assert value == pytest.approx(hsic_cka(a, b))
    assert -1e-12 <= value <= 1 + 1e-12
    assert linear_cka(b, a) == pytest.approx(value)


@given(seeds)
def test_cka_ignores_rotation_scale_and_shift_but_not_shuffling(seed):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(30, 4)) * [1, 2, 3, 4]
    assert linear_cka(a, 3 * a @ rotation(rng, 4) + 7) == pytest.approx(1)
    assert linear_cka(a, rng.permutation(a)) < 0.9


def test_rsa():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(20, 5))
    assert rsa(a, 2 * a @ rotation(rng, 5) + 1) == pytest.approx(1)
    assert abs(rsa(a, rng.permutation(a))) < 0.3
    # distances of a: 1, 3, 2; of b: 2, 3, 1
    assert rsa([[0.0], [1.0], [3.0]], [[0.0], [2.0], [3.0]]) == pytest.approx(0.5)
    assert rsa(a, 5 * a + 1, metric="correlation") == pytest.approx(1)


def test_cosine():
    np.testing.assert_allclose(cosine([[3, 4], [1, 0]], [[4, 3], [0, 2]]), [24 / 25, 0])
    np.testing.assert_allclose(cosine([1.0, 1.0], [[1.0, 1.0], [-1.0, -1.0]]), [1, -1])
    assert cosine([1e-200, 0.0], [1e200, 1e200]) == pytest.approx(np.sqrt(0.5))


def distributions(draw):
    size = draw(st.integers(2, 6))
    weights = st.lists(st.floats(0.01, 1), min_size=size, max_size=size).map(np.array)
    p, q = draw(weights), draw(weights)
    return p / p.sum(), q / q.sum()


@given(st.data())
def test_divergences(data):
    p, q = distributions(data.draw)
    exact = kl_divergence(p, q, epsilon=0.0)
    assert exact == pytest.approx(scipy.stats.entropy(p, q), abs=1e-12)
    assert exact >= -1e-12
    assert kl_divergence(p, p, epsilon=0.0) == pytest.approx(0, abs=1e-12)
    mixture = (p + q) / 2
    halves = kl_divergence(p, mixture, epsilon=0.0) / 2 + kl_divergence(q, mixture, epsilon=0.0) / 2
    assert halves == pytest.approx(jensenshannon(p, q) ** 2, abs=1e-12)
    distance = total_variation(p, q)
    assert 0 <= distance <= 1
    assert distance == pytest.approx(total_variation(q, p))
    assert 2 * distance**2 <= exact + 1e-12  # Pinsker


def test_divergences_by_hand():
    p, q = [0.5, 0.5, 0.0], [0.25, 0.0, 0.75]
    assert kl_divergence(p, q, epsilon=0.0) == np.inf
    expected = 0.5 * np.log(0.5 / (0.25 + 1e-8)) + 0.5 * np.log(0.5 / 1e-8)
    assert kl_divergence(p, q, epsilon=1e-8) == pytest.approx(expected)
    assert kl_divergence(p, p, epsilon=0.5) == pytest.approx(np.log(0.5))  # q is not renormalised
    assert total_variation(p, q) == pytest.approx(0.75)
    assert total_variation([1, 0], [0, 1]) == 1
    np.testing.assert_allclose(total_variation([p, q], q), [0.75, 0])


def test_mmd():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40, 3)), rng.normal(size=(50, 3))
    kernel = {
        name: np.exp(-((x[:, None] - y[None]) ** 2).sum(-1) / 2)
        for name, x, y in [("aa", a, a), ("bb", b, b), ("ab", a, b)]
    }
    expected = (kernel["aa"].sum() - 40) / (40 * 39) + (kernel["bb"].sum() - 50) / (50 * 49) - 2 * kernel["ab"].mean()
    assert mmd_squared(a, b, bandwidth=1.0) == pytest.approx(expected)
    repeats = [mmd_squared(rng.normal(size=(20, 2)), rng.normal(size=(20, 2))) for _ in range(200)]
    assert abs(np.mean(repeats)) < 0.003  # unbiased: the biased form averages about .05 here
    assert mmd_squared(a, b + 3) > 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear_cka([[1.0], [np.nan]], [[1.0], [2.0]]), "a must be finite"),
        (lambda: linear_cka([[1.0], [2.0]], [[1.0]]), "got 2 and 1 rows"),
        (lambda: linear_cka([[1.0], [2.0]], [[0.1], [0.1]]), "b is the same for all 2 samples"),
        (lambda: linear_cka([1.0, 2.0], [1.0, 2.0]), "a must have shape"),
        (lambda: rsa([[1.0], [2.0]], [[1.0], [2.0]]), "at least 3 samples"),
        (lambda: rsa(np.eye(3), np.arange(9.0).reshape(3, 3), "manhattn"), "metric must be a distance"),
        (lambda: rsa(np.arange(9.0).reshape(3, 3), np.zeros((3, 2)), "cosine"), "b has rows whose cosine"),
        (lambda: cosine([0.0, 0.0], [1.0, 0.0]), "a holds 1 zero vectors"),
        (lambda: cosine([1.0, 0.0], [1.0]), r"got \(2,\), \(1,\)"),
        (lambda: cosine([1.0], [np.nan]), "b must be finite"),
        (lambda: kl_divergence([0.5, 0.6], [0.5, 0.5], epsilon=0.0), "p must sum to 1"),
        (lambda: kl_divergence([0.5, 0.5], [1.5, -0.5], epsilon=0.0), "q must not be negative"),
        (lambda: kl_divergence([0.5, 0.5], [0.5, 0.5], epsilon=-1.0), "epsilon must be at least 0"),
        (lambda: total_variation([0.5, np.nan], [0.5, 0.5]), "p must be finite"),
        (lambda: total_variation([1.0], [0.5, 0.5]), r"got \(1,\), \(2,\)"),
        (lambda: mmd_squared([[1.0]], [[1.0], [2.0]]), "at least 2 points"),
        (lambda: mmd_squared(np.ones((3, 1)), np.ones((3, 1))), "bandwidth must be above 0"),
        (lambda: mmd_squared(np.ones((3, 1)), np.ones((3, 2))), "same dimension"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
