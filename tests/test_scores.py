"""`Scores`: what it refuses, how it draws, ranks and combines, and that its file comes back whole or not at all."""

from __future__ import annotations

import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from salience.data import gumbel_topk
from salience.errors import DataError, InputError
from salience.io import gumbel
from salience.scores import Scores

FINITE = st.floats(allow_nan=False, allow_infinity=False)
IDS = st.lists(st.text(max_size=8), min_size=1, max_size=30, unique=True)


@st.composite
def scores(draw: st.DrawFn, values: st.SearchStrategy[float] = FINITE) -> Scores:
    ids = draw(IDS)
    return Scores(draw(st.lists(values, min_size=len(ids), max_size=len(ids))), ids, "sample")


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "ids", "message"),
    [
        ([1, math.nan], ["a", "b"], "value of id 'b' is nan"),
        ([math.inf, 1], ["a", "b"], "value of id 'a' is inf"),
        ([1, None], ["a", "b"], "value of id 'b' is nan"),
        (["x"], ["a"], "values must be numbers"),
        ([[1.0, 2.0]], ["a"], r"one dimension, not shape \(1, 2\)"),
        ([1, 2], ["a"], "2 values for 1 ids"),
        ([], [], "cannot be empty"),
        ([1, 2, 3], ["a", "b", "a"], "id 'a' occurs more than once"),
        ([1, 2], [1, "1"], "id '1' occurs more than once"),
        ([1, 2], "ab", "not one string"),
        ([1, 2], pa.array(["a", None]), "1 of 2 ids are null"),
        ([1], ["\ud800"], "an id is not valid Unicode"),
    ],
)
def test_what_is_no_scores(values: list, ids: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Scores(values, ids, "sample")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"unit": ""}, "unit must say"), ({"unit": "x", "provenance": {"f": print}}, "provenance must be plain JSON")],
)
def test_what_is_no_description(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Scores([1], ["a"], **options)


@given(scores(), st.integers(0, 29), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_one_value_that_is_not_finite_is_enough(good: Scores, at: int, bad: float) -> None:
    values = good.values.copy()
    values[at % len(good)] = bad
    with pytest.raises(InputError, match="must be finite"):
        Scores(values, good.ids, "sample")


def test_the_values_are_a_copy_that_cannot_be_changed() -> None:
    values = np.array([1.0, 2.0])
    made = Scores(values, [7, 8], "layer", {"method": "m"})
    values[0] = 5
    assert made.values[0] == 1 and list(made.ids) == ["7", "8"]
    with pytest.raises(ValueError, match="read-only"):
        made.values[0] = 5
    assert repr(made) == "Scores(2 layers, 1 to 2, method='m')"


# --- choosing -----------------------------------------------------------------------------------------------


@given(scores(), st.data())
def test_top_is_the_largest_ties_by_id(made: Scores, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(made)))
    expected = sorted(zip(made.ids, made.values), key=lambda pair: (-pair[1], pair[0]))[:count]
    top = made.top(count)
    assert list(zip(top.ids, top.values)) == expected


@pytest.mark.parametrize("count", [0, -1, 4, 1.5, True + 3])
def test_counts_out_of_range(count: float) -> None:
    made = Scores([1, 2, 3], ["a", "b", "c"], "sample")
    for choose in (made.top, made.sample):
        with pytest.raises(InputError, match=f"count must be a whole number in 1..3, not {count}"):
            choose(count)


def test_keep_by_mask_and_by_position() -> None:
    made = Scores([1, 2, 3], ["a", "b", "c"], "sample", {"method": "m"})
    assert list(made.keep(np.array([True, False, True])).ids) == ["a", "c"]
    assert list(made.keep(np.array([2, 0])).ids) == ["c", "a"]
    assert made.keep(np.array([0])).provenance == {"method": "m"}
    for which, message in (
        ([True, False], "mask of length 3"), ([False] * 3, "nothing is kept"), ([], "nothing is kept"),
        ([3], "positions must be"), ([-1], "positions must be"), ([0.5], "positions must be"),
        ([[1]], "positions must be"),
        ([1, 1], "occurs more than once"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            made.keep(np.array(which))


LOGITS = np.array([0.0, 0.5, -1.0, 1.5, 2.0, -0.5])
DRAWS = 200_000


def exact_inclusion(logits: np.ndarray, k: int) -> np.ndarray:
    """Probability of each item to be among the first k of sequential sampling without replacement."""
    weights, inclusion = np.exp(logits), np.zeros(len(logits))
    for order in itertools.permutations(range(len(logits)), k):
        probability, left = 1.0, weights.sum()
        for item in order:
            probability *= weights[item] / left
            left -= weights[item]
        inclusion[list(order)] += probability
    return inclusion


def test_gumbel_keys_follow_the_law_and_noise_free_top_k_does_not() -> None:
    exact = exact_inclusion(LOGITS, 2)
    assert exact.sum() == pytest.approx(2)
    by_record = gumbel(0, "test", 1, np.arange(6 * DRAWS)).reshape(DRAWS, 6)
    for noise in (np.random.default_rng(0).gumbel(size=(DRAWS, 6)), by_record):
        drawn = np.bincount(np.argsort(-(LOGITS + noise), axis=1)[:, :2].ravel(), minlength=6) / DRAWS
        assert np.abs(drawn - exact).max() < 0.01
    fake = np.isin(np.arange(6), np.argsort(-LOGITS)[:2]).astype(float)
    assert np.abs(fake - exact).max() > 0.2
    replaced = 1 - (1 - np.exp(LOGITS) / np.exp(LOGITS).sum()) ** 2  # drawing with replacement is another law
    assert np.abs(replaced - exact).max() > 0.03


def test_sample_and_gumbel_topk_draw_by_these_keys() -> None:
    """Both are the largest ``logit + gumbel`` of their generator; with the test above that is the law."""
    made = Scores(LOGITS, list(range(6)), "sample")
    for seed in range(50):
        noise = np.random.default_rng(seed).gumbel(size=6)
        expected = np.argsort(-(LOGITS + noise))[:2]
        assert list(made.sample(2, random_state=seed).ids) == [str(item) for item in expected]
        chosen = gumbel_topk(LOGITS, 2, generator=np.random.default_rng(seed))
        np.testing.assert_array_equal(chosen, np.sort(expected))
        cold = np.argsort(-(LOGITS / 0.25 + noise))[:2]
        assert list(made.sample(2, random_state=seed, temperature=0.25).ids) == [str(item) for item in cold]


def test_sample_itself_follows_the_law() -> None:
    made, generator = Scores(LOGITS, list(range(6)), "sample"), np.random.default_rng(1)
    hits = np.zeros(6)
    for _ in range(4000):
        hits[made.sample(2, random_state=generator).ids.astype(int)] += 1
    exact = exact_inclusion(LOGITS, 2)
    assert (np.abs(hits / 4000 - exact) < 4 * np.sqrt(exact * (1 - exact) / 4000)).all()


def test_gumbel_topk_with_a_mask_and_what_it_refuses() -> None:
    mask = np.array([True, False, True, False, False, True])
    for seed in range(20):
        assert set(gumbel_topk(LOGITS, 2, generator=np.random.default_rng(seed), mask=mask)) <= {0, 2, 5}
    generator = np.random.default_rng(0)
    np.testing.assert_array_equal(gumbel_topk(LOGITS, 3, generator=generator, mask=mask), [0, 2, 5])
    for k, message in ((0, "count must be at least 1, not 0"), (4, "count 4 is more than the 3 eligible")):
        with pytest.raises(InputError, match=message):
            gumbel_topk(LOGITS, k, generator=generator, mask=mask)
    with pytest.raises(InputError, match="logits must be finite"):
        gumbel_topk(np.array([1.0, math.nan]), 1, generator=generator)


# --- weights and ranks --------------------------------------------------------------------------------------


def test_weights_are_a_softmax_of_mean_one() -> None:
    made = Scores([0.0, math.log(3.0)], ["a", "b"], "sample")
    np.testing.assert_allclose(made.weights(), [0.5, 1.5])
    np.testing.assert_allclose(made.weights(0.5), [0.2, 1.8])
    np.testing.assert_allclose(made.weights(1e300), [1.0, 1.0])


@given(scores(), st.floats(1e-300, 1e300))
def test_weights_and_draws_are_finite_whatever_the_values(made: Scores, temperature: float) -> None:
    weights = made.weights(temperature)
    assert np.isfinite(weights).all() and (weights >= 0).all() and weights.mean() == pytest.approx(1)
    assert len(made.sample(len(made), temperature=temperature)) == len(made)


@pytest.mark.parametrize("temperature", [0, -1, math.nan, math.inf])
def test_temperatures_out_of_range(temperature: float) -> None:
    made = Scores([1, 2], ["a", "b"], "sample")
    for call in (lambda: made.weights(temperature), lambda: made.sample(1, temperature=temperature)):
        with pytest.raises(InputError, match="temperature must be positive and finite"):
            call()


@given(scores(st.sampled_from([0.0, 1.0, 2.0, -5.0])))
def test_ranks_are_those_of_scipy(made: Scores) -> None:
    np.testing.assert_allclose(made.ranks(), scipy.stats.rankdata(made.values) / len(made))


def test_combine_is_the_mean_rank_by_id() -> None:
    first = Scores([1, 2, 3], ["a", "b", "c"], "sample", {"method": "x"})
    second = Scores([100, 5, 5], ["c", "b", "a"], "sample", {"method": "y"})
    both = first.combine(second)
    assert list(both.ids) == ["a", "b", "c"]
    np.testing.assert_allclose(both.values, [(1 / 3 + 0.5) / 2, (2 / 3 + 0.5) / 2, 1.0])
    assert both.provenance == {"combined": "mean rank", "of": [{"method": "x"}, {"method": "y"}]}
    np.testing.assert_allclose(second.combine(first).aligned(both.ids), both.values)
    with pytest.raises(InputError, match="samples with scores of layers"):
        first.combine(Scores([1, 2, 3], ["a", "b", "c"], "layer"))
    for ids in (["a", "b", "d"], ["a", "b"], ["a", "b", "c", "d"]):
        with pytest.raises(InputError, match="ids differ"):
            first.combine(Scores(range(len(ids)), ids, "sample"))


def test_aligned_takes_ids_in_any_order() -> None:
    made = Scores([1, 2, 3], [10, 11, 12], "sample")
    np.testing.assert_array_equal(made.aligned(["12", "10", "12"]), [3, 1, 3])
    np.testing.assert_array_equal(made.aligned(np.array([11, 10])), [2, 1])
    assert made.aligned([]).shape == (0,)
    with pytest.raises(InputError, match=r"id '13' has no score \(nearest names: "):
        made.aligned(["10", "13"])


def test_to_pandas() -> None:
    series = Scores([1, 2], ["a", "b"], "layer").to_pandas()
    pd.testing.assert_series_equal(series, pd.Series([1.0, 2.0], pd.Index(["a", "b"], name="layer"), name="score"))


# --- the file -----------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(scores(), st.dictionaries(st.text(), st.integers() | st.text() | st.none() | FINITE, max_size=3))
def test_save_and_load(tmp_path_factory, made: Scores, provenance: dict) -> None:
    path = tmp_path_factory.getbasetemp() / "scores.parquet"
    Scores(made.values, made.ids, "token", provenance).save(path)
    loaded = Scores.load(path)
    np.testing.assert_array_equal(loaded.values, made.values)
    np.testing.assert_array_equal(np.signbit(loaded.values), np.signbit(made.values))
    assert list(loaded.ids) == list(made.ids) and loaded.unit == "token" and loaded.provenance == provenance
    assert not path.with_name("scores.parquet.partial").exists()


def test_load_takes_any_parquet_with_id_and_score(tmp_path: Path) -> None:
    pd.DataFrame({"score": [1, 2], "id": [5, 6], "more": ["x", "y"]}).to_parquet(tmp_path / "a.parquet")
    loaded = Scores.load(tmp_path / "a.parquet")
    assert list(loaded.ids) == ["5", "6"] and list(loaded.values) == [1, 2] and loaded.unit == "sample"


META = b"salience.scores"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"ids": ["a"], "score": [1.0]}), r"has no column 'id' \(nearest names: 'ids'"),
        (pa.table({"id": ["a"], "scores": [1.0]}), "has no column 'score'"),
        (pa.table({"id": ["a", "a"], "score": [1.0, 2.0]}), "occurs more than once"),
        (pa.table({"id": ["a", None], "score": [1.0, 2.0]}), "ids are null"),
        (pa.table({"id": ["a", "b"], "score": [1.0, None]}), "must be finite"),
        (pa.table({"id": ["a"], "score": ["x"]}), "values must be numbers"),
        (pa.table({"id": [{"a": 1}], "score": [1.0]}), "holds no scores"),
        (pa.table({"id": pa.array([], pa.string()), "score": pa.array([], pa.float64())}), "cannot be empty"),
        (pa.table([["a"], ["b"], [1.0]], names=["id", "id", "score"]), "Multiple matches"),
        (pa.table({"id": ["a"], "score": [1.0]}).replace_schema_metadata({META: b"{"}), "holds no scores"),
        (pa.table({"id": ["a"], "score": [1.0]}).replace_schema_metadata({META: b"[]"}), "holds no scores"),
        (pa.table({"id": ["a"], "score": [1.0]}).replace_schema_metadata({META: b"\xff"}), "holds no scores"),
    ],
)
def test_files_that_hold_no_scores(tmp_path: Path, table: pa.Table, message: str) -> None:
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        Scores.load(tmp_path / "a.parquet")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no PAR1")
    for name in ("a.parquet", "absent.parquet"):
        with pytest.raises(DataError, match=f"{name} is not a readable Scores file"):
            Scores.load(tmp_path / name)


