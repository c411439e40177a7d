"""Cut a reasoning trace into steps, and say what each step is for.

A step is *progressive* (it moves the solution on) or functional: *verification*, *multi_method* (another way to the
same thing) or *error_correction*. Source: Xiao et al., LIMOPro (arXiv 2505.19187), section 3.1 and table 4. In the
paper a language model cuts and an LLM judges the steps without a marker; here both are pluggable, and rules stand in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from salience.errors import DataError, InputError, nearest

FUNCTIONAL = ("verification", "multi_method", "error_correction")
PATTERNS = ("progressive", *FUNCTIONAL)
MOST_SENTENCES = 4  # "typically 3-4 sentences" a step

_LEAD = r"^[\s\-*#>•]*(?:(?:but|so|and|oh|hm+|well|now|ok(?:ay)?|actually|no|yes)\b[\s,.…!—-]*)*"
# The markers of table 4. Single words count at the head of a sentence alone, phrases anywhere in it.
_MARKERS = {
    "error_correction": (
        r"\b(?:this|that) is (?:wrong|incorrect)\b|\b(?:this|that)'s (?:wrong|incorrect)\b|\bthe mistake (?:was|is)\b"
        r"|\b(?:this|that)(?:'s| is) impossible\b|\b(?:this|that) contradicts\b|\bthe error (?:is|was)\b"
        r"|\bI(?:'ve| have)? made (?:a|an) (?:mistake|error)\b"
    ),
    "multi_method": (
        _LEAD + r"alternatively\b|\banother way\b|\btry a different (?:approach|method|way)\b"
        r"|\busing another method\b|\bwe can also (?:verify|check)\b"
    ),
    "verification": (
        _LEAD + r"wait\b(?!\s+(?:for|until|times?|lists?)\b)"
        r"|\blet(?:'s| me| us) (?:re-?)?(?:double[- ]?)?(?:check|verify)\b"
        r"|" + _LEAD + r"double[- ]check(?:ing)?\b|" + _LEAD + r"going back to\b"
    ),
    "progressive": (
        r"\blet(?:'s| us| me) solve\b|" + _LEAD + r"(?:first|then|next|therefore|given that)\b|\bwe need to\b"
    ),
}  # fmt: skip
_RULES = {pattern: re.compile(rule, re.IGNORECASE) for pattern, rule in _MARKERS.items()}
# What somebody else says: quotations within a line, and code.
_FOREIGN = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|\"[^\"\n]*\"|“[^”]*”", re.DOTALL)
# A sentence keeps the line breaks behind it; blanks go with the next one, as tokens of most models have it.
_SENTENCE = re.compile(r".+?(?:[.!?…][\"')\]”’]*(?=[ \t])|[。！？]+|\s*\n\s*|\Z)", re.DOTALL)

Judge = Callable[[Sequence[str], Sequence[int]], Sequence["Judgement | str"]]


class Judgement(NamedTuple):
    """What a judge says of one step: its pattern, and the number of the step that it is about (None if unknown)."""

    pattern: str
    relates_to: int | None = None


@dataclass
class Step:
    """One step of a trace.

    Attributes
    ----------
    text : str
        As it stands in the trace, white space included.
    pattern : str
        One of ``PATTERNS``.
    relates_to : int or None
        Number of the step that a functional step is about: what the judge says, else the last progressive step before.
    marker : str or None
        The words that decided the pattern; None where a judge or nothing did.
    tokens : int or None
        Tokens of the scoring model.
    pir : float or None
        Importance in nats per token of the answer; None where it was not scored.
    removed : bool
    reason : str
        Why it was removed, or kept.
    """

    text: str
    pattern: str
    relates_to: int | None = None
    marker: str | None = None
    tokens: int | None = None
    pir: float | None = None
    removed: bool = False
    reason: str = ""


def segment_reasoning(reasoning: str, segmenter: Callable[[str], Sequence[str]] | None = None) -> list[str]:
    """Cut a trace into steps that put together give the trace again, character for character.

    Without a `segmenter` (reconstructed; the paper has a language model do it): paragraphs and lines are cut into
    sentences, up to four sentences of a paragraph make a step, a sentence with a functional marker opens a new one, and
    a progressive marker ends a functional step.

    Parameters
    ----------
    reasoning : str
    segmenter : callable, optional
        ``segmenter(reasoning) -> list of str``.

    Raises
    ------
    DataError
        The steps of `segmenter` do not concatenate to `reasoning`.

    Notes
    -----
    Source: arXiv 2505.19187, section 3.1 and appendix A.

    Examples
    --------
    >>> segment_reasoning("We add 3 and 5. That is 9. Wait, 3 + 5 is 8. Then 8 + 1 is 9.")
    ['We add 3 and 5. That is 9.', ' Wait, 3 + 5 is 8.', ' Then 8 + 1 is 9.']
    """
    if segmenter is not None:
        steps = list(segmenter(reasoning))
        whole = "".join(steps)
        if whole != reasoning:
            at = next((i for i, (a, b) in enumerate(zip(whole, reasoning)) if a != b), min(len(whole), len(reasoning)))
            raise DataError(
                f"the segmenter's steps do not put the reasoning together again: they differ from character {at} on, "
                f"{whole[at : at + 30]!r} for {reasoning[at : at + 30]!r}"
            )
        return [step for step in steps if step]
    steps, sentences, functional = [], 0, False
    fresh = True  # the next sentence opens a step
    for sentence, own in _with_own_words(_SENTENCE.findall(reasoning), reasoning):
        if not sentence.strip():
            if steps:
                steps[-1] += sentence
            else:
                steps.append(sentence)
                fresh = False
            continue
        found = _marker(own)
        opens = found is not None and (found[0] != "progressive" or functional)
        if fresh or opens or sentences >= MOST_SENTENCES:
            steps.append(sentence)
            sentences, functional = 0, found is not None and found[0] != "progressive"
        else:
            steps[-1] += sentence
        sentences += 1
        fresh = sentence.count("\n", len(sentence.rstrip())) >= 2
    return steps


def classify_steps(steps: Sequence[str], judge: Judge | None = None) -> list[Step]:
    """Give each step one of the four patterns: by its markers, else by a judge, else progressive.

    A step with markers of several patterns takes the first of error_correction, multi_method, verification,
    progressive (our order; the paper has none). Quotations and code have no say.

    Parameters
    ----------
    steps : sequence of str
        All steps of one trace.
    judge : callable, optional
        ``judge(steps, unmarked)`` gives a `Judgement`, or a pattern alone, for each number in `unmarked`:
        `chat_judge`, `model_judge` or a function of yours.

    Raises
    ------
    DataError
        The judge gives an unknown pattern, another number of judgements, or relates a step to one that is not there.

    Notes
    -----
    Source: arXiv 2505.19187, section 3.1 and table 4.
    """
    found = [_marker(own) for _, own in _with_own_words(steps, "".join(steps))]
    unmarked = [number for number, marker in enumerate(found) if marker is None]
    judged: dict[int, Judgement] = {}
    if judge is not None and unmarked:
        answers = list(judge(steps, unmarked))
        if len(answers) != len(unmarked):
            raise DataError(f"judge: gave {len(answers)} judgements for {len(unmarked)} steps")
        judged = {number: _checked(answer, number, len(steps)) for number, answer in zip(unmarked, answers)}
    result: list[Step] = []
    progressive: int | None = None
    for number, text in enumerate(steps):
        marker = found[number]
        pattern, relates_to = judged.get(number, Judgement("progressive"))
        if marker is not None:
            pattern = marker[0]
        if pattern == "progressive":
            progressive, relates_to = number, None
        elif relates_to is None:
            relates_to = progressive
        result.append(Step(text, pattern, relates_to, None if marker is None else marker[1]))
    return result


def check_patterns(patterns: Sequence[str]) -> tuple[str, ...]:
    """The patterns to prune: functional ones only.

    Raises
    ------
    InputError
        None is given, one is unknown, or progressive is among them.
    """
    if isinstance(patterns, str) or not patterns:
        raise InputError(f"patterns must name at least one of {', '.join(FUNCTIONAL)}, in a list; got {patterns!r}")
    for pattern in patterns:
        if pattern == "progressive":
            raise InputError("patterns: progressive steps carry the solution and are never pruned; leave them out")
        if pattern not in FUNCTIONAL:
            raise InputError(f"patterns: {pattern!r} is unknown ({nearest(pattern, FUNCTIONAL)})")
    return tuple(dict.fromkeys(patterns))


def _checked(answer: Judgement | str, number: int, steps: int) -> Judgement:
    judgement = Judgement(answer) if isinstance(answer, str) else Judgement(*answer)
    if judgement.pattern not in PATTERNS:
        raise DataError(
            f"judge: called step {number} {judgement.pattern!r}, which is no pattern "
            f"({nearest(str(judgement.pattern), PATTERNS)})"
        )
    about = judgement.relates_to
    if about is not None and not (isinstance(about, int) and 0 <= about < steps and about != number):
        raise DataError(f"judge: related step {number} to step {about!r}; the others are 0 to {steps - 1}")
    return judgement


def _with_own_words(parts: Sequence[str], whole: str) -> list[tuple[str, str]]:
    """Each part beside what is left of it without quotations and code."""
    own = _FOREIGN.sub(lambda match: "\0" * len(match[0]), whole.replace("’", "'"))
    pairs, at = [], 0
    for part in parts:
        pairs.append((part, own[at : at + len(part)]))
        at += len(part)
    return pairs


def _marker(own: str) -> tuple[str, str] | None:
    """The pattern that the markers of a text speak for, and the words of the first one."""
    sentences = _SENTENCE.findall(own)
    for pattern, rule in _RULES.items():
        for sentence in sentences:
            if match := rule.search(sentence):
                return pattern, match[0].strip(" \t\n\r-*#>•,.…!—")
    return None
