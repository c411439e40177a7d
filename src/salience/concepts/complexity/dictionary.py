"""The features: an overcomplete non-negative dictionary of the penultimate layer, and what each of them does there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.cluster import KMeans
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from salience.concepts.complexity.decoding import features_of
from salience.concepts.extractors import NMFConcepts
from salience.concepts.nonnegative import nmf, nnls, refuse_negative
from salience.errors import DataError, InputError

LEAST_NORM = 1e-4  # weight of |z|^2 beside |a - z D|^2, atoms having norm 1
TOLERANCE = 1e-7  # of the factorisation: from a random start the first iteration, that later ones are held to, is long


class FeatureDictionary(NMFConcepts):
    """Non-negative factorisation with more concepts than dimensions, where codes are not determined by the activations.

        encode(a) = argmin_{z >= 0} |a - z D|^2 + eps |z|^2,    eps -> 0: of all best codes the least

    Without the second term a code would depend on how the solver went; with it the code is a continuous function of
    the image. Up to as many concepts as dimensions there is hardly a difference to `NMFConcepts`.

    Parameters
    ----------
    n_concepts, max_iter, tol, random_state
        As in `NMFConcepts`, but `n_concepts` may exceed n and p: the factorisation then begins at random.

    Attributes
    ----------
    components_, codes_, relative_error_, n_iter_
        As in `NMFConcepts`; atoms have norm 1, and `codes_` are those of `encode`.
    """

    def fit(self, activations: Any, device: torch.device | str | None = None) -> FeatureDictionary:
        """Factorise activations (n, p); errors as in `nmf`."""
        n, p = getattr(activations, "shape", (0, 0))
        init = None
        if self.n_concepts > min(n, p) > 0:
            init = _random_start(activations, self.n_concepts, self.random_state)
        found = nmf(activations, self.n_concepts, init=init, max_iter=self.max_iter, tol=self.tol, device=device,
                    random_state=self.random_state)  # fmt: skip
        return self.use(found.dictionary, activations, found.n_iter)

    def use(self, dictionary: Float[Tensor, "k p"], activations: Any, n_iter: int = 0) -> FeatureDictionary:
        """Take this dictionary, its atoms scaled to norm 1, and the codes of `activations` (n, p) under it."""
        A = torch.from_numpy(np.array(activations)) if not isinstance(activations, Tensor) else activations
        size = dictionary.double().norm(dim=1, keepdim=True)
        self.components_, self.n_iter_ = (dictionary / size.clamp(min=1e-300)).to(dictionary.dtype), n_iter
        self.codes_ = self.encode(A).cpu()
        missing = (A.cpu() - self.codes_ @ self.components_.to(self.codes_)).double().norm()
        self.relative_error_ = float(missing / A.double().norm().clamp(min=1e-300))
        return self

    def encode(self, activations: Float[Tensor, "n p"]) -> Float[Tensor, "n k"]:
        """Non-negative least squares of least norm; a `DataError` refuses negative activations."""
        check_is_fitted(self, "components_")
        refuse_negative(activations.detach())
        D = self.components_.to(activations).double()
        wide = torch.cat([D, LEAST_NORM**0.5 * torch.eye(len(D)).to(D)], 1)
        padded = torch.cat([activations.double(), activations.new_zeros(len(activations), len(D)).double()], 1)
        return nnls(padded, wide).to(activations.dtype)


def learn_dictionary(
    A: Float[Tensor, "n p"] | Float[np.ndarray, "n p"],
    k: int,
    scope: str = "global",
    labels: Int[Tensor, " n"] | Int[np.ndarray, " n"] | Sequence[int] | None = None,
    *,
    max_iter: int = 200,
    random_state: int = 0,
) -> FeatureDictionary:
    """Learn k features of the penultimate layer.

        (Z, D) = argmin_{Z >= 0, D >= 0} |A - Z D|_F,    k > p allowed

    Parameters
    ----------
    A : Tensor or ndarray (n, p)
        Penultimate activations, not negative (`split_signs` makes others so).
    k : int
        Features in all.
    scope : {"global", "per_class"}
        One factorisation of all images, or one of each class's images with ``k / classes`` features, put together.
        Which of the two the paper used is not known.
    labels : (n,), optional
        For "per_class": class of each image, true or predicted.
    max_iter, random_state
        Of the factorisation; see `nmf`. Its tolerance is 1e-7.

    Returns
    -------
    FeatureDictionary
        With `codes_` (n, k), the features, and `encode` for new images.

    Raises
    ------
    InputError
        An unknown scope, labels that are missing or do not fit, or a k that classes do not divide.
    DataError
        Negative activations.

    Notes
    -----
    Source: section 3 of arXiv 2407.06076.
    """
    options: dict[str, Any] = {"max_iter": max_iter, "tol": TOLERANCE, "random_state": random_state}
    whole = FeatureDictionary(n_concepts=k, **options)
    if scope == "global":
        return whole.fit(A)
    if scope != "per_class":
        raise InputError(f"scope: got {scope!r}; it must be 'global' or 'per_class'")
    if labels is None or len(labels) != len(A):
        raise InputError(f"labels: scope 'per_class' needs one class for each of {len(A)} rows; got "
                         f"{'none' if labels is None else len(labels)}")  # fmt: skip
    own = np.asarray(labels)
    classes, counts = np.unique(own, return_counts=True)
    if k < len(classes) or k % len(classes):
        raise InputError(f"k: got {k}; it must be a multiple of the {len(classes)} classes")
    each = k // len(classes)
    few = counts.argmin()
    if counts[few] < each:
        raise InputError(f"labels: class {classes[few]} has {counts[few]} rows; {each} features need at least as many")
    parts = [FeatureDictionary(n_concepts=each, **options).fit(A[own == c]) for c in classes]
    return whole.use(torch.cat([part.components_ for part in parts]), A, max(part.n_iter_ for part in parts))


def split_signs(A: Float[Tensor, "n p"]) -> Float[Tensor, "n 2p"]:
    """Activations with negative values as non-negative ones: their positive parts, then their negative parts.

    An atom (d+, d-) then stands for ``d+ - d-``, and head weights W become ``[W, -W]``.
    """
    return torch.cat([A.clamp(min=0), A.neg().clamp(min=0)], 1)


class FeatureImportance(NamedTuple):
    """How much features move the logit, each (k,): `absolute` is `Gamma`, `signed` tells for and against (< 0)."""

    absolute: Float[np.ndarray, " k"]
    signed: Float[np.ndarray, " k"]


def feature_importance(z: Any, D: Any, W: Any, targets: Any) -> FeatureImportance:
    """How much each feature moves the logit of the image's class.

        Gamma(z_i) = E_x |dy_c/dz_i z_i|,    dy_c/dz_i = (D W^T)_ic

    As y is linear in z, this is occlusion, integrated gradients and gradient x input at once. The absolute value is
    taken of each image, inside the mean.

    Parameters
    ----------
    z : (n, k)
        Features.
    D : (k, p)
        Dictionary.
    W : (classes, p)
        Weights of the linear head.
    targets : integers (n,)
        The class of each image whose logit is followed; the predicted one by default elsewhere.

    Returns
    -------
    FeatureImportance
        In units of the logit.

    Raises
    ------
    InputError
        Shapes that do not fit, or a class that is not there.

    Notes
    -----
    Source: section 4.3 of arXiv 2407.06076.
    """
    z, D, W = features_of("z", z), features_of("D", D), features_of("W", W)
    c = np.asarray(targets)
    if D.shape != (z.shape[1], W.shape[1]) or c.shape != (len(z),) or c.dtype.kind not in "iu":
        raise InputError(f"z, D, W and targets: got {z.shape}, {D.shape}, {W.shape} and {c.shape} of {c.dtype}; they "
                         "must be (n, k), (k, p), (classes, p) and whole numbers (n,)")  # fmt: skip
    if c.min() < 0 or c.max() >= len(W):
        raise InputError(f"targets: got classes {c.min()}..{c.max()}; the head has 0..{len(W) - 1}")
    effects = (D @ W.T).T[c] * z
    return FeatureImportance(np.abs(effects).mean(0), effects.mean(0))


def support_features(
    z: Any, D: Any, W: Any, b: Any, importance: Any, targets: Any, kept: Sequence[int]
) -> Float[np.ndarray, " steps"]:
    """Accuracy with only the most important features, relative to that with all: what the others carry together.

    Parameters
    ----------
    z, D, W
        As in `feature_importance`.
    b : (classes,)
        Bias of the head.
    importance : (k,)
    targets : integers (n,)
        Labels, or predictions of the network.
    kept : sequence of int
        How many features to keep, at each step.

    Returns
    -------
    array (steps,)

    Raises
    ------
    InputError
        As in `feature_importance`, or a number of features that is not there.
    DataError
        With all features no image is classified as its target.
    """
    feature_importance(z, D, W, targets)  # checks
    z, D, W = features_of("z", z), features_of("D", D), features_of("W", W)
    order = np.argsort(-np.asarray(importance, dtype=np.float64), kind="stable")
    if order.shape != (z.shape[1],) or min(kept) < 0 or max(kept) > len(order):
        raise InputError(f"importance and kept: {order.shape} values and steps {list(kept)} for {z.shape[1]} features")

    def accuracy(count: int) -> float:
        own = order[:count]
        return float(((z[:, own] @ (D[own] @ W.T) + np.asarray(b)).argmax(1) == np.asarray(targets)).mean())

    whole = accuracy(len(order))
    if not whole:
        raise DataError("targets: with all features no image is classified as its target, so nothing can be lost")
    return np.array([accuracy(int(count)) for count in kept]) / whole


def hoyer(D: Any) -> Float[np.ndarray, " k"]:
    """How local each atom is: 0 if all neurons carry it alike, 1 if a single one does; NaN for an atom of zeros.

        (sqrt p - |d|_1 / |d|_2) / (sqrt p - 1)

    Raises
    ------
    InputError
        Atoms of a single dimension, where this is not defined.
    """
    D = features_of("D", D)
    p = D.shape[1]
    if p < 2:
        raise InputError("D: atoms must have at least 2 dimensions")
    size = np.linalg.norm(D, axis=1)
    ratio = np.abs(D).sum(1) / np.where(size > 0, size, np.nan)
    return (np.sqrt(p) - ratio) / (np.sqrt(p) - 1)


def meta_features(
    D: Any, complexity: Float[np.ndarray, " k"], n_clusters: int = 150, random_state: int = 0
) -> tuple[Int[np.ndarray, " k"], Float[np.ndarray, " n_clusters"]]:
    """Groups of atoms that point the same way (k-means of unit atoms), and the mean complexity of each; for display.

    Raises
    ------
    InputError
        More clusters than atoms.
    """
    D = features_of("D", D)
    if not 1 <= n_clusters <= len(D) or len(complexity) != len(D):
        raise InputError(f"n_clusters and complexity: got {n_clusters} and {len(complexity)} values for {len(D)} atoms")
    unit = D / np.linalg.norm(D, axis=1, keepdims=True).clip(min=1e-300)
    groups = KMeans(n_clusters, n_init=4, random_state=random_state).fit_predict(unit)
    known = np.isfinite(complexity)
    total = np.bincount(groups[known], complexity[known], n_clusters)
    count = np.bincount(groups[known], minlength=n_clusters)
    return groups, np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _random_start(activations: Any, k: int, random_state: int) -> tuple[Tensor, Tensor]:
    """Half-normal codes and atoms with the mean of the activations, as scikit-learn begins where k > p."""
    n, p = activations.shape
    dtype = activations.dtype if isinstance(activations, Tensor) else torch.from_numpy(np.array(activations[:1])).dtype
    mean = max(float(activations.mean()), 0.0)
    generator = torch.Generator().manual_seed(random_state)
    parts = [torch.randn(size, generator=generator, dtype=torch.float64).abs() * (mean / k) ** 0.5
             for size in ((n, k), (k, p))]  # fmt: skip
    return parts[0].to(dtype), parts[1].to(dtype)