def test_damage_is_found_or_harmless(tmp_path: Path) -> None:
    """Flipped bits and truncations never change a value or an id, and never end in an error of another family."""
    generator = np.random.default_rng(0)
    made = Scores(generator.normal(size=500), [f"file:{n}" for n in range(500)], "sample", {"method": "dsir"})
    made.save(tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    damaged = [whole[:size] for size in generator.integers(0, len(whole), 60)]
    for place, bit in zip(generator.integers(0, len(whole), 400), generator.integers(0, 8, 400)):
        data = bytearray(whole)
        data[place] ^= 1 << bit
        damaged.append(bytes(data))
    found = 0
    for data in damaged:
        (tmp_path / "a.parquet").write_bytes(data)
        try:
            loaded = Scores.load(tmp_path / "a.parquet")
        except DataError:
            found += 1
        else:
            np.testing.assert_array_equal(loaded.values, made.values)
            assert list(loaded.ids) == list(made.ids)
    assert found > 300


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    Scores([1], ["old"], "sample").save(path)

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", fail)  # the file has been begun then
    with pytest.raises(OSError, match="No space"):
        Scores([2], ["new"], "sample").save(path)
    assert list(Scores.load(path).ids) == ["old"] and os.listdir(tmp_path) == ["a.parquet"]


def test_the_description_is_readable_by_other_tools(tmp_path: Path) -> None:
    Scores([1.5], ["a"], "layer", {"method": "m"}).save(tmp_path / "a.parquet")
    schema = pq.read_schema(tmp_path / "a.parquet")
    described = json.loads(schema.metadata[META])
    assert (described["unit"], described["provenance"]) == ("layer", {"method": "m"})
    assert schema.names == ["id", "score"]
