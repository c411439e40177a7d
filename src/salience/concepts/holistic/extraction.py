"""How good a dictionary of concepts is: what it leaves out, how sparse, how steady, how lifelike what it writes is.

Source: Fel et al., NeurIPS 2023 (arXiv 2306.07304), section 3, from memory; formulas of relative error, sparsity,
Wasserstein and Fréchet distance and of the matching as in the metrics of overcomplete.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.optimize import linear_sum_assignment
from sklearn.base import clone
from sklearn.model_selection import KFold
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from salience.concepts.extractors import ConceptExtractor
from salience.errors import InputError
from salience.measure._checks import at_least, finite

ZERO = 1e-6  # a code no larger counts as none


@dataclass(frozen=True)
class ExtractionReport:
    """Measures of an extractor on activations that it was not fitted on.

    Attributes
    ----------
    relative_l2 : float
        ``|A - decode(U)| / |A|``; lower is better.
    sparsity : float
        Share of codes that are at most 1e-6 in absolute value; higher is sparser.
    stability : float
        Cosine distance between matched rows of dictionaries of folds, mean over pairs of folds; lower is better.
    w1 : float
        Wasserstein distance of the written activations to the true ones: `wasserstein`; lower is better.
    frechet : float
        The same between Gaussians of their means and covariances: `frechet`; lower is better.
    ood : float
        How much farther from real activations the written ones are than the true ones: `out_of_distribution`; about 0
        is best, below 0 is too typical.
    agreement : float
        Share of rows whose predicted class stays when the network reads what was written; NaN without a `head`.
    dropped : int
        Rows of the dictionaries of folds that are 0 and could not be matched.
    """

    relative_l2: float
    sparsity: float
    stability: float
    w1: float
    frechet: float
    ood: float
    agreement: float
    dropped: int


def extraction_report(
    train: Float[Tensor, "n *positions p"],
    test: Float[Tensor, "m *positions p"],
    extractor: ConceptExtractor,
    *,
    folds: int = 4,
    neighbors: int = 5,
    head: Callable[[Float[Tensor, "m *positions p"]], Float[Tensor, "m classes"]] | None = None,
    random_state: int = 0,
) -> ExtractionReport:
    """Measure a fitted extractor on activations that it has not seen, and refits of it on folds of those it has.

    Parameters
    ----------
    train : Tensor (n, ..., p)
        What it was fitted on; positions count as rows.
    test : Tensor (m, ..., p)
        Held out; the codes come from `encode`.
    extractor : ConceptExtractor
        Fitted, and a scikit-learn estimator: copies of it are fitted anew, each with a `random_state` of its own.
    folds : int
        Parts of `train`, at least 2, a dictionary each.
    neighbors : int
        Of `out_of_distribution`.
    head : callable, optional
        Logits that follow from activations shaped as `test`.
    random_state : int
        Of the folds.

    Raises
    ------
    InputError
        Fewer than two folds, or as the extractor's own.
    """
    at_least("folds", folds, 2)
    width = test.shape[-1]
    bank, real = train.reshape(-1, width), test.reshape(-1, width)
    with torch.no_grad():
        codes = extractor.encode(real)
        written = extractor.decode(codes)
        agreement = math.nan
        if head is not None:
            kept = head(written.view(test.shape)).argmax(1) == head(test).argmax(1)
            agreement = float(kept.double().mean())
    stability, dropped = _stability(bank, extractor, folds, random_state)
    bank, real, written, codes = bank.cpu(), real.cpu(), written.cpu(), codes.cpu()
    return ExtractionReport(
        relative_l2=float((real - written).double().norm() / real.double().norm().clamp(min=1e-300)),
        sparsity=float((codes.abs() <= ZERO).double().mean()),
        stability=stability, w1=wasserstein(real, written), frechet=frechet(real, written),
        ood=out_of_distribution(bank, real, written, neighbors=neighbors), agreement=agreement, dropped=dropped,
    )  # fmt: skip


def _stability(
    bank: Float[Tensor, "n p"], extractor: ConceptExtractor, folds: int, random_state: int
) -> tuple[float, int]:
    """Mean distance between dictionaries of disjoint folds, and how many of their rows are 0."""
    parts = KFold(folds, shuffle=True, random_state=random_state).split(np.zeros(len(bank)))
    found = []
    for number, (_, rows) in enumerate(parts):
        own = clone(extractor)
        if "random_state" in own.get_params():  # each fold draws anew, or what is drawn would look steady
            own.set_params(random_state=own.random_state + number)
        found.append(own.fit(bank[torch.from_numpy(rows).to(bank.device)]).components_)
    dropped = sum(int((v.norm(dim=1) == 0).sum()) for v in found)
    return float(np.mean([dictionary_distance(v, w) for v, w in itertools.combinations(found, 2)])), dropped


def dictionary_distance(first: ArrayLike | Tensor, second: ArrayLike | Tensor) -> float:
    """Cosine distance of two dictionaries, their rows matched one to one: which is which is not looked at.

        min over matchings s of  mean_i (1 - cos(V_i, W_s(i)))

    Parameters
    ----------
    first, second : (k, p) and (l, p)
        Rows of 0 have no direction and are left out; of what is left the smaller number is matched.

    Returns
    -------
    float
        In 0..2; NaN where a dictionary is all 0.

    Notes
    -----
    The sum that overcomplete's `cosine_hungarian_loss` gives, divided by the number of matched rows.
    """
    v, w = finite("first", first, 2), finite("second", second, 2)
    if v.shape[1] != w.shape[1]:
        raise InputError(f"first and second: have rows of {v.shape[1]} and of {w.shape[1]} values; they must agree")
    v, w = (rows[np.linalg.norm(rows, axis=1) > 0] for rows in (v, w))
    if not len(v) or not len(w):
        return math.nan
    v, w = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (v, w))
    distance = 1 - v @ w.T
    return float(distance[linear_sum_assignment(distance)].mean())


def wasserstein(real: ArrayLike | Tensor, written: ArrayLike | Tensor) -> float:
    """1-Wasserstein distance column by column, averaged: ``mean |sort(A)_ij - sort(B)_ij|``, columns sorted.

    Parameters
    ----------
    real, written : (n, p)
    """
    a, b = _pair(real, written)
    return float(np.abs(np.sort(a, axis=0) - np.sort(b, axis=0)).mean())


def frechet(real: ArrayLike | Tensor, written: ArrayLike | Tensor) -> float:
    """Fréchet distance of two Gaussians.

        |m_A - m_B|^2 + tr(C_A + C_B - 2 (C_A C_B)^(1/2))

    Parameters
    ----------
    real, written : (n, p)
        n >= 2.
    """
    a, b = _pair(real, written)
    if len(a) < 2:
        raise InputError("real and written: have a single row; at least 2 are needed")
    first, second = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    # The root of C_A C_B has the trace of the root of the symmetric C_A^(1/2) C_B C_A^(1/2).
    values, vectors = np.linalg.eigh(first)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    middle = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(min=0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + first.trace() + second.trace() - 2 * middle)


def out_of_distribution(
    bank: ArrayLike | Tensor, real: ArrayLike | Tensor, written: ArrayLike | Tensor, *, neighbors: int = 5
) -> float:
    """How much farther from the bank of real activations the written ones lie, on average.

        mean_j d_k(written_j) - d_k(real_j),    d_k the distance to the k-th nearest row of the bank

    Parameters
    ----------
    bank : (n, p)
    real, written : (m, p)
    neighbors : int
        k, at most n.

    Notes
    -----
    Source: Sun et al., "Out-of-Distribution Detection with Deep Nearest Neighbors", ICML 2022 (arXiv 2204.06507); there
    activations are divided by their length, here they are taken as they are.
    """
    a, b = _pair(real, written)
    rows = finite("bank", bank, 2)
    at_least("neighbors", neighbors, 1)
    if neighbors > len(rows) or rows.shape[1] != a.shape[1]:
        raise InputError(f"bank: has shape {rows.shape}; at least {neighbors} rows of {a.shape[1]} values are needed")
    index = NearestNeighbors(n_neighbors=neighbors).fit(rows)
    far = [index.kneighbors(x)[0][:, -1].mean() for x in (a, b)]
    return float(far[1] - far[0])


def _pair(real: ArrayLike | Tensor, written: ArrayLike | Tensor) -> tuple[np.ndarray, np.ndarray]:
    a, b = finite("real", real, 2), finite("written", written, 2)
    if a.shape != b.shape:
        raise InputError(f"real and written: have shapes {a.shape} and {b.shape}; they must be the same")
    return a, b
