"""Ranking a table: what is found, what every row becomes of, and what is said of tables that cannot be ranked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from salience.errors import DataError, InputError, NothingToDo
from salience.features import ca_mutual_info, rank_table
from salience.features.outrank import rows as rows_module
from salience.features.outrank.columns import NOISE
from salience.features.outrank.proof import prove

ROWS = 6000


def table(rows: int = ROWS, seed: int = 0) -> pa.Table:
    """A column that tells a lot, one that tells a little, its copy, noise of two sizes, and a pair that tells all."""
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 2, (2, rows))
    y = a ^ b
    strong = np.where(rng.random(rows) < 0.2, rng.integers(0, 5, rows), 5 + y)
    return pa.table({
        "noise2": rng.integers(0, 2, rows), "a": a, "noise900": rng.integers(0, 900, rows), "strong": strong,
        "weak": y ^ (rng.random(rows) < 0.35), "b": b, "copy": strong + 10, "y": np.where(y, "yes", "no"),
    })  # fmt: skip


def scores(report) -> dict[str, float]:
    return dict(zip(report.singles["feature"].to_pylist(), report.singles["score"].to_pylist()))


def same(first, second) -> None:
    assert first.singles.equals(second.singles) and first.pairs.equals(second.pairs)
    assert first.counts == second.counts and first.quality.equals(second.quality)


# --- scores -------------------------------------------------------------------------------------------------


def test_without_a_shuffle_it_is_the_median_of_the_reference_over_batches_in_order() -> None:
    data = table(4 * 1000 + 600)
    found = scores(rank_table(data, "y", shuffle="none", batch_rows=1000))
    y = pd.factorize(data["y"].to_pandas())[0]
    for name in data.column_names[:-1]:
        f = data[name].to_numpy()
        batches = [ca_mutual_info(f[at : at + 1000], y[at : at + 1000]) for at in range(0, 4600, 1000)]
        assert found[name] == pytest.approx(np.median(batches), abs=1e-12)


def test_signals_are_above_noise_and_controls_calibrate_the_eye() -> None:
    report = rank_table(table(20_000), "y", controls=True, batch_rows=2000)
    order = report.singles["feature"].to_pylist()
    assert order[:4] == ["CONTROL-target", "strong", "copy", "weak"]
    assert report.select(above_controls=True)[:3] == ["strong", "copy", "weak"]
    assert report.noise() == max(scores(report)[name] for name in NOISE)
    normalised = dict(zip(order, report.singles["normalised"].to_pylist()))
    assert min(normalised.values()) == 0 and normalised["CONTROL-target"] == pytest.approx(1, abs=0.01)
    plain = dict(zip(order, report.singles["plain"].to_pylist()))
    assert plain["noise900"] > plain["weak"]  # what the correction is for
    assert report.label_entropy == pytest.approx(np.log(2), abs=1e-3)
    assert report.scores().top(3).ids.tolist() == ["copy", "strong", "weak"]  # equal ones by name


def test_a_pair_tells_what_neither_column_does() -> None:
    report = rank_table(table(), "y", order=2, batch_rows=2000)
    first = report.singles.slice(0, 1).to_pylist()[0]
    assert (first["feature"], first["kind"]) == ("a AND b", "combination") and first["score"] > 0.65
    assert report.singles.num_rows == 7 + 21 and report.exist == (0, 21)
    members = [row for row in report.singles.to_pylist() if "a" in row["feature"].split(" AND ")]
    aggregated = dict(zip(report.aggregated["feature"].to_pylist(), report.aggregated["score"].to_pylist()))
    assert aggregated["a"] == pytest.approx(np.median([r["score"] for r in members if r["kind"] == "combination"]))
    three = rank_table(table(), "y", order=3, batch_rows=3000, combination_budget=20)
    assert three.exist == (0, 35) and sum(kind == "combination" for kind in three.singles["kind"].to_pylist()) == 35


def test_pairs_condition_the_first_on_the_second() -> None:
    data = table(900)
    report = rank_table(data, "y", pairs="all", shuffle="none")
    found = {(row["a"], row["b"]): row["score"] for row in report.pairs.to_pylist()}
    names = data.column_names[:-1]
    assert len(found) == 21
    for (a, b), score in found.items():
        assert names.index(a) < names.index(b)
        assert score == pytest.approx(ca_mutual_info(data[a].to_numpy(), data[b].to_numpy()), abs=1e-12)
    assert ["copy", "strong"] in [sorted(group) for group in report.clusters()]


def test_three_mr_by_hand() -> None:
    report = rank_table(table(), "y", pairs="all", order=2, batch_rows=2000)
    names = report.features
    index = {name: at for at, name in enumerate(names)}
    single = scores(report)

    def scaled(values: dict) -> dict:
        low, high = min(values.values()), max(values.values())
        return {key: (value - low) / (high - low) for key, value in values.items()}

    rel = scaled({name: single[name] for name in names})
    red = scaled({frozenset((r["a"], r["b"])): r["score"] for r in report.pairs.to_pylist()})
    relat = scaled({frozenset(name.split(" AND ")): value for name, value in single.items() if " AND " in name})
    for alpha, beta, agg, reduce in ((1, 1, "median", np.median), (0.5, 0, "mean", np.mean), (2, 1, "sum", np.sum)):
        chosen = [max(names, key=rel.__getitem__)]
        while len(chosen) < len(names):
            left = [name for name in names if name not in chosen]
            gain = {
                f: rel[f] - alpha * reduce([red[frozenset((f, g))] for g in chosen])
                + beta * reduce([relat[frozenset((f, g))] for g in chosen])
                for f in left
            }  # fmt: skip
            chosen.append(max(left, key=gain.__getitem__))
        assert report.three_mr(alpha, beta, agg) == chosen
    order = report.three_mr(beta=0)
    assert abs(order.index("copy") - order.index("strong")) > 1 and index  # a copy is redundant


# --- the same from any source, whatever the machine ---------------------------------------------------------


def test_all_kinds_of_input_agree(tmp_path: Path) -> None:
    data = table()
    pa_csv.write_csv(data, tmp_path / "t.csv")
    pq.write_table(data, tmp_path / "t.parquet", row_group_size=999)
    expected = scores(rank_table(data, "y", shuffle="none", batch_rows=1500))
    for source in (
        tmp_path / "t.csv",
        tmp_path / "t.parquet",
        data.to_pandas(),
        pl.from_arrow(data),
        data.to_reader(77),
    ):
        found = scores(rank_table(source, "y", shuffle="none", batch_rows=1500))
        assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("shuffle", ["window", "global", "none"])
def test_workers_change_nothing_and_the_seed_does(tmp_path: Path, shuffle) -> None:
    pa_csv.write_csv(table(), tmp_path / "t.csv")
    options = {"order": 2, "pairs": "all", "controls": True, "batch_rows": 700, "shuffle": shuffle, "hold_out": 0.2}
    first = rank_table(tmp_path / "t.csv", "y", **options, workers=1)
    same(first, rank_table(tmp_path / "t.csv", "y", **options, workers=7))
    other = rank_table(tmp_path / "t.csv", "y", **options, random_state=1)
    assert scores(other) != scores(first)


def test_a_global_shuffle_does_not_care_for_the_order_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "_PART_BYTES", 1 << 14)
    data = table()
    data = data.sort_by("y")
    with pytest.raises(
        DataError, match=r"one value of the label 'y' only: the rows are sorted by it.*--shuffle global"
    ):
        rank_table(data, "y", batch_rows=300)
    with pytest.raises(DataError, match="--shuffle global"):
        rank_table(data, "y", batch_rows=300, shuffle="none")
    found = scores(rank_table(data, "y", batch_rows=300, shuffle="global"))
    assert found["strong"] > 0.3
    rng = np.random.default_rng(0)
    y = rng.random(20_000) < np.linspace(0.1, 0.9, 20_000)  # it drifts, and no batch has one value only
    drifting = rank_table(pa.table({"x": y ^ (rng.random(20_000) < 0.1), "y": y}), "y", batch_rows=1000)
    assert any("follows from the place in the file" in warning for warning in drifting.warnings)


def test_rare_labels_are_no_sorted_file() -> None:
    rng = np.random.default_rng(0)
    y = (np.arange(4000) % 900 == 5).astype(int)
    report = rank_table(pa.table({"x": rng.integers(0, 3, 4000), "y": y}), "y", batch_rows=400)
    assert any("one value of the label only" in warning for warning in report.warnings)
    assert report.counts["not_scored"] > 0


# --- every row is accounted for -----------------------------------------------------------------------------


def test_the_equation_adds_up(tmp_path: Path) -> None:
    lines = ["x,y"] + [f"{n % 7},{n % 2}" for n in range(3000)]
    for at in (10, 400, 2000):
        lines[at] = "1,2,3"
    lines[20], lines[30], lines[31] = "", "5,", "6,{}"
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    report = rank_table(tmp_path / "t.csv", "y", hold_out=0.25, subsample=3, batch_rows=200)
    counts = dict(report.counts)
    read = counts.pop("read")
    assert read == 3000 == sum(counts.values()) and counts["quarantined"] == 3 and counts["blank"] == 1
    assert counts["held_out"] > 150 and counts["passed_over"] > 1900
    assert report.equation.startswith("3,000 records read = ") and "3 quarantined" in report.equation
    every = rank_table(tmp_path / "t.csv", "y")
    assert every.counts["unlabelled"] == 2 and every.counts["scored"] == 3000 - 3 - 1 - 2
    with pytest.raises(DataError, match=r"3 of 3000 records of the table are bad.*fields where the header has 2"):
        rank_table(tmp_path / "t.csv", "y", max_bad=0.0005)
    with pytest.raises(DataError, match="bad record in"):
        rank_table(tmp_path / "t.csv", "y", max_bad=0)


def test_held_out_rows_are_in_no_score() -> None:
    data = table()
    report = rank_table(data, "y", hold_out=0.3)
    assert report.held.num_rows == report.counts["held_out"] > 1500
    kept = pl.from_arrow(report.sample).height
    assert kept == report.counts["scored"] and kept + report.held.num_rows == ROWS
    alone = rank_table(report.sample, "y", shuffle="global")
    assert scores(alone)["strong"] == pytest.approx(scores(report)["strong"], abs=0.02)


def test_numbers_that_never_repeat_are_put_into_bins() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=5000)
    data = pa.table({"x": x, "text": [f"id {n}" for n in range(5000)], "n": rng.integers(0, 4, 5000), "y": x > 0.3})
    as_is = rank_table(data, "y")
    assert scores(as_is)["x"] == pytest.approx(0) and any("pass bins=16" in warning for warning in as_is.warnings)
    binned = rank_table(data, "y", bins=16)
    assert scores(binned)["x"] > 0.5 and scores(binned)["text"] == pytest.approx(0)
    quality = {row["column"]: row for row in binned.quality.to_pylist()}
    assert quality["x"]["binned"] and not quality["n"]["binned"] and quality["x"]["cardinality"] == 5000
    assert quality["x"]["median"] == pytest.approx(np.median(x)) and quality["x"]["min"] == pytest.approx(x.min())
    with pytest.raises(DataError, match="nothing repeats"):
        rank_table(data, "x")
    assert scores(rank_table(data, "x", bins=8))["y"] > 0.4  # a label of numbers


# --- the proof ----------------------------------------------------------------------------------------------


def test_the_proof_says_whether_it_helped() -> None:
    data = table(12_000).drop_columns(["copy"])
    for at in range(120):
        data = data.append_column(f"more{at}", pa.array(np.random.default_rng(at).integers(0, 3000, 12_000)))
    proof = prove(rank_table(data, "y", hold_out=0.2, batch_rows=3000), k=3)
    assert proof.better is True and proof.verdict.startswith("the 3 best columns are better than 3 random ones here")
    assert {"strong", "weak"} <= set(proof.columns["outrank"]) and "weak" not in proof.columns["plain MI"]
    assert proof.against("plain MI").low > 0 and proof.log_loss["outrank"] < proof.log_loss["majority"]
    shuffled = data.set_column(
        data.column_names.index("y"), "y", data["y"].take(np.random.default_rng(0).permutation(12_000))
    )
    nothing = prove(rank_table(shuffled, "y", hold_out=0.2, batch_rows=3000), k=3)
    assert (nothing.better is not True and "no better than" in nothing.verdict) or "worse than" in nothing.verdict
    with pytest.raises(NothingToDo, match="held out"):
        prove(rank_table(data, "y"))


# --- what cannot be ranked ----------------------------------------------------------------------------------


def test_tables_that_cannot_be_ranked(tmp_path: Path) -> None:
    small = pa.table({"x": [1, 2, 1, 2], "y": [0, 1, 0, 1], "z": [5, 5, 5, 5]})
    (tmp_path / "header.csv").write_text("x,y\n")
    for source, options, kind, said in (
        (small, {"label": "yy"}, DataError, r"no column 'yy' to rank by \(nearest names: 'y'"),
        (small, {"label": "z"}, DataError, "label 'z' has one value in all rows: 5"),
        (small.append_column("id", pa.array([1, 2, 3, 4])), {"label": "id"}, DataError, "nothing repeats"),
        (small.select(["y"]), {"label": "y"}, NothingToDo, "no column besides the label"),
        (tmp_path / "header.csv", {"label": "y"}, NothingToDo, "holds no"),
        (pa.table({"x": [1, 2], "y": pa.nulls(2, pa.string())}), {"label": "y"}, NothingToDo, "value of the label 'y'"),
        (small.append_column("a AND b", pa.array([1] * 4)), {"label": "y", "order": 2}, InputError, "rename it"),
        (
            small.append_column("CONTROL-x", pa.array([1] * 4)),
            {"label": "y", "controls": True},
            InputError,
            "rename it",
        ),
        (small.append_column("l", pa.array([[1]] * 4)), {"label": "y"}, DataError, "column 'l' holds list"),
        (small, {"label": "y", "order": 3}, InputError, "only 2 columns to combine"),
        (small, {"label": "y", "pairs": "some"}, InputError, "pairs must be 'target' or 'all'"),
        (small, {"label": "y", "shuffle": "no"}, InputError, "shuffle must be one of"),
        (small, {"label": "y", "batch_rows": 1}, InputError, "batch_rows must be"),
        (small, {"label": "y", "hold_out": 1.0}, InputError, "hold_out must be"),
        (small, {"label": "y", "bins": 1}, InputError, "bins must be"),
        (small, {"label": "y", "workers": 0}, InputError, "workers must be"),
        (small, {"label": "y", "columns": ["q"]}, DataError, "no column 'q'"),
    ):
        with pytest.raises(kind, match=said):
            rank_table(source, **options)


def test_files_whose_columns_have_different_types(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1, 2], "y": [0, 1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"x": ["p", "q"], "y": [0, 1]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="a column of different types"):
        rank_table(tmp_path, "y")


def test_odd_tables_give_numbers() -> None:
    """A constant column, one of nulls, empty texts, an infinite number, one batch of five rows."""
    data = pa.table({
        "c": [1] * 5, "n": pa.nulls(5), "e": ["", "{}", "", "", ""], "f": [np.inf, np.nan, 1.0, -np.inf, 0.0],
        "y": [True, False, True, False, True],
    })  # fmt: skip
    report = rank_table(data, "y", controls=True, order=2, pairs="all", bins=2)
    values = np.array([row["score"] for row in report.singles.to_pylist()])
    assert np.isfinite(values).all() and scores(report)["c"] == 0 == scores(report)["n"]
    assert any("one batch" in warning for warning in report.warnings)
    assert report.three_mr() and report.clusters()
    with pytest.raises(InputError, match="the ranking has no controls"):
        rank_table(data, "y").select()
    with pytest.raises(InputError, match="no pairs of columns"):
        rank_table(data, "y").three_mr()
