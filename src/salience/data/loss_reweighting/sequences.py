"""One loss per sequence, from the logits of a language model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from salience.errors import InputError

IGNORED = -100  # label of tokens that are no target, as everywhere in transformers


class SequenceLosses(NamedTuple):
    """Mean cross-entropy of each sequence over its target tokens, in nats, and how many these are.

    A sequence without targets has loss 0 and 0 tokens.
    """

    losses: Float[Tensor, " sequences"]
    tokens: Int[Tensor, " sequences"]


def per_sequence_loss(
    logits: Float[Tensor, "batch seq vocab"],
    labels: Int[Tensor, "batch seq"],
    *,
    shift: bool = True,
    segments: Int[Tensor, "batch seq"] | None = None,
) -> SequenceLosses:
    """Mean token cross-entropy of every sequence.

        l_i = sum_t CE(logits_{i,t}, labels_{i,t+1}) / n_i,   over the n_i labels of sequence i that are not -100

    Parameters
    ----------
    logits : (batch, seq, vocab) Tensor
    labels : (batch, seq) int Tensor
        The tokens themselves; -100 where there is no target.
    shift : bool
        Whether position t predicts label t + 1, as in causal language models. False where logits and labels stand at
        the same positions already (masked models, encoder-decoders).
    segments : (batch, seq) int Tensor, optional
        Which document each token of a packed row belongs to, by any numbers within the row. Then there is one loss per
        document, row by row and in the order of the numbers, and no token is predicted from the document before it.

    Raises
    ------
    InputError
        Shapes that do not fit, labels that are not whole numbers, or a label beyond the vocabulary.
    """
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise InputError(
            f"labels: shape {tuple(labels.shape)} for logits of shape {tuple(logits.shape)}; (batch, seq) and (batch, "
            "seq, vocab) are needed"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise InputError(f"labels: got {labels.dtype}; token ids are whole numbers")
    if segments is not None and segments.shape != labels.shape:
        raise InputError(f"segments: shape {tuple(segments.shape)} for labels of shape {tuple(labels.shape)}")
    labels = labels.to(logits.device)
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
        if segments is not None:
            crosses = segments[:, :-1] != segments[:, 1:]
            labels = labels.masked_fill(crosses.to(labels.device), IGNORED)
            segments = segments[:, 1:]
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= logits.shape[2]))]
    if len(wrong):
        raise InputError(f"labels: {int(wrong[0])} is no token of a vocabulary of {logits.shape[2]}, nor {IGNORED}")
    flat = cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none")
    where, count = _sequences(labels, segments)
    losses = torch.zeros(count, dtype=flat.dtype, device=flat.device).index_add(0, where, flat)
    tokens = torch.zeros(count, dtype=torch.int64, device=flat.device)
    tokens = tokens.index_add(0, where, (labels.flatten() != IGNORED).long())
    return SequenceLosses(losses / tokens.clamp(min=1), tokens)


def _sequences(labels: Tensor, segments: Tensor | None) -> tuple[Int[Tensor, " tokens"], int]:
    """The sequence that each token belongs to, and how many sequences there are."""
    rows = torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)
    if segments is None:
        return rows.flatten(), len(labels)
    pairs = torch.stack([rows.flatten(), segments.to(labels.device).flatten()], dim=1)
    found, where = pairs.unique(dim=0, return_inverse=True)
    return where, len(found)
