"""Take GSM8K through `salience select text`, `--method kmq` and `salience refine traces`, and draw what each did.

    pool.jsonl        1,319 problems, each with what four language models wrote to it, one after the other
    percent.jsonl     what is wanted: other problems, that speak of percentages
    evaluator/        a Llama of 0.8 million parameters, trained on GSM8K's own solutions

Usage: python examples/choose.py GSM8K FOLDER [IMAGE]

GSM8K is a folder with train.jsonl and example_model_solutions.jsonl of github.com/openai/grade-school-math. An
evaluator that FOLDER already holds is not trained again.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

AUTHORS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
TEMPLATE = "{question}\n{reasoning}#### {answer}"
PERCENT = re.compile("percent|%")
STEPS, BATCH, LENGTH, RATE = 500, 10, 224, 3e-3
CHOSEN, COVERING = 400, 200


def lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def trace(row: dict[str, Any], order: np.ndarray) -> dict[str, Any]:
    """A problem and the four solutions, the first as it is and the others as alternatives; which of them are right."""
    steps, right = [], []
    for place, author in enumerate(np.array(AUTHORS)[order]):
        solution = row[author]["solution"].rsplit("\nA:", 1)[0].strip()
        steps.append((f"Alternatively, {solution}" if place else solution) + "\n")
        right.append(bool(row[author]["is_correct"]))
    gold = row["ground_truth"].rsplit("A:", 1)[1].strip()
    return {"question": row["question"], "reasoning": steps, "answer": gold, "right": right, "solved": sum(right)}


def pool(gsm8k: Path) -> list[dict[str, Any]]:
    """Every problem of the file with model-written solutions, the solutions in random order."""
    rng = np.random.default_rng(0)
    return [trace(row, rng.permutation(4)) for row in lines(gsm8k / "example_model_solutions.jsonl")]


def train_evaluator(gsm8k: Path, folder: Path) -> None:
    """A small Llama on GSM8K's training problems, single digits as tokens: minutes of one core.

    It knows little arithmetic, but it learns that the answer repeats what the solution has found.
    """
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts = []
    for row in lines(gsm8k / "train.jsonl"):
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
        if step % 50 == 0:
            print(f"step {step} of {STEPS}", file=sys.stderr)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / 50, 1.02 - step / STEPS)
        starts = torch.randint(len(stream) - LENGTH, (BATCH,), generator=generator)
        ids = torch.stack([stream[start : start + LENGTH] for start in starts])
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def draw(written: list[dict[str, Any]], before: list[dict], chosen: list[dict], image: Path) -> None:
    """Share of percentages at each stage, how many solutions were right, and PIR of right and wrong alternatives."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from salience.report.images import style

    scores: dict[bool, list[float]] = {True: [], False: []}
    for row in written:
        if row["pir"]["skipped"]:
            continue
        for right, step in zip(row["right"][1:], row["pir"]["steps"][1:], strict=True):
            scores[right].append(step["pir"])
    stages = {"pool": before, "select text": chosen, "kmq": written}
    with mpl.style.context(["default", style(dark=False)]):
        figure = Figure(figsize=(10.5, 3.4), layout="constrained")
        left, middle, right_axes = figure.subplots(1, 3)
        left.bar(list(stages), [100 * share(rows) for rows in stages.values()], color="C0")
        left.set(title="speak of percentages", ylabel="% of the problems")
        for name, rows in stages.items():
            solved = np.bincount([row["solved"] for row in rows], minlength=5) / len(rows)
            middle.plot(100 * solved, marker="o", label=name)
        middle.set(title="right solutions of four", xlabel="right", ylabel="% of the problems", xticks=range(5))
        middle.legend(fontsize=8)
        edges = np.linspace(*np.quantile(scores[True] + scores[False], [0.01, 0.99]), 30)
        for right, name in ((True, "reaches the answer"), (False, "does not")):
            right_axes.hist(scores[right], edges, density=True, histtype="step", label=name)
        right_axes.set(title="alternatives in traces", xlabel="PIR, nats per token of the answer", yticks=[])
        right_axes.legend(fontsize=8)
        figure.savefig(image, dpi=130, facecolor="white")


def share(rows: list[dict[str, Any]]) -> float:
    """Share of problems that speak of percentages."""
    return float(np.mean([bool(PERCENT.search(row["question"])) for row in rows]))


def main(gsm8k: Path, folder: Path, image: Path | None) -> None:
    """Prepare, run every command of the page, and print what there was to know about the choices."""
    from smaller import shown

    gsm8k, image = gsm8k.absolute(), image and image.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "evaluator").exists():
        train_evaluator(gsm8k, folder / "evaluator")
    for old in (*folder.glob("chosen*"), *folder.glob("shorter*")):
        (shutil.rmtree if old.is_dir() else Path.unlink)(old)
    before = pool(gsm8k)
    wanted = [{"question": row["question"]} for row in lines(gsm8k / "train.jsonl") if PERCENT.search(row["question"])]
    for name, rows in (("pool", before), ("percent", wanted)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with contextlib.chdir(folder):
        columns = ("--text-column", "question")
        first = ("select", "text", "pool.jsonl", "--target", "percent.jsonl", *columns, "--min-tokens", 0,
                 "--count", CHOSEN)  # fmt: skip
        shown(*first, "-o", "chosen-of-10000.jsonl")
        shown(*first, "--buckets", 1000, "-o", "chosen-by-target.jsonl")
        shown("select", "text", "chosen-by-target.jsonl", "--method", "kmq", "--quality", "solved", *columns,
              "--count", COVERING, "-o", "chosen.jsonl")  # fmt: skip
        shown("refine", "traces", "chosen.jsonl", "--model", "evaluator", "--ratio", 0.4, "--template", TEMPLATE,
              "--skip-long", "-o", "shorter.jsonl")  # fmt: skip
        chosen, written = lines(Path("chosen-by-target.jsonl")), lines(Path("shorter.jsonl"))
    for name, rows in (("pool", before), ("select text", chosen), ("kmq", written)):
        solved = np.mean([row["solved"] for row in rows]) / 4
        told = f"{share(rows):6.1%} speak of percentages, {solved:.1%} of the solutions are right"
        print(f"{name:12}{len(rows):6,} problems, {told}")
    scored = [row for row in written if not row["pir"]["skipped"]]
    steps = [(right, step) for row in scored for right, step in zip(row["right"], row["pir"]["steps"], strict=True)]
    gone = [right for right, step in steps if step["removed"]]
    print(f"alternatives removed: {len(gone)}, {np.mean(gone):.1%} of them right; "
          f"of those kept {np.mean([right for right, step in steps if not step['removed']]):.1%}")  # fmt: skip
    if image is not None:
        image.parent.mkdir(parents=True, exist_ok=True)
        draw(written, before, chosen, image)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None)
