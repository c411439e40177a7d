"""Concept extractors: activations in, codes and a dictionary out.

Every one writes activations `A` (n, p) as a product of codes `U` (n, k) and a dictionary `V` (k, p); what is asked of
the two is all that tells one from another:

    min |A - U V|^2   with   k-means      each row of U one-hot
                             PCA          V V^T = I, on A less its mean
                             NMF          U >= 0, V >= 0
                             semi-NMF     U >= 0                                (`seminmf`)
                             autoencoder  U = encoder(A), ||u||_0 <= K          (`sparse_autoencoder`)
                             random       V drawn, U >= 0: the control

Source: Fel, Boutin, Moayeri, Cadène, Béthune, Andéol, Chalvidal and Serre, "A Holistic Approach to Unifying Automatic
Concept Extraction and Concept Importance Estimation", NeurIPS 2023 (arXiv 2306.07304), section 3, from memory.
"""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import numpy as np
import sklearn.exceptions
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from salience.concepts.nonnegative import matrix_shape, nmf, nnls, refuse_negative
from salience.errors import DataError, InputError

Activations = Float[Tensor, "n p"] | Float[np.ndarray, "n p"]


class ConceptExtractor(Protocol):
    """What every extractor does: find a dictionary, write activations in it, and read them back.

    `encode` is differentiable in the activations where the method allows it, `decode` in the codes.
    """

    @property
    def components_(self) -> Float[Tensor, "k p"]:
        """The dictionary `V`: a concept a row."""
        ...

    def fit(self, activations: Activations) -> ConceptExtractor:
        """Find the dictionary."""
        ...

    def encode(self, activations: Float[Tensor, "n p"]) -> Float[Tensor, "n k"]:
        """Codes `U` of new activations."""
        ...

    def decode(self, codes: Float[Tensor, "n k"]) -> Float[Tensor, "n p"]:
        """Activations that the codes stand for."""
        ...


class NMFConcepts(BaseEstimator):
    """Non-negative matrix factorisation: what a position shows is a sum of parts.

        min_{U >= 0, V >= 0} 1/2 |A - U V|^2,    encode(a) = argmin_{u >= 0} 1/2 |a - u V|^2,    decode(u) = u V

    Parameters
    ----------
    n_concepts : int
        k.
    max_iter, tol, random_state
        See `nmf`.

    Attributes
    ----------
    components_ : Tensor (k, p)
        `V`, on the CPU.
    codes_ : Tensor (n, k)
        `U` of what it was fitted on.
    relative_error_ : float
    n_iter_ : int
    """

    def __init__(self, *, n_concepts: int = 20, max_iter: int = 200, tol: float = 1e-4, random_state: int = 0) -> None:
        self.n_concepts, self.max_iter, self.tol, self.random_state = n_concepts, max_iter, tol, random_state

    def fit(self, activations: Activations, device: torch.device | str | None = None) -> NMFConcepts:
        """Factorise activations (n, p), a tensor or an array in memory or on disk; errors as in `nmf`."""
        found = nmf(activations, self.n_concepts, max_iter=self.max_iter, tol=self.tol, device=device,
                    random_state=self.random_state)  # fmt: skip
        self.codes_, self.components_, self.relative_error_, self.n_iter_ = found
        return self

    def encode(self, activations: Float[Tensor, "n p"]) -> Float[Tensor, "n k"]:
        """Non-negative least squares; a `DataError` refuses negative activations."""
        check_is_fitted(self)
        refuse_negative(activations.detach())
        return nnls(activations, self.components_.to(activations))

    def decode(self, codes: Float[Tensor, "n k"]) -> Float[Tensor, "n p"]:
        """The product with the dictionary."""
        check_is_fitted(self)
        return codes @ self.components_.to(codes)


