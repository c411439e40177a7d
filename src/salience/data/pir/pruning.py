"""Which steps of a trace go: the least important of each functional pattern; and what the paper compares with.

Source: Xiao et al., LIMOPro (arXiv 2505.19187), section 3.3 and Algorithm 1; comparators of section 4.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from salience.data.pir.steps import FUNCTIONAL, PATTERNS, Step, check_patterns
from salience.errors import InputError

TIE = 1e-5  # nats per token; closer scores are rounding


def prune_steps(steps: Sequence[Step], ratio: float = 0.4, patterns: Sequence[str] = FUNCTIONAL) -> list[int]:
    """Numbers of the steps to remove: of each pattern, the ``floor(ratio n)`` with the lowest PIR.

    Scores that agree to 1e-5 are ties: the longer step goes first, then the later one. Progressive steps, and steps
    without a score, stay. Sets `removed` and `reason` of every step.

    Parameters
    ----------
    steps : sequence of Step
        All steps of one trace, with `pir` set.
    ratio : float in [0, 1]
        Share of each pattern's steps to remove; the paper studies 0.2 to 0.8.
    patterns : sequence of str
        Which functional patterns to prune.

    Raises
    ------
    InputError
        The ratio or a pattern is out of range.

    Notes
    -----
    Source: arXiv 2505.19187, section 3.3; rounding down and the ties are ours, as the paper says neither.
    """
    check_ratio(ratio)
    patterns = check_patterns(patterns)
    gone: list[int] = []
    for step in steps:
        step.removed, step.reason = False, _kept(step, patterns)
    for pattern in patterns:
        mine = [number for number, step in enumerate(steps) if step.pattern == pattern and step.pir is not None]
        order = sorted(mine, key=lambda number: _order(steps[number], number))
        count = budget(ratio, len(mine))
        tied = count_ties([steps[number] for number in order], count)
        for place, number in enumerate(order):
            step = steps[number]
            step.removed = place < count
            words = f"{_ordinal(place)} of {len(mine)} {pattern} steps by PIR {step.pir:+.4f}; the lowest {count} go"
            step.reason = words + (f" ({tied} tied at the cut: longer first, then later)" if tied else "")
        gone += order[:count]
    return sorted(gone)


def comparator(
    steps: Sequence[Step], count: int, kind: Literal["spirit", "rule", "random", "longest"],
    rng: np.random.Generator | None = None,
) -> list[int]:  # fmt: skip
    """Numbers of the steps that another rule would remove, as many as PIR did.

    Parameters
    ----------
    steps : sequence of Step
    count : int
        Steps to remove.
    kind : {"spirit", "rule", "random", "longest"}
        The paper's comparators: lowest PIR over all steps, progressive ones included (score them all first); random
        functional steps; random steps. And ours: the longest functional steps, the cheapest way to save tokens.
    rng : numpy Generator
        For the random ones.

    Raises
    ------
    InputError
        There are fewer steps to choose from than `count`, `spirit` lacks a score, or a random rule lacks its generator.
    """
    if kind not in ("spirit", "rule", "random", "longest"):
        raise InputError(f"kind must be 'spirit', 'rule', 'random' or 'longest', not {kind!r}")
    every = kind in ("spirit", "random")
    pool = [number for number, step in enumerate(steps) if every or step.pattern in FUNCTIONAL]
    if not 0 <= count <= len(pool):
        raise InputError(f"count is {count}; {kind} has {len(pool)} steps to choose from")
    if kind == "spirit":
        if any(step.pir is None for step in steps):
            raise InputError("spirit ranks all steps: score them with patterns=PATTERNS first")
        return sorted(sorted(pool, key=lambda number: _order(steps[number], number))[:count])
    if kind == "longest":
        return sorted(sorted(pool, key=lambda number: (-_length(steps[number]), -number))[:count])
    if rng is None:
        raise InputError(f"{kind} is random: give rng")
    return sorted(int(number) for number in rng.choice(pool, count, replace=False)) if count else []


def budget(ratio: float, n: int) -> int:
    """How many of n steps a ratio removes, ``floor(ratio n)``, safe from 0.29 * 100 = 28.999…"""
    return math.floor(ratio * n + 1e-9)


def count_ties(ordered: Sequence[Step], count: int) -> int:
    """Steps whose score equals the one at the cut, if some of them go and some stay; else 0."""
    if not 0 < count < len(ordered) or _rounded(ordered[count - 1]) != _rounded(ordered[count]):
        return 0
    return sum(_rounded(step) == _rounded(ordered[count]) for step in ordered)


def pattern_stats(traces: Iterable[Sequence[Step]]) -> dict[str, dict[str, float]]:
    """Steps, tokens and share of the tokens of each pattern, over traces whose steps know their tokens (table 1).

    Returns
    -------
    dict
        By pattern: ``steps``, ``tokens`` and ``share`` (of all tokens; 0 to 1), and ``kept_tokens``.
    """
    steps, tokens, kept = Counter[str](), Counter[str](), Counter[str]()
    for trace in traces:
        for step in trace:
            steps[step.pattern] += 1
            tokens[step.pattern] += step.tokens or 0
            kept[step.pattern] += 0 if step.removed else step.tokens or 0
    total = max(tokens.total(), 1)
    return {
        pattern: {"steps": steps[pattern], "tokens": tokens[pattern], "share": tokens[pattern] / total,
                  "kept_tokens": kept[pattern]} for pattern in PATTERNS
    }  # fmt: skip


def efficiency(accuracy: float, tokens: float) -> float:
    """Accuracy per generated token, ``EFF = ACC / TOK``, with the accuracy as a fraction.

    Parameters
    ----------
    accuracy : float in [0, 1]
    tokens : float
        Mean length of the responses that the model *generates*, not of its training data.

    Raises
    ------
    InputError
        Either is out of range (an accuracy above 1 is likely a percentage).

    Notes
    -----
    Source: arXiv 2505.19187, section 4.

    Examples
    --------
    >>> round(efficiency(0.421, 4716) * 1e5, 2)
    8.93
    """
    if not 0 <= accuracy <= 1:
        raise InputError(f"accuracy must be a fraction in 0..1, not {accuracy}")
    if not (tokens > 0 and math.isfinite(tokens)):
        raise InputError(f"tokens must be a positive number, not {tokens}")
    return accuracy / tokens


def check_ratio(ratio: float) -> None:
    """Raise unless 0 <= ratio <= 1."""
    if not 0 <= ratio <= 1:
        raise InputError(f"ratio must lie in 0..1, the share of each functional pattern's steps to remove; got {ratio}")


def _kept(step: Step, patterns: Sequence[str]) -> str:
    if step.pattern == "progressive":
        return "progressive steps are never removed"
    return f"{step.pattern} steps are not pruned" if step.pattern not in patterns else "not scored"


def _order(step: Step, number: int) -> tuple[float, int, int]:
    return _rounded(step), -_length(step), -number


def _rounded(step: Step) -> int:
    return round((step.pir or 0.0) / TIE)


def _length(step: Step) -> int:
    return len(step.text) if step.tokens is None else step.tokens


def _ordinal(place: int) -> str:
    """Place 0 is the lowest."""
    return "lowest" if not place else f"no. {place + 1} from below"
