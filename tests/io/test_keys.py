"""Draws are a function of (seed, purpose, file, row), and look random."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import xxhash

from salience.io import gumbel, key_of, keys, uniform

ROWS = np.arange(200_000)


def test_mix_is_splitmix64() -> None:
    """The first outputs of SplitMix64 from seed 0, as published with the generator."""
    golden = 0x9E3779B97F4A7C15
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    states = np.array([0, golden, 2 * golden % 2**64], dtype=np.uint64)
    with np.errstate(over="ignore"):
        assert keys._mix(states).tolist() == expected


def test_a_name_is_its_xxh3() -> None:
    assert key_of("a/b.jsonl") == xxhash.xxh3_64_intdigest(b"a/b.jsonl")


def test_draws_are_uniform_and_gumbel() -> None:
    drawn = uniform(3, "purpose", 17, ROWS)
    assert drawn.min() > 0 and drawn.max() < 1
    assert scipy.stats.kstest(drawn, "uniform").pvalue > 0.01
    assert scipy.stats.kstest(gumbel(3, "purpose", 17, ROWS), "gumbel_r").pvalue > 0.01
    np.testing.assert_allclose(gumbel(3, "p", 1, ROWS[:9]), -np.log(-np.log(uniform(3, "p", 1, ROWS[:9]))))
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.01


def test_draws_stay_inside_the_open_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    for state in (0, 2**64 - 1):
        monkeypatch.setattr(keys, "_mix", lambda x, state=state: np.full(np.shape(x), state, np.uint64))
        assert 0 < uniform(0, "p", 0, np.array([1]))[0] < 1
        assert np.isfinite(gumbel(0, "p", 0, np.array([1]))).all()


@pytest.mark.parametrize(
    "other", [(4, "purpose", 17), (3, "purposes", 17), (3, "purpose", 18), (-3, "purpose", 17), (2**70, "purpose", 17)]
)
def test_seed_purpose_and_file_give_independent_draws(other: tuple[int, str, int]) -> None:
    first, second = uniform(3, "purpose", 17, ROWS), uniform(*other, ROWS)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.01 and not (first == second).any()


def test_a_draw_does_not_depend_on_the_others() -> None:
    drawn = uniform(3, "purpose", 17, ROWS)
    for rows in (ROWS[5:9], ROWS[::-1][:7], np.array([123_456])):
        np.testing.assert_array_equal(uniform(3, "purpose", 17, rows), drawn[rows])
    np.testing.assert_array_equal(uniform(np.int64(3), "purpose", 17, ROWS[:5]), drawn[:5])
    assert uniform(0, "p", 2**64 - 1, np.empty(0, np.int64)).shape == (0,)