class KMeansConcepts(BaseEstimator):
    """K-means: every position shows one concept. With TCAV it is ACE.

        min_U |A - U V|^2, rows of U one-hot,    encode(a) = one-hot of argmin_i |a - V_i|,    decode(u) = u V

    Parameters
    ----------
    n_concepts : int
        k.
    n_init : int
        Beginnings, of which the best result is taken.
    max_iter, random_state
        See `sklearn.cluster.KMeans`.

    Attributes
    ----------
    components_ : Tensor (k, p)
        The centres.
    """

    def __init__(self, *, n_concepts: int = 20, n_init: int = 10, max_iter: int = 300, random_state: int = 0) -> None:
        self.n_concepts, self.n_init, self.max_iter, self.random_state = n_concepts, n_init, max_iter, random_state

    def fit(self, activations: Activations) -> KMeansConcepts:
        """Find the centres; a warning tells of clusters without a row, where fewer than k rows differ.

        Raises
        ------
        InputError
            No matrix of floats, or fewer rows or columns than concepts.
        DataError
            Values that are not finite.
        """
        a = fitting_matrix(activations, self.n_concepts)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sklearn.exceptions.ConvergenceWarning)
            found = KMeans(self.n_concepts, n_init=self.n_init, max_iter=self.max_iter,
                           random_state=self.random_state).fit(a)  # fmt: skip
        empty = self.n_concepts - len(np.unique(found.labels_))
        if empty:
            warnings.warn(f"{empty} of {self.n_concepts} clusters hold no row: the activations have fewer that differ; "
                          "take fewer concepts", stacklevel=2)  # fmt: skip
        self.components_ = torch.from_numpy(found.cluster_centers_).to(torch.from_numpy(a).dtype)
        return self

    def encode(self, activations: Float[Tensor, "n p"]) -> Float[Tensor, "n k"]:
        """One-hot at the nearest centre; the first of centres that are as near. Its derivative is 0."""
        check_is_fitted(self)
        centres = self.components_.to(activations)
        nearest = torch.cdist(activations.detach(), centres, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
        return torch.nn.functional.one_hot(nearest, len(centres)).to(activations)

    def decode(self, codes: Float[Tensor, "n k"]) -> Float[Tensor, "n p"]:
        """The centre; of codes that are not one-hot, the sum of the centres weighed by them."""
        check_is_fitted(self)
        return codes @ self.components_.to(codes)


class PCAConcepts(BaseEstimator):
    """Principal components: orthogonal directions, codes of either sign.

        min_{V V^T = I} |A - m - U V|^2,    encode(a) = (a - m) V^T,    decode(u) = u V + m,    m the mean of A

    The mean that is taken off when a code is made is put back when it is read: all codes 0 is the mean activation.

    Parameters
    ----------
    n_concepts : int
        k.
    Attributes
    ----------
    components_ : Tensor (k, p)
    mean_ : Tensor (p,)
    """

    def __init__(self, *, n_concepts: int = 20) -> None:
        self.n_concepts = n_concepts

    def fit(self, activations: Activations) -> PCAConcepts:
        """Find the directions; errors as in `KMeansConcepts.fit`."""
        a = fitting_matrix(activations, self.n_concepts)
        # Not "auto", which draws for large matrices.
        found = PCA(self.n_concepts, svd_solver="covariance_eigh" if len(a) > a.shape[1] else "full").fit(a)
        kind = torch.from_numpy(a).dtype
        self.components_ = torch.from_numpy(found.components_.copy()).to(kind)
        self.mean_ = torch.from_numpy(found.mean_).to(kind)
        return self

    def encode(self, activations: Float[Tensor, "n p"]) -> Float[Tensor, "n k"]:
        """Coordinates along the directions, from the mean."""
        check_is_fitted(self)
        return (activations - self.mean_.to(activations)) @ self.components_.to(activations).T

    def decode(self, codes: Float[Tensor, "n k"]) -> Float[Tensor, "n p"]:
        """The mean and what the codes add to it."""
        check_is_fitted(self)
        return codes @ self.components_.to(codes) + self.mean_.to(codes)


class RandomConcepts(BaseEstimator):
    """Directions that nothing was learned for: the control of the other extractors.

        V_ij = |g_ij| / |g_i|, g normal,    encode(a) = argmin_{u >= 0} 1/2 |a - u V|^2,    decode(u) = u V

    NMF without the learning: the same constraints on codes and dictionary, and the best codes there are.

    Parameters
    ----------
    n_concepts : int
        k.
    random_state : int

    Attributes
    ----------
    components_ : Tensor (k, p)
    """

    def __init__(self, *, n_concepts: int = 20, random_state: int = 0) -> None:
        self.n_concepts, self.random_state = n_concepts, random_state

    def fit(self, activations: Activations) -> RandomConcepts:
        """Draw the directions; errors as in `KMeansConcepts.fit`."""
        a = fitting_matrix(activations, self.n_concepts)
        v = np.abs(np.random.default_rng(self.random_state).normal(size=(self.n_concepts, a.shape[1])))
        v /= np.linalg.norm(v, axis=1, keepdims=True)
        self.components_ = torch.from_numpy(v).to(torch.from_numpy(a).dtype)
        return self

    def encode(self, activations: Float[Tensor, "n p"]) -> Float[Tensor, "n k"]:
        """Non-negative least squares."""
        check_is_fitted(self)
        return nnls(activations, self.components_.to(activations))

    def decode(self, codes: Float[Tensor, "n k"]) -> Float[Tensor, "n p"]:
        """The product with the dictionary."""
        check_is_fitted(self)
        return codes @ self.components_.to(codes)


def fitting_matrix(activations: Any, n_concepts: Any, *, overcomplete: bool = False) -> Float[np.ndarray, "n p"]:
    """Activations as an array in memory, checked, and the number of concepts against its size.

    With `overcomplete` there may be more concepts than columns.
    """
    n, p = matrix_shape(activations)
    most = n if overcomplete else min(n, p)
    if isinstance(n_concepts, bool) or not isinstance(n_concepts, int) or not 1 <= n_concepts <= most:
        raise InputError(f"n_concepts: got {n_concepts!r}; activations of shape ({n}, {p}) allow 1..{most}")
    a = activations.detach().cpu().numpy() if isinstance(activations, Tensor) else np.array(activations)
    wrong = ~np.isfinite(a).all(1)
    if wrong.any():
        raise DataError(f"activations: row {int(np.argmax(wrong))} is not finite")
    return a
