"""The parts of a ranking: distinct values, codes, bins, turns, windows, samples."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pyarrow as pa
import pytest

from salience.errors import InputError, NothingToDo
from salience.features import OutRankSelector, rank_table
from salience.features.outrank import rows as rows_module
from salience.features.outrank import sketch
from salience.features.outrank.batches import Turns
from salience.features.outrank.columns import CONTROLS, Bins, combine, controls, encode
from salience.features.outrank.proof import prove
from salience.features.outrank.quality import ColumnQuality, row_quality
from salience.features.outrank.rows import KeyedSample, Rows, sorted_by_key, windows
from salience.features.outrank.sketch import ValueCounter, hashes_of


def hashed(values: range | list[str]) -> np.ndarray:
    return hashes_of(pa.array([str(value) for value in values], pa.large_string()))


# --- distinct values ----------------------------------------------------------------------------------------


def test_values_are_counted_one_by_one_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    counter, expected = ValueCounter(), Counter()
    rng = np.random.default_rng(0)
    for _ in range(20):
        values, counts = np.unique(rng.zipf(1.5, 500) % 3000, return_counts=True)
        counter.add(hashed(values.tolist()), counts)
        expected.update(dict(zip(values.tolist(), counts.tolist())))
    assert counter.exact and counter.distinct() == len(expected)
    assert sorted(counter.counts()) == sorted(expected.values())


def test_beyond_the_limit_no_value_is_lost_and_known_ones_are_counted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sketch, "EXACT", 1000)
    counter = ValueCounter()
    for start in range(0, 100_000, 700):
        counter.add(hashed(range(start, start + 700)), np.ones(700, np.int64))
    counter.add(hashed([0, 1]), np.array([5, 6]))
    assert not counter.exact and counter.distinct() == pytest.approx(100_100, rel=0.02)
    assert sorted(counter.counts())[-2:] == [6, 7] and len(counter.counts()) == 1000


@pytest.mark.parametrize("count", [1, 1000, 70_000, 200_000, 1_500_000])
def test_the_sketch_is_right_at_every_size(count: int) -> None:
    registers = np.zeros(1 << 16, np.uint8)
    rng = np.random.default_rng(count)
    sketch._register(registers, rng.integers(0, 2**64, count, np.uint64))
    assert sketch._estimate(registers) == pytest.approx(count, rel=0.015)


def test_hashes_tell_strings_apart() -> None:
    texts = pa.array(["", "a", "b", "ab", "ba", "0", "00"] + [str(n) for n in range(50_000)], pa.large_string())
    assert len(set(hashes_of(texts).tolist())) == 50_006  # "0" occurs twice
    np.testing.assert_array_equal(hashes_of(texts.slice(3, 4)), hashes_of(texts)[3:7])
    assert 0 not in hashes_of(texts)


# --- codes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "column",
    [
        pa.chunked_array([["a", None], ["b", "a", ""]]),
        pa.chunked_array([[3, 1, 3], [2, 3]]),
        pa.chunked_array([[10**12, 5, -7, 5, 5]]),
        pa.chunked_array([[1, None, 1, 2, None]]),
        pa.chunked_array([[0.5, np.nan, np.nan, 0.5, -0.5]]),
        pa.chunked_array([[True, False, None, True, True]]),
        pa.chunked_array([pa.array(["x", "y", None, "x", "y"]).dictionary_encode()]),
        pa.chunked_array([pa.nulls(5)]),
    ],
)
def test_equal_values_have_equal_codes_and_null_is_a_value(column: pa.ChunkedArray) -> None:
    coded = encode("c", column)
    decoded = coded.values.take(pa.array(coded.codes)).to_pylist()
    assert [str(value) for value in decoded] == [str(value) for value in column.to_pylist()]
    np.testing.assert_array_equal(np.bincount(coded.codes, minlength=len(coded.values)), coded.counts)
    assert len(coded.values.unique()) == len(coded.values)


@pytest.mark.parametrize("sizes", [(2, 3), (500, 700), (90_000, 3)])
def test_combined_codes_tell_pairs_apart_and_nothing_else(sizes: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, size, 1000, dtype=np.uint32) for size in sizes)
    codes, below = combine(a, sizes[0], b, sizes[1])
    assert codes.max() < below
    assert len(set(codes.tolist())) == len(set(zip(a.tolist(), b.tolist())))
    assert len(set(zip(codes.tolist(), a.tolist(), b.tolist()))) == len(set(codes.tolist()))


def test_bins_are_quantiles_of_the_first_rows() -> None:
    first = encode("x", pa.chunked_array([[str(n) for n in range(100)] + [""]]))
    bins = Bins(first, 4, ("",))
    np.testing.assert_allclose(bins.edges, [24.75, 49.5, 74.25])
    found = bins(encode("x", pa.chunked_array([["-5", "30", "", "74.25", "1e9"]])))
    assert found.codes.tolist() == [0, 1, 4, 3, 3]
    assert Bins(encode("x", pa.chunked_array([["a", "b", "c"]])), 2, ()).edges is None
    assert Bins(encode("x", pa.chunked_array([[1, 2, 3]])), 3, ()).edges is None  # no more values than bins


def test_controls_are_what_they_say() -> None:
    label = encode("y", pa.chunked_array([[0, 1] * 500]))
    columns = [encode("x", pa.chunked_array([[n // 2 for n in range(1000)]]))]
    found = dict(zip(CONTROLS, controls(np.random.default_rng(0), columns, label)))
    assert all(codes.max() < below and len(codes) == 1000 for codes, below in found.values())
    distinct = {name: len(np.unique(codes)) for name, (codes, _) in found.items()}
    assert distinct["CONTROL-constant0"] == 1 and distinct["CONTROL-random-binary"] == 2
    assert distinct["CONTROL-gaussian"] == distinct["CONTROL-int-sequence"] == 1000
    assert distinct["CONTROL-volume"] == 500 and distinct["CONTROL-random-card100"] == 100
    np.testing.assert_array_equal(found["CONTROL-target"][0], label.codes)


# --- turns --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 3, 7, 10, 50])
def test_those_taken_least_often_come_first(budget: int) -> None:
    """As sorting by the number of times taken and cutting does, which is what the reference does."""
    turns, everything = Turns(5, 2, budget), list(combinations(range(5), 2))
    counts = dict.fromkeys(everything, 0)
    assert turns.total == 10
    for _ in range(9):
        expected = sorted(everything, key=counts.__getitem__)[:budget]
        taken = turns.next()
        assert sorted(taken) == sorted(expected)
        for subset in taken:
            counts[subset] += 1
    assert max(counts.values()) - min(counts.values()) <= 1


# --- rows ---------------------------------------------------------------------------------------------------


def parts(sizes: list[int], hold_out: float = 0.3) -> list[Rows]:
    rng, found, start = np.random.default_rng(0), [], 0
    for size in sizes:
        table = pa.table({"n": np.arange(start, start + size)})
        found.append(Rows(table, rng.random(size), rng.random(size) < hold_out, rng.random(size)))
        start += size
    return found


def numbers(rows: Rows) -> list[int]:
    return rows.table["n"].to_pylist()


@pytest.mark.parametrize("sizes", [[100], [7, 0, 60, 33], [1] * 100])
def test_windows_do_not_depend_on_how_the_rows_come(sizes: list[int]) -> None:
    whole = Rows.joined(parts([100]))
    cut = [whole.slice(a, b) for a, b in zip(np.cumsum([0, *sizes]), np.cumsum(sizes))]
    found = list(windows(cut, 20))
    assert [numbers(each) for each in found] == [numbers(each) for each in windows([whole], 20)]
    assert [int((~each.held).sum()) for each in found[:-1]] == [20] * (len(found) - 1)
    assert [number for each in found for number in numbers(each)] == list(range(100))


@pytest.mark.parametrize("bytes_", [0, 1, 1 << 30])
def test_a_global_shuffle_is_a_sort_by_key(bytes_: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "_PART_BYTES", 1 << 27)
    source = parts([50, 60, 40])
    whole = Rows.joined(source)
    found = Rows.joined(list(sorted_by_key(source, 20, bytes_)))
    order = np.argsort(whole.key)
    assert numbers(found) == order.tolist() and found.table.column_names == ["n"]
    np.testing.assert_array_equal(found.held, whole.held[order])
    np.testing.assert_array_equal(found.sample, whole.sample[order])


@pytest.mark.parametrize("sizes", [[1000], [10] * 100, [300, 5, 695]])
def test_the_sample_has_the_smallest_keys(sizes: list[int]) -> None:
    sample, whole = KeyedSample(50), parts([1000])[0]
    for a, b in zip(np.cumsum([0, *sizes]), np.cumsum(sizes)):
        part = whole.slice(int(a), int(b))
        sample.offer(part, ~part.held)
    allowed = np.flatnonzero(~whole.held)
    assert numbers(sample.rows()) == allowed[np.argsort(whole.sample[allowed])[:50]].tolist() and len(sample) == 50


# --- quality ------------------------------------------------------------------------------------------------


def test_quality_of_a_column_by_hand() -> None:
    quality = ColumnQuality(("", "{}"))
    quality.add(encode("c", pa.chunked_array([["10", "", "2.5", "10", None]])))
    quality.add(encode("c", pa.chunked_array([["{}", "10", "é", "-1"]])))
    found = quality.summary()
    assert found["coverage"] == pytest.approx(100 * 6 / 9) and found["cardinality"] == 4 and found["exact"]
    assert found["bytes"] == pytest.approx((2 + 0 + 3 + 2 + 0 + 2 + 2 + 2 + 2) / 9)
    assert (found["rare"], found["rare_share"]) == (3, 0.75)
    assert (found["more_than_0"], found["more_than_1"], found["more_than_10"]) == (4, 1, 0)
    assert found["min"] is None and not quality.numeric  # "é" is no number
    numbers = ColumnQuality(("",))
    numbers.add(encode("c", pa.chunked_array([["3", "", "-7"]])))
    assert (numbers.summary()["min"], numbers.summary()["max"]) == (-7, 3)
    nothing = ColumnQuality(("",))
    nothing.add(encode("c", pa.chunked_array([pa.nulls(3)])))
    assert nothing.summary()["coverage"] == 0 and nothing.summary()["cardinality"] == 0 and not nothing.numeric


@pytest.mark.parametrize("values", [[0, 9, 10, 99, 100, -1, -10, 7, 7], [2**62, -(2**63), 2**63 - 1, 5], [3, None, 4]])
def test_whole_numbers_are_described_as_their_texts_are(values: list[int | None]) -> None:
    found = []
    for kind in (pa.int64(), pa.string()):
        quality = ColumnQuality(("",))
        for _ in range(2):
            quality.add(encode("c", pa.chunked_array([pa.array(values).cast(kind)])))
        found.append(quality.summary())
    assert found[0] == found[1] and found[0]["cardinality"] == len(set(values) - {None})


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_a_token_for_missing_may_have_blanks_around_it(kind: pa.DataType) -> None:
    column = pa.chunked_array([pa.array([" ?", "?", "  ", "a ?", "\tNA ", None], kind)])
    for tokens in (("?", "", "NA"), (" ? ", " ", "NA")):
        quality = ColumnQuality(tokens)
        quality.add(encode("c", column))
        assert quality.summary()["coverage"] == pytest.approx(100 / 6) and quality.summary()["cardinality"] == 1
    found = row_quality(pa.table({"c": column, "y": ["u"] * 6}), "y", ("?", "", "NA")).to_pylist()
    assert found[0]["missing"] == pytest.approx(5 / 6)


@pytest.mark.parametrize("values", [[3, -999, 4, -999], [3.0, -999.0, 4.0, -999.0], ["3", " -999", "4", "-999 "]])
def test_a_number_may_stand_for_missing(values: list) -> None:
    quality = ColumnQuality(("", "-999"))
    quality.add(encode("c", pa.chunked_array([values])))
    found = quality.summary()
    assert (found["coverage"], found["cardinality"], found["min"], found["max"]) == (50, 2, 3, 4)


def test_entropy_of_long_and_short_texts_is_that_of_their_counts() -> None:
    texts = ["".join(np.random.default_rng(n).choice(list("abcdé漢"), n)) for n in (1, 2, 31, 32, 33, 400)]
    for text in texts:
        counts = np.unique(list(text), return_counts=True)[1] / len(text)
        (found,) = row_quality(pa.table({"s": [text], "y": ["u"]}), "y", ("",)).to_pylist()
        assert found["entropy"] == pytest.approx(-(counts * np.log(counts)).sum(), abs=1e-12)


def test_zero_may_have_blanks_around_it() -> None:
    table = pa.table({"s": [" 0", "0", "00", None], "x": [0.0, 1.0, np.nan, 0.0], "y": ["u"] * 4})
    assert row_quality(table, "y", ("",)).to_pylist()[0]["zero"] == pytest.approx(4 / 8)


def test_quality_of_rows_by_hand() -> None:
    table = pa.table({"y": ["a", "b", "a"], "s": ["aab", "x" * 31, ""], "n": [0, 5, 0], "u": ["äöü", None, "ää"]})
    found = row_quality(table, "y", ("",)).to_pylist()
    a, b = found
    assert (a["label"], a["rows"], b["label"], b["rows"]) == ("a", 2, "b", 1)
    assert a["missing"] == pytest.approx(1 / 6) and a["zero"] == pytest.approx(2 / 6)
    assert b["missing"] == pytest.approx(1 / 3) and b["longer_than_30"] == pytest.approx(1 / 3)
    thirds = -(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3))
    assert a["entropy"] == pytest.approx((thirds + np.log(3)) / 2)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64])
def test_whole_numbers_at_the_ends_of_their_type(dtype: type) -> None:
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    for ends in ((low, low + 100), (high - 100, high), (max(low, -100), 100)):
        values = np.array([ends[0], ends[1], ends[0] + 1] * 60, dtype=dtype)
        coded = encode("n", pa.chunked_array([pa.array(values)]))
        assert coded.values.take(pa.array(coded.codes)).to_pylist() == values.tolist()
        assert int(coded.counts.sum()) == len(values)


@pytest.mark.parametrize("token", ["", "nan", "NaN", "NA", "null", "?"])
def test_customary_words_for_nothing_leave_a_column_numeric(tmp_path, token: str) -> None:
    rng = np.random.default_rng(0)
    signal, y = rng.normal(size=4000), rng.integers(0, 2, 4000)
    signal += 3 * y
    gone = rng.random(4000) < 0.02
    rows = [f"{token if none else value},{label}" for none, value, label in zip(gone, signal, y)]
    (tmp_path / "t.csv").write_text("x,y\n" + "\n".join(rows) + "\n")
    report = rank_table(tmp_path / "t.csv", "y", bins=16)
    assert report.singles.to_pylist()[0]["score"] > 0.3


def test_a_sample_of_one_class_measures_nothing() -> None:
    table = pa.table({"x": np.arange(400) % 7, "z": np.arange(400) % 5, "y": [0] * 399 + [1]})
    report = rank_table(table, "y", hold_out=0.5)
    if len(set(report.sample["y"].to_pylist())) < 2:
        with pytest.raises(NothingToDo, match="one value of the label only"):
            prove(report)


def test_a_constant_target_is_refused() -> None:
    with pytest.raises(InputError, match="y holds one value only"):
        OutRankSelector().fit(np.arange(20).reshape(10, 2), np.ones(10))
