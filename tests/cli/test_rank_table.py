"""`salience rank table`: what it prints and writes, its exit codes, and nothing hostile on a terminal or a page."""

from __future__ import annotations

import json
import os
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from salience.features.outrank import ranking
from salience.scores import Scores

HOSTILE = "<script>alert(1)</script>"


def table(rows: int = 4000, noise: int = 60) -> pa.Table:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, rows)
    columns = {"signal": y ^ (rng.random(rows) < 0.15), "weak": y ^ (rng.random(rows) < 0.35)}
    columns |= {f"noise{at}": rng.integers(0, 300, rows) for at in range(noise)}
    return pa.table({**columns, "y": np.where(y, "buy", "leave")})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pa_csv.write_csv(table(), tmp_path / "t.csv")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def run(folder: Path, salience):
    return partial(salience, "rank", "table")


BASE = ["t.csv", "--label", "y", "-o", "out", "--batch-rows", "1000", "--workers", "1"]
FILES = ["feature_singles.tsv", "manifest.json", "quality.tsv", "report.html", "row_quality.tsv", "scores.parquet"]


def one_sentence(err: str) -> bool:
    return err.startswith("salience: ") and err.count("\n") == 1


# --- what it does -------------------------------------------------------------------------------------------


def test_it_says_first_whether_it_helped_then_ranks(run, folder: Path) -> None:
    code, out, err = run(*BASE, "--top", "2")
    assert code == 0 and err == ""
    assert out.startswith("The 2 best columns are better than 2 random ones here: log loss 0.")
    lines = [line.split() for line in out.splitlines()]
    assert ["1", "signal"] in [line[:2] for line in lines] and ["2", "weak"] in [line[:2] for line in lines]
    assert "columns score above the best noise" in out
    assert "4,000 records read = " in out and "0 quarantined" in out
    assert sorted(os.listdir("out")) == FILES and sorted(os.listdir()) == ["out", "t.csv"]
    assert Scores.load("out/scores.parquet").top(2).ids.tolist() == ["signal", "weak"]
    page = Path("out/report.html").read_text()
    assert "better than random columns" in page and page.index("better than random") < page.index("Ranking")
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert manifest["proof"]["better"] is True and manifest["parameters"]["seed"] == 0


def test_no_better_than_random_is_said_as_plainly(run, folder: Path) -> None:
    data = table()
    order = np.random.default_rng(1).permutation(len(data))
    pa_csv.write_csv(data.set_column(data.num_columns - 1, "y", data["y"].take(order)), "t.csv")
    code, out, _ = run(*BASE)
    assert code == 0 and out.startswith("The 10 best columns are no better than 10 random ones here")
    assert "no better than random columns" in Path("out/report.html").read_text()


def test_pairs_and_combinations(run, folder: Path) -> None:
    pq.write_table(table(noise=4), "t.parquet")
    code, out, _ = run("t.parquet", *BASE[1:], "--order", "2", "--pairs", "all", "--top", "2", "--json")
    data = json.loads(out)
    assert code == 0 and data["proof"]["k"] == 2 and data["label"] == "y" and data["batches"] == 3
    assert {row["kind"] for row in data["ranking"]} == {"column", "combination", "control"}
    extra = {"3mr_ranks.tsv", "pairwise_ranks.tsv", "feature_singles_aggregated.tsv"}
    assert set(os.listdir("out")) == extra | set(FILES)
    order = [line.split("\t")[0] for line in Path("out/3mr_ranks.tsv").read_text().splitlines()]
    assert order[:2] == ["feature", "signal"] and len(order) == 7
    assert len(Path("out/pairwise_ranks.tsv").read_text().splitlines()) == 1 + 15
    page = Path("out/report.html").read_text()
    assert all(f">{part}<" in page for part in ("Redundancy", "Combinations", "Quality of the data"))


def test_the_same_seed_writes_the_same_files(run, folder: Path) -> None:
    for out in ("one", "two"):
        run("t.csv", "--label", "y", "-o", out, "--batch-rows", "1000", "--workers", "1" if out == "one" else "3")
    for name in ("feature_singles.tsv", "quality.tsv", "row_quality.tsv"):
        assert Path("one", name).read_bytes() == Path("two", name).read_bytes()
    for part in ("counts", "proof", "warnings"):
        first, second = (json.loads(Path(out, "manifest.json").read_text()) for out in ("one", "two"))
        assert first[part] == second[part]


def test_what_could_not_be_read_is_kept_aside(run, folder: Path) -> None:
    with open("t.csv", "a") as file:
        file.write("1,2\n")
    code, out, _ = run(*BASE)
    assert code == 0 and "1 quarantined" in out and "unreadable records: out/quarantine.jsonl" in out
    found = json.loads(Path("out/quarantine.jsonl").read_text())
    assert found["raw"] == "1,2" and found["reason"] == "2 fields where the header has 63"
    code, _, err = run(*BASE, "--overwrite", "--strict")
    assert code == 3 and one_sentence(err) and "bad record in" in err


def test_nothing_held_out_measures_nothing(run) -> None:
    code, out, _ = run(*BASE, "--hold-out", "0", "--no-controls")
    assert code == 0 and "random" not in out and "CONTROL" not in Path("out/feature_singles.tsv").read_text()


