"""Are a model's labels good enough to answer a question with? The work behind `salience verify labels`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from sklearn.linear_model import LinearRegression

from salience.errors import DataError, InputError
from salience.io.whole import column_of, is_text, numbers_of, read_whole, words_of
from salience.measure import bootstrap_interval
from salience.trust.dsl.estimate import DSLResult
from salience.trust.dsl.formula import parse
from salience.trust.dsl.table import dsl_regression

_MOST_CATEGORIES = 12
HELPFUL = 0.97  # an interval this much narrower than that of gold labels alone is worth the trouble


@dataclass(frozen=True)
class LabelsPart:
    """The estimate for one question: a mean, a regression, or one category of several.

    Attributes
    ----------
    what : str
    result : DSLResult
    halving : list of int or None
        Gold labels in all that would halve each interval.
    agreement : (mean, low, high) or None
        Share of labelled rows on which model and gold agree, weighted by ``1 / pi``; for labels of a few kinds. Of the
        outcome where it is a gold column, of the first gold column otherwise.
    baseline : float or None
        Agreement of always naming the commonest gold label.
    correlation : float
        Of gold labels and the model's on labelled rows.
    """

    what: str
    result: DSLResult
    halving: list[int | None]
    agreement: tuple[float, float, float] | None
    baseline: float | None
    correlation: float

    @property
    def narrower(self) -> np.ndarray:
        """Width of each DSL interval over that of gold labels alone."""
        return self.result.se / self.result.others["GSO"][1]

    @property
    def misled(self) -> list[str]:
        """Coefficients on which the model's labels alone differ from DSL by more than both errors together explain."""
        coef, se = self.result.others["SO"]
        off = np.abs(coef - self.result.coef) > 1.96 * np.hypot(se, self.result.se)
        return [name for name, out in zip(self.result.names, off) if out]

    @property
    def verdict(self) -> str:
        """What the model's labels are worth here, with figures."""
        ratio = float(np.nanmedian(self.narrower))
        if not np.isfinite(ratio):
            first = "gold labels alone give no estimate"
        elif ratio < HELPFUL:
            first = f"the model's labels help: intervals {100 * (1 - ratio):.0f} % narrower than by gold labels alone"
        else:
            first = (
                f"the model's labels are no better than none here: intervals are {100 * ratio:.0f} % as wide as by "
                "gold labels alone"
            )
        parts = [f"{self.what}: {first}"]
        if self.misled:
            parts.append(
                f"taken at their word they mislead on {len(self.misled)} of {len(self.result.names)} coefficients "
                f"({', '.join(self.misled[:4])})"
            )
        if self.agreement is not None:
            mean, low, high = self.agreement
            parts.append(
                f"they agree with {100 * mean:.1f} % of the gold labels ({100 * low:.1f} to {100 * high:.1f}); always "
                f"the commonest label would agree with {100 * (self.baseline or 0):.1f} %"
            )
        return "; ".join(parts) + "."

    def labels_needed(self, at: int) -> str:
        """How many gold labels would halve an interval, in words."""
        if self.result.n_labeled == self.result.n:
            return "all labelled"
        return f"{self.halving[at]:,} labels" if self.halving[at] else "not by labels"


@dataclass(frozen=True)
class LabelsCheck:
    """What `check_labels_of` found: one part per question, and how it was made."""

    parts: list[LabelsPart]
    alpha: float
    rows_read: int
    settings: dict[str, Any]
    left_out: list[str]

    @property
    def notes(self) -> list[str]:
        """What a reader must know."""
        return [*self.left_out, *dict.fromkeys(note for part in self.parts for note in part.result.notes)]

    @property
    def equation(self) -> str:
        """What became of every row."""
        result = self.parts[0].result
        return (
            f"{self.rows_read:,} rows read = {result.n_labeled:,} with gold labels + {result.n - result.n_labeled:,} "
            f"without + {result.n_dropped:,} dropped for missing values"
        )

    def rows(self) -> list[dict[str, Any]]:
        """One record per part, method and coefficient."""
        return [{"label": part.what, **row} for part in self.parts for row in part.result.rows(self.alpha)]

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "parts": [
                {
                    "what": part.what, "verdict": part.verdict, "n_labeled": part.result.n_labeled,
                    "labels_to_halve": dict(zip(part.result.names, part.halving)),
                    "agreement": list(part.agreement) if part.agreement else None,
                    "estimates": part.result.rows(self.alpha),
                }
                for part in self.parts
            ],
            "rows_read": self.rows_read, "rows_used": self.parts[0].result.n,
            "rows_dropped": self.parts[0].result.n_dropped, "notes": self.notes,
        }  # fmt: skip


