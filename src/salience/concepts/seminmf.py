"""Semi-NMF: codes that are not negative, a dictionary of either sign, for layers that do not end in a ReLU."""

from __future__ import annotations

import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from salience.concepts.extractors import Activations, KMeansConcepts, fitting_matrix
from salience.concepts.nonnegative import nnls
from salience.errors import InputError

_SOFT = 0.2  # added to the one-hot codes of k-means to begin with, as in the source


class SemiNMFConcepts(BaseEstimator):
    """Semi-non-negative matrix factorisation: sums of parts, whatever the sign of the activations.

        min_{U >= 0} 1/2 |A - U V|^2,    encode(a) = argmin_{u >= 0} 1/2 |a - u V|^2,    decode(u) = u V

    Codes and dictionary take turns, each solved exactly given the other (least squares, non-negative for the codes), so
    that the error never rises; it begins with the codes of k-means. Rows of `V` have length 1.

    Parameters
    ----------
    n_concepts : int
        k.
    max_iter : int
    tol : float
        Stop when a turn lowers the squared error by less than this share.
    random_state : int

    Attributes
    ----------
    components_ : Tensor (k, p)
    errors_ : list of float
        ``|A - U V| / |A|`` after each turn.

    Notes
    -----
    Source: Ding, Li and Jordan, "Convex and Semi-Nonnegative Matrix Factorizations", 2010, section 2.1, with exact
    alternating least squares in the place of its multiplicative updates.
    """

    def __init__(self, *, n_concepts: int = 20, max_iter: int = 50, tol: float = 1e-4, random_state: int = 0) -> None:
        self.n_concepts, self.max_iter, self.tol, self.random_state = n_concepts, max_iter, tol, random_state

    def fit(self, activations: Activations) -> SemiNMFConcepts:
        """Find the dictionary; errors as in `KMeansConcepts.fit`."""
        a = torch.from_numpy(fitting_matrix(activations, self.n_concepts))
        if self.max_iter < 1 or self.tol < 0:
            raise InputError(f"max_iter and tol: got {self.max_iter} and {self.tol}; they must be at least 1 and 0")
        begin = KMeansConcepts(n_concepts=self.n_concepts, n_init=1, random_state=self.random_state).fit(a)
        codes, size = begin.encode(a) + _SOFT, float(a.double().norm())
        self.errors_: list[float] = []
        for _ in range(self.max_iter):
            v = torch.linalg.lstsq(codes.double(), a.double(), driver="gelsd").solution
            v = torch.nn.functional.normalize(v).to(a.dtype)
            codes = nnls(a, v)
            error = float((a - codes @ v).double().norm()) / max(size, 1e-300)
            done = bool(self.errors_) and self.errors_[-1] ** 2 - error**2 <= self.tol * self.errors_[-1] ** 2
            self.errors_.append(error)
            if done:
                break
        self.components_ = v
        return self

    def encode(self, activations: Float[Tensor, "n p"]) -> Float[Tensor, "n k"]:
        """Non-negative least squares."""
        check_is_fitted(self)
        return nnls(activations, self.components_.to(activations))

    def decode(self, codes: Float[Tensor, "n k"]) -> Float[Tensor, "n p"]:
        """The product with the dictionary."""
        check_is_fitted(self)
        return codes @ self.components_.to(codes)
