"""Real text: a small Llama trained on WikiText-2, rounded, GPTQ, QuaRot-style and RSQ at 3 and 4 bits.

The folder has WikiText-2's validation and test parts: the model learns and is calibrated on the first and is judged on
the second. Run with ``-s`` to see the table.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from salience.model import fit
from salience.weights import RSQQuantizer

DATA = Path(os.environ.get("SALIENCE_DATA", "absent")) / "wikitext-2"
pytestmark = [
    pytest.mark.realdata,
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason="SALIENCE_DATA names no folder with wikitext-2"),
]
LENGTH, BATCH, STEPS, WORDS = 256, 8, 400, 1024
WAYS = {
    "RTN": {"rounding": "nearest", "rotate": None}, "GPTQ": {"importance": "uniform", "rotate": None},
    "QuaRot": {"importance": "uniform"}, "RSQ": {},
}  # fmt: skip


def windows(tokenizer, part: str) -> torch.Tensor:
    ids = torch.tensor(tokenizer.encode((DATA / f"{part}.txt").read_text(encoding="utf-8")).ids)
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


@pytest.fixture(scope="module")
def text():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=WORDS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train([str(DATA / "valid.txt")], trainer)
    return windows(tokenizer, "valid"), windows(tokenizer, "test")[:160]


@pytest.fixture(scope="module")
def model(text):
    """Four layers of 128 units, 400 steps of 8 windows."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=LENGTH,
    )  # fmt: skip
    model, draw = transformers.LlamaForCausalLM(config), torch.Generator().manual_seed(0)
    rows = text[0][torch.randint(len(text[0]), (BATCH * STEPS,), generator=draw)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)

    def schedule(step: int) -> None:
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, step / 40) * (1 + math.cos(math.pi * step / STEPS)) / 2

    def loss(output, ids):
        return cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    fit(model, rows, rows, loss=loss, optimizer=optimizer, epochs=1, generator=draw, batch_size=BATCH, on_step=schedule)
    return model.eval()


@torch.no_grad()
def perplexities(model, rows) -> tuple[float, float]:
    """Over all tokens, and over the last quarter of each window: those with a long context."""
    nats = []
    for part in rows.split(16):
        logits = model(part).logits[:, :-1]
        nats.append(cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none"))
    losses = torch.cat(nats)
    return math.exp(float(losses.mean())), math.exp(float(losses[:, -LENGTH // 4 :].mean()))


def test_quantised_perplexity_on_wikitext(model, text) -> None:
    known, judged = text
    chosen = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(1))[:64]]
    found = {"full precision": perplexities(model, judged)}
    for bits in (3, 4):
        for name, options in WAYS.items():
            quantised = RSQQuantizer(bits=bits, **options).quantize(model, chosen).model
            found[f"{name}, {bits} bits"] = perplexities(quantised, judged)
    for name, (whole, long) in found.items():
        print(f"{name:16s} {whole:8.3f} {long:8.3f}")
    full = found["full precision"]
    assert full[0] < 0.5 * WORDS and full[1] < full[0]  # it has learned, and a longer context helps
    for number in (0, 1):
        for name in WAYS:
            assert found[f"{name}, 4 bits"][number] < found[f"{name}, 3 bits"][number]
        for name in ("GPTQ", "QuaRot", "RSQ"):
            assert found[f"{name}, 3 bits"][number] < found["RTN, 3 bits"][number]
            assert found[f"{name}, 4 bits"][number] < 1.02 * full[number]
