"""Probes of concepts: concept vectors, the normalised average precision, and what their fits share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import sklearn
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split

from salience.errors import DataError, InputError

GRID = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0)  # inverse strengths of the penalty that are tried
FEWEST = 3  # positives (and negatives) below which no probe is fitted


class Parts(NamedTuple):
    """Rows to fit on, to choose the penalty on, and to measure on."""

    train: Int[np.ndarray, " n_train"]
    val: Int[np.ndarray, " n_val"]
    test: Int[np.ndarray, " n_test"]


class CAV(NamedTuple):
    """A concept activation vector: ``coef @ h + intercept`` is the concept's log-odds at features h.

    `C` is the inverse strength of the penalty that was chosen, `auc` the area under the ROC curve by which it was.
    """

    coef: Float[np.ndarray, " p"]
    intercept: float
    C: float
    auc: float

    def scores(self, feats: Float[np.ndarray, "n p"]) -> Float[np.ndarray, " n"]:
        """Log-odds (n,) of the concept."""
        return np.asarray(feats, dtype=np.float64) @ self.coef + self.intercept


class Probed(NamedTuple):
    """Concept vectors by concept name, and why the other concepts have none."""

    cavs: dict[str, CAV]
    skipped: dict[str, str]


def normalized_ap(y_true: ArrayLike, scores: ArrayLike, n_pos: float) -> float:
    """Average precision as if there were `n_pos` positives, so that frequent and rare concepts can be compared.

        NAP = sum_t N R(t) / (N R(t) + F(t)) * (R(t) - R(t-)),    N = n_pos

    over the distinct scores t from the highest down; R is the recall and F the number of false positives among the
    scores of at least t. Random scores give about ``N / (N + negatives)``.

    Parameters
    ----------
    y_true : array (n,) of bool
    scores : array (n,)
        Higher for positives. Equal scores count together, so that their order plays no part (in the authors' code
        it does).
    n_pos : float
        N, above 0. With N the number of positives it is the plain average precision.

    Returns
    -------
    float

    Raises
    ------
    InputError
        NaN, lengths that do not fit, an N that is not above 0, or no positive.

    Notes
    -----
    Source: section 5 of arXiv 2207.09615 and the authors' ConceptLearning notebook; after Hoiem, Chodpathumwan, Dai,
    "Diagnosing Error in Object Detectors", ECCV 2012.
    """
    truth, values = labels_of("y_true", y_true), features_of("scores", scores, 1)
    if len(truth) != len(values):
        raise InputError(f"y_true and scores: have {len(truth)} and {len(values)} rows; they must be as many")
    if not (np.isfinite(n_pos) and n_pos > 0):
        raise InputError(f"n_pos: got {n_pos!r}; it must be a number above 0")
    if not truth.any():
        raise InputError("y_true: holds no positive, so that there is no recall")
    order = np.argsort(-values, kind="stable")
    last = np.append(np.flatnonzero(np.diff(values[order])), len(values) - 1)  # of each group of equal scores
    hits = np.cumsum(truth[order])[last]
    recall, false = hits / truth.sum(), last + 1 - hits
    weighted = n_pos * recall
    found = weighted + false  # never 0: a group holds a positive or a negative
    return float((weighted / found) @ np.diff(recall, prepend=0.0))


def fit_cav(
    feats: Float[np.ndarray, "n p"],
    labels: Bool[np.ndarray, " n"],
    val: tuple[Any, Any],
    Cs: Sequence[float] = GRID,
) -> CAV:
    """The concept activation vector of one concept: L2 logistic regression, its penalty chosen by validation AUC.

    Parameters
    ----------
    feats : array (n, p)
        Of the layer that is looked at.
    labels : array (n,) of bool
        Whether the concept is there.
    val : (feats, labels)
        Rows to choose C on; of equal ones the smallest C is taken.
    Cs : sequence of float

    Returns
    -------
    CAV

    Raises
    ------
    InputError
        NaN, shapes that do not fit, fewer than 3 positives or negatives to fit on, or a concept that is constant in
        `val`.

    Notes
    -----
    Source: section 4 of arXiv 2207.09615 and the authors' DatasetChoice notebook (solver liblinear).
    """
    x, y = features_of("feats", feats), labels_of("labels", labels)
    x_val, y_val = features_of("val features", val[0]), labels_of("val labels", val[1])
    if len(x) != len(y) or len(x_val) != len(y_val) or x.shape[1] != x_val.shape[1]:
        raise InputError(f"feats {x.shape}, labels {y.shape} and val {x_val.shape}, {y_val.shape}: must fit each other")
    if why := unfit(y, y_val):
        raise InputError(f"labels: {why}")
    best: CAV | None = None
    for C in Cs:
        model = logistic("l2", C).fit(x, y)
        coef, intercept = model.coef_[0].astype(np.float64), float(model.intercept_[0])
        auc = float(roc_auc_score(y_val, x_val @ coef + intercept))
        if best is None or auc > best.auc:
            best = CAV(coef, intercept, float(C), auc)
    assert best is not None
    return best


def fit_cavs(
    feats: Float[np.ndarray, "n p"],
    concepts: Bool[np.ndarray, "n c"],
    names: Sequence[str],
    parts: Parts,
    Cs: Sequence[float] = GRID,
) -> Probed:
    """`fit_cav` for each concept; those that are constant in a part, or too rare to fit, are listed with the reason."""
    cavs, skipped = {}, {}
    for name, labels in zip(names, np.asarray(concepts).T, strict=True):
        why = unfit(*(labels[rows] for rows in parts))
        if why:
            skipped[name] = why
            continue
        cavs[name] = fit_cav(feats[parts.train], labels[parts.train], (feats[parts.val], labels[parts.val]), Cs)
    return Probed(cavs, skipped)


def predicted_concepts(cavs: Mapping[str, CAV], feats: Float[np.ndarray, "n p"]) -> Float[np.ndarray, "n c"]:
    """Probability of each concept, which is what a concept bottleneck lays its linear head on.

    ``baseline_explanation(predicted_concepts(cavs, feats), predictions, ...)`` is that bottleneck: concepts first,
    classes from them alone (Koh et al., "Concept Bottleneck Models", ICML 2020, trained one after the other).
    """
    return 1 / (1 + np.exp(-np.column_stack([cav.scores(feats) for cav in cavs.values()])))


def split(n: int, random_state: int = 42) -> Parts:
    """60 % to fit on, 20 % to choose the penalty on, 20 % to measure on, as in the authors' code."""
    if n < 10:
        raise DataError(f"probe set: has {n} rows; at least 10 are needed to fit, choose and measure on")
    train, rest = train_test_split(np.arange(n), test_size=0.4, random_state=random_state)
    val, test = train_test_split(rest, test_size=0.5, random_state=random_state)
    return Parts(train, val, test)