def check_labels_of(
    data: Any, *, gold: Sequence[str], predicted: Sequence[str], formula: str | None = None,
    category: str | None = None, model: str = "auto", learner: str = "forest", random_state: int = 1234,
    alpha: float = 0.05, progress: Callable[[str], None] | None = None, **settings: Any,
) -> LabelsCheck:  # fmt: skip
    """Estimate by all methods, and say what the model's labels are worth.

    Parameters
    ----------
    data : table
        See `salience.io.whole.whole_table`.
    gold, predicted : list of str
        Columns of gold labels and of the model's.
    formula : str, optional
        The mean (a share, for 0 and 1) of the one gold column by default.
    category : str, optional
        For labels that are words; by default each category is estimated against the rest.
    model : {"auto", "logit", "lm", "felm"}
    learner : {"forest", "linear", "identity"}
    alpha : float
    progress : callable, optional
        Told what is being done.
    **settings
        Of `salience.trust.dsl_regression`.
    """
    if not 0 < alpha < 1:
        raise InputError(f"alpha must lie between 0 and 1, not {alpha}")
    tell = progress or (lambda message: None)
    table, left_out = read_whole(data)
    for name in gold:
        column_of(table, name, "gold column")
    if formula is None:
        if len(gold) > 1 or model == "felm":
            raise InputError("a formula is needed with several gold columns, and with model felm")
        formula = f"`{gold[0]}` ~ 1"
    outcome = parse(formula).outcome
    mean = not parse(formula).terms
    chosen = model if model != "auto" else "logit" if not mean and _binary(table, outcome, gold) else "lm"
    categories = _categories(table, outcome, gold, category)
    pairs = dict(zip(gold, predicted))
    judged = (outcome, pairs[outcome]) if outcome in pairs else (gold[0], predicted[0])
    parts = []
    for at, label in enumerate(categories):
        tell(f"estimating {outcome if label is None else label} ({at + 1} of {len(categories)})")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # told as notes
            result = dsl_regression(
                formula, table, list(gold), list(predicted), model=chosen, category=label,
                learner={"forest": None, "linear": LinearRegression(), "identity": "identity"}[learner],
                random_state=random_state, **settings,
            )  # fmt: skip
        if mean and len(result.names) == 1:
            result = replace(result, names=("share" if label is not None or _binary(table, outcome, gold) else "mean",))
        what = outcome if label is None else f"{outcome} = {label}"
        parts.append(_part(table, what, label, *judged, settings.get("prob"), result, random_state))
    recorded = {"formula": formula, "model": chosen, "gold": list(gold), "predicted": list(predicted),
                "learner": learner, "random_state": random_state, **settings}  # fmt: skip
    return LabelsCheck(parts, alpha, table.num_rows, recorded, left_out)


def _binary(table, outcome: str, gold: Sequence[str]) -> bool:
    column = column_of(table, outcome, "outcome")
    if is_text(column):
        return outcome in gold
    values = numbers_of(table, outcome)
    return bool(np.isin(values[~np.isnan(values)], (0, 1)).all())


def _categories(table, outcome: str, gold: Sequence[str], category: str | None) -> list[str | None]:
    if category is not None or outcome not in gold or not is_text(table[outcome]):
        return [category]
    known = sorted({word for word in words_of(table, outcome) if word is not None})
    if len(known) > _MOST_CATEGORIES:
        raise DataError(f"{outcome!r} has {len(known):,} different labels; name one with category")
    return list(known) if len(known) > 2 else known[-1:]


def _part(table, what, label, gold, predicted, prob, result: DSLResult, seed: int) -> LabelsPart:
    if label is None:
        truth, guess = numbers_of(table, gold), numbers_of(table, predicted)
    else:
        words = words_of(table, gold)
        truth = np.array([np.nan if word is None else float(word == label) for word in words])
        stand_in = table[predicted]
        if is_text(stand_in):
            other = words_of(table, predicted)
            guess = np.array([np.nan if word is None else float(word == label) for word in other])
        else:
            guess = numbers_of(table, predicted)
    known = np.isfinite(truth) & np.isfinite(guess)
    weights = 1 / numbers_of(table, prob)[known] if prob else np.ones(int(known.sum()))
    truth, guess = truth[known], guess[known]
    agreement, baseline = None, None
    if len(truth) > 1 and np.isin(truth, (0, 1)).all() and np.isin(guess, (0, 1)).all():
        share = weights / weights.mean()
        found = bootstrap_interval((truth == guess) * share, random_state=seed)
        agreement = found.mean, max(found.low, 0.0), min(found.high, 1.0)
        baseline = max(float((truth * share).mean()), 1 - float((truth * share).mean()))
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = float(np.corrcoef(truth, guess)[0, 1]) if len(truth) > 1 else np.nan
    halving: list[int | None] = [None] * len(result.names)
    if result.n_labeled < result.n:
        halving = result.labels_for(0.5)
    return LabelsPart(what, result, halving, agreement, baseline, correlation)
