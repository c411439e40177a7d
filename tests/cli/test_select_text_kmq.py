"""`salience select text --method kmq`: records as they were, coverage and quality told, what is refused."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from salience.scores import Scores

TOPICS = [["wave", "tide", "reef", "sail"], ["loop", "array", "cache", "stack"], ["bread", "salt", "oven", "yeast"]]


@pytest.fixture(autouse=True)
def _argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    lines = []
    for number in range(200):
        topic = TOPICS[rng.choice(3, p=[0.85, 0.1, 0.05])]
        text = " ".join(rng.choice(topic, 12)) + f" {number}"
        lines.append(json.dumps({"grade": int(rng.integers(1, 7)), "text": text, "id": number}))
    (tmp_path / "pool.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "pool.jsonl"


def test_documents_are_chosen_by_quality_in_every_cluster(pool: Path, tmp_path: Path, salience) -> None:
    out = tmp_path / "chosen.jsonl"
    command = ("select", "text", pool, "--method", "kmq", "-n", 24, "--quality", "grade", "--clusters", 3, "-o", out)
    code, told, err = salience(*command)
    assert code == 0, err
    assert re.match(r"(Better than|No better than|Worse than) random.*: held-out rows lie", told)
    assert "clusters hit: 3 of 3" in told and "200 records read = 24 selected + 136 not selected + 40 held out" in told
    chosen = out.read_text().splitlines()
    assert len(chosen) == 24 and set(chosen) <= set(pool.read_text().splitlines())
    grades = [json.loads(line)["grade"] for line in chosen]
    assert np.mean(grades) > 4.5  # 3.5 of all
    scores = Scores.load(f"{out}.scores.parquet")
    assert len(scores) == 160 and all(name.startswith("pool.jsonl:") for name in scores.ids)
    assert "not measured" not in Path(f"{out}.report.html").read_text()
    before = out.read_bytes()
    assert salience(*command)[0] == 2
    assert salience(*command, "--overwrite", "--json")[0] == 0 and out.read_bytes() == before


def test_a_matrix_and_csv(tmp_path: Path, salience) -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"text": [f"document {i}" for i in range(60)], "grade": rng.integers(1, 7, 60)})
    frame.to_csv(tmp_path / "p.csv", index=False)
    np.save(tmp_path / "v.npy", rng.normal(size=(60, 3)))
    out = tmp_path / "c.csv"
    code, _, err = salience("select", "text", tmp_path / "p.csv", "--method", "kmq", "--fraction", 0.2, "--quality",
                       "grade", "--embeddings", tmp_path / "v.npy", "-o", out, "--hold-out", 0)  # fmt: skip
    assert code == 0, err
    assert len(pd.read_csv(out)) == 12


@pytest.mark.parametrize(
    ("extra", "code", "words"),
    [
        (("-n", 9, "--quality", "grad"), 3, "nearest names: 'grade'"),
        (("-n", 9, "--quality", "text"), 3, "numbers are needed"),
        (("-n", 161), 2, "161 documents are more than the 160"),
        (("-n", 9, "--fraction", 0.1), 2, "either a count or a fraction"),
        (("-n", 9, "--target", "x.jsonl"), 2, "--target does not go with --method kmq"),
        (("-n", 9, "--ngrams", 3, "--resume"), 2, "--ngrams, --resume does not go with"),
        (("-n", 9, "--clusters", "few"), 2, "--clusters must be"),
        (("-n", 9, "--embeddings", "none"), 2, "neither a model directory nor a readable .npy"),
    ],
)
def test_bad_use(pool: Path, tmp_path: Path, salience, extra, code, words) -> None:
    found, told, err = salience("select", "text", pool, "--method", "kmq", "-o", tmp_path / "o.jsonl", *extra)
    assert found == code and re.search(words, err) and not told, err
    assert not (tmp_path / "o.jsonl").exists() and not list(tmp_path.glob(".o*"))


def test_other_methods_need_a_target_and_take_no_quality(pool: Path, tmp_path: Path, salience) -> None:
    base = ("select", "text", pool, "-n", 9, "-o", tmp_path / "o.jsonl")
    assert "--target is missing" in salience(*base)[2]
    assert "belong to --method kmq alone" in salience(*base, "--target", pool, "--quality", "grade")[2]


def test_no_input_and_no_earlier_file_is_replaced(pool: Path, tmp_path: Path, salience) -> None:
    vectors, side = tmp_path / "v.jsonl", tmp_path / "o.jsonl.scores.parquet"
    np.save(tmp_path / "v.npy", np.ones((200, 2)))
    (tmp_path / "v.npy").rename(vectors)
    side.write_text("mine")
    base = ("select", "text", pool, "--method", "kmq", "-n", 9)
    for extra, words in (
        (("--embeddings", vectors, "-o", vectors, "--overwrite"), "output .* is the input"),
        (("-o", pool, "--overwrite"), "output .* is the input"),
        (("-o", tmp_path / "o.jsonl"), "scores file .* exists; pass --overwrite"),
    ):
        code, _, err = salience(*base, *extra)
        assert code == 2 and re.search(words, " ".join(err.split())), err
    assert side.read_text() == "mine" and not (tmp_path / "o.jsonl").exists()


def graded(tmp_path: Path, grades: list[object], suffix: str) -> Path:
    """A corpus with these grades; None is a missing field."""
    path = tmp_path / f"g{suffix}"
    rows = [{"text": f"document {i} of words"} | ({} if g is None else {"grade": g}) for i, g in enumerate(grades)]
    if suffix == ".csv":
        pd.DataFrame(rows, columns=["text", "grade"]).to_csv(path, index=False)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_missing_quality(tmp_path: Path, salience, suffix: str) -> None:
    np.save(tmp_path / "v.npy", np.random.default_rng(0).normal(size=(60, 3)))
    base = ("--method", "kmq", "-n", 3, "--hold-out", 0, "--quality", "grade", "--embeddings", tmp_path / "v.npy",
            "--clusters", 3, "--overwrite", "-o", tmp_path / f"o{suffix}")  # fmt: skip
    file = graded(tmp_path, [-50] + [None] * 59, suffix)
    found = json.loads(salience("select", "text", file, *base, "--json")[1])
    assert found["mean_quality"] == [-50, None] or found["mean_quality"] == [-50, -50]
    assert found["notes"] == ["quality of 59 rows is missing; they count as the mean"]
    code, _, err = salience("select", "text", file, *base)
    assert code == 0 and "note: quality of 59 rows is missing" in err
    assert "quality of 59 rows is missing" in (tmp_path / f"o{suffix}.report.html").read_text()
    code, _, err = salience("select", "text", graded(tmp_path, [None] * 60, suffix), *base)
    assert code == 3 and re.search("is missing in every document|no document has a field 'grade'", err), err
    file = graded(tmp_path, [None, 3, " good ", 4] + [1] * 56, suffix)
    code, _, err = salience("select", "text", file, *base)
    assert code == 3 and "holds ' good '; numbers are needed" in " ".join(err.split()), err


def test_the_page_says_that_held_out_documents_were_too_few(tmp_path: Path, salience) -> None:
    file = graded(tmp_path, [1, 2, 3] * 4, ".jsonl")
    out = tmp_path / "o.jsonl"
    code, _, err = salience("select", "text", file, "--method", "kmq", "-n", 3, "-o", out)
    assert code == 0 and "2 held-out documents are too few" in err, err
    assert "2 held-out documents are too few" in Path(f"{out}.report.html").read_text()


@pytest.mark.realdata
def test_alpaca(tmp_path: Path, salience) -> None:
    file = Path(os.environ.get("SALIENCE_DATA", "")) / "alpaca-demo" / "alpaca_en_demo.json"
    if not os.environ.get("SALIENCE_DATA") or not file.exists():
        pytest.skip("SALIENCE_DATA names no folder with alpaca-demo/alpaca_en_demo.json")
    rows = json.loads(file.read_text())
    lines = [json.dumps({"text": "\n".join((r["instruction"], r["input"], r["output"])), "words": min(6, len(r["output"].split()) / 40)})
             for r in rows]  # fmt: skip
    (tmp_path / "alpaca.jsonl").write_text("\n".join(lines) + "\n")
    code, told, err = salience("select", "text", tmp_path / "alpaca.jsonl", "--method", "kmq", "-n", 100, "--quality",
                          "words", "-o", tmp_path / "c.jsonl", "--json")  # fmt: skip
    assert code == 0, err
    found = json.loads(told)
    assert found["selected"] == 100 and found["clusters_hit"] / found["clusters"] > 0.9
    assert found["mean_quality"][1] > found["mean_quality"][0]
