"""A small Llama that reads bytes, trained on the standard library's source code."""

from __future__ import annotations

import math
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from salience.model.fitting import fit
from salience.reproductions.worlds import text

LENGTH = 128  # bytes of a sequence
HELD_OUT = 0.1  # the last tenth of the source
BATCH, STEPS, WARM_UP, RATE = 12, 500, 50, 2e-3
SMOKE_STEPS, SMOKE_PART = 20, "asyncio"


def build(seed: int) -> nn.Module:
    """Three layers of 128 units, 4 heads, 128 tokens; embedding and output matrix of their own."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=512, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def build_tiny(seed: int) -> nn.Module:
    """One layer of 64 units: for the plumbing."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=512, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def sequences(part: str = "") -> tuple[Tensor, Tensor]:
    """Training and held-out sequences of bytes, (n, 128) each; what is not ASCII is a question mark.

    Parameters
    ----------
    part : str
        A package of the standard library; all of it by default.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) / part
    source = "\n".join(document.text for document in text.source_passages(root))
    ids = torch.frombuffer(bytearray(source.encode("ascii", "replace")), dtype=torch.uint8).long()
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    cut = int(len(rows) * (1 - HELD_OUT))
    return rows[:cut], rows[cut:]


def pretrain(model: nn.Module, seed: int) -> None:
    """500 steps of 12 sequences."""
    _train(model, seed, STEPS, "")


def pretrain_shortly(model: nn.Module, seed: int) -> None:
    """20 steps: for the plumbing."""
    _train(model, seed, SMOKE_STEPS, SMOKE_PART)


def _train(model: nn.Module, seed: int, steps: int, part: str) -> None:
    """AdamW with a warm-up, then half a cosine."""
    generator = torch.Generator().manual_seed(seed)
    rows = sequences(part)[0]
    rows = rows[torch.randperm(len(rows), generator=generator)[: BATCH * steps]]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE / WARM_UP)

    def schedule(step: int) -> None:
        share = min(1.0, step / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = RATE * share

    def loss(output: Any, ids: Tensor) -> Tensor:
        return cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    fit(
        model, rows, rows, loss=loss, optimizer=optimizer, epochs=1, generator=generator, batch_size=BATCH,
        on_step=schedule,
    )  # fmt: skip
