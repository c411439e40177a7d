"""PIR, perplexity-based importance refinement: score the functional steps of a trace and drop the least important.

    PIR(x_i) = log( PPL(R without x_i) / PPL(R) )

the mean negative log-likelihood of the answer's tokens without step i minus that with it, in nats per token: every step
is left out of the *original* chain by itself, all others stay. Above 0 the step helps; at 0 or below, the answer is as
likely or likelier without it.

Source: Xiao et al., LIMOPro: Reasoning Refinement for Efficient and Effective Test-time Scaling, NeurIPS 2025
(arXiv 2505.19187v2), sections 3.2 and 3.3, Algorithm 1. The printed equations condition on steps and answer; the
question is put first here, as Algorithm 1 hands over the whole solution [R].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from salience.data.pir.pruning import check_ratio, prune_steps
from salience.data.pir.scoring import AnswerScorer, TooLong
from salience.data.pir.steps import FUNCTIONAL, PATTERNS, Judge, Step, check_patterns, classify_steps, segment_reasoning
from salience.errors import DataError, InputError


class PIR:
    """Shorten reasoning traces by the functional steps that the answer does not need.

    Parameters
    ----------
    model : transformers causal language model
        The evaluator; the paper has Qwen2.5-32B-Instruct.
    tokenizer : transformers tokenizer
    ratio : float in [0, 1]
        Share of each functional pattern's steps, trace by trace, to remove, rounded down. The paper studies 0.2 to 0.8.
    patterns : sequence of str
        Which of verification, multi_method and error_correction to prune.
    judge : callable, optional
        Says what steps without a marker are (see `classify_steps`); without one they count as progressive and stay.
    segmenter : callable, optional
        Cuts a trace into steps (see `segment_reasoning`).
    columns : (str, str, str)
        Names of question, reasoning and answer. A reasoning that is a list of texts is taken as its steps.
    template, batch_size, max_length, prefix_cache
        See `AnswerScorer`.
    on_overflow : {"raise", "skip"}
        What to do with an example that is longer than the model reads; one that is skipped stays as it is. Nothing is
        ever cut: that would change every score.

    Raises
    ------
    InputError
        A parameter is out of range.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, ratio: float = 0.4, patterns: Sequence[str] = FUNCTIONAL,
        judge: Judge | None = None, segmenter: Callable[[str], Sequence[str]] | None = None,
        columns: tuple[str, str, str] = ("question", "reasoning", "answer"), template: str | None = None,
        batch_size: int = 8, max_length: int | None = None, prefix_cache: bool = True,
        on_overflow: Literal["raise", "skip"] = "raise",
    ) -> None:  # fmt: skip
        check_ratio(ratio)
        if on_overflow not in ("raise", "skip"):
            raise InputError(f"on_overflow must be 'raise' or 'skip', not {on_overflow!r}")
        if len(set(columns)) != 3:
            raise InputError(f"columns must be three names, of question, reasoning and answer; got {columns!r}")
        self.ratio, self.patterns, self.judge, self.segmenter = ratio, check_patterns(patterns), judge, segmenter
        self.columns, self.on_overflow = columns, on_overflow
        self.scorer = AnswerScorer(
            model, tokenizer, template=template, batch_size=batch_size, max_length=max_length,
            prefix_cache=prefix_cache,
        )  # fmt: skip

    def answer_nll(self, question: str, steps: Sequence[str], answer: str) -> float:
        """Mean negative log-likelihood of the answer's tokens after these steps, in nats: log PPL(R).

        Raises
        ------
        DataError
            The answer has no token, the chain is too long, or a log-probability is not finite.
        """
        chain = self.scorer.encode(question, steps, answer)
        return float(self.scorer.nll(chain, [range(len(steps))])[0])

    def score(
        self, question: str, steps: Sequence[Step], answer: str, patterns: Sequence[str] | None = None
    ) -> Float[np.ndarray, " steps"]:
        """PIR of every functional step, NaN for the others; also set on the steps, with their tokens.

        Parameters
        ----------
        question, answer : str
        steps : sequence of Step
        patterns : sequence of str, optional
            Score steps of these patterns instead of ``self.patterns``; all of ``PATTERNS`` for the comparator "spirit".

        Returns
        -------
        (n,) float64, in nats per token of the answer
        """
        wanted = self.patterns if patterns is None else patterns
        if unknown := [pattern for pattern in wanted if pattern not in PATTERNS]:
            raise InputError(f"patterns: {unknown[0]!r} is none of {', '.join(PATTERNS)}")
        chain = self.scorer.encode(question, [step.text for step in steps], answer)
        everything = range(len(steps))
        which = [number for number in everything if steps[number].pattern in wanted]
        scores = np.full(len(steps), np.nan)
        if which:
            without = [[other for other in everything if other != number] for number in which]
            nll = self.scorer.nll(chain, [everything, *without])
            scores[which] = nll[1:] - nll[0]
        for step, ids, value in zip(steps, chain.steps, scores, strict=True):
            step.tokens, step.pir = len(ids), None if np.isnan(value) else float(value)
        return scores

    def steps_of(self, reasoning: str | Sequence[str]) -> list[Step]:
        """The steps of a trace, each with its pattern."""
        texts = segment_reasoning(reasoning, self.segmenter) if isinstance(reasoning, str) else list(reasoning)
        return classify_steps(texts, self.judge)

    def refine(self, example: Mapping[str, Any]) -> dict[str, Any]:
        """The example with its reasoning shortened, and why.

        Parameters
        ----------
        example : mapping
            With question, reasoning and answer under their column names; everything else is handed on.

        Returns
        -------
        dict
            A new example, with ``pir`` added: ``tokens_before`` and ``tokens_after`` of the reasoning, ``skipped``
            (None or why nothing was done), and ``steps`` with text, pattern, relates_to, marker, tokens, pir, removed
            and reason of each.

        Raises
        ------
        DataError
            A part is missing or empty, or see `score` and `classify_steps`.
        """
        question, reasoning, answer = self.parts_of(example)
        steps, skipped = self.steps_of(reasoning), None
        try:
            self.score(question, steps, answer)
            prune_steps(steps, self.ratio, self.patterns)
        except TooLong as error:
            if self.on_overflow == "raise":
                raise
            skipped = str(error)
            for step in steps:
                step.tokens, step.reason = self.scorer.count(step.text), "the example is too long for the model"
        kept = [step.text for step in steps if not step.removed]
        result = dict(example)
        result[self.columns[1]] = "".join(kept) if isinstance(reasoning, str) else kept
        tokens = [step.tokens or 0 for step in steps]
        result["pir"] = {
            "tokens_before": sum(tokens), "skipped": skipped,
            "tokens_after": sum(count for count, step in zip(tokens, steps) if not step.removed),
            "steps": [vars(step) for step in steps],
        }  # fmt: skip
        return result

    def refine_dataset(self, data: Any) -> Any:
        """Refine every example; a data set in gives a data set out.

        Parameters
        ----------
        data : datasets.Dataset, list of dict, or anything with the Arrow stream protocol (pandas, polars, pyarrow)

        Returns
        -------
        datasets.Dataset, list of dict, or pa.Table
            As many examples, in their order.

        Raises
        ------
        InputError
            `data` is nothing of the kind.
        DataError
            An example cannot be refined; its number is named.
        """
        if isinstance(data, list):
            return self._refined(data)
        if hasattr(data, "from_list") and hasattr(data, "column_names") and not isinstance(data, pa.Table):
            return type(data).from_list(self._refined(data))
        if hasattr(data, "__arrow_c_stream__"):
            return pa.Table.from_pylist(self._refined(pa.table(data).to_pylist()))
        raise InputError(
            f"data: {type(data).__name__} is no data set; give a list of dict, datasets.Dataset or a table"
        )

    def parts_of(self, example: Mapping[str, Any]) -> tuple[str, str | list[str], str]:
        """Question, reasoning and answer of an example, checked."""
        values: list[Any] = []
        for name, what in zip(self.columns, ("question", "reasoning", "answer"), strict=True):
            value: Any = example.get(name)
            if isinstance(value, np.ndarray):
                value = value.tolist()
            texts: list[Any] = value if what == "reasoning" and isinstance(value, list) else [value]
            if not texts or not all(isinstance(text, str) for text in texts):
                raise DataError(f"field {name!r} ({what}) holds {value!r:.40}; text is needed")
            if not "".join(texts).strip():
                raise DataError(f"field {name!r} ({what}) is empty")
            values.append(value)
        return values[0], values[1], values[2]

    def _refined(self, examples: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        refined = []
        for number, example in enumerate(examples):
            try:
                refined.append(self.refine(example))
            except DataError as error:
                raise type(error)(f"example {number}: {error}") from error
        return refined
