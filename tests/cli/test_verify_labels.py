"""`salience verify labels` and `salience explain table`: exit codes, what is printed first, and what is written."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.csv
import pytest

from salience.scores import Scores


@pytest.fixture(autouse=True)
def _argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)


@pytest.fixture
def posts(tmp_path: Path) -> Path:
    rng = np.random.default_rng(3)
    n = 600
    truth = (rng.random(n) < 0.4).astype(int)
    llm = np.where(rng.random(n) < 0.15, 1 - truth, truth)
    known = np.zeros(n, dtype=bool)
    known[rng.choice(n, 150, replace=False)] = True
    stance = np.where(truth == 1, "for", np.where(rng.random(n) < 0.5, "against", "none"))
    frame = pd.DataFrame({
        "hand": np.where(known, truth, np.nan), "llm": llm, "length": rng.normal(size=n), "topic": rng.choice(["a", "b"], n),
        "chance": 0.25, "stance": np.where(known, stance, None), "guess": stance, "noise": rng.integers(0, 2, n),
    })  # fmt: skip
    frame.to_csv(tmp_path / "posts.csv", index=False)
    return tmp_path / "posts.csv"


BASE = ("--gold", "hand", "--predicted", "llm", "--learner", "linear", "--splits", "2")


def test_a_share_is_told_with_what_labels_are_worth(posts: Path, salience) -> None:
    code, out, err = salience("verify", "labels", posts, *BASE, "--assume-random")
    assert code == 0, err
    first = out.splitlines()[0]
    assert "the model's labels help" in first and "narrower than by gold labels alone" in first
    assert "agree with" in first and "share" in out and "600 rows read = 150 with gold labels + 450 without + 0" in out


def test_noise_is_told_plainly(posts: Path, salience) -> None:
    _, out, _ = salience("verify", "labels", posts, "-g", "hand", "-p", "noise", "--assume-random", "--splits", "2",
                    "--learner", "linear")  # fmt: skip
    assert "no better than none here" in out.splitlines()[0]


def test_a_regression_is_written_with_its_page(posts: Path, tmp_path: Path, salience) -> None:
    out = tmp_path / "estimates.csv"
    command = ("verify", "labels", posts, *BASE, "--prob", "chance", "--formula", "hand ~ length + topic", "-o", out)
    code, told, _ = salience(*command, "--json")
    result = json.loads(told)
    assert code == 0 and result["parts"][0]["n_labeled"] == 150
    rows = pyarrow.csv.read_csv(out).to_pylist()
    assert {row["method"] for row in rows} == {"DSL", "GSO", "SO", "SL"} and len(rows) == 12
    assert rows[1]["name"] == "length" and rows[1]["low"] < rows[1]["coef"] < rows[1]["high"]
    page = Path(f"{out}.report.html").read_text()
    assert "topic[b]" in page and "gold only" in page
    manifest = json.loads(Path(f"{out}.manifest.json").read_text())
    assert manifest["model"] == "logit" and "estimates.csv" in manifest["files"]
    before = out.read_bytes()
    code, _, err = salience(*command)
    assert code == 2 and "--overwrite" in err and out.read_bytes() == before
    assert salience(*command, "--overwrite")[0] == 0 and out.read_bytes() == before


def test_categories_each_in_turn(posts: Path, salience) -> None:
    arguments = ("verify", "labels", posts, "-g", "stance", "-p", "guess", "--assume-random", "--splits", "1",
                 "--learner", "linear", "--json")  # fmt: skip
    every = json.loads(salience(*arguments)[1])
    assert [part["what"] for part in every["parts"]] == ["stance = against", "stance = for", "stance = none"]
    shares = [part["estimates"][0]["coef"] for part in every["parts"]]
    assert sum(shares) == pytest.approx(1, abs=0.02)
    one = json.loads(salience(*arguments, "--category", "for")[1])
    assert [part["what"] for part in one["parts"]] == ["stance = for"]


@pytest.mark.parametrize(
    ("extra", "code", "words"),
    [
        ((), 2, "how were the rows with gold labels chosen"),
        (("--prob", "chance", "--assume-random"), 2, "either --prob or --assume-random"),
        (("--prob", "nothing"), 2, "nearest|there are"),
        (("--prob", "length"), 3, "prob must be above 0"),
        (("--assume-random", "--fixed-effect", "topic"), 2, "belongs to --model felm"),
        (("--assume-random", "--formula", "hand ~"), 2, "not of the form"),
        (("--assume-random", "--gold", "llm"), 2, "one column for each --gold"),
        (("--assume-random", "--alpha", "2"), 2, "alpha"),
        (("--assume-random", "--seed", "-1"), 2, "--seed must be 0 or larger"),
        (("--assume-random", "-o", "out.txt"), 2, "must end in .csv"),
        (("--assume-random", "--report", "out.pdf"), 2, "ends in .html"),
    ],
)
def test_bad_use(posts: Path, salience, extra, code, words) -> None:
    import re

    found, out, err = salience("verify", "labels", posts, *BASE, *extra)
    assert found == code and re.search(words, err) and len(err.splitlines()) == 1 and not out


def test_files_that_cannot_be_used(tmp_path: Path, salience) -> None:
    empty = tmp_path / "empty.csv"
    empty.write_text("hand,llm\n")
    assert salience("verify", "labels", empty, *BASE, "--assume-random")[0] == 4
    assert salience("verify", "labels", tmp_path / "none.csv", *BASE, "--assume-random")[0] == 2
    torn = tmp_path / "torn.parquet"
    torn.write_bytes(b"PAR1 and no more")
    code, _, err = salience("verify", "labels", torn, *BASE, "--assume-random")
    assert code == 3 and "cannot be read" in err
    ragged = tmp_path / "ragged.csv"
    ragged.write_text("hand,llm\n1,2\n1,2,3\n")
    assert salience("verify", "labels", ragged, *BASE, "--assume-random")[0] == 3


@pytest.fixture
def patients(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    columns = {f"gene{i}": rng.normal(size=300) for i in range(20)}
    sick = (columns["gene3"] > 0) | (columns["gene7"] > 1)
    frame = pd.DataFrame(
        columns | {"ward": rng.choice(["<b>east</b>", "west"], 300), "state": np.where(sick, "ill", "well")}
    )
    frame.to_csv(tmp_path / "patients.csv", index=False)
    return tmp_path / "patients.csv"


def test_a_table_is_explained_and_measured(patients: Path, tmp_path: Path, salience) -> None:
    out = tmp_path / "columns.parquet"
    command = ("explain", "table", patients, "--label", "state", "-o", out)
    code, told, err = salience(*command)
    assert code == 0, err
    assert told.startswith("A better surrogate than on random columns: on 90 held-out rows")
    assert "most important first: gene3" in told and "THEN ill" in told and "F statistic" in told
    scores = Scores.load(out)
    assert set(scores.top(2).ids) == {"gene3", "gene7"} and scores.unit == "feature" and len(scores) == 22
    page = Path(f"{out}.report.html").read_text()
    assert "<b>east" not in page and "gene3" in page
    assert salience(*command)[0] == 2
    result = json.loads(salience(*command, "--overwrite", "--json", "--ignore", "ward", "-k", 2)[1])
    assert result["better"] and set(result["columns"]) == {"gene3", "gene7"} and len(Scores.load(out)) == 20


@pytest.mark.parametrize(
    ("extra", "code", "words"),
    [
        (("--label", "stat"), 2, "nearest names: 'state'"),
        (("--label", "gene1"), 3, "different values; 2 to 50"),
        (("--label", "state", "-k", "99"), 2, "from 1 to the 22 columns"),
        (("--label", "state", "--test", "1.5"), 2, "test must lie"),
        (("--label", "state", "--seed", "-1"), 2, "--seed must be 0 or larger"),
        (("--label", "state", "--examples", "-1"), 2, "examples must be 0 or larger"),
        (("--label", "state", "--min-support", "2"), 2, "min_support must lie"),
        (("--label", "state", "-o", "x.csv"), 2, "must end in .parquet"),
        (("--label", "state", "--ignore", "nothing"), 2, "ignored column"),
    ],
)
def test_bad_use_of_explain_table(patients: Path, salience, extra, code, words) -> None:
    found, out, err = salience("explain", "table", patients, *extra)
    assert found == code and words in err and not out


def test_help_loads_nothing_heavy() -> None:
    import subprocess

    program = (
        "import sys\nfrom salience.cli import main\nsys.argv = ['salience', *{}, '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print('loaded:', *({{'torch', 'sklearn', 'matplotlib', 'pandas'}} & set(sys.modules)))"
    )
    for words in (["verify", "labels"], ["explain", "table"]):
        done = subprocess.run([sys.executable, "-c", program.format(words)], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "loaded:"
