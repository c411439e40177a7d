"""What a batch asks of a model and how it answers: logits and labels of the answer's tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from salience.errors import InputError
from salience.model.at import logits_of, run

IGNORED = -100  # label of tokens that belong to no answer, as everywhere in transformers


class Answers(NamedTuple):
    """Logits at every position, the token to be predicted there, which are answers, and which are no padding."""

    logits: Float[Tensor, "batch seq vocab"]
    labels: Int[Tensor, "batch seq"]
    answer: Bool[Tensor, "batch seq"]
    real: Bool[Tensor, "batch seq"]


def split_batch(batch: Any) -> tuple[Any, Tensor]:
    """Inputs and labels of a batch: a mapping with ``labels``, or a sequence whose last entry they are."""
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            raise InputError(f"data: a batch has the entries {', '.join(map(str, batch))}, but no 'labels'")
        return {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]
    if isinstance(batch, tuple | list) and len(batch) >= 2:
        return tuple(batch[:-1]), batch[-1]
    raise InputError(
        f"data: a batch is {type(batch).__name__}; a mapping with 'labels' is needed, or inputs followed by labels"
    )


def answers(model: Callable[..., Any], batch: Any) -> Answers:
    """Run a model on a batch.

    Logits (batch, classes) belong to labels (batch,): one answer a sample. Logits (batch, seq, vocab) belong to labels
    (batch, seq), shifted by one as in causal language models; of longer logits (image tokens come first) the last ones.
    """
    inputs, labels = split_batch(batch)
    logits = logits_of(run(model, inputs)).float()  # type: ignore[arg-type]
    if logits.ndim == 2 and labels.ndim == 1:
        logits, labels = logits[:, None], labels[:, None]
        real = torch.ones_like(labels, dtype=torch.bool)
    elif logits.ndim == 3 and labels.ndim == 2 and logits.shape[1] >= labels.shape[1]:
        logits, labels = logits[:, -labels.shape[1] : -1], labels[:, 1:]
        mask = inputs.get("attention_mask") if isinstance(inputs, dict) else None
        real = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask[:, 1:].bool()
    else:
        raise InputError(
            f"labels: shape {tuple(labels.shape)} for logits of shape {tuple(logits.shape)}; (batch,) for (batch, "
            "classes) or (batch, seq) for (batch, seq, vocab) are needed"
        )
    labels = labels.to(logits.device)
    return Answers(logits, labels, labels != IGNORED, real.to(logits.device))


def answer_losses(model: Callable[..., Any], batch: Any) -> Float[Tensor, " batch"]:
    """Mean negative log-likelihood of every sample's answer tokens, in nats; NaN for a sample without any."""
    found = answers(model, batch)
    log_p = found.logits.log_softmax(dim=-1)
    token = -log_p.gather(2, found.labels.clamp(min=0)[..., None])[..., 0]
    return mean_over(token, found.answer)


def mean_over(values: Float[Tensor, "batch seq"], which: Bool[Tensor, "batch seq"]) -> Float[Tensor, " batch"]:
    """Mean of every row over the positions that count; NaN where none does."""
    return torch.where(which, values, 0.0).sum(dim=1) / which.sum(dim=1)
