"""Deletion and insertion curves: hand-worked values, counted evaluations, and rankings that must lose."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from salience.errors import InputError
from salience.measure import curve

WEIGHTS = np.array([[4.0, 2.0, 1.0, 1.0], [1.0, 1.0, 2.0, 4.0]])
ORDER = np.array([[0, 1, 2, 3], [3, 2, 1, 0]])


def weighted(keep, rows):
    return (keep * WEIGHTS[rows]).sum(axis=1)


def test_deletion_by_hand():
    result = curve(weighted, ORDER)
    np.testing.assert_allclose(result.scores, [[8, 4, 2, 1, 0]] * 2)
    np.testing.assert_allclose(result.changed, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(result.area, (4 + 4 + 2 + 1) / 4)  # trapezoids: (8/2 + 4 + 2 + 1 + 0/2) / 4


def test_insertion_by_hand_and_reversed_deletion():
    inserted = curve(weighted, ORDER, mode="insertion")
    np.testing.assert_allclose(inserted.scores, [[0, 4, 6, 7, 8]] * 2)
    backwards = curve(weighted, ORDER[:, ::-1], mode="deletion")
    np.testing.assert_allclose(inserted.scores, backwards.scores[:, ::-1])


def test_uneven_steps_weigh_by_units_changed():
    result = curve(lambda keep, rows: keep[:, 0].astype(float), np.array([[1, 2, 0]]), steps=2)
    np.testing.assert_allclose(result.changed, [0, 2 / 3, 1])  # rint(1.5) = 2 units in the first step
    np.testing.assert_allclose(result.scores, [[1, 1, 0]])
    np.testing.assert_allclose(result.area, 2 / 3 + 1 / 6)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 1000])
def test_number_of_evaluations_and_batches(batch_size):
    seen = []

    def count(keep, rows):
        seen.append(len(keep))
        return weighted(keep, rows)

    result = curve(count, ORDER, steps=2, batch_size=batch_size)
    assert sum(seen) == 2 * 3
    assert len(seen) == -(-6 // batch_size)
    np.testing.assert_array_equal(result.scores, curve(weighted, ORDER, steps=2).scores)


@given(st.permutations(range(4)), st.sampled_from(["deletion", "insertion"]), st.integers(1, 4))
def test_ends_do_not_depend_on_the_order_and_best_order_wins(order, mode, steps):
    result = curve(lambda keep, rows: keep @ WEIGHTS[0], np.array([order]), steps, mode=mode)
    best = curve(lambda keep, rows: keep @ WEIGHTS[0], ORDER[:1], steps, mode=mode)
    assert sorted(result.scores[0, [0, -1]]) == [0, 8]
    sign = 1 if mode == "deletion" else -1
    assert sign * result.area[0] >= sign * best.area[0] - 1e-12


def test_constant_score_has_its_own_value_as_area():
    np.testing.assert_allclose(curve(lambda keep, rows: np.full(len(keep), 0.3), ORDER, 3).area, 0.3)


@pytest.mark.parametrize(
    ("order", "options", "message"),
    [
        ([[0, 1, 1]], {}, "exactly once"),
        ([[0, 1, 3]], {}, "exactly once"),
        ([0, 1, 2], {}, "order must be"),
        ([[0.0, 1.0]], {}, "order must be"),
        (np.empty((0, 3), int), {}, "order must be"),
        ([[0, 1, 2]], {"steps": 4}, "at most the number of units, 3"),
        ([[0, 1, 2]], {"steps": 0}, "steps must be"),
        ([[0, 1, 2]], {"batch_size": 0}, "batch_size must be"),
        ([[0, 1, 2]], {"mode": "remove"}, "'deletion' or 'insertion'"),
    ],
)
def test_bad_input(order, options, message):
    with pytest.raises(InputError, match=message):
        curve(lambda keep, rows: keep.sum(axis=1), order, **options)


def test_bad_score_function():
    with pytest.raises(InputError, match=r"one score per mask, \(4,\); got \(4, 3\)"):
        curve(lambda keep, rows: keep, [[0, 1, 2]])
    with pytest.raises(InputError, match="score_fn's result must be finite"):
        curve(lambda keep, rows: np.full(len(keep), np.nan), [[0, 1, 2]])
