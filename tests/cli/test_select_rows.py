"""`salience select rows`: the choice, its proof, Scores in and out, exit codes."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from salience.data import select_rows
from salience.data.row_proof import prove_rows
from salience.errors import DataError, InputError
from salience.scores import Scores


@pytest.fixture(autouse=True)
def _argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)


def people(n: int = 400, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    group = rng.choice(4, n, p=[0.7, 0.15, 0.1, 0.05])
    frame = pd.DataFrame({"a": 4 * (group % 2) + rng.normal(size=n), "b": 4 * (group // 2) + rng.normal(size=n)})
    frame["code"] = [f"{i:05d}" for i in range(n)]
    frame["town"] = rng.choice(["<b>x</b>", "y"], n)
    wrong = rng.random(n) < 0.4
    frame["grade"] = np.where(wrong, 1, 6)
    frame["kind"] = np.array(["w", "x", "y", "z"])[np.where(wrong, rng.integers(0, 4, n), group)]
    return frame


@pytest.fixture
def table(tmp_path: Path) -> Path:
    people().to_csv(tmp_path / "people.csv", index=False)
    return tmp_path / "people.csv"


BASE = ("--label", "kind", "--ignore", "code", "-n", 40)


def test_rows_are_chosen_measured_and_written(table: Path, tmp_path: Path, salience) -> None:
    out = tmp_path / "chosen.csv"
    command = ("select", "rows", table, *BASE, "--quality", "grade", "-o", out)
    code, told, err = salience(*command)
    assert code == 0, err
    assert re.match(r"(Better than|No better than|Worse than) random.*: accuracy .* for random of equal size", told)
    assert "k-means medoids" in told and "400 rows read = 40 selected + 260 not selected + 100 held out" in told
    lines = out.read_text().splitlines()
    original = table.read_text().splitlines()
    assert lines[0] == original[0] and len(lines) == 41 and set(lines) <= set(original)  # "00017" is still that
    scores = Scores.load(f"{out}.scores.parquet")
    assert len(scores) == 300 and scores.ids[0].startswith("people.csv:") and scores.provenance["method"] == "kmq"
    page = Path(f"{out}.report.html").read_text()
    assert "&lt;b&gt;x&lt;/b&gt;" in page and "<b>x</b>" not in page
    manifest = json.loads(Path(f"{out}.manifest.json").read_text())
    assert set(manifest["files"]) == {"chosen.csv", "chosen.csv.scores.parquet", "chosen.csv.report.html"}
    before = out.read_bytes()
    code, _, err = salience(*command)
    assert code == 2 and "--overwrite" in err
    assert salience(*command, "--overwrite")[0] == 0 and out.read_bytes() == before
    result = json.loads(salience(*command, "--overwrite", "--json", "--seed", 1)[1])
    assert result["selected"] == 40 and out.read_bytes() != before
    grades = pd.read_csv(out)["grade"]
    assert (grades == 6).mean() > 0.9  # 60 % of all rows


def test_quality_helps_where_it_knows_which_labels_are_right() -> None:
    found = select_rows(people(3000), count=60, label="kind", quality="grade", ignore=["code"])
    assert found.proof is not None and found.proof.better and "better than random: accuracy" in found.proof.verdict
    blind = select_rows(people(3000), count=60, label="kind", method="random", ignore=["code", "grade"])
    assert blind.proof is not None and blind.proof.comparisons[0].better is None
    assert "no better than random here" in blind.proof.verdict


def test_held_out_rows_decide_nothing() -> None:
    """What is chosen stays when the held-out rows change."""
    frame = people()
    first = select_rows(frame, count=30, label="kind", ignore=["code"])
    held = np.setdiff1d(np.arange(400), [int(name.split(":")[1]) for name in first.scores.ids])
    assert len(held) == 100
    frame.loc[held, "a"] += 1000
    np.testing.assert_array_equal(select_rows(frame, count=30, label="kind", ignore=["code"]).chosen, first.chosen)
    whole = select_rows(frame, count=30, hold_out=0, ignore=["code"])
    assert whole.proof is None and len(whole.scores) == 400


def test_without_a_label_coverage_is_measured(table: Path, tmp_path: Path, salience) -> None:
    code, told, err = salience("select", "rows", table, "--ignore", "code", "--ignore", "kind", "--fraction", 0.1,
                          "-o", tmp_path / "c.csv", "--method", "medoids,kmq")  # fmt: skip
    assert code == 0, err
    assert told.startswith("Better than random: held-out rows lie") and "kmq" in told


def test_scores_of_any_method_choose_and_combine_by_rank(table: Path, tmp_path: Path, salience) -> None:
    """Crossing: Scores in, of one method or of two; classes keep their shares."""
    base = ("select", "rows", table, *BASE, "--hold-out", 0)
    assert salience(*base, "-o", tmp_path / "a.csv", "--quality", "grade")[0] == 0
    assert salience(*base, "-o", tmp_path / "b.csv", "--method", "random")[0] == 0
    parts = [Scores.load(tmp_path / f"{name}.csv.scores.parquet") for name in "ab"]
    files = [tmp_path / f"{name}.csv.scores.parquet" for name in "ab"]
    code, _, err = salience(*base[:3], "-n", 40, "--hold-out", 0, "--scores", files[0], "--scores", files[1],
                       "-o", tmp_path / "both.csv")  # fmt: skip
    assert code == 0, err
    best = parts[0].combine(parts[1]).top(40)
    rows = sorted(int(name.split(":")[1]) for name in best.ids)
    lines = table.read_text().splitlines()[1:]
    assert (tmp_path / "both.csv").read_text().splitlines()[1:] == [lines[at] for at in rows]
    labelled = select_rows(table, count=40, label="kind", scores=parts, hold_out=0, ignore=["code"])
    assert all(chosen >= 2 for _, _, chosen in labelled.classes) and sum(c for *_, c in labelled.classes) == 40
    drawn = [
        select_rows(table, count=40, scores=parts[:1], draw=True, random_state=s, hold_out=0).chosen for s in (0, 0, 1)
    ]
    assert (drawn[0] == drawn[1]).all() and (drawn[0] != drawn[2]).any()


def test_embeddings_from_a_matrix_and_a_column(tmp_path: Path) -> None:
    frame = people()
    vectors = np.random.default_rng(1).normal(size=(400, 3)).astype(np.float32)
    np.save(tmp_path / "v.npy", vectors)
    frame["v"] = list(vectors)
    frame.to_parquet(tmp_path / "people.parquet")
    found = [select_rows(tmp_path / "people.parquet", count=50, embeddings=given).chosen
             for given in ("v", str(tmp_path / "v.npy"), vectors)]  # fmt: skip
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_parquet_in_and_out(tmp_path: Path, salience) -> None:
    people().to_parquet(tmp_path / "p.parquet")
    out = tmp_path / "c.parquet"
    assert salience("select", "rows", tmp_path / "p.parquet", *BASE, "-o", out)[0] == 0
    assert pq.read_table(out).num_rows == 40 and pq.read_schema(out).names == list(people().columns)


def test_rows_without_a_label_are_left_out_and_told(tmp_path: Path, salience) -> None:
    frame = people()
    frame.loc[:9, "kind"] = None
    frame.to_csv(tmp_path / "p.csv", index=False)
    code, told, err = salience("select", "rows", tmp_path / "p.csv", *BASE, "-o", tmp_path / "c.csv")
    assert code == 0 and "10 rows without a label were left out" in err and "+ 10 without a label" in told


def test_the_proof_by_hand() -> None:
    """Two points train 1-nearest-neighbour to all right; two others to all wrong."""
    rows = np.array([[0.0], [1.0], [0.1], [0.9]])
    labels, held = np.array(["a", "b", "b", "a"]), np.tile([[0.0], [1.0]], (20, 1))
    proof = prove_rows("kmq", rows, np.array([0, 1]), {"random": [np.array([2, 3])] * 2}, held, labels=labels,
                       held_labels=np.tile(["a", "b"], 20))  # fmt: skip
    first = proof.comparisons[0]
    assert (first.chosen, first.other, first.difference) == (1.0, 0.0, 1.0) and proof.better
    distance = proof.comparisons[-1]
    assert distance.chosen == 0 and distance.other == pytest.approx(0.1) and distance.difference == pytest.approx(0.1)


@pytest.mark.parametrize("options", [(), ("--graph", "ml_lsh", "--no-coverage")])
def test_gais_measures_itself_and_its_scores_go_on(table: Path, tmp_path: Path, salience, options) -> None:
    out = tmp_path / "gais.csv"
    base = ("select", "rows", table, *BASE)
    code, told, err = salience(*base, "--method", "gais,kmq", *options, "-o", out)
    assert code == 0, err
    assert re.match(r"(Better than|No better than|Worse than) random.*: accuracy .* for random of equal size", told)
    assert all(name in told for name in ("k-means medoids", "kmq", "1-nearest-neighbour", "40 selected"))
    assert len(out.read_text().splitlines()) == 41
    manifest = json.loads(Path(f"{out}.manifest.json").read_text())
    assert manifest["settings"]["graph"] == (options[1] if options else "minibatch")
    before = out.read_bytes()
    assert salience(*base, "--method", "gais", *options, "-o", out, "--overwrite")[0] == 0
    assert out.read_bytes() == before
    assert salience(*base, "-o", tmp_path / "kmq.csv", "--quality", "grade")[0] == 0
    files = [Path(f"{tmp_path / name}.csv.scores.parquet") for name in ("gais", "kmq")]
    code, _, err = salience(*base, "--scores", files[0], "--scores", files[1], "-o", tmp_path / "both.csv")
    assert code == 0, err
    ranks = Scores.load(files[0]).combine(Scores.load(files[1]))
    both = Scores.load(tmp_path / "both.csv.scores.parquet")
    np.testing.assert_allclose(both.values, ranks.aligned(both.ids))


@pytest.mark.parametrize(
    ("extra", "code", "words"),
    [
        (("--count", 40, "--fraction", 0.1), 2, "either a count or a fraction"),
        ((), 2, "either a count or a fraction"),
        (("-n", 0), 2, "count must be at least 1"),
        (("-n", 301), 2, "301 rows are more than the 300 that can be chosen"),
        (("-n", 9, "--label", "kin"), 2, "nearest names: 'kind'"),
        (("-n", 9, "--label", "a"), 3, "different values; 2 to 100 classes"),
        (("-n", 9, "--quality", "kind"), 3, "numbers are needed"),
        (("-n", 9, "--method", "best"), 2, "method must be one of"),
        (("-n", 9, "--method", "random", "--quality", "grade"), 2, "--quality belongs to --method kmq alone"),
        (("-n", 9, "--method", "kmq", "--scores", "x.parquet"), 2, "leave --method out"),
        (("-n", 9, "--method", "gais"), 2, "name the column with --label"),
        (("-n", 9, "--method", "kmq,gais"), 2, "name the column with --label"),
        (("-n", 9, "--graph", "sl_lsh"), 2, "--graph belongs to --method gais alone"),
        (("-n", 9, "--no-coverage", "--method", "random"), 2, "--no-coverage belongs to --method gais alone"),
        (("-n", 9, "--method", "gais", "--quality", "grade"), 2, "--quality belongs to --method kmq alone"),
        (("-n", 9, "--method", "gais", "--label", "kind", "--graph", "knn"), 2, "graph must be one of"),
        (("-n", 3, "--method", "gais", "--label", "kind"), 2, "a budget of 3 rows is too small"),
        (("-n", 9, "--scores", "none.parquet"), 3, "not a readable Scores file"),
        (("-n", 9, "--draw"), 2, "draw goes with scores"),
        (("-n", 9, "--embeddings", "none.npy"), 2, "neither a column nor a readable .npy"),
        (("-n", 9, "--clusters", "x"), 2, "--clusters must be"),
        (("-n", 9, "--clusters", 999), 2, "more than the 300 rows"),
        (("-n", 9, "--hold-out", 1), 2, "hold_out must lie"),
        (("-n", 9, "--seed", -1), 2, "random_state must be 0 or larger"),
        (("-n", 9, "--allocation", "even"), 2, "allocation must be one of"),
        (("-n", 9, "-o", "out.txt"), 2, "must end in .csv or .parquet"),
        (("-n", 9, "--report", "out.pdf"), 2, "ends in .html"),
    ],
)
def test_bad_use(table: Path, tmp_path: Path, salience, extra, code, words) -> None:
    out = tmp_path / "out.csv"
    found, told, err = salience("select", "rows", table, "-o", out, *extra)
    assert found == code and re.search(words, err) and not told, err
    assert not out.exists() and not list(tmp_path.glob(".out*"))


def test_files_that_cannot_be_used(tmp_path: Path, salience) -> None:
    empty = tmp_path / "empty.csv"
    empty.write_text("a,b\n")
    rest = ("-n", 3, "-o", tmp_path / "o.csv")
    assert salience("select", "rows", empty, *rest)[0] == 4
    assert salience("select", "rows", tmp_path / "none.csv", *rest)[0] == 2
    constant = tmp_path / "constant.csv"
    constant.write_text("a,b\n" + "1,2\n" * 50)
    code, _, err = salience("select", "rows", constant, *rest)
    assert code == 3 and "every column is constant" in err
    other = Scores([1.0, 2.0], ["x", "y"], "sample")
    with pytest.raises(InputError, match="has no score"):
        select_rows(people(), count=3, scores=[other])
    with pytest.raises(DataError, match="embeddings have shape"):
        select_rows(people(), count=3, embeddings=np.ones((3, 2)))


def test_a_dry_run_writes_nothing(table: Path, tmp_path: Path, salience) -> None:
    code, told, _ = salience("select", "rows", table, *BASE, "-o", tmp_path / "o.csv", "--dry-run")
    assert code == 0 and "nothing was written" in told and not (tmp_path / "o.csv").exists()


@pytest.mark.realdata
@pytest.mark.parametrize("method", ["kmq", "gais"])
def test_adult_income_is_not_below_random(method) -> None:
    file = Path(os.environ.get("SALIENCE_DATA", "")) / "adult" / "adult-train.csv"
    if not os.environ.get("SALIENCE_DATA") or not file.exists():
        pytest.skip("SALIENCE_DATA names no folder with adult/adult-train.csv")
    frame = pd.read_csv(file, header=None, skipinitialspace=True)
    frame.columns = [f"c{i}" for i in range(frame.shape[1])]
    found = select_rows(frame, count=500, label="c14", ignore=["c2"], method=method)
    assert found.proof is not None and found.proof.comparisons[0].better is not False, found.proof.verdict


def test_few_held_out_rows_measure_nothing() -> None:
    found = select_rows(people(12), count=3, ignore=["code"])
    assert found.proof is None and "nothing was measured: 3 held-out rows are too few" in found.notes


def test_no_input_and_no_earlier_file_is_replaced(table: Path, tmp_path: Path, salience) -> None:
    scores, vectors = tmp_path / "s.parquet", tmp_path / "v.csv"
    Scores(np.arange(400.0), [f"people.csv:{i}" for i in range(400)], "sample").save(scores)
    np.save(tmp_path / "v.npy", np.ones((400, 2)))
    (tmp_path / "v.npy").rename(vectors)
    side, page = tmp_path / "o.csv.scores.parquet", tmp_path / "o.html"
    side.write_bytes(scores.read_bytes())
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    base = ("select", "rows", table, "-n", 9)
    for extra, words in (
        (("--scores", scores, "-o", scores, "--overwrite"), "output .* is the input"),
        (("--scores", side, "-o", tmp_path / "o.csv", "--overwrite"), "scores file .* is the input"),
        (("--embeddings", vectors, "-o", vectors, "--overwrite"), "output .* is the input"),
        (("-o", table, "--overwrite"), "output .* is the input"),
        (("-o", tmp_path / "o.csv"), "scores file .* exists; pass --overwrite"),
    ):
        code, _, err = salience(*base, *extra)
        assert code == 2 and re.search(words, " ".join(err.split())), err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    code, _, err = salience(*base, "-o", tmp_path / "o.csv", "--overwrite", "--report", page)
    assert code == 0 and page.exists() and side.read_bytes() != before[side], err
    assert not list(tmp_path.glob(".*"))


def test_a_report_of_its_own_name_stays_when_the_run_fails(tmp_path: Path, salience) -> None:
    frame = people()
    frame["raw"] = [b"\xff%d" % i for i in range(400)]
    frame.to_parquet(tmp_path / "p.parquet")
    page = tmp_path / "page.html"
    page.write_text("old")
    command = ("select", "rows", tmp_path / "p.parquet", "--ignore", "raw", "-n", 9, "--report", page, "--overwrite")
    code, _, err = salience(*command, "-o", tmp_path / "o.csv")
    assert code == 2 and "column 'raw' holds binary, which cannot be written as .csv" in " ".join(err.split()), err
    assert page.read_text() == "old" and sorted(path.name for path in tmp_path.iterdir()) == ["p.parquet", "page.html"]
    assert salience(*command, "-o", tmp_path / "o.parquet")[0] == 0 and page.read_text() != "old"


def test_missing_quality_is_told(recwarn) -> None:
    frame = people()
    frame.loc[:, "grade"] = frame["grade"].astype(float)
    frame.loc[::2, "grade"] = np.nan
    found = select_rows(frame, count=30, quality="grade", ignore=["code"])
    assert [note for note in found.notes if "rows is missing; they count as the mean" in note] and not len(recwarn)


def test_the_page_says_that_held_out_rows_were_too_few(tmp_path: Path, salience) -> None:
    people(12).to_csv(tmp_path / "p.csv", index=False)
    assert salience("select", "rows", tmp_path / "p.csv", "-n", 3, "-o", tmp_path / "o.csv")[0] == 0
    page = (tmp_path / "o.csv.report.html").read_text()
    assert "3 held-out rows are too few" in page and "nothing was held out" not in page
