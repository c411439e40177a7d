"""Rankings of real tables: census income, and a sample of click logs. Needs the folder named by SALIENCE_DATA."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pytest

from salience.features import rank_table
from salience.features.outrank.proof import prove

pytestmark = pytest.mark.realdata
ADULT = [
    "age",
    "workclass",
    "fnlwgt",
    "education",
    "education_num",
    "marital_status",
    "occupation",
    "relationship",
    "race",
    "sex",
    "capital_gain",
    "capital_loss",
    "hours_per_week",
    "native_country",
    "income",
]


def data(name: str) -> Path:
    folder = os.environ.get("SALIENCE_DATA")
    if not folder or not (Path(folder) / name).exists():
        pytest.skip(f"SALIENCE_DATA names no folder with {name}")
    return Path(folder) / name


def adult() -> pa.Table:
    read = pa_csv.ReadOptions(column_names=ADULT)
    return pa_csv.read_csv(data("adult/adult-train.csv"), read_options=read)


def test_adult() -> None:
    report = rank_table(adult(), "income", pairs="all", order=2, controls=True, bins=16, hold_out=0.2)
    assert report.counts["read"] == 32_561 == report.counts["scored"] + report.counts["held_out"]
    best = report.select(5)
    assert set(best[:2]) == {"relationship", "marital_status"} and "capital_gain" in best
    scores = dict(zip(report.singles["feature"].to_pylist(), report.singles["score"].to_pylist()))
    assert scores["fnlwgt"] < 0.01 < scores["sex"]  # a sampling weight tells nothing
    assert scores["relationship AND capital_gain"] > max(scores[name] for name in ADULT[:-1])
    assert {"education", "education_num"} in map(set, report.clusters(0.9))
    quality = {row["column"]: row for row in report.quality.to_pylist()}
    assert quality["workclass"]["coverage"] == pytest.approx(100 * (1 - 1836 / 32_561), abs=0.01)
    assert (quality["age"]["min"], quality["age"]["max"], quality["age"]["cardinality"]) == (17, 90, 73)
    proof = prove(report, 4)
    assert proof.log_loss["outrank"] < proof.log_loss["random"] < proof.log_loss["majority"]


def test_a_header_that_is_missing_is_told() -> None:
    from salience.errors import DataError

    with pytest.raises(DataError, match="no column 'income' to rank by"):
        rank_table(data("adult/adult-train.csv"), "income")


def test_criteo_sample() -> None:
    report = rank_table(data("criteo-sample/criteo_sample.csv"), "label", controls=True, order=2, hold_out=0.3)
    assert report.counts["read"] == 200 and report.batches == 1
    assert report.exist == (0, 741) and report.singles.num_rows == 39 + 741 + 11
    assert any("one batch" in warning for warning in report.warnings)
    quality = {row["column"]: row for row in report.quality.to_pylist()}
    assert quality["C9"]["cardinality"] <= 3 and quality["I12"]["coverage"] < 30
    singles = {row["feature"]: row for row in report.singles.to_pylist()}
    # of 160 rows nearly every pair of values is unique: plain information takes that for knowledge
    assert singles["C4"]["plain"] > 0.5 * report.label_entropy and singles["C4"]["score"] < 0.05
    assert prove(report).rows == (report.counts["scored"], report.counts["held_out"])
