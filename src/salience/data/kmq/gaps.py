"""The score gap of iterative kMQ: how much better the given answer is than the one that the model writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from salience.errors import DataError, InputError, NothingToDo
from salience.model.at import training_mode
from salience.model.batches import map_batches
from salience.model.text import span_log_probs

Scorer = Callable[[Sequence[str], Sequence[str]], Any]


def score_gap(
    model: Any, tokenizer: Any, examples: Sequence[tuple[str, str]], scorer: Scorer, *, max_new_tokens: int = 512,
    max_prompt_tokens: int = 2048, batch_size: int = 8,
) -> Float[np.ndarray, " n"]:  # fmt: skip
    r"""Score of the given answer minus score of the answer that the model writes to the same prompt.

        S_i = score(x_i, y_gold) - score(x_i, y_gen),      y_gen by greedy decoding from the current weights

    Parameters
    ----------
    model : transformers causal language model
        Run in evaluation mode and without gradients; its training flag is given back.
    tokenizer : transformers tokenizer
    examples : sequence of (str, str)
        Prompt (as the model is to be asked, first turn only) and given answer.
    scorer : callable
        ``scorer(prompts, answers) -> (n,)``, larger for better answers: `reward_scorer`, `perplexity_scorer`, or
        a judge of your own.
    max_new_tokens, max_prompt_tokens : int
        Longest answer; of a longer prompt the end is kept.
    batch_size : int
        Prompts per pass; halved when memory runs out.

    Returns
    -------
    (n,) float64
        Above 0 where the given answer is better: there is something to learn.

    Raises
    ------
    InputError
        The model cannot generate, or the scorer gives another number of scores.
    DataError
        A prompt has no token, or a score is not finite.
    NothingToDo
        There are no examples.

    Notes
    -----
    Source: arXiv 2409.11378, Algorithm 1 and section 2.3; lengths and greedy decoding as in the authors' code.
    """
    if not len(examples):
        raise NothingToDo("examples: there are none")
    if not hasattr(model, "generate"):
        raise InputError(f"model: {type(model).__name__} writes no text")
    prompts, gold = (list(part) for part in zip(*examples))
    written = _generate(model, tokenizer, prompts, max_new_tokens, max_prompt_tokens, batch_size)
    scores = []
    for answers in (gold, written):
        values = np.asarray(scorer(prompts, answers), dtype=np.float64)
        if values.shape != (len(prompts),):
            raise InputError(f"scorer: gave scores of shape {values.shape} for {len(prompts)} answers")
        if not np.isfinite(values).all():
            raise DataError(f"scorer: the score of answer {int(np.argmax(~np.isfinite(values)))} is not finite")
        scores.append(values)
    return scores[0] - scores[1]


def perplexity_scorer(model: Any, tokenizer: Any) -> Scorer:
    """Score an answer by minus its perplexity under a language model: the paper's "ppl" arm.

    The end of the text counts as a token of the answer, so that an empty answer has a score, too.
    """
    end = tokenizer.eos_token
    if end is None:
        raise InputError("tokenizer: has no token for the end of a text")

    def score(prompts: Sequence[str], answers: Sequence[str]) -> Float[np.ndarray, " n"]:
        spans = [
            span_log_probs(model, tokenizer, prompt, [answer + end])[0] for prompt, answer in zip(prompts, answers)
        ]
        return np.array([-float(torch.exp(-span.double().mean())) for span in spans])

    return score


def reward_scorer(model: Any, tokenizer: Any, *, template: str = "{prompt}{answer}", batch_size: int = 8) -> Scorer:
    """Score an answer by the one logit of a reward model (`AutoModelForSequenceClassification`, one label).

    Parameters
    ----------
    model : transformers sequence classifier
    tokenizer : transformers tokenizer
    template : str
        How prompt and answer are put together for this reward model.
    batch_size : int

    Raises
    ------
    InputError
        The model has more than one label.
    """
    if getattr(model.config, "num_labels", None) != 1:
        raise InputError(f"model: has {getattr(model.config, 'num_labels', 'no')} labels; a reward model has one")
    device = next(model.parameters()).device

    def one_batch(texts: list[str]) -> Tensor:
        # One text a pass: which end a classifier reads the reward from depends on its padding token.
        rows = [tokenizer(text, return_tensors="pt", truncation=True) for text in texts]
        return torch.cat([model(**{name: part.to(device) for name, part in row.items()}).logits[:, 0] for row in rows])

    def score(prompts: Sequence[str], answers: Sequence[str]) -> Float[np.ndarray, " n"]:
        texts = [template.format(prompt=prompt, answer=answer) for prompt, answer in zip(prompts, answers)]
        with training_mode(model, False), torch.no_grad():
            return map_batches(one_batch, texts, batch_size=batch_size).double().cpu().numpy()

    return score


def _generate(
    model: Any, tokenizer: Any, prompts: list[str], max_new_tokens: int, max_prompt_tokens: int, batch_size: int
) -> list[str]:
    device = next(model.parameters()).device
    end = tokenizer.eos_token_id
    filler = next(t for t in (tokenizer.pad_token_id, end, 0) if t is not None)

    def one_batch(batch: list[str]) -> tuple[Tensor, Tensor]:
        rows = [ids[-max_prompt_tokens:] for ids in tokenizer(list(batch))["input_ids"]]
        for prompt, ids in zip(batch, rows, strict=True):
            if not ids:
                raise DataError(f"examples: the prompt {prompt[:40]!r} has no token")
        width = max(map(len, rows))
        # Padded here, on the left: what is written must follow its prompt directly.
        ids = torch.tensor([[filler] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        written = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens,
            pad_token_id=filler,
        )[:, width:]  # fmt: skip
        lengths = torch.full((len(rows),), written.shape[1])
        return torch.nn.functional.pad(written, (0, max_new_tokens - written.shape[1]), value=filler), lengths

    with training_mode(model, False), torch.no_grad():
        tokens, lengths = map_batches(one_batch, prompts, batch_size=batch_size)
    return tokenizer.batch_decode(
        [row[:length].tolist() for row, length in zip(tokens, lengths)], skip_special_tokens=True
    )
