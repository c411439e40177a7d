"""Scores of the steps of a trace with a shared prefix, against encoding every shortened chain anew, on one core.

A trace has 20 steps of 48 tokens behind a question of 48. The model is a Llama-type decoder with random weights. Three
layouts of functional steps:

1. all: all 20 are functional;
2. spread: 8 of 20, as in the paper's LIMO (40 %), evenly over the trace;
3. behind: 8 of 20, all behind the solution.

Plain: one pass of the model over each shortened chain, as one would write it. Lean: the same in passes that compute
logits of the answer alone, the best that can be done without a cache. What sharing alone can save is the quotient of
tokens: for `all` it is below 2 plus the question's part. Scores must agree to 1e-4. Rounds alternate; figures are
ratios of CPU time in the same round, medians and worst.

Usage: python benchmarks/pir.py [--rounds 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from salience.data.pir.scoring import AnswerScorer, Chain

STEPS, TOKENS, ANSWER, VOCABULARY = 20, 48, 6, 32_000
LAYOUTS = {"all": list(range(20)), "spread": [1, 4, 6, 9, 11, 14, 16, 19], "behind": list(range(12, 20))}
GATE = 3.0


def network() -> Any:
    """Twelve layers of width 256 and a vocabulary of 32,000, as such models have."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=688, num_hidden_layers=12, num_attention_heads=4,
        max_position_embeddings=2048,
    )).eval()  # fmt: skip


def chain() -> Chain:
    """Random tokens."""
    rng = np.random.default_rng(0)
    before, *steps = rng.integers(VOCABULARY, size=(1 + STEPS, TOKENS)).tolist()
    return Chain(before, steps, [5, 6], rng.integers(VOCABULARY, size=ANSWER).tolist())


def plain(model: Any, trace: Chain, variants: list[list[int]]) -> np.ndarray:
    """Each chain by itself, as one would write it."""
    found = []
    with torch.no_grad():
        for kept in variants:
            ids = torch.tensor([trace.ids(kept)])
            log_p = model(input_ids=ids).logits.float().log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
            found.append(-float(log_p[-ANSWER:].mean()))
    return np.array(found)


def measured(model: Any, scorer: AnswerScorer, lean: AnswerScorer, which: list[int], rounds: int) -> dict[str, float]:
    """Ratios of times over those with the cache."""
    trace, everything = chain(), list(range(STEPS))
    variants = [everything, *([n for n in everything if n != gone] for gone in which)]
    ways = {
        "cached": lambda: scorer.nll(trace, variants), "plain": lambda: plain(model, trace, variants),
        "lean": lambda: lean.nll(trace, variants),
    }  # fmt: skip
    ratios: dict[str, list[float]] = {"plain": [], "lean": []}
    worst = 0.0
    for number in range(rounds):
        order = list(ways)[number % 3 :] + list(ways)[: number % 3]
        seconds, scores = {}, {}
        for name in order:
            began = time.process_time()
            scores[name] = ways[name]()
            seconds[name] = time.process_time() - began
        for name, values in ratios.items():
            values.append(seconds[name] / seconds["cached"])
            difference = (scores[name][1:] - scores[name][0]) - (scores["cached"][1:] - scores["cached"][0])
            worst = max(worst, float(np.abs(difference).max()))
    if worst > 1e-4:
        raise SystemExit(f"scores differ by {worst:.2e}: nothing to compare")
    again = sum(len(trace.ids(kept)) for kept in variants)
    shared = len(trace.ids(everything)) + sum(len(trace.ids(kept)) - trace.shared(kept) for kept in variants[1:])
    return {
        "plain, median": statistics.median(ratios["plain"]), "plain, worst": min(ratios["plain"]),
        "lean, median": statistics.median(ratios["lean"]), "tokens saved, at most": again / shared,
        "largest difference of scores": worst,
    }  # fmt: skip


def main() -> None:
    """Measure, and print the figures beside the gate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="also write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    model = network()
    with torch.no_grad():
        for parameter in model.parameters():  # larger, so that steps matter and a wrong path shows
            if parameter.ndim > 1:
                parameter.mul_(3)
    import transformers

    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=_no_tokens())
    scorer, lean = AnswerScorer(model, tokenizer), AnswerScorer(model, tokenizer, prefix_cache=False)
    figures: dict[str, Any] = {
        f"{name}: {what}": value
        for name, which in LAYOUTS.items()
        for what, value in measured(model, scorer, lean, which, options.rounds).items()
    }
    figures["gate, plain at 20 steps"] = GATE
    print(json.dumps(figures, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _no_tokens() -> Any:
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))


if __name__ == "__main__":
    main()
