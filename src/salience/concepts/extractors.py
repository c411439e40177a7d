"""Concept extractors: activations in, codes and a dictionary out."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from salience.concepts.nonnegative import nmf, nnls, refuse_negative


class ConceptExtractor(Protocol):
    """What every extractor does: find a dictionary, write activations in it, and read them back.

    `encode` is differentiable in the activations where the method allows it, `decode` in the codes.
    """

    @property
    def components_(self) -> Float[Tensor, "k p"]:
        """The dictionary `V`: a concept a row."""
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

    def fit(
        self, activations: Float[Tensor, "n p"] | Float[np.ndarray, "n p"], device: torch.device | str | None = None
    ) -> NMFConcepts:
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