def test_a_dry_run_says_what_it_would_cost_and_writes_nothing(run, folder: Path) -> None:
    plan = ["--dry-run", "--order", "2", "--pairs", "all"]
    code, out, err = run(*BASE, *plan)
    assert (code, err) == (0, "") and out.endswith("nothing was written\n") and sorted(os.listdir()) == ["t.csv"]
    found = json.loads(run(*BASE, *plan, "--json")[1])
    assert found["columns"] == 62 and found["rows"] == pytest.approx(4000, rel=0.1) and not found["rows_known"]
    assert found["batches"] == pytest.approx(3, abs=1) and found["seconds"] > 0 and found["peak_bytes"] > 1e8
    pq.write_table(table(), "t.parquet")
    found = json.loads(run("t.parquet", *BASE[1:], "--dry-run", "--columns", "weak,signal", "--json")[1])
    assert (found["rows"], found["rows_known"], found["columns"], found["files"]) == (4000, True, 2, 1)
    with pa.CompressedOutputStream("t.csv.gz", "gzip") as file:
        pa_csv.write_csv(table(), file)
    assert "not known" in run("t.csv.gz", *BASE[1:], "--dry-run")[1]
    for wrong, code in (("--label=why", 3), ("--order=0", 2), ("--columns=nose1", 3)):
        assert run(*BASE, "--dry-run", wrong)[0] == code
    assert not Path("out").exists()


# --- exit codes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["absent.csv", *BASE[1:]], 2, "absent.csv does not exist"),
        ([*BASE, "--label", "why"], 3, "no column 'why' to rank by"),
        ([*BASE, "--label", "yy"], 3, "nearest names: 'y'"),
        ([*BASE, "--order", "0"], 2, "order must be a whole number"),
        ([*BASE, "--top", "0"], 2, "--top must be at least 1"),
        ([*BASE, "--seed", "-1"], 2, "--seed must be 0"),
        ([*BASE, "--hold-out", "1.5"], 2, "hold_out must be"),
        ([*BASE, "--columns", "signal,nose1"], 3, "no column 'nose1' (nearest names"),
        ([*BASE[:4], "no/such/out"], 2, "output folder"),
        (["empty.csv", *BASE[1:]], 4, "every input is empty"),
        (["constant.csv", *BASE[1:]], 3, "label 'y' has one value in all rows: '1'"),
        (["sorted.csv", *BASE[1:], "--batch-rows", "100"], 3, "Pass --shuffle global"),
    ],
)
def test_failures_are_one_sentence_and_leave_nothing(run, folder: Path, arguments, code: int, said: str) -> None:
    Path("empty.csv").touch()
    Path("constant.csv").write_text("x,y\n1,1\n2,1\n1,1\n")
    Path("sorted.csv").write_text("x,y\n" + "".join(f"{n % 3},{n // 1000}\n" for n in range(2000)))
    before = sorted(os.listdir())
    got, out, err = run(*arguments)
    assert (got, out) == (code, "") and one_sentence(err) and said in err
    assert sorted(os.listdir()) == before


def test_an_existing_output_is_refused_and_a_strange_one_never_replaced(run, folder: Path) -> None:
    assert run(*BASE)[0] == 0
    code, _, err = run(*BASE)
    assert code == 2 and "out exists; pass --overwrite" in err
    assert run(*BASE, "--overwrite")[0] == 0
    Path("out/mine.txt").write_text("mine")
    code, _, err = run(*BASE, "--overwrite")
    assert code == 2 and "mine.txt" in err and Path("out/mine.txt").read_text() == "mine"


def test_an_output_inside_the_input_would_be_read_next_time(run, folder: Path) -> None:
    code, _, err = run(".", *BASE[1:])
    assert code == 2 and "lies inside the input" in err and os.listdir() == ["t.csv"]


def test_an_interrupt_exits_130_and_leaves_nothing(run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ranking._Run, "finish", stop)
    code, _, err = run(*BASE)
    assert (code, err) == (130, "salience: interrupted; no unfinished output was left\n")
    assert os.listdir() == ["t.csv"]


# --- hostile names and values -------------------------------------------------------------------------------


class Page(HTMLParser):
    """Collect what a page would run, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.active = "", []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.active += [value for name, value in attributes if name.startswith("on")] + [tag] * (tag == "script")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_names_and_values_are_shown_not_run(run, folder: Path) -> None:
    data = table(noise=1)
    evil = ["=cmd()", HOSTILE, "\x1b[31mred\ttab\nline"]
    data = data.rename_columns([*evil, "y"]).set_column(
        3, "y", pa.array(np.where(data["y"].to_numpy() == "buy", HOSTILE, "\x1b]0;x\x07"))
    )
    pq.write_table(data, "t.parquet")
    code, out, err = run("t.parquet", *BASE[1:], "--order", "2", "--pairs", "all", "--label", "y")
    page = Page(Path("out/report.html").read_text())
    assert code == 0 and page.active == [] and HOSTILE in page.text
    assert [c for c in out + err if not c.isprintable() and c != "\n"] == []
    for name in ("feature_singles.tsv", "quality.tsv", "row_quality.tsv", "pairwise_ranks.tsv", "3mr_ranks.tsv"):
        lines = Path("out", name).read_text().split("\n")
        assert len({line.count("\t") for line in lines[:-1]}) == 1  # no cell breaks its line
        assert not any(cell[:1] in ("=", "@", "\x1b") for line in lines for cell in line.split("\t"))
    assert "'=cmd()" in Path("out/feature_singles.tsv").read_text()
    assert set(Scores.load("out/scores.parquet").ids) == set(evil)  # exact here