def unfit(train: np.ndarray, *others: np.ndarray) -> str:
    """Why no probe can be fitted to these labels and judged on the others; empty if one can."""
    positives, negatives = int(train.sum()), int((~np.asarray(train, dtype=bool)).sum())
    if min(positives, negatives) < FEWEST:
        return f"{positives} positives and {negatives} negatives to fit on; at least {FEWEST} of each are needed"
    if any(part.all() or not part.any() for part in others):
        return "the same in all rows of a part to choose or measure on"
    return ""


def logistic(penalty: str, C: float) -> LogisticRegression:
    """Logistic regression by liblinear; scikit-learn calls the penalty `l1_ratio` from 1.8 on."""
    # What draws is the order of liblinear's coordinates.
    options: dict[str, Any] = {"C": C, "solver": "liblinear", "max_iter": 1000, "random_state": 0}
    if tuple(map(int, sklearn.__version__.split(".")[:2])) >= (1, 8):
        return LogisticRegression(l1_ratio={"l1": 1.0, "l2": 0.0}[penalty], **options)
    return LogisticRegression(penalty=penalty, **options)


def features_of(name: str, values: Any, ndim: int = 2) -> np.ndarray:
    """Finite float64 numbers of some dimensions."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != ndim or not array.size:
        raise InputError(f"{name}: must have {ndim} dimension{'s' * (ndim > 1)} and not be empty; got {array.shape}")
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        raise InputError(f"{name}: row {bad[0][0]} holds NaN or an infinite value; all must be finite")
    return array


def labels_of(name: str, values: Any, ndim: int = 1) -> np.ndarray:
    """Truth values, written as such or as 0 and 1."""
    array = np.asarray(values)
    if array.ndim != ndim or not array.size:
        raise InputError(f"{name}: must have {ndim} dimension{'s' * (ndim > 1)} and not be empty; got {array.shape}")
    if array.dtype != np.bool_ and not np.isin(array, (0, 1)).all():
        raise InputError(f"{name}: must hold only True and False, or 1 and 0")
    return array.astype(np.bool_)


def classes_of(values: Any, n: int) -> np.ndarray:
    """Whole numbers, one for each row."""
    array = np.asarray(values)
    if array.shape != (n,) or not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"predictions: must be whole numbers, one for each of the {n} rows; got {array.dtype} "
                         f"{array.shape}")  # fmt: skip
    return array


def names_of(names: Sequence[str] | None, count: int) -> tuple[str, ...]:
    """Names of the concepts: each once."""
    titles = tuple(f"concept {i}" for i in range(count)) if names is None else tuple(map(str, names))
    if len(titles) != count or len(set(titles)) < count:
        raise InputError(f"names: must be {count} different names, one for each concept; got {list(titles)!r}")
    return titles
