"""Intervals and paired differences: coverage, exact p-values, parity with scipy, and the degenerate cases."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from salience.errors import InputError
from salience.measure import bootstrap_interval, difference_over_draws, paired, paired_difference


def test_p_value_by_hand():
    result = paired_difference([1, 2, 3, 4], [0, 0, 0, 0], random_state=0)
    assert result.mean == 2.5
    assert result.p_value == 2 / 16  # only all plus and all minus reach 2.5
    # 3, 1, -1: of the 8 sums of signs, +-5 and the four +-3 are as far out as the 3 seen
    assert paired_difference([3, 1, 0], [0, 0, 1], random_state=0).p_value == 6 / 8


@pytest.mark.parametrize("n", [6, 40])
def test_p_value_agrees_with_scipy(n):
    rng = np.random.default_rng(n)
    a = rng.normal(0.3, 1, n)
    theirs = scipy.stats.permutation_test(
        (a,), np.mean, permutation_type="samples", n_resamples=20_000, vectorized=True, rng=0
    ).pvalue
    ours = paired_difference(a, np.zeros(n), resamples=20_000, random_state=0).p_value
    assert ours == pytest.approx(theirs, abs=1e-12 if n == 6 else 0.015)


def test_interval_agrees_with_scipy_on_many_values():
    values = np.random.default_rng(0).exponential(size=400)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=0, batch=1000
    ).confidence_interval
    ours = bootstrap_interval(values, resamples=20_000, random_state=1)
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.05 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.05 * width)
    assert ours.low < ours.mean < ours.high
    wider = bootstrap_interval(values, confidence=0.99, resamples=20_000, random_state=1)
    assert wider.low < ours.low and wider.high > ours.high


def test_interval_covers_as_often_as_it_says_on_few_values():
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(500):
        interval = bootstrap_interval(rng.normal(size=10), resamples=500, random_state=rng)
        covered += interval.low <= 0 <= interval.high
    assert 0.925 <= covered / 500 <= 0.98  # the plain percentile interval covers about 0.90 here


def test_pairing_matters():
    rng = np.random.default_rng(0)
    difficulty = 10 * rng.normal(size=50)
    a, b = difficulty + 1 + 0.1 * rng.normal(size=50), difficulty
    paired_result = paired_difference(a, b, random_state=0)
    assert 0.9 < paired_result.low < paired_result.high < 1.1
    assert paired_result.p_value == 1 / 2001
    shuffled = paired_difference(a, rng.permutation(b), random_state=0)
    assert shuffled.low < 0 < shuffled.high


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=9), st.integers(0, 5))
def test_bounds_and_symmetry(differences, seed):
    zeros = np.zeros(len(differences))
    result = paired_difference(differences, zeros, resamples=600, random_state=seed)
    assert min(differences) - 1e-9 <= result.low <= result.high <= max(differences) + 1e-9
    assert 1 / 600 <= result.p_value <= 1
    assert result == paired_difference(differences, zeros, resamples=600, random_state=seed)
    mirrored = paired_difference(zeros, differences, resamples=600, random_state=seed)
    assert mirrored.mean == pytest.approx(-result.mean)
    assert mirrored.p_value == result.p_value
    assert (mirrored.low, mirrored.high) == pytest.approx((-result.high, -result.low))


def test_one_pair_says_nothing_of_the_spread():
    assert paired_difference([3.0], [1.0], random_state=0) == (2.0, -math.inf, math.inf, 1.0, 1)
    assert bootstrap_interval([3.0], random_state=0) == (3.0, -math.inf, math.inf, 1)


def test_equal_differences():
    assert paired_difference([2, 3, 4], [1, 2, 3], random_state=0) == (1, 1, 1, 2 / 8, 3)
    assert paired_difference([2, 3, 4], [2, 3, 4], random_state=0) == (0, 0, 0, 1, 3)
    assert bootstrap_interval([0.1] * 3, random_state=0) == (0.1, 0.1, 0.1, 3)


def test_parts_do_not_change_what_is_drawn_in_size(monkeypatch):
    monkeypatch.setattr(paired, "_CELLS", 100)
    a = np.random.default_rng(0).normal(0.5, 1, 30)
    small = paired_difference(a, np.zeros(30), random_state=0)
    monkeypatch.undo()
    whole = paired_difference(a, np.zeros(30), random_state=0)
    assert small.low == pytest.approx(whole.low, abs=0.1)
    assert small.p_value == pytest.approx(whole.p_value, abs=0.02)


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        ([1.0, np.nan], [1.0, 2.0], {}, "a must be finite"),
        ([1.0, 2.0], [1.0, np.nan], {}, "b must be finite"),
        ([1.0, 2.0], [1.0], {}, "same shape"),
        ([], [], {}, "a must not be empty"),
        ([1.0, 2.0], [0.0, 0.0], {"confidence": 95.0}, "confidence must lie between 0 and 1; got 95"),
        ([1.0, 2.0], [0.0, 0.0], {"resamples": 10}, "resamples must be a whole number of at least 100"),
    ],
)
def test_bad_input(a, b, options, message):
    with pytest.raises(InputError, match=message):
        paired_difference(a, b, random_state=0, **options)
    with pytest.raises(InputError, match="values must be finite"):
        bootstrap_interval([np.nan], random_state=0)


def test_several_draws_widen_the_interval_by_their_spread() -> None:
    rng = np.random.default_rng(0)
    a, units = rng.normal(1, 0.1, 200), rng.normal(0, 0.1, 200)
    alike = difference_over_draws(a, [units, units, units], random_state=0)
    alone = difference_over_draws(a, [units], random_state=0)
    assert alike == pytest.approx(alone) == paired_difference(a, units, random_state=0)
    apart = difference_over_draws(a, [units - 1, units, units + 1], random_state=0)
    reach = scipy.stats.t.ppf(0.975, 2) * 1 * np.sqrt(1 + 1 / 3)
    assert apart.mean == pytest.approx(alone.mean)
    assert apart.high - apart.mean == pytest.approx(np.hypot(alone.high - alone.mean, reach))
    assert apart.low < 0 < alone.low  # one more draw may well be as good
    with pytest.raises(InputError, match="draws must be finite"):
        difference_over_draws(a, [units, np.full(200, np.nan)], random_state=0)


def test_one_random_draw_is_rarely_called_better_than_others() -> None:
    rng, called = np.random.default_rng(1), 0
    for trial in range(200):
        draws = rng.normal(size=(11, 1)) + rng.normal(0, 0.01, (11, 40))
        called += difference_over_draws(draws[0], list(draws[1:]), random_state=trial).low > 0
    assert called <= 14  # 2.5 % expected; units alone would call about half
