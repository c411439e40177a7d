"""Finished units are found again, torn entries are dropped, and nothing goes on with another run's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salience.data.proof import Sample, Texts
from salience.errors import DataError, InputError
from salience.io import Bad, Corpus, Ledger, Tally, corpus, lines
from salience.io.ledger import corpus_digest, differences, unit_digest
from salience.io.pack import pack, unpack

FACTS = {"parameters": {"n": 1}, "files": {"a": 5}}


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    monkeypatch.setattr(corpus, "UNIT_BYTES", 100)
    monkeypatch.setattr(lines, "BLOCK_BYTES", 64)
    (tmp_path / "raw.jsonl").write_text("".join(f'{{"text": "document number {n}"}}\n' for n in range(40)))
    return Corpus(tmp_path / "raw.jsonl")


def work(seen: list[int]):
    def fn(unit):
        seen.append(unit.number)
        return {"number": unit.number, "array": np.arange(unit.number), "bytes": b"\0" * unit.number}

    return fn


def same(found, units) -> None:
    for (unit, value), expected in zip(found, units, strict=True):
        assert unit == expected and value["number"] == unit.number
        assert value["array"].tolist() == list(range(unit.number)) and value["bytes"] == b"\0" * unit.number


@pytest.mark.parametrize("workers", [1, 3])
def test_finished_units_come_from_the_log(pool: Corpus, tmp_path: Path, workers: int) -> None:
    assert len(pool.units) > 10
    first: list[int] = []
    ledger = Ledger(tmp_path / "l", FACTS)
    results = ledger.map("stage", work(first), pool.units, workers=workers)
    same([next(results) for _ in range(5)], pool.units[:5])
    results.close()
    ledger.close()
    again: list[int] = []
    ledger = Ledger(tmp_path / "l", FACTS, resume=True)
    same(list(ledger.map("stage", work(again), pool.units, workers=workers)), pool.units)
    assert not set(first) & set(again) and sorted(first + again) == [unit.number for unit in pool.units]
    assert ledger.digest("stage") == corpus_digest(pool)
    same(list(ledger.map("stage", work(again), pool.units)), pool.units)
    assert len(first + again) == len(pool.units)
    ledger.remove()
    assert not (tmp_path / "l").exists()


def test_a_log_cut_anywhere_keeps_its_whole_entries(pool: Corpus, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l", FACTS)
    list(ledger.map("stage", work([]), pool.units[:4], workers=1))
    ledger.close()
    log = tmp_path / "l" / "stage.log"
    whole = log.read_bytes()
    ends = [entry.start + 24 + entry.size for entry in ledger._entries["stage"].values()]
    for cut in range(0, len(whole) + 1, 7):
        log.write_bytes(whole[:cut])
        seen: list[int] = []
        ledger = Ledger(tmp_path / "l", FACTS, resume=True)
        same(list(ledger.map("stage", work(seen), pool.units[:4], workers=1)), pool.units[:4])
        ledger.close()
        assert seen == [unit for unit, end in enumerate(ends) if end > cut]
    flipped = bytearray(whole)
    flipped[ends[1] + 40] ^= 1  # in the third entry: it and all behind it are worked out again
    log.write_bytes(flipped)
    seen = []
    ledger = Ledger(tmp_path / "l", FACTS, resume=True)
    same(list(ledger.map("stage", work(seen), pool.units[:4], workers=1)), pool.units[:4])
    assert seen == [2, 3]
    damaged = bytearray(log.read_bytes())
    damaged[60] ^= 1
    log.write_bytes(damaged)
    with pytest.raises(DataError, match=r"stage\.log is damaged"):
        list(ledger.map("stage", work(seen), pool.units[:4]))


def test_only_the_same_run_goes_on(pool: Corpus, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l", FACTS)
    list(ledger.map("stage", work([]), pool.units, workers=1))
    with pytest.raises(InputError, match="another run is at work"):
        Ledger(tmp_path / "l", FACTS, resume=True)
    ledger.close()
    with pytest.raises(InputError, match="pass --resume to finish it, or --overwrite to start again"):
        Ledger(tmp_path / "l", FACTS)
    with pytest.raises(InputError, match="parameters n was 1 and is 2; files b was absent and is 5"):
        Ledger(tmp_path / "l", {"parameters": {"n": 2}, "files": {"a": 5, "b": 5}}, resume=True)
    path = tmp_path / "raw.jsonl"
    data = path.read_bytes()
    path.write_bytes(data[:250] + b"x" + data[251:])
    ledger = Ledger(tmp_path / "l", FACTS, resume=True)
    with pytest.raises(InputError, match=r"raw\.jsonl has changed \(between bytes 200 and 300\)"):
        list(ledger.map("stage", work([]), pool.units))
    ledger.close()
    seen: list[int] = []
    ledger = Ledger(tmp_path / "l", FACTS, overwrite=True)
    list(ledger.map("stage", work(seen), pool.units[:2]))
    assert sorted(seen) == [0, 1]
    ledger.close()
    reading = [Ledger.of_finished(tmp_path / "l", FACTS, ()) for _ in range(2)]
    for ledger in reading:  # several at once, and nothing is changed
        same(list(ledger.map("stage", work(seen), pool.units[:2])), pool.units[:2])
    assert sorted(seen) == [0, 1]
    with pytest.raises(InputError, match="holds no finished scoring pass"):
        Ledger.of_finished(tmp_path / "absent", FACTS, ())


def test_digests_see_every_byte_of_a_unit(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    table = pa.table({"text": [f"text {n}" for n in range(60)], "n": list(range(60))})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=20, compression="none", use_dictionary=False)
    units = Corpus(tmp_path / "a.parquet").units
    before = [unit_digest(unit) for unit in units]
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[data.index(b"text 21") + 5] ^= 1
    (tmp_path / "a.parquet").write_bytes(data)
    assert [unit_digest(unit) != old for unit, old in zip(units, before)] == [False, True, False]
    first, second = (Corpus(table.set_column(1, "n", [[*range(59), last]])).units[0] for last in (59, 60))
    assert unit_digest(first) == unit_digest(Corpus(table).units[0]) != unit_digest(second)


def test_samples_and_tallies_come_back() -> None:
    kinds = (Sample, Tally, Texts)
    sample, tally, texts = Sample(3), Tally(5, 1, [("f", Bad(7, "not JSON", b"\xff{"))]), Texts(4)
    sample.offer(pa.array(["a", "é", "c", "d"]), np.array([0.4, 0.1, 0.3, 0.2]))
    texts.add(pa.array(["x"]), [("f", 3)])
    back = unpack(pack([sample, tally, texts], kinds), kinds)
    assert back[0].strings() == ["é", "d", "c"] and back[1] == tally and back[2].where == [("f", 3)]
    assert back[2].counts.tolist() == [0] * 4 and back[2].strings() == ["x"]
    assert back[0].below(0.25).strings() == ["é", "d"] and back[0].bound == 0.3
    with pytest.raises(TypeError, match="a Sample cannot be packed"):
        pack(sample)


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(
        st.characters(exclude_categories=["Cs"])
    ) | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text("abc", max_size=3), inner),
    max_leaves=12,
)  # fmt: skip


@given(plain)
@settings(max_examples=200, deadline=None)
def test_plain_data_comes_back(value: object) -> None:
    assert unpack(pack(value)) == value


@pytest.mark.parametrize("dtype", ["<i8", "<f8", "<u2", "|b1", "<f4"])
def test_arrays_come_back(dtype: str) -> None:
    array = np.arange(12).reshape(3, 4).astype(dtype)
    for given_ in (array, array.T, array[:, :0], array[0, 1]):
        back = unpack(pack({"x": [given_, "y"]}))["x"][0]
        assert np.array_equal(back, given_) and (not isinstance(given_, np.ndarray) or back.dtype == array.dtype)
    table = pa.table({"a": [1, None], "b": ["x", "y"]})
    assert unpack(pack([table.slice(1), b"z"])) == [table.slice(1), b"z"]


def test_differences_are_named() -> None:
    assert list(differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": "x"})) == [
        "a c was 2 and is 4", "d was 3 and is absent", 'e was absent and is "x"',
    ]  # fmt: skip
