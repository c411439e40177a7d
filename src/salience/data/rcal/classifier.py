"""RCAL on representations as they are: scikit-learn's logistic regression on mixed real rows and sampled points."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Shaped
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from salience.data.rcal.gaussians import ClassGaussians, calibrate_tail, robust_gaussians
from salience.errors import DataError, InputError


class RCALHead(ClassifierMixin, BaseEstimator):
    """A linear classifier of fixed representations, trained on noisy, long-tailed labels by RCAL.

        L = sum_i [lam_i CE(y~_i) + (1 - lam_i) CE(y~_j)](lam_i z_i + (1 - lam_i) z_j)  +  sum over sampled (z, k) of CE

    with j a random other row and lam_i ~ Beta(mixup, mixup). Sampled points come from class Gaussians without outliers
    (`robust_gaussians`) whose tails are calibrated (`calibrate_tail`), and balance the classes.

    Parameters
    ----------
    neighbors, contamination, shrink
        As of `robust_gaussians`. Give the share of wrong labels if you know it.
    q, gamma, alpha, calibrate_mean, calibrate_cov
        As of `calibrate_tail`.
    mixup : float
        Both parameters of the Beta distribution [R]; 0 leaves rows as they are.
    per_class : int, optional
        As of `ClassGaussians.sample`.
    C : float
        Inverse strength of the L2 penalty.
    random_state : int, RandomState or None

    Attributes
    ----------
    classes_ : (K,) labels
    gaussians_ : ClassGaussians
    model_ : LogisticRegression

    Notes
    -----
    Stages 2 and 3 of the paper without its individual calibration, which has nothing to hold where the encoder does
    not move; see `RCALTrainer`. Source: arXiv 2211.10955.
    """

    def __init__(
        self, *, neighbors: int = 20, contamination: float | str = "estimate", shrink: float | str = 1e-3, q: int = 3,
        gamma: float = 0.5, alpha: float = 0.0, calibrate_mean: bool = False, calibrate_cov: bool = True,
        mixup: float = 1.0, per_class: int | None = None, C: float = 1.0, random_state: Any = 0,
    ) -> None:  # fmt: skip
        self.neighbors = neighbors
        self.contamination = contamination
        self.shrink = shrink
        self.q = q
        self.gamma = gamma
        self.alpha = alpha
        self.calibrate_mean = calibrate_mean
        self.calibrate_cov = calibrate_cov
        self.mixup = mixup
        self.per_class = per_class
        self.C = C
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: ArrayLike) -> RCALHead:
        """Recover the class Gaussians, sample, and train.

        Parameters
        ----------
        X : (n, m) float
            Representations.
        y : (n,) labels
            Wrong in part.

        Raises
        ------
        InputError, DataError
            As of `robust_gaussians` and `calibrate_tail`; mixup or C out of range.
        """
        if not isinstance(self.mixup, int | float) or not 0 <= self.mixup < np.inf:
            raise InputError(f"mixup: got {self.mixup!r}; a number of at least 0 is needed")
        if not isinstance(self.C, int | float) or not 0 < self.C < np.inf:
            raise InputError(f"C: got {self.C!r}; a number above 0 is needed")
        try:
            rows, labels = validate_data(self, X, y, dtype=np.float64, ensure_min_samples=2)
            check_classification_targets(labels)
        except ValueError as error:
            raise DataError(str(error)) from None
        found = robust_gaussians(
            rows, labels, neighbors=self.neighbors, contamination=self.contamination, shrink=self.shrink
        )
        self.gaussians_ = calibrate_tail(
            found, q=self.q, gamma=self.gamma, alpha=self.alpha, mean=self.calibrate_mean, cov=self.calibrate_cov
        )
        self.classes_ = self.gaussians_.classes
        rng = np.random.default_rng(check_random_state(self.random_state).randint(2**31 - 1))
        self.model_ = train_head(
            rows, labels, self.gaussians_, rng, mixup=self.mixup, per_class=self.per_class, C=self.C
        )
        return self

    def predict_proba(self, X: ArrayLike) -> Float[np.ndarray, "n classes"]:
        """Probability of each of `classes_`, (n, K)."""
        check_is_fitted(self)
        return self.model_.predict_proba(validate_data(self, X, dtype=np.float64, reset=False))

    def predict(self, X: ArrayLike) -> Shaped[np.ndarray, " n"]:
        """The likeliest class of each row, (n,)."""
        best = self.predict_proba(X).argmax(axis=1)
        return self.classes_[best]


def train_head(
    rows: Float[np.ndarray, "n dim"], labels: Shaped[np.ndarray, " n"], gaussians: ClassGaussians,
    rng: np.random.Generator, *, mixup: float = 1.0, per_class: int | None = None, C: float = 1.0,
) -> LogisticRegression:  # fmt: skip
    """Logistic regression on mixed real rows, each once with either label, and on points drawn from `gaussians`."""
    points, kinds = gaussians.sample(per_class, random_state=rng)
    lam = rng.beta(mixup, mixup, len(rows)) if mixup else np.ones(len(rows))
    other = rng.permutation(len(rows))
    mixed = lam[:, None] * rows + (1 - lam[:, None]) * rows[other]
    return LogisticRegression(C=C, max_iter=1000).fit(
        np.concatenate([mixed, mixed, points]), np.concatenate([labels, labels[other], kinds]),
        sample_weight=np.concatenate([lam, 1 - lam, np.ones(len(points))]),
    )  # fmt: skip
