"""`salience select stream`: what is printed first, what is written, an earlier pool, and bad input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from salience.data import select_stream
from salience.scores import Scores


@pytest.fixture(autouse=True)
def _argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> list[Path]:
    """Three data sets of different size; each is a skill of its own, four classes each told by another column."""
    folder = tmp_path_factory.mktemp("stream")
    rng = np.random.default_rng(0)
    paths = []
    for number, n in enumerate((300, 200, 40)):
        x = rng.normal(size=(n, 3))
        frame = pd.DataFrame(x, columns=["a", "b", "c"])
        frame["skill"] = 8.0 * number
        frame["outcome"] = [f"{number}{'yes' if value > 0 else 'no'}" for value in x[:, number]]
        frame["nll"], frame["el2n"] = rng.exponential(size=n), rng.integers(0, 2, n)
        frame["gradient"] = list((np.eye(3)[number] + 0.05 * rng.normal(size=(n, 3))).tolist())
        frame["code"] = [f"{number}-{row}" for row in range(n)]
        paths.append(folder / f"part{number}.parquet")
        frame.to_parquet(paths[-1])
    return paths


BASE = [
    "--vectors", "gradient", "--score", "nll", "--score", "el2n", "--label", "outcome", "--ignore", "code", "-n", 45,
]  # fmt: skip


def test_rounds_a_pool_and_the_proof_first(tables: list[Path], tmp_path: Path, salience) -> None:
    out = tmp_path / "chosen"
    code, told, err = salience("select", "stream", *tables, *BASE, "--clusters", 3, "--pool-limit", 100, "-o", out)
    assert code == 0, err
    first = told.splitlines()[0].lower()
    assert "random" in first and "accuracy" in first and "95 % interval" in first
    assert "540 rows read = 100 in the pool + 410 pruned + 0 without a vector or a score + 30 held out" in told
    rounds = pyarrow.csv.read_csv(out / "rounds.csv").to_pylist()
    assert [row["chosen"] for row in rounds] == [45, 45, 45] and [row["arrived"] for row in rounds] == [290, 190, 30]
    assert [row["from"] for row in rounds] == [290, 290, 130] and [row["pool after"] for row in rounds] == [100] * 3
    last = [row for row in pyarrow.csv.read_csv(out / "clusters.csv").to_pylist() if row["round"] == 3]
    assert sorted(row["chosen"] for row in last) == [15, 15, 15] and {row["score"] for row in last} == {"nll"}
    chosen = pq.read_table(out / "round-3.parquet").to_pandas()
    assert sorted(chosen["code"].str[0].value_counts()) == [15, 15, 15] and not chosen["code"].duplicated().any()
    pool = pq.read_table(out / "pool.parquet")
    assert len(pool) == 100 and pool.column_names == pq.read_table(tables[0]).column_names
    times = Scores.load(out / "scores.parquet")
    assert len(times) == 510 and times.values.sum() == 135 and times.ids[0].startswith("part0.parquet:")
    page = (out / "report.html").read_text()
    assert "Clusters of the last round" in page and "newest data set" in page
    assert salience("verify", "output", out)[0] == 0


def test_the_next_round_goes_on_with_the_pool(tables: list[Path], tmp_path: Path, salience) -> None:
    assert salience("select", "stream", tables[0], *BASE, "--pool-limit", 50, "-o", tmp_path / "one")[0] == 0
    code, told, err = salience("select", "stream", tables[1], *BASE, "--pool", tmp_path / "one/pool.parquet",
                          "--clusters", 2, "-o", tmp_path / "two", "--json")  # fmt: skip
    found = json.loads(told)
    assert code == 0, err
    assert found["rounds"][0]["from"] == 200 and found["counts"]["earlier pool"] == 50
    assert found["rounds"][0]["of them new"] == 22 or found["rounds"][0]["of them new"] == 23
    assert found["verdict"] == found["proof"]["verdict"]


def test_without_scores_label_or_vectors_coverage_is_measured(tables: list[Path], tmp_path: Path, salience) -> None:
    frames = [pd.read_parquet(path)[["a", "b", "c", "skill"]] for path in tables]
    paths = [tmp_path / f"{number}.csv" for number in range(3)]
    for frame, path in zip(frames, paths):
        frame.to_csv(path, index=False)
    code, told, err = salience("select", "stream", *paths, "-n", 30, "--clusters", 3, "-o", tmp_path / "out")
    assert code == 0 and "held-out rows lie" in told and "drawn uniformly" in err
    found = select_stream(frames, 30, n_clusters=3)
    assert [step.chosen.tolist() for step in found.rounds] == [
        step.chosen.tolist() for step in select_stream([str(path) for path in paths], 30, n_clusters=3).rounds
    ]


def test_gradient_vectors_alone_measure_nothing(tables: list[Path], tmp_path: Path, salience) -> None:
    slim = tmp_path / "slim.parquet"
    pd.read_parquet(tables[0])[["gradient", "nll", "outcome"]].to_parquet(slim)
    code, told, _ = salience("select", "stream", slim, "--vectors", "gradient", "--score", "nll", "--label", "outcome",
                        "-n", 20, "-o", tmp_path / "out")  # fmt: skip
    assert code == 0 and told.startswith("Nothing was measured: gradient vectors know the label")


def test_missing_vectors_and_labels_are_counted(tables: list[Path], tmp_path: Path, salience) -> None:
    frame = pd.read_parquet(tables[2])
    frame.loc[3, "outcome"] = None
    frame.at[4, "gradient"] = None
    frame["nll"] = frame["nll"].where(frame.index != 5)
    frame.to_parquet(tmp_path / "gaps.parquet")
    code, told, err = salience("select", "stream", tmp_path / "gaps.parquet", "--vectors", "gradient", "--score", "nll",
                          "--label", "outcome", "--ignore", "code", "-n", 5, "--hold-out", 0, "-o", tmp_path / "out")  # fmt: skip
    assert code == 0, err
    assert "40 rows read = 37 in the pool + 0 pruned + 2 without a vector or a score + 0 held out to measure on + 1 without a label" in told  # fmt: skip
    assert told.startswith("Nothing was held out")


def test_a_dry_run_writes_nothing_and_an_output_is_never_replaced(tables: list[Path], tmp_path: Path, salience) -> None:
    command = ("select", "stream", *tables, *BASE, "-o", tmp_path / "out")
    assert salience(*command, "--dry-run", "--json")[0] == 0 and not list(tmp_path.iterdir())
    assert salience(*command)[0] == 0
    code, _, err = salience(*command)
    assert code == 2 and "--overwrite" in err


@pytest.mark.parametrize(
    ("extra", "code", "told"),
    [
        (["-n", 0], 2, "budget must be a whole number of at least 1"),
        (["-n", 5, "--vectors", "gradiant"], 2, "nearest names: 'gradient'"),
        (["-n", 5, "--vectors", "a"], 3, "vectors (lists of numbers) are needed"),
        (["-n", 5, "--score", "code", "--ignore", "gradient"], 3, "numbers are needed"),
        (["-n", 5, "--label", "code", "--ignore", "gradient"], 3, "2 to 100 classes are needed"),
        (["-n", 5, "--clusters", 0, "--ignore", "gradient"], 2, "n_clusters"),
        (["-n", 5, "--pool-limit", 0, "--ignore", "gradient"], 2, "pool_limit"),
        (["-n", 5, "--hold-out", 1.0], 2, "hold_out must lie in"),
        (["-n", 5, "--seed", -1], 2, "random_state"),
        (["-n", 5, "--pool", "nowhere.parquet"], 2, "nowhere.parquet"),
    ],
)
def test_bad_options_are_named(tables: list[Path], tmp_path: Path, salience, extra: list, code: int, told: str) -> None:
    found, _, err = salience("select", "stream", *tables, "-o", tmp_path / "out", *extra)
    assert found == code and told in err, err
    assert not (tmp_path / "out").exists()


def test_vectors_of_two_lengths_and_a_set_given_twice(tables: list[Path], tmp_path: Path, salience) -> None:
    frame = pd.read_parquet(tables[2])
    frame.at[0, "gradient"] = [1.0]
    frame.to_parquet(tmp_path / "odd.parquet")
    code, _, err = salience("select", "stream", tmp_path / "odd.parquet", *BASE, "-o", tmp_path / "out")
    assert code == 3 and "vectors of one length" in err
    code, _, err = salience("select", "stream", tables[0], tables[0], *BASE, "-o", tmp_path / "out")
    assert code == 2 and "given twice" in err
