"""Tables read as a whole: the same columns from every kind of source, and what cannot be read is named."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from salience.errors import DataError, InputError, NothingToDo
from salience.io.whole import is_text, numbers_of, whole_table, words_of

COLUMNS = {"n": [1.5, None, 3.0], "w": ["a", None, "b"], "i": [1, 2, 3], "t": [True, False, True]}


def sources(folder: Path) -> list:
    table = pa.table(COLUMNS)
    frame = table.to_pandas()
    pq.write_table(table, folder / "t.parquet")
    frame.to_csv(folder / "t.csv", index=False)
    with gzip.open(folder / "t.csv.gz", "wt") as file:
        frame.to_csv(file, index=False)
    return [
        table,
        frame,
        pl.DataFrame(COLUMNS),
        COLUMNS,
        folder / "t.parquet",
        folder / "t.csv",
        str(folder / "t.csv.gz"),
    ]


def test_every_source_gives_the_same(tmp_path: Path) -> None:
    for source in sources(tmp_path):
        table = whole_table(source)
        assert table.column_names == list(COLUMNS)
        np.testing.assert_array_equal(numbers_of(table, "n"), [1.5, np.nan, 3.0])
        assert words_of(table, "w").tolist() == ["a", None, "b"] and is_text(table["w"])
        assert numbers_of(table, "t").tolist() == [1, 0, 1] and not is_text(table["t"])
        assert words_of(table, "i").tolist() == ["1", "2", "3"] == words_of(table, "i").tolist()
    assert whole_table(pd.DataFrame({"a": [1, 2]}, index=[5, 7])).column_names == ["a"]


def test_whole_numbers_with_gaps_are_the_words_they_were() -> None:
    table = whole_table({"c": [1.0, np.nan, 2.5]})
    assert words_of(table, "c").tolist() == ["1", None, "2.5"]


def test_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a\n1\n")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    (tmp_path / "twice.csv").write_text("a,a\n1,2\n")
    (tmp_path / "empty.csv").write_text("a,b\n")
    (tmp_path / "nothing.csv").write_text("")
    for name, error, words in (
        ("t.txt", InputError, "is no table"), ("none.csv", InputError, "does not exist"),
        ("torn.parquet", DataError, "cannot be read"), ("twice.csv", DataError, "2 columns called 'a'"),
        ("nothing.csv", NothingToDo, "nothing to read"), ("empty.csv", NothingToDo, "no rows"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            whole_table(tmp_path / name)
    with pytest.raises(InputError):
        whole_table(3)
    with pytest.raises(DataError):
        whole_table({"a": [1], "b": [1, 2]})
    with pytest.raises(DataError, match="holds 'a'"):
        numbers_of(whole_table(COLUMNS), "w")
    with pytest.raises(InputError, match="nearest"):
        numbers_of(whole_table({"amount": [1]}), "amoun")


def test_a_ragged_line_is_left_out_and_told(tmp_path: Path) -> None:
    """As `rank table` does: one bad record in 200 is set aside, one in two stops."""
    lines = [f"{i},w{i}" for i in range(200)]
    (tmp_path / "t.csv").write_text("\n".join(["n,w", *lines[:50], "1,2,3", *lines[50:]]) + "\n")
    with pytest.warns(UserWarning, match="1 unreadable records were left out"):
        table = whole_table(tmp_path / "t.csv")
    np.testing.assert_array_equal(numbers_of(table, "n"), np.arange(200))
    (tmp_path / "t.csv").write_text("n,w\n1,a\n1,2,3\n")
    with pytest.raises(DataError, match="1 of 2 records"):
        whole_table(tmp_path / "t.csv")


def test_missing_values_of_a_file_are_those_of_the_reader(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("i,f,w,t,v\n1,1.5,NA,true,\n,,,,\n3,2,x,false,\n")
    table = whole_table(tmp_path / "t.csv")
    assert [str(table[name].type) for name in "iftv"] == ["int64", "double", "bool", "null"]
    assert words_of(table, "w").tolist() == ["NA", None, "x"] and words_of(table, "i").tolist() == ["1", None, "3"]


def test_lists_are_no_words() -> None:
    table = whole_table({"l": [[1, 2], [3]]})
    with pytest.raises(DataError, match="holds values of the kind list"):
        words_of(table, "l")
