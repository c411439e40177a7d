"""Texts through a language model: log-probabilities of spans, and embeddings."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from salience.errors import DataError, InputError, NothingToDo
from salience.model.at import training_mode
from salience.model.batches import map_batches


def span_log_probs(
    model: Any,
    tokenizer: Any,
    prefix: str,
    continuations: Sequence[str],
    *,
    batch_size: int = 32,
) -> list[Float[Tensor, " _"]]:
    r"""Log-probability of every token of each continuation, given the prefix that they share.

    .. math:: \log p(t_j \mid \text{prefix}, t_1, \dots, t_{j-1})

    The prefix runs through the model once; its keys and values serve all continuations. Prefix and
    continuation are tokenised together, as the model would see them: a token that spans the seam belongs to
    the continuation.

    Parameters
    ----------
    model : transformers causal language model
        Run in evaluation mode and without gradients; its training flag is given back.
    tokenizer : PreTrainedTokenizerFast
        A fast tokenizer, which knows where in the text each token lies.
    prefix : str
        May be empty if the tokenizer puts a token at the beginning by itself.
    continuations : sequence of str
        Texts that go on directly from `prefix`; write the space between them where there is one.

    Returns
    -------
    list of Tensor
        One float32 tensor (tokens,) per continuation, on the CPU, in nats.

    Raises
    ------
    InputError
        The tokenizer is not a fast one, the model is not causal or keeps no cache of keys and values, or a
        first token has nothing before it.
    DataError
        A continuation has no token, or a log-probability is not finite.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise InputError(f"model: {type(model).__name__} is no causal language model but an encoder-decoder")
    if not continuations:
        raise NothingToDo("continuations: there are none")
    rows, starts = _tokenise(tokenizer, prefix, continuations)
    # What all rows share, short of one token: the last shared token is run again to predict what follows it.
    shared = min(starts) - 1
    while any(row[:shared] != rows[0][:shared] for row in rows):
        shared -= 1
    width = max(len(row) for row in rows) - shared - 1
    device = next(model.parameters()).device
    with training_mode(model, False), torch.no_grad():
        cache = _cache(model, rows[0][:shared], device) if shared else None

        def log_probs(batch: list[list[int]]) -> Tensor:
            tails = [torch.tensor(row[shared:]) for row in batch]
            ids = pad_sequence(tails, batch_first=True).to(device)
            mask = pad_sequence([torch.ones(shared + len(t), dtype=torch.long) for t in tails], batch_first=True)
            kwargs = {} if cache is None else {_cache_name(model): copy.deepcopy(cache)}
            for own in kwargs.values():  # a pass writes to its cache, so each batch has a copy
                own.batch_repeat_interleave(len(batch))
            # Padding stands on the right, where no token before it can see it and no position is shifted.
            logits = model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1].to(device), **kwargs).logits
            logits = logits.float()
            chosen = logits.gather(-1, ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)
            return torch.nn.functional.pad(chosen, (0, width - chosen.shape[1]))

        table = map_batches(log_probs, rows, batch_size=batch_size)
    spans = [
        values[start - shared - 1 : len(row) - shared - 1].clone()
        for values, row, start in zip(table, rows, starts, strict=True)
    ]
    for text, span in zip(continuations, spans, strict=True):
        if not torch.isfinite(span).all():
            raise DataError(f"model: a log-probability of {text[:40]!r} is not finite")
    return spans


def embed(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    batch_size: int = 32,
    pooling: Literal["mean", "cls", "last"] = "mean",
) -> Float[Tensor, "n dim"]:
    """Embed texts as unit vectors from the last hidden states of a `transformers` model.

    Parameters
    ----------
    model : transformers model
        Its backbone is used, without a head; of an encoder-decoder the encoder. Run in evaluation mode and
        without gradients; its training flag is given back.
    tokenizer : transformers tokenizer
        Texts longer than it and the model allow are cut at the end.
    texts : sequence of str
    batch_size : int
        Texts per pass; halved when memory runs out.
    pooling : {"mean", "cls", "last"}
        Mean over the tokens, the first token, or the last one.

    Returns
    -------
    Tensor, shape (n, dim)
        float32, of Euclidean length 1, on the CPU, in the order of `texts`.

    Raises
    ------
    InputError
        `pooling` is unknown.
    DataError
        A text has no token, or an embedding is zero or not finite.
    """
    if pooling not in ("mean", "cls", "last"):
        raise InputError(f"pooling: got {pooling!r}; it must be 'mean', 'cls' or 'last'")
    device = next(model.parameters()).device
    config = model.config
    backbone = model.get_encoder() if getattr(config, "is_encoder_decoder", False) else model.base_model
    longest = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or 10**9)

    def one_batch(batch: Sequence[str]) -> Tensor:
        rows = tokenizer(list(batch), truncation=True, max_length=longest)["input_ids"]
        for text, row in zip(batch, rows, strict=True):
            if not row:
                raise DataError(f"texts: {text[:40]!r} has no token")
        # Padded here, on the right: many tokenizers of language models have no padding token.
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        hidden = backbone(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()
        if pooling == "mean":
            pooled = (hidden * mask[..., None]).sum(1) / lengths[:, None]
        elif pooling == "cls":
            pooled = hidden[:, 0]
        else:
            pooled = hidden[torch.arange(len(rows), device=device), lengths - 1]
        if not torch.isfinite(pooled).all() or (pooled == 0).all(1).any():
            raise DataError("model: an embedding is zero or not finite")
        return normalize(pooled, dim=1)

    with training_mode(model, False), torch.no_grad():
        return map_batches(one_batch, list(texts), batch_size=batch_size)


def _tokenise(tokenizer: Any, prefix: str, continuations: Sequence[str]) -> tuple[list[list[int]], list[int]]:
    """Token ids of prefix + continuation, and where in them each continuation begins."""
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"tokenizer: {type(tokenizer).__name__} is not a fast tokenizer, which this needs")
    rows, starts = [], []
    for i, text in enumerate(continuations):
        encoded = tokenizer(prefix + text, return_offsets_mapping=True)
        ids, ends = encoded["input_ids"], [end for _, end in encoded["offset_mapping"]]
        inside = [j for j, end in enumerate(ends) if end > len(prefix)]
        if not inside:
            raise DataError(f"continuations: number {i}, {text[:40]!r}, has no token")
        if inside[0] == 0:
            raise InputError("prefix: is empty and the tokenizer begins with no token of its own; give a prefix")
        rows.append(ids[: inside[-1] + 1])  # without a special token that ends the text
        starts.append(inside[0])
    return rows, starts


def _cache(model: Any, ids: list[int], device: torch.device) -> Any:
    output = model(input_ids=torch.tensor([ids], device=device), use_cache=True)
    cache = getattr(output, _cache_name(model), None)
    if not hasattr(cache, "batch_repeat_interleave"):
        raise InputError(f"model: {type(model).__name__} keeps no cache of keys and values to share")
    return cache


def _cache_name(model: Any) -> str:
    """transformers 5.24 began to call it `cache`."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
