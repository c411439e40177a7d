"""`salience refine traces`: what is printed first, what is written, a judge, and bad input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from salience.data import PIR, refine_traces
from salience.data.pir.steps import FUNCTIONAL
from salience.errors import NothingToDo
from salience.io import verify_output
from salience.model import load
from salience.scores import Scores


@pytest.fixture(autouse=True)
def _argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)


CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A character-level Llama that has learnt to say the number of the last "It is n" again."""
    folder = tmp_path_factory.mktemp("model")
    inner = Tokenizer(models.WordLevel({c: i for i, c in enumerate(CHARACTERS)}, unk_token=" "))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="\n")
    torch.manual_seed(0)
    net = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(CHARACTERS), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=512, bos_token_id=None, eos_token_id=None,
    ))  # fmt: skip
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    rng = np.random.default_rng(0)
    for step in range(250):
        said = rng.integers(10, size=(16, 1 + step % 12))  # long ones too, as attention must not stray
        texts = [f"{' Check it is '.join(map(str, row))}.\n\n{row[-1]}" for row in said]
        ids = torch.tensor(tokenizer(texts)["input_ids"])
        labels = torch.full_like(ids, -100)
        labels[:, -1] = ids[:, -1]
        loss = net(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def traces(count: int = 12, seed: int = 0) -> list[dict]:
    """A wrong number, then checks that repeat it, corrections, and alternatives."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        right, wrong = rng.permutation(10)[:2]
        reasoning = (
            f"First, we add. It is {wrong}. Wait, it is {wrong}. Let me check: it is {wrong}. Double-check: it is {right}."
            f" Alternatively, it is {wrong}. Another way. It is {right}."
        )
        rows.append({"id": number, "question": f"No. {number}?", "reasoning": reasoning, "answer": str(right)})
    return rows


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "traces.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in traces()))
    return path


def base(jsonl: Path, model: Path, out: Path) -> list[object]:
    return ["refine", "traces", jsonl, "--model", model, "-o", out]


def test_the_proof_comes_first_and_every_removal_is_explained(
    jsonl: Path, model: Path, tmp_path: Path, salience
) -> None:
    out = tmp_path / "out.jsonl"
    code, told, err = salience(*base(jsonl, model, out), "--ratio", 0.5)
    assert code == 0, err
    first = told.splitlines()[0]
    assert first.startswith("Refined traces predict the answer ") and "at random: perplexity" in first
    assert "12 records read = 12 refined + 0 unchanged + 0 skipped + 0 blank + 0 quarantined" in told
    rows, before = [json.loads(line) for line in out.read_text().splitlines()], traces()
    assert [row["id"] for row in rows] == list(range(12))
    for row, old in zip(rows, before, strict=True):
        steps = row["pir"]["steps"]
        assert "".join(step["text"] for step in steps) == old["reasoning"]
        assert row["reasoning"] == "".join(step["text"] for step in steps if not step["removed"])
        assert (row["question"], row["answer"]) == (old["question"], old["answer"])
        gone = [step for step in steps if step["removed"]]
        assert sorted(step["pattern"] for step in gone) == ["multi_method", "verification"]
        assert all("lowest" in step["reason"] and step["pir"] is not None for step in gone)
    log = [json.loads(line) for line in (tmp_path / "out.jsonl.steps.jsonl").read_text().splitlines()]
    assert len(log) == sum(len(row["pir"]["steps"]) for row in rows)
    scores = Scores.load(tmp_path / "out.jsonl.scores.parquet")
    scored = [step for step in log if step["pir"] is not None]
    assert scores.unit == "step" and scores.aligned([f"{s['record']}:{s['step']}" for s in scored]).tolist() == [
        step["pir"] for step in scored
    ]
    page = (tmp_path / "out.jsonl.report.html").read_text()
    assert "<del>" in page and "no better than random removal" not in page and "Tokens by step pattern" in page
    assert verify_output(out).ok


def test_the_figures_are_of_direct_evaluation(model: Path, tmp_path: Path) -> None:
    loaded = load(model)
    pir = PIR(loaded.model, loaded.processor, ratio=0.5)
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in traces(30)))
    found = refine_traces(path, tmp_path / "out.jsonl", pir)
    full, ours = [], []
    for line in (tmp_path / "out.jsonl").read_text().splitlines():
        row = json.loads(line)
        for kept, values in ((row["pir"]["steps"], full), ([s for s in row["pir"]["steps"] if not s["removed"]], ours)):
            values.append(pir.answer_nll(row["question"], [step["text"] for step in kept], row["answer"]))
    np.testing.assert_allclose(found.nll["full chain"], full, atol=1e-5)
    np.testing.assert_allclose(found.nll["PIR"], ours, atol=1e-5)
    assert found.mean("random") == pytest.approx(np.mean(found.draws)) and len(found.draws) == 5
    assert found.gain("full chain").mean == pytest.approx(np.mean(full) - np.mean(ours), abs=1e-5)
    # The model repeats the last number, which the last alternative says: random removal loses it half of the time.
    assert found.better is True and found.mean("PIR") < found.mean("random")


def test_the_same_whatever_the_batch_the_files_and_the_format(
    jsonl: Path, model: Path, tmp_path: Path, salience
) -> None:
    parquet = tmp_path / "traces.parquet"
    pq.write_table(pa.Table.from_pylist(traces()), parquet, row_group_size=5)
    found = []
    for source, out, batch in ((jsonl, "a.jsonl", 8), (jsonl, "b.jsonl", 1), (parquet, "c.parquet", 8)):
        code, told, err = salience(
            *base(source, model, tmp_path / out), "--ratio", 0.5, "--batch-size", batch, "--json"
        )
        assert code == 0, err
        found.append(json.loads(told))
    assert (tmp_path / "c.parquet.manifest.json").exists()
    table = pq.read_table(tmp_path / "c.parquet")
    kept = [json.loads(line)["reasoning"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert table.column("reasoning").to_pylist() == kept
    assert table.column("pir").to_pylist()[0]["steps"][1]["pattern"] == "verification"
    assert found[0]["nll"]["PIR"] == pytest.approx(found[1]["nll"]["PIR"], abs=1e-5) == found[2]["nll"]["PIR"]
    assert found[0]["tokens_after"] == found[1]["tokens_after"] < found[0]["tokens_before"]
    assert set(found[0]["patterns"]) == {"progressive", *FUNCTIONAL}


def test_ready_steps_one_pattern_and_other_names(model: Path, tmp_path: Path, salience) -> None:
    path = tmp_path / "own.jsonl"
    rows = [{"q": "1?", "steps": ["It is 3.", " Wait, it is 4.", " Wait, it is 5."], "a": "5"}] * 6
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, told, err = salience(*base(path, model, tmp_path / "o.jsonl"), "--ratio", 0.5, "--question", "q", "--reasoning",
                          "steps", "--answer", "a", "--pattern", "verification", "--json")  # fmt: skip
    assert code == 0, err
    assert json.loads(told)["removed"] == {
        "progressive": 0,
        "verification": 6,
        "multi_method": 0,
        "error_correction": 0,
    }
    assert json.loads((tmp_path / "o.jsonl").read_text().splitlines()[0])["steps"] == ["It is 3.", " Wait, it is 5."]


def test_a_local_model_as_judge(model: Path, tmp_path: Path, salience) -> None:
    path = tmp_path / "plain.jsonl"
    path.write_text(
        "".join(json.dumps({**row, "reasoning": "It is 3.\n\nIt is 4.\n\nIt is 5."}) + "\n" for row in traces(2))
    )
    code, _, err = salience(*base(path, model, tmp_path / "o.jsonl"))
    assert code == 4 and "no step of any trace is functional" in err and "--judge" in err
    code, _, err = salience(*base(path, model, tmp_path / "o.jsonl"), "--judge", model, "--ratio", 0.9)
    assert code in (0, 4), err  # as the tiny model finds; the plumbing is the same


def test_a_chat_endpoint_as_judge(model: Path, tmp_path: Path, salience, monkeypatch) -> None:
    import sys as system

    system.path.insert(0, str(Path(__file__).parents[1] / "data"))
    from test_pir_judges import Fake, ok

    path, fake = tmp_path / "plain.jsonl", Fake()
    path.write_text(
        "".join(json.dumps({**row, "reasoning": "It is 3.\n\nIt is 4.\n\nIt is 5."}) + "\n" for row in traces(6))
    )
    reply = json.dumps(
        [{"step": n, "pattern": "verification" if n else "progressive", "relates_to": 0} for n in range(3)]
    )
    fake.script = [ok(reply)] * 6
    monkeypatch.setenv("JUDGE_KEY", "secret")
    command = [
        *base(path, model, tmp_path / "o.jsonl"),
        "--judge",
        fake.url,
        "--judge-model",
        "judge-1",
        "--ratio",
        0.5,
    ]
    code, _, err = salience(*command, "--judge-key", "JUDGE_KEY")
    fake.close()
    assert code == 0, err
    assert len(fake.asked) == 6 and fake.headers[0]["Authorization"] == "Bearer secret"
    written = "".join(file.read_text() for file in tmp_path.glob("o.jsonl*.json*"))
    assert "secret" not in written and '"relates_to": 0' in written
    assert salience(*command, "--judge-key", "NO_KEY", "--overwrite")[0] == 2
    code, _, err = salience(*base(path, model, tmp_path / "p.jsonl"), "--judge", fake.url)
    assert code == 2 and "--judge-model is missing" in err


def test_unusable_records_are_set_aside(model: Path, tmp_path: Path, salience) -> None:
    path = tmp_path / "some.jsonl"
    good = [json.dumps(row) for row in traces(8)]
    path.write_text("\n".join([*good, '{"question": "?"}', "{not json", ""]))
    command = base(path, model, tmp_path / "o.jsonl")
    code, _, err = salience(*command, "--ratio", 0.5)
    assert code == 3 and "2 of 10 records of the traces are bad" in err
    code, _, err = salience(*command, "--ratio", 0.5, "--strict")
    assert code == 3 and not (tmp_path / "o.jsonl").exists()
    code, told, err = salience(*command, "--ratio", 0.5, "--max-bad", 0.3)
    assert code == 0, err
    assert "10 records read = 8 refined + 0 unchanged + 0 skipped + 0 blank + 2 quarantined" in told
    bad = [json.loads(line) for line in (tmp_path / "o.jsonl.quarantine.jsonl").read_text().splitlines()]
    assert any("field 'reasoning' (reasoning) holds None" in record["reason"] for record in bad)


def test_long_traces_stop_the_run_or_are_skipped(jsonl: Path, model: Path, tmp_path: Path, salience) -> None:
    path = tmp_path / "long.jsonl"
    rows = traces(6)
    rows[2]["reasoning"] *= 9
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [*base(path, model, tmp_path / "o.jsonl"), "--ratio", 0.5]
    code, _, err = salience(*command)
    assert code == 3 and "long.jsonl at " in err and "the model reads 512" in err and not list(tmp_path.glob("o.*"))
    code, told, err = salience(*command, "--skip-long")
    assert code == 0 and "5 refined + 0 unchanged + 1 skipped" in told and "longer than the model reads" in err
    kept = [json.loads(line)["reasoning"] for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert kept[2] == rows[2]["reasoning"]


def test_a_dry_run_writes_nothing_and_needs_no_model(jsonl: Path, tmp_path: Path, salience) -> None:
    code, told, _ = salience(
        *base(jsonl, tmp_path / "none", tmp_path / "o.jsonl"), "--dry-run", "--json", "--ratio", 0.5
    )
    plan = json.loads(told)
    assert code == 0 and plan["traces"] == 12 and plan["steps"]["verification"] == 36
    assert plan["remove"] == {"progressive": 0, "verification": 12, "multi_method": 12, "error_correction": 0}
    assert plan["passes"] == 12 * 6 and not list(tmp_path.iterdir())


def test_nothing_is_replaced_unasked_and_nothing_is_left_of_a_failure(
    jsonl: Path, model: Path, tmp_path: Path, salience
) -> None:
    command = [*base(jsonl, model, tmp_path / "o.jsonl"), "--ratio", 0.5]
    code, _, err = salience(*base(jsonl, model, tmp_path / "o.jsonl"), "--ratio", 0.1)
    assert (
        code == 4 and "nothing is removed at ratio 0.1: no trace has 10 steps" in err and not list(tmp_path.iterdir())
    )
    assert salience(*command)[0] == 0
    code, _, err = salience(*command)
    assert code == 2 and "--overwrite" in err
    assert salience(*command, "--overwrite")[0] == 0
    assert salience("refine", "traces", jsonl, "--model", model, "-o", jsonl, "--overwrite")[0] == 2


@pytest.mark.parametrize(
    ("extra", "code", "told"),
    [
        (["--ratio", "1.5"], 2, "ratio must lie in 0..1"), (["--pattern", "progressive"], 2, "never pruned"),
        (["--pattern", "verify"], 2, "'verify' is unknown"), (["--template", "{question}"], 2, "template must hold"),
        (["--judge-model", "x"], 2, "go with a --judge"), (["--question", "qestion"], 3, "nearest names: 'question'"),
        (["--device", "tpu9"], 2, "--device"), (["--seed", "-1"], 2, "seed must be"), (["--report", "x.txt"], 2, "--report"),
        (["--reasoning", "thoughts"], 3, "field 'thoughts'"),
    ],
)  # fmt: skip
def test_bad_options(jsonl: Path, model: Path, tmp_path: Path, salience, extra: list, code: int, told: str) -> None:
    got, _, err = salience(*base(jsonl, model, tmp_path / "o.jsonl"), *extra)
    assert got == code and told in err, err
    assert not list(tmp_path.iterdir())


def test_outputs_that_cannot_hold_the_result(jsonl: Path, model: Path, tmp_path: Path, salience) -> None:
    csv = tmp_path / "t.csv"
    csv.write_text('question,reasoning,answer\n1?,"It is 3. Wait, it is 4. Wait, it is 5.",5\n')
    code, _, err = salience(*base(csv, model, tmp_path / "o.csv"))
    assert code == 2 and "must end in .jsonl or .parquet" in err
    code, _, err = salience(*base(jsonl, model, tmp_path / "o.parquet"))
    assert code == 2 and "cannot take jsonl records" in err
    code, told, err = salience(*base(csv, model, tmp_path / "o.jsonl"), "--ratio", 0.5)
    assert code == 0 and "too few traces" in told, err


def test_tables_in_memory(model: Path, tmp_path: Path) -> None:
    loaded = load(model)
    pir = PIR(loaded.model, loaded.processor, ratio=0.5)
    found = refine_traces(pa.Table.from_pylist(traces(6)), tmp_path / "o.parquet", pir)
    assert found.refined == 6 and pq.read_table(tmp_path / "o.parquet").num_rows == 6
    with pytest.raises(NothingToDo):
        refine_traces(
            pa.Table.from_pylist(traces(6)), tmp_path / "p.parquet", PIR(loaded.model, loaded.processor, ratio=0.0)
        )
