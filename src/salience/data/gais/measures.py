"""What a selection is worth: how much it leaves out, and what learners trained on it still know."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import clone
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import ParameterSampler, train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from salience.data.gais.estimator import GAIS
from salience.errors import InputError

LEARNERS = {
    "1-nearest-neighbour": KNeighborsClassifier(1),
    "logistic regression": LogisticRegression(max_iter=1000),
    "random forest": RandomForestClassifier(100, random_state=0),
}
SEARCHED = {
    "theta_s": (0.8, 0.9, 0.95), "theta_r": (0.1, 0.3, 0.5), "n_bits": (6, 8, 10), "n_tables": (4, 8, 16),
    "heads": (2, 4, 8), "reduction": (0.9, 0.93, 0.96, 0.98),
}  # fmt: skip


def evaluate_selection(
    X: ArrayLike, y: ArrayLike, selected: ArrayLike, X_test: ArrayLike, y_test: ArrayLike,
    models: Mapping[str, Any] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Reduction, accuracy of learners trained on the selection and on everything, and effectiveness.

        R = 1 - |S| / n,      relative accuracy = Acc_S / Acc_full,      E = Acc_S R

    Parameters
    ----------
    X, y : (n, d), (n,)
        Features are standardised by these rows, for the learners.
    selected : (b,) int
        Rows of X.
    X_test, y_test : (m, d), (m,)
    models : mapping of str to classifier, optional
        By default 1-nearest-neighbour, logistic regression and a random forest.

    Returns
    -------
    dict of str to float
        "reduction", "accuracy", "full accuracy", "relative accuracy" (mean over learners of the ratio),
        "effectiveness", and "accuracy, LEARNER" for each.

    Raises
    ------
    InputError
        There is no row in the selection.

    Notes
    -----
    The product E is usual in the literature on instance selection; the paper's own definition was not read.
    """
    rows, labels, chosen = np.asarray(X), np.asarray(y), np.asarray(selected)
    if not len(chosen):
        raise InputError("selected holds no row")
    scale = StandardScaler().fit(rows)
    rows, test = scale.transform(rows), scale.transform(np.asarray(X_test))
    found: dict[str, list[float]] = {"accuracy": [], "full accuracy": [], "relative accuracy": []}
    single = {}
    for name, model in (LEARNERS if models is None else models).items():
        part = _accuracy(model, rows[chosen], labels[chosen], test, y_test)
        full = _accuracy(model, rows, labels, test, y_test)
        for key, value in zip(found, (part, full, part / full if full else 0.0)):
            found[key].append(value)
        single[f"accuracy, {name}"] = part
    means = {key: float(np.mean(values)) for key, values in found.items()}
    reduction = 1 - len(chosen) / len(rows)
    return {"reduction": reduction, **means, "effectiveness": means["accuracy"] * reduction, **single}


def tune_gais(
    X: ArrayLike, y: ArrayLike, *, trials: int = 10, base: GAIS | None = None, random_state: int = 0
) -> tuple[GAIS, list[dict[str, Any]]]:
    """Random search for the parameters with the greatest effectiveness on a validation part of the table.

    Parameters
    ----------
    X, y : (n, d), (n,)
    trials : int
        Draws from the quantile and mask rate of edges, bits, tables, heads and the reduction.
    base : GAIS, optional
        Gives all other parameters.
    random_state : int
        Of the draws and of the split (a quarter validates).

    Returns
    -------
    GAIS, list of dict
        An unfitted estimator with the best parameters, and every trial with its measures, best first.

    Notes
    -----
    Source: arXiv 2502.20293 tunes by Bayesian optimisation (from a summary); random search and its ranges are
    reconstructed.
    """
    if trials < 1:
        raise InputError(f"trials must be at least 1, not {trials}")
    base = GAIS() if base is None else base
    rows, labels = np.asarray(X), np.asarray(y)
    learn, check = train_test_split(np.arange(len(labels)), test_size=0.25, stratify=labels, random_state=random_state)
    tried = []
    for parameters in ParameterSampler(SEARCHED, trials, random_state=random_state):
        model = clone(base).set_params(**parameters).fit(rows[learn], labels[learn])
        measures = evaluate_selection(rows[learn], labels[learn], model.selected_idx_, rows[check], labels[check])
        tried.append({**parameters, **measures})
    tried.sort(key=lambda trial: -trial["effectiveness"])
    return clone(base).set_params(**{name: tried[0][name] for name in SEARCHED}), tried


def _accuracy(model: Any, rows: np.ndarray, labels: np.ndarray, test: np.ndarray, targets: ArrayLike) -> float:
    if len(np.unique(labels)) == 1:  # some learners refuse a single class
        return float(np.mean(np.asarray(targets) == labels[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converged: the same for all
        return float(clone(model).fit(rows, labels).score(test, targets))
