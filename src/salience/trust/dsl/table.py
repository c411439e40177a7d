"""Regressions and shares from tables: gold labels, model labels and regressors by column name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float
from numpy.typing import ArrayLike

from salience.errors import DataError, InputError
from salience.io.whole import column_of, is_text, numbers_of, whole_table, words_of
from salience.trust.dsl.estimate import DSLResult, Rows, estimate
from salience.trust.dsl.estimator import DSL, check_labels, check_prob, check_settings, with_effects
from salience.trust.dsl.formula import Regressors, parse

if TYPE_CHECKING:
    import pandas as pd


def dsl_regression(
    formula: str, data: Any, predicted: Sequence[str] | str, prediction: Sequence[str] | str, *, model: str = "logit",
    features: Sequence[str] = (), prob: str | None = None, labeled: str | None = None, cluster: str | None = None,
    fixed_effects: Sequence[str] = (), category: str | None = None, learner: Any = None, folds: int = 5,
    splits: int = 10, rescale: bool = True, assume_random: bool = False, random_state: int = 1234,
) -> DSLResult:  # fmt: skip
    """Regress by a formula where the outcome, regressors or both were labelled by a model and checked by hand in part.

    With gold and predicted designs ``(y, X)``, ``m_i = m_i^pred + (R_i / pi_i) (m_i^gold - m_i^pred)`` is summed to 0
    (see `salience.trust.DSL`). A row counts as labelled if it has all gold labels.

    Parameters
    ----------
    formula : str
        ``"y ~ x1 + C(group) + x1:x2 - 1"``: text columns become categories.
    data : table
        See `salience.io.whole.whole_table`; it is held in memory.
    predicted : str or list of str
        Columns of the formula with gold labels, empty where there is none.
    prediction : str or list of str
        The model's label or score for each of them, on every row.
    model : {"logit", "lm", "felm"}
    features : list of str
        Further columns to predict from.
    prob, labeled, cluster : str, optional
        Columns with the labelling probability, a 0/1 mark of labelled rows, and clusters.
    fixed_effects : list of str
        Columns of groups, with "felm".
    category : str, optional
        Regress on "the label is this category" where the outcome's labels are words, one of several.
    learner, folds, splits, rescale, assume_random, random_state
        See `salience.trust.DSL`.

    Returns
    -------
    DSLResult

    Raises
    ------
    InputError, DataError
        See `salience.trust.DSL.fit`.
    """
    check_settings(model, learner, folds, splits, random_state)
    table, wanted = whole_table(data), parse(formula)
    variables = [predicted] if isinstance(predicted, str) else list(predicted)
    stand_ins = [prediction] if isinstance(prediction, str) else list(prediction)
    _check_columns(variables, stand_ins, [wanted.outcome, *wanted.columns])
    if (model == "felm") != bool(fixed_effects):
        raise InputError("fixed_effects go with model='felm', and 'felm' needs them")
    columns = [
        _label_pair(table, name, other, category if name == wanted.outcome else None)
        for name, other in zip(variables, stand_ins)
    ]
    mark = numbers_of(table, labeled, "labeled column") if labeled else None
    gold = check_labels(np.stack([pair[0] for pair in columns], axis=1), mark)
    surrogate = np.stack([pair[1] for pair in columns], axis=1)
    chance = check_prob(
        numbers_of(table, prob, "prob column") if prob else None, ~np.isnan(gold).any(axis=1), assume_random
    )
    regressors = Regressors(wanted, table, variables)
    outcome = None if wanted.outcome in variables else numbers_of(table, wanted.outcome, "outcome")
    inputs = [surrogate, *(_feature(table, name) for name in features)]
    needed = inputs if outcome is None else [*inputs, outcome[:, None]]
    groups = [words_of(table, name, "fixed effect") for name in fixed_effects]
    clusters = words_of(table, cluster, "cluster") if cluster else None
    whole = np.all([regressors.whole, *(np.isfinite(part).all(axis=1) for part in needed)], axis=0)
    for words in [*groups, *([clusters] if clusters is not None else [])]:
        whole &= np.array([word is not None for word in words])
    if not whole.any():
        raise DataError("no row has a value in every column that is used")
    regressors.keep(whole)
    code = None if clusters is None else np.unique(clusters[whole].astype(str), return_inverse=True)[1]
    known = np.hstack([*(part[whole] for part in inputs), _shaped(regressors.known(), int(whole.sum()))])
    rows = Rows(gold[whole], surrogate[whole], known, chance[whole], code)
    kept_outcome = None if outcome is None else outcome[whole]
    kept_groups = [np.unique(group[whole].astype(str), return_inverse=True)[1] for group in groups]
    intercept = wanted.intercept and model != "felm"

    def build(values: Float[np.ndarray, "n v"]) -> tuple[np.ndarray, Any]:
        named = dict(zip(variables, values.T))
        y = named[wanted.outcome] if kept_outcome is None else kept_outcome
        plain = _shaped(regressors.matrix(named), len(values))
        return y, with_effects(regressors.names, plain, kept_groups, intercept)[1]

    names, _ = with_effects(
        regressors.names, _shaped(regressors.matrix(dict(zip(variables, rows.surrogate.T))), len(rows.prob)),
        kept_groups, intercept,
    )  # fmt: skip
    return estimate(
        rows, build, names, "logit" if model == "logit" else "lm", DSL(learner=learner)._learner(), folds, splits,
        rescale, random_state, int((~whole).sum()),
    )  # fmt: skip


def prevalence(
    Q: ArrayLike, Y: ArrayLike, *, labels: Sequence[Any] | None = None, prob: ArrayLike | None = None,
    groups: ArrayLike | None = None, alpha: float = 0.05, **settings: Any,
) -> pd.DataFrame:  # fmt: skip
    """Shares of each label, in all rows or by group, with intervals.

    The linear model on the intercept, or on a dummy per group: numerically the group means of the corrected
    predictions. Each label is estimated against the rest.

    Parameters
    ----------
    Q, Y : (n,)
        The model's labels and the gold labels (None or NaN where there is none), numbers or words. Rows without a
        label of the model, or without a group, are dropped and counted.
    labels : sequence, optional
        Which labels; by default all that occur among the gold labels.
    prob : (n,) float, optional
        See `salience.trust.DSL.fit`.
    groups : (n,), optional
    alpha : float
    **settings
        Parameters of `salience.trust.DSL`, such as ``assume_random=True``.

    Returns
    -------
    DataFrame
        label, group (where given), method, share, se, low, high; ``attrs["n_dropped"]`` counts the rows left out.
    """
    import pandas as pd

    model_labels, gold = np.asarray(Q, dtype=object), np.asarray(Y, dtype=object)
    if model_labels.shape != gold.shape or gold.ndim != 1:
        raise InputError(f"Q and Y must have one value for each row, not shapes {model_labels.shape} and {gold.shape}")
    missing, unsaid = pd.isna(gold), pd.isna(model_labels)
    gold, model_labels = gold.copy(), model_labels.copy()
    gold[missing], model_labels[unsaid] = None, None  # pd.NA cannot be compared
    if missing.all():
        raise DataError("no row has gold labels: label a random sample by hand first (see sample_for_labeling)")
    every = sorted({value for value in gold[~missing]}, key=str) if labels is None else list(labels)
    levels, dummies = None, None
    if groups is not None:
        given = np.asarray(groups, dtype=object)
        if given.shape != gold.shape:
            raise InputError(f"groups has shape {given.shape}; there are {len(gold)} rows")
        ungrouped, texts = pd.isna(given), given.astype(str)
        levels = np.unique(texts[~(ungrouped | unsaid)])
        dummies = (texts[:, None] == levels).astype(np.float64)
        dummies[ungrouped] = np.nan
    parts = []
    kinds = sorted(set(model_labels[~unsaid]), key=str)
    others = np.stack([model_labels == kind for kind in kinds], axis=1).astype(np.float64) if len(kinds) > 2 else None
    for label in every:
        target = np.where(missing, np.nan, (gold == label).astype(np.float64))
        model = DSL(model="lm", fit_intercept=groups is None, **settings)
        stand_in = np.where(unsaid, np.nan, (model_labels == label).astype(np.float64))
        result = model.fit(dummies, target, stand_in, W=others, prob=prob).result_
        frame = pd.DataFrame(result.rows(alpha)).drop(columns="p_value").rename(columns={"coef": "share"})
        frame.insert(0, "label", label)
        named = frame.pop("name")
        if levels is not None:
            frame.insert(1, "group", [levels[result.names.index(name)] for name in named])
        parts.append(frame)
    frame = pd.concat(parts, ignore_index=True)
    frame.attrs["n_dropped"] = result.n_dropped
    return frame


def _check_columns(variables: list[str], stand_ins: list[str], used: list[str]) -> None:
    if not variables or len(variables) != len(stand_ins):
        raise InputError(
            f"each gold column needs the model's column beside it; got {len(variables)} predicted columns and "
            f"{len(stand_ins)} of predictions"
        )
    for name in variables:
        if name not in used:
            raise InputError(f"predicted column {name!r} does not occur in the formula, which uses {', '.join(used)}")
    if set(variables) & set(stand_ins):
        raise InputError("a column is given both as gold labels and as predictions")


def _label_pair(table: pa.Table, gold: str, prediction: str, category: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Gold labels and predictions of one variable as numbers."""
    given = column_of(table, gold, "gold column")
    column_of(table, prediction, "prediction column")
    if category is None:
        if is_text(given):
            shown = sorted({str(value) for value in given.to_pylist() if value is not None})
            raise DataError(
                f"gold column {gold!r} holds words ({', '.join(shown[:8])}): name the category to estimate, the others "
                "count as 0"
            )
        return numbers_of(table, gold), numbers_of(table, prediction, "prediction column")
    words = words_of(table, gold)
    known = {word for word in words if word is not None}
    if category not in known:
        raise DataError(f"category {category!r} does not occur in {gold!r}, which has {', '.join(sorted(known)[:8])}")
    scores = table[prediction]
    stand_in = words_of(table, prediction)
    if not is_text(scores) and is_text(given):  # a score or a probability of the category
        return _as_mark(words, category), numbers_of(table, prediction)
    return _as_mark(words, category), _as_mark(stand_in, category)


def _as_mark(words: np.ndarray, category: str) -> Float[np.ndarray, " n"]:
    return np.array([np.nan if word is None else float(word == category) for word in words])


def _feature(table: pa.Table, name: str) -> Float[np.ndarray, "n f"]:
    """A column to predict from: numbers as they are, words as a dummy per level."""
    if not is_text(column_of(table, name, "feature")):
        return numbers_of(table, name)[:, None]
    words = words_of(table, name)
    levels = sorted({word for word in words if word is not None})
    if len(levels) > 200:
        raise DataError(f"feature {name!r} has {len(levels):,} different texts, more than 200: give numbers instead")
    marks = np.stack([words == level for level in levels], axis=1).astype(np.float64)
    marks[np.array([word is None for word in words])] = np.nan
    return marks


def _shaped(matrix: np.ndarray, n: int) -> Float[np.ndarray, "n p"]:
    return matrix if len(matrix) == n else np.empty((n, 0))
