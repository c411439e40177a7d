r"""The perplexity of the answer given a chain of steps, for many shortened chains at once.

    PPL(R) = exp( -1/m sum_j log p(a_j | q, x_1 .. x_n, a_1 .. a_{j-1}) )

Question, each step and answer are tokenised by themselves, so that a shortened chain is the chain without the tokens of
some steps, whatever stands beside them. What lies before the first missing step is the same in the full chain: its keys
and values are computed once and cut to length for each shortened chain.

Source: Xiao et al., LIMOPro (arXiv 2505.19187), section 3.2 and Algorithm 1.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from salience.errors import DataError, InputError
from salience.model.at import training_mode
from salience.model.batches import map_batches

PLAIN = "{question}\n\n{reasoning}\n\n{answer}"
PADDING = 1.05  # most tokens computed in a batch, of those needed


class Chain(NamedTuple):
    """Token ids of one example: what stands before the steps, each step, what links them to the answer, the answer."""

    before: list[int]
    steps: list[list[int]]
    link: list[int]
    answer: list[int]

    def ids(self, kept: Sequence[int]) -> list[int]:
        """All tokens of the chain with these steps alone."""
        return [*self.before, *(token for number in kept for token in self.steps[number]), *self.link, *self.answer]

    def shared(self, kept: Sequence[int]) -> int:
        """Tokens that a shortened chain has in common with the full one before its first missing step."""
        length = len(self.before)
        for place, number in enumerate(kept):
            if place != number:
                break
            length += len(self.steps[place])
        # The token before the answer predicts it, so it is run again if it would be shared.
        return min(length, len(self.ids(kept)) - len(self.answer) - 1)


class _Row(NamedTuple):
    shared: int
    tail: list[int]


class AnswerScorer:
    """Negative log-likelihood per token of an answer, given a question and some steps.

    Parameters
    ----------
    model : transformers causal language model
        Run in evaluation mode and without gradients; its training flag is given back.
    tokenizer : transformers tokenizer
    template : str, optional
        With ``{question}``, ``{reasoning}`` and, at the end, ``{answer}``. By default the tokenizer's chat template for
        the question, where it has one, and blank lines between the parts.
    batch_size : int
        Shortened chains per pass; halved when memory runs out.
    max_length : int, optional
        Longest chain in tokens; by default what the model's configuration says.
    prefix_cache : bool
        Share keys and values. Models that keep no such cache of all tokens (sliding windows, recurrence), or take no
        positions, encode every chain anew whatever is asked for here.

    Raises
    ------
    InputError
        The model is no causal language model, or a parameter is out of range.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, template: str | None = None, batch_size: int = 8,
        max_length: int | None = None, prefix_cache: bool = True,
    ) -> None:  # fmt: skip
        config = getattr(model, "config", None)
        if config is None or getattr(config, "is_encoder_decoder", False) or not hasattr(model, "forward"):
            raise InputError(f"model: {type(model).__name__} is no causal language model of transformers")
        if tokenizer is None or not callable(tokenizer):
            raise InputError("tokenizer: there is none; the model directory needs its tokenizer files")
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, not {batch_size}")
        if max_length is not None and max_length < 2:
            raise InputError(f"max_length must be at least 2, not {max_length}")
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.max_length = max_length or getattr(config.get_text_config(), "max_position_embeddings", None)
        self._parts = _template(template)
        accepted = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in accepted else "past_key_values"  # renamed by transformers 5.24
        self._keeps_logits = "logits_to_keep" in accepted
        self._positions = "position_ids" in accepted
        self._cached = prefix_cache and self._positions and self._cache_name in accepted

    def encode(self, question: str, steps: Sequence[str], answer: str) -> Chain:
        """Tokenise the parts of an example, each by itself.

        Raises
        ------
        DataError
            The answer has no token, nothing stands before it, or the chain is longer than the model reads.
        """
        if self._parts is None and getattr(self.tokenizer, "chat_template", None):
            turn = [{"role": "user", "content": question}]
            before = self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            link, start = "\n\n", []
        else:
            head, middle, link = self._parts or _split(PLAIN)
            before = head + question + middle
            start = self._beginning()
        chain = Chain(
            start + self._ids(before), [self._ids(step) for step in steps], self._ids(link), self._ids(answer)
        )
        length = len(chain.ids(range(len(steps))))
        if not chain.answer:
            raise DataError(f"the answer {answer[:40]!r} has no token")
        if not chain.before:
            raise DataError("there is nothing before the steps: the question is empty and the template adds nothing")
        if self.max_length is not None and length > self.max_length:
            raise TooLong(
                f"question, reasoning and answer have {length:,} tokens; the model reads {self.max_length:,}. Cutting "
                "would change every score: take a model with a longer context, or skip such examples"
            )
        return chain

    def nll(self, chain: Chain, variants: Sequence[Sequence[int]]) -> Float[np.ndarray, " variants"]:
        """Mean negative log-likelihood of the answer, in nats per token, for each choice of steps.

        Parameters
        ----------
        chain : Chain
        variants : sequence of sequences of int
            Numbers of the steps that stay, rising; equal ones are computed once.

        Raises
        ------
        DataError
            A log-probability is not finite.
        """
        full = tuple(range(len(chain.steps)))
        wanted = [tuple(kept) for kept in variants]
        found: dict[tuple[int, ...], float] = {}
        with training_mode(self.model, False), torch.no_grad():
            others = sorted({kept for kept in wanted if kept != full}, key=lambda kept: (self._tail(chain, kept), kept))
            cache = None
            if full in wanted or (others and self._cached):
                found[full], cache = self._whole(chain.ids(full), len(chain.answer), keep=bool(others))
            if cache is None:
                found |= {kept: self._whole(chain.ids(kept), len(chain.answer))[0] for kept in others}
            else:
                length = len(chain.ids(full)) - 1
                alone = [kept for kept in others if not chain.shared(kept)]  # a mask needs something to leave open
                found |= {kept: self._whole(chain.ids(kept), len(chain.answer))[0] for kept in alone}
                others = [kept for kept in others if kept not in found]
                rows = [_Row(shared := chain.shared(kept), chain.ids(kept)[shared:]) for kept in others]
                values: list[float] = []
                for batch in self._batches(rows):
                    values += map_batches(
                        lambda part: self._behind(part, cache, length, len(chain.answer)), batch, batch_size=len(batch)
                    ).tolist()
                found |= dict(zip(others, values))
        result = np.array([found[kept] for kept in wanted], dtype=np.float64)
        if not np.isfinite(result).all():
            raise DataError("model: a log-probability of the answer is not finite")
        return result

    def _tail(self, chain: Chain, kept: Sequence[int]) -> int:
        return len(chain.ids(kept)) - chain.shared(kept)

    def _batches(self, rows: list[_Row]) -> list[list[_Row]]:
        """Rows sorted by their tails, put together while padding costs little."""
        batches: list[list[_Row]] = []
        needed = 0
        for row in rows:
            if batches and len(batches[-1]) < self.batch_size:
                count = len(batches[-1]) + 1
                if len(row.tail) * count <= PADDING * (needed + len(row.tail)):
                    batches[-1].append(row)
                    needed += len(row.tail)
                    continue
            batches.append([row])
            needed = len(row.tail)
        return batches

    def _whole(self, ids: list[int], answer: int, keep: bool = False) -> tuple[float, Any]:
        """NLL of a chain in one pass, and the keys and values of all its tokens but the last."""
        given = torch.tensor([ids], device=self._device)
        options: dict[str, Any] = {"logits_to_keep": answer} if self._keeps_logits else {}
        output = self.model(input_ids=given[:, :-1], use_cache=keep and self._cached, **options)
        value = float(_nll(output.logits[:, -answer:], given[:, -answer:])[0])
        cache = getattr(output, self._cache_name, None) if keep and self._cached else None
        return value, cache if _plain(cache) else None

    def _behind(self, rows: list[_Row], cache: Any, length: int, answer: int) -> Float[Tensor, " rows"]:
        """NLLs of chains whose beginnings stand in the cache of the full chain.

        Tails are aligned on the right. Between the part of the cache that a row shares and its tail lies a hole that
        the mask closes; positions count on as if it were not there.
        """
        most, width = max(row.shared for row in rows), max(len(row.tail) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), most + width, dtype=torch.long)
        positions = torch.zeros(len(rows), width, dtype=torch.long)
        for at, (shared, tail) in enumerate(rows):
            ids[at, width - len(tail) :] = torch.tensor(tail)
            mask[at, :shared] = 1
            mask[at, most + width - len(tail) :] = 1
            positions[at, width - len(tail) :] = torch.arange(shared, shared + len(tail))
        ids, mask, positions = (part.to(self._device) for part in (ids, mask, positions))
        own = copy.deepcopy(cache)  # a pass writes to its cache
        own.crop(-(length - most)) if length > most else None
        own.batch_repeat_interleave(len(rows))
        options: dict[str, Any] = {"logits_to_keep": answer} if self._keeps_logits else {}
        logits = self.model(
            input_ids=ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1], use_cache=True,
            **{self._cache_name: own}, **options,
        ).logits  # fmt: skip
        return _nll(logits[:, -answer:], ids[:, -answer:])

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self._ids(text))

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _beginning(self) -> list[int]:
        """The token that the tokenizer puts at the beginning of a text by itself, if any."""
        first = self.tokenizer.bos_token_id
        return [first] if first is not None and self.tokenizer("a")["input_ids"][:1] == [first] else []


