"""`salience select tasks`: what is printed first, what is written, and bad input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.csv
import pyarrow.parquet
import pytest

from salience.data import select_tasks
from salience.errors import DataError, InputError, NothingToDo
from salience.scores import Scores


@pytest.fixture(autouse=True)
def _argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)


@pytest.fixture(scope="module")
def clinics(tmp_path_factory) -> Path:
    """Eight source tables whose labels hang on two directions, and a target that is like the third of them."""
    folder = tmp_path_factory.mktemp("clinics")
    rng = np.random.default_rng(0)
    B = np.linalg.qr(rng.normal(size=(12, 2)))[0]
    angles = np.linspace(0, np.pi, 8, endpoint=False)
    for name, angle, rows in [*((f"c{n}", a, 300) for n, a in enumerate(angles)), ("target", angles[2], 30)]:
        X = rng.normal(size=(rows, 12))
        y = X @ B @ [np.cos(angle), np.sin(angle)] + 0.5 * rng.normal(size=rows)
        frame = pd.DataFrame(X, columns=[f"x{i}" for i in range(12)])
        frame["stay"], frame["kind"] = y, np.where(y > 0, "long", "short")
        frame["clinic"] = name
        frame.to_csv(folder / f"{name}.csv", index=False)
    return folder


def base(folder: Path) -> list[object]:
    return ["select", "tasks", *sorted(folder.glob("c*.csv")), "--target", folder / "target.csv", "--rank", 2]


def test_the_plan_is_written_and_the_proof_printed_first(clinics: Path, tmp_path: Path, salience) -> None:
    out = tmp_path / "chosen"
    code, told, err = salience(*base(clinics), "-y", "stay", "-n", 400, "-o", out)
    assert code == 0, err
    first = told.splitlines()[0]
    assert first.startswith("L1 relevance is ") and "equal shares" in first and "target rows alone" in first
    assert "2,400 source rows read = 400 taken + 2,000 not taken + 0 incomplete" in told
    plan = pyarrow.csv.read_csv(out / "plan.csv").to_pylist()
    assert sum(row["take"] for row in plan) == 400 and plan[0]["task"] in ("c1.csv", "c2.csv", "c3.csv")
    chosen = pyarrow.parquet.read_table(out / "chosen.parquet")
    taken = chosen.to_pandas().groupby("task").size().to_dict()
    assert taken == {row["task"]: row["take"] for row in plan}
    assert not chosen.to_pandas().duplicated().any()
    assert Scores.load(out / "scores.parquet").unit == "task"
    page = (out / "report.html").read_text()
    assert "equal shares" in page and "c2.csv" in page and "left over by the penalty" in page
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["parameters"]["rank"] == 2 and len(manifest["inputs"]) == 9


def test_the_same_seed_chooses_the_same_rows(clinics: Path, tmp_path: Path, salience) -> None:
    tables = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert salience(*base(clinics), "-y", "stay", "-n", 200, "-o", tmp_path / name, "--seed", seed)[0] == 0
        tables.append(pyarrow.parquet.read_table(tmp_path / name / "chosen.parquet"))
    assert tables[0].equals(tables[1]) and not tables[0].equals(tables[2])


def test_labels_of_words_a_task_column_and_json(clinics: Path, tmp_path: Path, salience) -> None:
    whole = tmp_path / "all.csv"
    pd.concat([pd.read_csv(path) for path in clinics.glob("c*.csv")]).to_csv(whole, index=False)
    code, told, err = salience("select", "tasks", whole, "--task", "clinic", "-t", clinics / "target.csv", "-y", "kind",
                          "-n", 300, "--rank", 2, "-o", tmp_path / "out", "--json", "--strategy", "l2")  # fmt: skip
    found = json.loads(told)
    assert code == 0, err
    assert found["measure"] == "share of wrong signs" and found["settings"]["classes"] == ["long", "short"]
    assert {row["task"] for row in found["plan"]} == {f"c{n}" for n in range(8)}
    assert set(found["held_out"]) == {"l1", "l2", "passive", "alone"} and found["verdict"].startswith("L2 relevance")


def test_prices_are_kept_within(clinics: Path, tmp_path: Path, salience) -> None:
    prices = {f"c{n}.csv": 1 + n for n in range(8)}
    table = tmp_path / "prices.csv"
    table.write_text("task,cost\n" + "".join(f"{name},{price}\n" for name, price in prices.items()))
    command = (*base(clinics), "-y", "stay", "-n", 1500, "--costs", table, "--floor", 8, "-o", tmp_path / "out")
    code, _, err = salience(*command)
    plan = pyarrow.csv.read_csv(tmp_path / "out" / "plan.csv").to_pylist()
    assert code == 0, err
    assert 1500 - 8 < sum(row["take"] * prices[row["task"]] for row in plan) <= 1500
    table.write_text("task,cost\nc0.csv,1\n")
    assert "there is no price for task 'c1.csv'" in salience(*command, "--overwrite")[2]
    table.write_text("task,cost\nc0.csv,0\n")
    assert "a price above 0 is needed" in salience(*command, "--overwrite")[2]


def test_a_dry_run_writes_nothing(clinics: Path, tmp_path: Path, salience) -> None:
    code, told, _ = salience(*base(clinics), "-y", "stay", "-n", 200, "-o", tmp_path / "out", "--dry-run", "--json")
    assert code == 0 and json.loads(told)["tasks"] == 8 and not list(tmp_path.iterdir())


def test_an_output_is_never_replaced_unasked(clinics: Path, tmp_path: Path, salience) -> None:
    command = (*base(clinics), "-y", "stay", "-n", 200, "-o", tmp_path / "out")
    assert salience(*command)[0] == 0
    code, _, err = salience(*command)
    assert code == 2 and "--overwrite" in err
    assert salience(*command, "--overwrite")[0] == 0


@pytest.mark.parametrize(
    ("extra", "code", "told"),
    [
        (["-y", "sta", "-n", 200], 2, "label 'sta' is no column of"),
        (["-y", "stay", "-n", 20], 2, "does not cover"),
        (["-y", "stay", "-n", 0], 2, "budget must be at least 1"),
        (["-y", "stay", "-n", 5000], 2, "more than the pools"),
        (["-y", "stay", "-n", 200, "--seed", -1], 2, "--seed"),
        (["-y", "stay", "-n", 200, "--top", 9], 2, "top must be"),
        (["-y", "kind", "-n", 200, "--positive", "lang"], 2, "is no class of 'kind' \\(nearest names: 'long'"),
    ],
)
def test_bad_options_are_named(clinics: Path, tmp_path: Path, salience, extra: list, code: int, told: str) -> None:
    import re

    got, _, err = salience(*base(clinics), *extra, "-o", tmp_path / "out")
    assert got == code and re.search(told, err), err
    assert not list(tmp_path.iterdir())


def frame(rows: int = 30, **columns) -> dict[str, list]:
    rng = np.random.default_rng(rows)
    return {"a": rng.normal(size=rows).tolist(), "b": rng.normal(size=rows).tolist(),
            "y": rng.normal(size=rows).tolist()} | columns  # fmt: skip


def test_tables_that_do_not_fit_are_told() -> None:
    with pytest.raises(InputError, match="no source"):
        select_tasks([], frame(), "y", 10)
    with pytest.raises(InputError, match="label 'y' is no column of task 0"):
        select_tasks([{"a": [1.0]}], frame(), "y", 10)
    with pytest.raises(DataError, match="no column of numbers"):
        select_tasks([{"c": [1.0], "y": [1.0]}], frame(), "y", 10)
    with pytest.raises(DataError, match="words in some tables and numbers in others"):
        select_tasks([frame(y=["u", "v"] * 15)], frame(), "y", 10)
    with pytest.raises(InputError, match="has 3 classes"):
        select_tasks([frame(y=["u", "v", "w"] * 10)], frame(y=["u", "v", "w"] * 10), "y", 10)
    with pytest.raises(NothingToDo, match="no complete row"):
        select_tasks([frame(a=[None] * 29 + [1.0], y=[1.0] * 29 + [None])], frame(), "y", 10)
    with pytest.raises(DataError, match="every input is constant"):
        select_tasks([frame(a=[1.0] * 30, b=[2.0] * 30)], frame(), "y", 10)


def test_incomplete_rows_and_idle_columns_are_counted() -> None:
    holes = frame(60)
    holes["a"][3] = None
    holes["y"][4] = None
    holes["word"] = ["x"] * 60
    holes["still"] = [1.0] * 60
    found = select_tasks([holes, frame(50) | {"still": [1.0] * 50}], frame(20) | {"still": [1.0] * 20}, "y", 60, rank=1)
    assert found.counts == {"rows": 110, "used": 108, "incomplete": 2, "unreadable": 0, "in the target": 0}
    assert any("word" in note for note in found.notes) and any("constant" in note for note in found.notes)
    assert found.taken.sum() == 60 == found.chosen.num_rows


def test_a_target_too_small_to_hold_rows_out_is_not_measured() -> None:
    found = select_tasks([frame(60), frame(61)], frame(6), "y", 60, rank=1)
    assert found.verdict.startswith("not measured") and not found.errors and found.taken.sum() == 60


def test_a_rank_that_a_fold_cannot_fit_is_not_measured() -> None:
    found = select_tasks([frame(60), frame(61)], frame(10) | {}, "y", 60, rank=2)
    assert found.errors  # 8 rows a fold
    wide = [frame(rows, **{f"x{n}": np.random.default_rng([rows, n]).normal(size=rows).tolist() for n in range(6)})
            for rows in (60, 61, 10)]  # fmt: skip
    found = select_tasks(wide[:2], wide[2], "y", 60, rank=7)
    assert not found.errors and any("not measured: rank 7 needs 9 rows" in note for note in found.notes)


def csv(path: Path, rows: int, **columns: list) -> Path:
    pd.DataFrame(frame(rows, **columns)).to_csv(path, index=False)
    return path


def test_chosen_rows_are_as_they_stand_in_the_file(tmp_path: Path) -> None:
    one = csv(tmp_path / "one.csv", 40, code=["00017"] * 40)
    target = csv(tmp_path / "target.csv", 20)
    assert set(select_tasks([one], target, "y", 12, rank=1).chosen["code"].to_pylist()) == {"00017"}
    both = csv(tmp_path / "both.csv", 60, task=["00017"] * 30 + ["00018"] * 30, code=[f"{n:05d}" for n in range(60)])
    found = select_tasks([both], target, "y", 30, task="task", rank=1)
    assert found.names == ["00017", "00018"]
    assert {(row["task"], int(row["code"]) < 30) for row in found.chosen.to_pylist()} == {
        ("00017", True),
        ("00018", False),
    }
    assert all(len(code) == 5 for code in found.chosen["code"].to_pylist())


def test_a_target_among_the_sources_is_refused_and_its_rows_are_left_out(tmp_path: Path) -> None:
    one, target = csv(tmp_path / "one.csv", 40), csv(tmp_path / "target.csv", 20)
    with pytest.raises(InputError, match="is one of the sources"):
        select_tasks([one, tmp_path / "." / "target.csv"], target, "y", 12, rank=1)
    ours, other = frame(20), frame(41)
    found = select_tasks([frame(40), {name: ours[name][:7] + other[name] for name in ours}], ours, "y", 30, rank=1)
    assert found.counts["in the target"] == 7 and found.available.tolist() == [40, 41]
    assert found.equation == ("88 source rows read = 30 taken + 51 not taken + 0 incomplete + 0 unreadable + "
                              "7 equal to a target row")  # fmt: skip


def test_sources_that_do_not_fit_together_are_told_before_anything_is_chosen() -> None:
    def never(message: str) -> None:
        raise AssertionError(message)

    with pytest.raises(DataError, match="column 'id' of the sources is int64 in one table and string"):
        select_tasks([frame(40, id=[1] * 40), frame(41, id=["u"] * 41)], frame(20), "y", 30, rank=1, progress=never)
    parts = [frame(40, id=[1] * 40, clinic=["u"] * 40), frame(41, id=["u"] * 41, clinic=["u"] * 41)]
    with pytest.raises(DataError, match="column 'id' of task 'u'"):
        select_tasks(parts, frame(20), "y", 30, task="clinic", rank=1, progress=never)


def test_a_column_named_task_names_the_tasks_or_is_refused() -> None:
    parts = [frame(40, task=["u"] * 40), frame(41, task=["v"] * 41)]
    with pytest.raises(InputError, match=r"task 0 has a column 'task' already.*--task task"):
        select_tasks(parts, frame(20), "y", 30, rank=1)
    found = select_tasks(parts, frame(20), "y", 30, task="task", rank=1)
    assert found.names == ["u", "v"] and set(found.chosen["task"].to_pylist()) == {"u", "v"}


def test_unreadable_records_are_in_the_equation(tmp_path: Path) -> None:
    one = csv(tmp_path / "one.csv", 300)
    one.write_text(one.read_text() + "1,2,3,4,5\n")
    found = select_tasks([one], frame(20), "y", 30, rank=1)
    assert found.equation == "301 source rows read = 30 taken + 270 not taken + 0 incomplete + 1 unreadable"
