"""What idle layers save, against a full step of the same model in one run on one core.

A step is forward, backward and AdamW on a Llama-type decoder of 12 layers. Full fine-tuning (embeddings and head
frozen) and LoRA on all projections, each with

1. all layers active;
2. the lower half idle, where the backward pass must really stop;
3. half of the layers idle, and three quarters (the paper's default), drawn by IST anew at each step;

against a gate of 0.75 for half of the layers; beside the time of the hook itself (gate: 1.03 of a plain step with all
layers active), what the updates of the scores cost at their default interval, and the bytes that wait for the backward
pass, of gradients and of the optimiser's state. Rounds alternate; figures are ratios of CPU time in the same round:
machines are noisy.

Usage: python benchmarks/ist.py [--rounds 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from salience.weights import ImportanceSparseTuning

LAYERS, ROWS, TOKENS = 12, 8, 48
GATES = {
    "lower half idle, of a full step": 0.75,
    "half idle, drawn, of a full step": 0.75,
    "hook, of a plain step": 1.03,
}


def network(kind: str) -> Any:
    """A decoder with random weights, tuned fully or by LoRA."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=512, hidden_size=192, intermediate_size=512, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=4,
    ))  # fmt: skip
    if kind == "LoRA":
        return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    model.requires_grad_(False)
    model.model.layers.requires_grad_(True)
    return model


class Stepper:
    """A model with its optimiser, and one way to choose its layers."""

    def __init__(self, kind: str, choose: Callable[[ImportanceSparseTuning, int], Any] | None, **options: Any) -> None:
        self.model, self.choose, self.number = network(kind), choose, 0
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], 1e-4)
        self.tuning = ImportanceSparseTuning(self.model, **options)
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(512, (ROWS, TOKENS), generator=generator)
        self.batch = {"input_ids": tokens, "labels": tokens}

    def step(self) -> None:
        if self.choose is not None:
            self.choose(self.tuning, self.number)
        self.optimizer.zero_grad(set_to_none=True)
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self.number += 1

    def timed(self, steps: int) -> float:
        """Mean CPU seconds of a step."""
        began = time.process_time()
        for _ in range(steps):
            self.step()
        return (time.process_time() - began) / steps

    def bytes(self) -> dict[str, int]:
        """Of one more step: what waits for the backward pass, gradients, and the optimiser's state so far."""
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        if self.choose is not None:
            self.choose(self.tuning, self.number)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.model(**self.batch).loss
        loss.backward()
        gradients = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)
        self.optimizer.step()
        states = sum(v.nbytes for s in self.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor))
        return {
            "activations": sum(size for at, size in kept.items() if at not in weights),
            "gradients": gradients, "optimiser state": states,
        }  # fmt: skip


def draw(tuning: ImportanceSparseTuning, step: int) -> None:
    """As IST does, without updates of the scores."""
    tuning.before_step(0)


def lower_half_idle(tuning: ImportanceSparseTuning, step: int) -> None:
    tuning._activate(list(range(LAYERS // 2, LAYERS)))


def measured(kind: str, rounds: int, steps: int) -> dict[str, float]:
    """Ratios of times, medians over the rounds, and of bytes."""
    ways: dict[str, Stepper] = {
        "full": Stepper(kind, None, mode="random"),
        "hook": Stepper(kind, draw, mode="random", n_update=1.0),
        "lower half idle": Stepper(kind, lower_half_idle, mode="random", n_update=0.5),
        "half idle, drawn": Stepper(kind, draw, mode="random", n_update=0.5),
        "three quarters idle, drawn": Stepper(kind, draw, mode="random", n_update=0.25),
    }  # fmt: skip
    for way in ways.values():
        way.timed(2)
    found: dict[str, list[float]] = {name: [] for name in ways if name != "full"}
    scoring: list[float] = []
    for number in range(rounds):
        order = list(ways)[number % len(ways) :] + list(ways)[: number % len(ways)]
        seconds = {name: ways[name].timed(steps) for name in order}
        for name, values in found.items():
            values.append(seconds[name] / seconds["full"])
        learner = Stepper(kind, None, interval=1)
        began = time.process_time()
        learner.tuning.before_step(1, learner.batch)
        scoring.append((time.process_time() - began) / 10 / seconds["full"])
    held = {name: way.bytes() for name, way in ways.items() if name != "hook"}
    parked = Stepper(kind, draw, mode="random", n_update=0.25)
    parked.tuning.idle_state, parked.tuning.optimizer = "drop", parked.optimizer
    parked.timed(3)
    held["three quarters idle, state dropped"] = parked.bytes()
    return {
        **{f"{kind}: {name}, of a {'plain' if name == 'hook' else 'full'} step": statistics.median(values)
           for name, values in found.items()},
        f"{kind}: updates of the scores, of a full step": statistics.median(scoring),
        **{f"{kind}: {what}, {name}, of a full step": size / held["full"][what]
           for name, sizes in held.items() if name != "full" for what, size in sizes.items()},
    }  # fmt: skip


def main() -> None:
    """Measure, and print the figures beside their gates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="steps of each way in a round")
    parser.add_argument("--json", help="also write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    figures: dict[str, Any] = {}
    for kind in ("full fine-tuning", "LoRA"):
        figures |= measured(kind, options.rounds, options.steps)
    figures["gates"] = GATES
    print(json.dumps(figures, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
