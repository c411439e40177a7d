"""The corrected mutual information: by hand, against its definition, and against the reference's own figures."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score

from salience.errors import InputError
from salience.features import ca_mutual_info
from salience.features.outrank.mutual_info import class_sums, count_terms, target_of

# (rows, values of the feature, classes, seed): corrected and plain, printed by the estimator of the PyPI package
# outrank 0.97.5, `mutual_info_estimator_numba(feature, label, float32(1), correction)`, numpy 2.4, numba 0.68.
PEER = {
    "binary": (4000, 2, 2, 0, 6.285309791564941e-05, 0.0002939442347269505),
    "hundred": (4000, 100, 2, 1, -0.0010731220245361328, 0.01351516880095005),
    "classes": (4000, 37, 9, 2, 0.00893828272819519, 0.04561542719602585),
    "ids": (4000, 1500, 2, 3, -0.0052030086517333984, 0.22156593203544617),
    "rare": (3000, 50, 1200, 4, -0.003060269635170698, 2.7917556762695312),
    "dependent": (16384, 2000, 3, 6, 0.7390222549438477, 0.8843110203742981),
}


def drawn(n: int, values: int, classes: int, seed: int, dependent: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    f = rng.integers(0, values, n)
    if dependent:
        f = (y * 600 + rng.integers(0, 800, n)) % values
    return f, y


def by_definition(f: np.ndarray, y: np.ndarray, shifts: int = 1) -> float:
    """H(f~|y) - H(f|y), one row and one class after the other."""
    n, sizes = len(y), np.bincount(y)

    def conditional(values: list[int]) -> float:
        total = 0.0
        for v in np.unique(y):
            inside = [value for value, label in zip(values, y) if label == v]
            for value in set(inside):
                share = inside.count(value) / len(inside)
                total -= len(inside) / n * share * np.log(share)
        return total

    spoofed = [[int(f[(i + k * sizes[y[i]]) % n]) for i in range(n)] for k in range(1, shifts + 1)]
    return float(np.mean([conditional(values) for values in spoofed]) - conditional(f.tolist()))


@pytest.mark.parametrize("name", PEER)
def test_parity_with_the_reference(name: str) -> None:
    *parameters, corrected, plain = PEER[name]
    f, y = drawn(*parameters, dependent=name == "dependent")
    assert ca_mutual_info(f, y) == pytest.approx(corrected, abs=1e-6)
    assert ca_mutual_info(f, y, correction=False) == pytest.approx(plain, abs=1e-6)


def test_by_hand() -> None:
    # classes 0, 0, 0, 1: every row of class 0 borrows three rows further down, the last row one further down
    f, y = np.array([0, 0, 1, 1]), np.array([0, 0, 0, 1])
    spoofed = [1, 0, 0, 0]
    given = -3 / 4 * (2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3))  # of f in class 0: 0, 0, 1; class 1 has one row
    spoof = -3 / 4 * (1 / 3 * np.log(1 / 3) + 2 / 3 * np.log(2 / 3))  # of 1, 0, 0
    assert [int(f[(i + (3 if y[i] == 0 else 1)) % 4]) for i in range(4)] == spoofed
    assert ca_mutual_info(f, y) == pytest.approx(spoof - given, abs=1e-15) == pytest.approx(0)
    assert ca_mutual_info(np.array([0, 0, 0, 1]), np.array([1, 1, 1, 0]), correction=False) == pytest.approx(
        -(3 / 4 * np.log(3 / 4) + 1 / 4 * np.log(1 / 4))
    )


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_it_is_its_definition(data) -> None:
    n = data.draw(st.integers(2, 40))
    f, y = (np.array(data.draw(st.lists(st.integers(0, top), min_size=n, max_size=n))) for top in (9, 5))
    shifts = data.draw(st.integers(1, 3))
    if np.array_equal(f, y):
        return
    assert ca_mutual_info(f, y, shifts=shifts) == pytest.approx(by_definition(f, y, shifts), abs=1e-12)
    assert ca_mutual_info(f, y, correction=False) == pytest.approx(mutual_info_score(f, y), abs=1e-12)
    # names of values mean nothing
    assert ca_mutual_info((f * 7 + 3) % 11, y, shifts=shifts) == pytest.approx(by_definition(f, y, shifts), abs=1e-12)
    assert ca_mutual_info(f + 10**9, y, shifts=shifts) == pytest.approx(by_definition(f, y, shifts), abs=1e-12)


@pytest.mark.parametrize(("values", "classes"), [(2, 2), (10, 7), (300, 300), (9000, 3), (3, 5000)])
def test_both_ways_of_counting_agree(values: int, classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of (value, class), and class after class."""
    rng = np.random.default_rng(0)
    codes, y = rng.integers(0, values, (2, 5000), np.uint32), rng.integers(0, classes, 5000).astype(np.uint32)
    target, terms = target_of(y, classes, 2), count_terms(5000)
    found = [
        class_sums(codes, np.array([1, 0]), np.full(2, below), target, terms)
        for below in (values, 4 * 5000 // classes + values)  # the second is too large for a table
    ]
    np.testing.assert_allclose(found[0], found[1], atol=1e-8)
    joint = np.unique(codes[1].astype(np.int64) * classes + y, return_counts=True)[1]
    assert found[0][0, 0] == pytest.approx(joint @ np.log(joint))


def test_noise_of_many_values_scores_nothing_and_a_weak_signal_something() -> None:
    f, y = drawn(16384, 2000, 2, 0)
    weak = y ^ (np.random.default_rng(1).random(16384) < 0.45)
    assert ca_mutual_info(f, y, correction=False) > 10 * ca_mutual_info(weak, y, correction=False)
    noise = [ca_mutual_info(*drawn(16384, 2000, 2, seed)) for seed in range(20)]
    assert ca_mutual_info(weak, y) > 0.004 > 2 * abs(np.median(noise))


def test_a_target_that_is_the_feature_gives_its_entropy_but_equal_sums_do_not() -> None:
    y = np.array([0, 1, 1, 2, 0, 1, 2, 2])
    assert ca_mutual_info(y, y) == pytest.approx(
        -3 * 0.375 * np.log(0.375) + 0.375 * np.log(0.375) - 0.25 * np.log(0.25)
    )
    rng = np.random.default_rng(5)  # here the sums of both are equal, which the reference takes for equal columns
    label, feature = rng.integers(0, 2, 7), rng.integers(0, 3, 7)
    assert label.sum() == feature.sum() and ca_mutual_info(feature, label) == pytest.approx(
        by_definition(feature, label)
    )


def test_sorted_rows_lose_the_signal_which_is_why_rows_are_shuffled() -> None:
    rng = np.random.default_rng(0)
    y = np.sort(rng.integers(0, 2, 4000))
    copy = y ^ (rng.random(4000) < 0.01)
    order = rng.permutation(4000)
    assert ca_mutual_info(copy[order], y[order]) > 0.6 and ca_mutual_info(copy, y) < 0.06


@pytest.mark.parametrize(
    ("feature", "target", "options", "said"),
    [
        ([0, 1], [0], {}, "feature has 2 rows and target 1"),
        ([], [], {}, "non-empty array of integer codes"),
        ([0.5], [0], {}, "float64 of shape"),
        ([[0]], [0], {}, r"of shape \(1, 1\)"),
        ([-1], [0], {}, "holds the code -1"),
        ([0], [0], {"shifts": 0}, "shifts must be"),
    ],
)
def test_bad_input(feature, target, options, said: str) -> None:
    with pytest.raises(InputError, match=said):
        ca_mutual_info(np.array(feature), np.array(target), **options)
