"""PIR on what language models of several sizes wrote to GSM8K's test questions, right and wrong.

A trace is one model's solution; three more follow as "Alternatively, ...". A small language model, trained on GSM8K's
training questions for some CPU minutes, knows little arithmetic, but it learns that the answer repeats what the solution
has found. Whether a solution reached the gold answer is in the data, and PIR does not see it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from sklearn.metrics import roc_auc_score
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from salience.cli import main

FOLDER = Path(os.environ.get("SALIENCE_DATA", "")) / "gsm8k"
pytestmark = [
    pytest.mark.realdata, pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("SALIENCE_DATA"), reason="SALIENCE_DATA names no data folder"),
    pytest.mark.skipif(not (FOLDER / "train.jsonl").is_file(), reason=f"{FOLDER} holds no train.jsonl"),
]  # fmt: skip
AUTHORS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
TEMPLATE = "{question}\n{reasoning}#### {answer}"
STEPS, BATCH, LENGTH, RATE, TRACES = 500, 10, 224, 3e-3, 150


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def language_model(tmp_path_factory) -> Path:
    """A Llama of 0.8 million parameters on GSM8K's training questions, with single digits as tokens."""
    texts = []
    for row in lines(FOLDER / "train.jsonl"):
        solution, answer = row["answer"].rsplit("\n#### ", 1)
        texts.append(TEMPLATE.format(question=row["question"], reasoning=solution + "\n", answer=answer))
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=1024, special_tokens=["</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ))  # fmt: skip
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=1024, bos_token_id=None, eos_token_id=0,
    ))  # fmt: skip
    stream = torch.tensor([token for ids in tokenizer(texts)["input_ids"] for token in [*ids, 0]])
    optimizer, generator = torch.optim.AdamW(model.parameters(), RATE), torch.Generator().manual_seed(0)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / 50, 1.02 - step / STEPS)
        starts = torch.randint(len(stream) - LENGTH, (BATCH,), generator=generator)
        ids = torch.stack([stream[start : start + LENGTH] for start in starts])
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("gsm8k-model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trace(row: dict, order: np.ndarray) -> dict:
    """The solutions one after the other, the first as it is."""
    steps, right = [], []
    for place, author in enumerate(np.array(AUTHORS)[order]):
        solution = row[author]["solution"].rsplit("\nA:", 1)[0].strip()
        steps.append((f"Alternatively, {solution}" if place else solution) + "\n")
        right.append(bool(row[author]["is_correct"]))
    gold = row["ground_truth"].rsplit("A:", 1)[1].strip()
    return {"question": row["question"], "reasoning": steps, "answer": gold, "right": right}


def test_alternatives_that_reach_the_answer_score_higher(
    language_model: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    rng = np.random.default_rng(0)
    written = [trace(row, rng.permutation(4)) for row in lines(FOLDER / "example_model_solutions.jsonl")]
    mixed = [row for row in written if 0 < sum(row["right"][1:]) < 3][:TRACES]  # something to tell apart
    path, out = tmp_path / "solutions.jsonl", tmp_path / "refined.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in mixed))
    monkeypatch.setattr(sys, "argv", ["salience", "refine", "traces", str(path), "--model", str(language_model), "-o", str(out),
                                      "--ratio", "0.4", "--template", TEMPLATE, "--json"])  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        main()
    told = capsys.readouterr()
    assert not stopped.value.code, told.err
    found = json.loads(told.out)
    print(found["verdict"])
    assert found["counts"]["refined"] == TRACES and found["removed"]["multi_method"] == TRACES
    assert found["better"] is True and found["tokens_after"] < 0.9 * found["tokens_before"]
    right, scores, gone = [], [], []
    for line in out.read_text().splitlines():
        row = json.loads(line)
        for correct, step in zip(row["right"][1:], row["pir"]["steps"][1:], strict=True):
            assert step["pattern"] == "multi_method"
            right.append(correct)
            scores.append(step["pir"])
            gone.append(step["removed"])
    right, gone = np.array(right), np.array(gone)
    print(roc_auc_score(right, scores), right.mean(), right[gone].mean())
    assert roc_auc_score(right, scores) > 0.55  # chance is 0.5, with a standard error of 0.028 at 450 steps
    assert right[gone].mean() < right.mean()