class TooLong(DataError):
    """A chain is longer than the model reads."""


def _nll(logits: Float[Tensor, "rows answer vocabulary"], ids: Tensor) -> Float[Tensor, " rows"]:
    """Mean over the answer's tokens, upcast: halves of bfloat16 are as large as the differences sought."""
    logits = logits.float()
    chosen = logits.gather(-1, ids[..., None])[..., 0] - logits.logsumexp(-1)
    return -chosen.double().mean(-1)


def _plain(cache: Any) -> bool:
    """Whether a cache keeps keys and values of all tokens in every layer, and can be cut and repeated."""
    layers = getattr(cache, "layers", None) or ()
    return len(layers) > 0 and all(type(layer).__name__ == "DynamicLayer" for layer in layers)


def _template(template: str | None) -> tuple[str, str, str] | None:
    if template is None:
        return None
    try:
        return _split(template)
    except ValueError:
        raise InputError(
            f"template must hold {{question}}, {{reasoning}} and {{answer}} once each, in this order and the answer at "
            f"the end; got {template!r}"
        ) from None


def _split(template: str) -> tuple[str, str, str]:
    """What stands before the question, between question and steps, and between steps and answer."""
    head, rest = template.split("{question}")
    middle, rest = rest.split("{reasoning}")
    link, end = rest.split("{answer}")
    if end:
        raise ValueError
    return head, middle, link
