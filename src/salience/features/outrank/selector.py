"""The same score as a feature selector of scikit-learn, on a matrix in memory."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float
from sklearn.base import BaseEstimator
from sklearn.feature_selection import SelectorMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import type_of_target
from sklearn.utils.validation import check_is_fitted, validate_data

from salience.errors import InputError
from salience.features.outrank.batches import BatchScores
from salience.features.outrank.columns import Bins, Coded, encode


class OutRankSelector(SelectorMixin, BaseEstimator):
    """Keep the columns that tell most about a target, by cardinality-aware mutual information.

        score = H(f~|y) - H(f|y)        median over batches of rows, in nats (see `ca_mutual_info`)

    Parameters
    ----------
    n_features_to_select : int or None
        Columns to keep; None keeps those that score above 0, and at least the best one.
    bins : int
        Columns with more distinct numbers are put into so many quantile bins, as is a target of real numbers. Text
        and other values are categories.
    batch_rows : int
    shifts : int
        Spoofed columns whose mean is subtracted.
    random_state : int, RandomState or None
        Of the order in which rows go to batches.

    Attributes
    ----------
    scores_ : (features,) float64
    plain_ : (features,) float64
        Plain mutual information, for comparison.
    n_features_in_ : int
    feature_names_in_ : (features,) str
        Where X has column names.

    Raises
    ------
    InputError
        A parameter is out of range.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> X, y = load_iris(return_X_y=True)
    >>> OutRankSelector(n_features_to_select=2).fit(X, y).get_support().tolist()
    [False, False, True, True]
    """

    def __init__(
        self, *, n_features_to_select: int | None = None, bins: int = 16, batch_rows: int = 1 << 14, shifts: int = 1,
        random_state: int | np.random.RandomState | None = 0,
    ) -> None:  # fmt: skip
        self.n_features_to_select = n_features_to_select
        self.bins = bins
        self.batch_rows = batch_rows
        self.shifts = shifts
        self.random_state = random_state

    def fit(self, X, y) -> OutRankSelector:
        """Score every column of X (n, features) against y (n,). NaN and None are a value of their own."""
        X, y = validate_data(self, X, y, dtype=None, ensure_all_finite="allow-nan", ensure_min_samples=2)
        self._check_parameters(X.shape[1])
        target = self._target(y)
        if len(np.unique(target.codes)) < 2:
            raise InputError(f"y holds one value only, {y[0]!r}: there is nothing to tell apart")
        columns = [self._coded(str(at), X[:, at]) for at in range(X.shape[1])]
        below = np.array([len(column.values) for column in columns])
        codes = np.stack([column.codes for column in columns])
        order = check_random_state(self.random_state).permutation(len(y))
        scores = BatchScores(len(columns), len(columns), shifts=self.shifts)
        for start in range(0, len(order), self.batch_rows):
            rows = order[start : start + self.batch_rows]
            if not start or len(rows) > self.batch_rows // 2:
                scores.add(np.ascontiguousarray(codes[:, rows]), below, target.codes[rows], len(target.values))
        found = np.median(scores.singles(), axis=0)
        self.scores_: Float[np.ndarray, " features"] = found[0]
        self.plain_: Float[np.ndarray, " features"] = found[1]
        return self

    def _get_support_mask(self) -> Bool[np.ndarray, " features"]:
        check_is_fitted(self)
        order = np.argsort(-self.scores_, kind="stable")
        positive = max(int((self.scores_ > 0).sum()), 1)
        count = positive if self.n_features_to_select is None else self.n_features_to_select
        mask = np.zeros(len(order), bool)
        mask[order[:count]] = True
        return mask

    def _target(self, y: np.ndarray) -> Coded:
        if type_of_target(y, input_name="y").startswith("continuous"):
            return self._coded("y", y)
        return encode("y", pa.chunked_array([pa.array(y)]))

    def _coded(self, name: str, values: np.ndarray) -> Coded:
        if values.dtype.kind in "fiub":
            coded = encode(name, pa.chunked_array([pa.array(values)]))
            return Bins(coded, self.bins, ())(coded)
        if values.dtype == object:
            try:
                return self._coded(name, values.astype(np.float64))
            except (TypeError, ValueError):
                pass
            if any(isinstance(value, dict | list | set) for value in values):
                raise TypeError(f"column {name} of X holds a collection; argument must be a string or a number")
        return encode(name, pa.chunked_array([pa.array([None if value is None else str(value) for value in values])]))

    def _check_parameters(self, features: int) -> None:
        for name, least in (("bins", 2), ("batch_rows", 2), ("shifts", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
                raise InputError(f"{name} must be a whole number of at least {least}, not {value!r}")
        count = self.n_features_to_select
        if count is not None and (isinstance(count, bool) or not isinstance(count, int | np.integer)
                                  or not 1 <= count <= features):  # fmt: skip
            raise InputError(f"n_features_to_select must be None or in 1..{features}, not {count!r}")

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.input_tags.allow_nan = True
        tags.input_tags.string = True
        return tags
