"""PIR on what language models of several sizes wrote to GSM8K's test questions, right and wrong.

A trace is one model's solution; three more follow as "Alternatively, ...". A small language model, trained on GSM8K's
training questions for some CPU minutes, knows little arithmetic, but it learns that the answer repeats what the solution
has found. Whether a solution reached the gold answer is in the data, and PIR does not see it.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from salience.cli import main

FOLDER = Path(os.environ.get("SALIENCE_DATA", "")) / "gsm8k"
pytestmark = [
    pytest.mark.realdata, pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("SALIENCE_DATA"), reason="SALIENCE_DATA names no data folder"),
    pytest.mark.skipif(not (FOLDER / "train.jsonl").is_file(), reason=f"{FOLDER} holds no train.jsonl"),
]  # fmt: skip
TRACES = 150
EXAMPLE = Path(__file__).parents[2] / "examples" / "choose.py"


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    """What `examples/choose.py` defines."""
    return runpy.run_path(str(EXAMPLE))


@pytest.fixture(scope="module")
def language_model(example: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gsm8k-model")
    example["train_evaluator"](FOLDER, folder)
    return folder


def test_alternatives_that_reach_the_answer_score_higher(
    example: dict[str, Any], language_model: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    told_apart = [row for row in example["pool"](FOLDER) if 0 < sum(row["right"][1:]) < 3]
    mixed = told_apart[:TRACES]
    path, out = tmp_path / "solutions.jsonl", tmp_path / "refined.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in mixed))
    monkeypatch.setattr(sys, "argv", ["salience", "refine", "traces", str(path), "--model", str(language_model), "-o", str(out),
                                      "--ratio", "0.4", "--template", example["TEMPLATE"], "--skip-long", "--json"])  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        main()
    told = capsys.readouterr()
    assert not stopped.value.code, told.err
    found = json.loads(told.out)
    print(found["verdict"])
    refined = found["counts"]["refined"]
    assert refined > 0.9 * TRACES and refined + found["counts"]["skipped"] == TRACES
    assert found["removed"]["multi_method"] == refined
    assert found["better"] is True and found["tokens_after"] < 0.9 * found["tokens_before"]
    right, scores, gone = [], [], []
    for line in out.read_text().splitlines():
        row = json.loads(line)
        if row["pir"]["skipped"]:
            continue
        for correct, step in zip(row["right"][1:], row["pir"]["steps"][1:], strict=True):
            assert step["pattern"] == "multi_method"
            right.append(correct)
            scores.append(step["pir"])
            gone.append(step["removed"])
    right, gone = np.array(right), np.array(gone)
    print(roc_auc_score(right, scores), right.mean(), right[gone].mean())
    assert roc_auc_score(right, scores) > 0.55  # chance is 0.5, with a standard error of 0.028 at 450 steps
    assert right[gone].mean() < right.mean()
