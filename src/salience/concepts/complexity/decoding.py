"""How well features can be read from layers by a linear decoder: V-information, complexity, time to decode.

    I_V(x -> z) = H_V(z) - H_V(z | x) = Var(z) R^2,      V: Gaussians of variance 1/2 with a linear mean
    K(z, x) = 1 - mean_layers I_V(f_l(x) -> z)           complexity: 0 readable everywhere, 1 nowhere
    A(z) = 1 - mean_checkpoints I_V(f_n^(e)(x) -> z)     time to decode: 0 readable from the first checkpoint on

Source: Fel, Béthune, Lampinen, Serre and Hermann, NeurIPS 2024 (arXiv 2407.06076), sections 3 and 4.1. Reconstructed
from the paper's equations as others tell them. Ours: the decoder is a ridge regression, judged on held-out images.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from salience.errors import DataError, InputError

Matrix = Float[Tensor, "rows columns"] | Float[np.ndarray, "rows columns"]
RIDGES = tuple(10.0**power for power in range(-6, 2))  # tried by "cv", in units of the mean eigenvalue of H^T H
_CELLS = 2**24  # of a layer held in float64 at once: 128 MB
_STEADY = 1e-6  # a feature is near-constant if its deviation is below this share of its largest value


@dataclass
class Decodability:
    """How well each of k features can be read from each of n layers, or checkpoints.

    Attributes
    ----------
    names : tuple of str
        The layers or checkpoints, in order.
    information : array (n, k)
        `I_V`, in 0..1, in units of the feature's variance; NaN where a feature is dead.
    ridge : array (n, k)
        The penalty that the decoder was given.
    live : boolean array (k,)
        False for features that are the same for (nearly) all images of one of the two parts: they have no score.
    """

    names: tuple[str, ...]
    information: Float[np.ndarray, "n k"]
    ridge: Float[np.ndarray, "n k"]
    live: Bool[np.ndarray, " k"]

    @property
    def score(self) -> Float[np.ndarray, " k"]:
        """``1 - mean I_V`` over all of them: `K` over layers, `A` over checkpoints."""
        return 1 - self.information.mean(0)

    @property
    def dead(self) -> int:
        """How many features have no score."""
        return int((~self.live).sum())


def v_information(
    H_train: Matrix, z_train: Matrix, H_test: Matrix, z_test: Matrix, ridge: float | str = "cv"
) -> Float[np.ndarray, " k"]:
    """Information about features that a linear decoder finds in a layer, out of sample.

        I_V = max(0, Var(z) R^2),    R^2 = 1 - sum (z - zhat)^2 / sum (z - mean z)^2 on the test part

    which is the difference of the mean negative log-likelihoods of ``N(mean z, 1/2)`` and of ``N(zhat(x), 1/2)``.
    One eigendecomposition serves all features and all penalties.

    Parameters
    ----------
    H_train, H_test : Tensor or ndarray (n, d), (m, d)
        The layer, a row an image; a memory map is read block by block. Computed in float64.
    z_train, z_test : Tensor or ndarray (n, k), (m, k)
        The features.
    ridge : "cv" or float
        Penalty on the squared weights: for each feature that of `RIDGES` times the mean eigenvalue of ``H^T H`` which
        does best by leave-one-out on the training part, or this one for all.

    Returns
    -------
    array (k,)
        In the squared units of z; not negative.

    Raises
    ------
    InputError
        Shapes that do not fit, or a penalty of 0 with more columns than rows.
    DataError
        Values that are not finite.

    Notes
    -----
    Source: sections 3 and appendix on the closed form of arXiv 2407.06076; V-information: Xu et al., ICLR 2020.
    """
    z_train, z_test = features_of("z_train", z_train), features_of("z_test", z_test)
    return _information(_Layer(H_train, H_test), z_train, z_test, ridge)[0]


def feature_complexity(
    layers: Mapping[str, tuple[Matrix, Matrix]], z_train: Matrix, z_test: Matrix, ridge: float | str = "cv"
) -> Decodability:
    """Complexity of features: how little of them can be read linearly, averaged over all layers.

        K(z, x) = 1 - (1/n) sum_l I_V(f_l(x) -> z),    z of variance 1

    Give every layer, from the input on: a score over some of the layers is another one. It also depends on how maps
    were reduced to vectors (`layer_activations`) and on the penalty, which is why that is returned.

    Parameters
    ----------
    layers : dict of str to (train, test)
        Each (n, d_l) and (m, d_l): rows in the same order everywhere.
    z_train, z_test : Tensor or ndarray (n, k), (m, k)
    ridge : "cv" or float
        See `v_information`.

    Returns
    -------
    Decodability
        With `score` for K; dead features have NaN.

    Raises
    ------
    InputError, DataError
        As in `v_information`; no layer.

    Warns
    -----
    UserWarning
        A single layer, where K is 1 - I_V of that one.
    """
    if len(layers) == 1:
        warnings.warn("layers: a single one is given, so that complexity is 1 - I_V of that layer alone", stacklevel=2)
    return _decodability("layers", layers, z_train, z_test, ridge)


def time_to_decode(
    checkpoints: Mapping[str, tuple[Matrix, Matrix]], z_train: Matrix, z_test: Matrix, ridge: float | str = "cv"
) -> Decodability:
    """When features become readable: final features, read from the penultimate layer of each checkpoint.

        A(z) = 1 - (1/E) sum_e I_V(f_n^(e)(x) -> z),    z of the last checkpoint throughout

    Parameters
    ----------
    checkpoints : dict of str to (train, test)
        Penultimate activations (n, p), (m, p) at each checkpoint in the order of training, of the same images in the
        same order (`layer_activations` returns fingerprints to compare).
    z_train, z_test : Tensor or ndarray (n, k), (m, k)
        Features of the finished network. `ridge` as in `v_information`.

    Returns
    -------
    Decodability
        With `score` for A: low for what is there early.

    Raises
    ------
    InputError, DataError
        As in `v_information`; no checkpoint.
    """
    return _decodability("checkpoints", checkpoints, z_train, z_test, ridge)


def _decodability(what: str, steps: Mapping[str, tuple[Matrix, Matrix]], z_train: Matrix, z_test: Matrix,
                  ridge: float | str) -> Decodability:  # fmt: skip
    if not steps:
        raise InputError(f"{what}: there are none; give at least one")
    train, test = features_of("z_train", z_train), features_of("z_test", z_test)
    if train.shape[1] != test.shape[1]:
        raise InputError(f"z_train and z_test: have {train.shape[1]} and {test.shape[1]} features")
    live = varies(train) & varies(test)
    if not live.any():
        raise DataError(f"z_train and z_test: none of {len(live)} features varies in both parts")
    # In units of the deviation that the held-out part has, so that I_V is R^2.
    scale = test[:, live].std(0)
    train, test = train[:, live] / scale, test[:, live] / scale
    information = np.full((len(steps), len(live)), np.nan)
    penalties = information.copy()
    for row, (name, parts) in enumerate(steps.items()):
        information[row, live], penalties[row, live] = _information(_Layer(*parts, name), train, test, ridge)
    return Decodability(tuple(steps), information, penalties, live)


def varies(features: Float[np.ndarray, "n k"]) -> Bool[np.ndarray, " k"]:
    """Which features are not (nearly) the same for all images."""
    return features.std(0) > _STEADY * np.abs(features).max(0)


def features_of(name: str, values: Any) -> Float[np.ndarray, "n k"]:
    """Features as float64, checked."""
    array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float64)
    if array.ndim != 2 or 0 in array.shape:
        raise InputError(f"{name}: must be a matrix (images, features) that is not empty; got {array.shape}")
    if not np.isfinite(array).all():
        row, column = np.argwhere(~np.isfinite(array))[0]
        raise DataError(f"{name}: row {row}, feature {column} is not finite")
    return array


class _Layer:
    """A layer through its singular vectors: ``H - mean = U diag(s) V^T`` on the training part, ``T = (H - mean) V``.

    Of `H^T H` (d, d) or `H H^T` (n, n) the smaller one is decomposed, in float64.
    """

    def __init__(self, train: Matrix, test: Matrix, name: str = "H") -> None:
        for part, matrix in (("train", train), ("test", test)):
            if getattr(matrix, "ndim", 0) != 2 or 0 in matrix.shape:
                raise InputError(f"{name}: the {part} part must be a matrix (images, columns) that is not empty; got "
                                 f"{tuple(getattr(matrix, 'shape', ()))}; flatten or pool maps first")  # fmt: skip
        if train.shape[1] != test.shape[1]:
            raise InputError(
                f"{name}: has {train.shape[1]} columns in the train part and {test.shape[1]} in the test part"
            )
        self.name, self.shape, self.rows_test = name, tuple(train.shape), len(test)
        n, d = self.shape
        if d <= n:
            mean = sum(part.sum(0) for part in _blocks(train, name)) / n
            gram = sum((c := part - mean).T @ c for part in _blocks(train, name))
            values, V = _eigh(gram)
            scores = [torch.cat([(part - mean) @ V for part in _blocks(m, name)]) for m in (train, test)]
            self.s2, self.U, self.T = values, scores[0] / values.sqrt(), scores[1]
        else:
            gram, across = torch.zeros(n, n).double(), torch.zeros(len(test), n).double()
            step = max(1, _CELLS // max(n, len(test)))
            for own, other in zip(_columns(train, name, step), _columns(test, name, step), strict=True):
                mean = own.mean(0)
                gram, across = gram + (own - mean) @ (own - mean).T, across + (other - mean) @ (own - mean).T
            self.s2, self.U = _eigh(gram)
            self.T = across @ self.U / self.s2.sqrt()
        self.total = float(gram.trace())

    def fit(self, z: Float[Tensor, "n k"], penalty: float) -> tuple[Float[Tensor, "m k"], Float[Tensor, " k"]]:
        """Predictions on the test part, and the sum of squared leave-one-out residuals on the training part."""
        mean = z.mean(0)
        inner = self.U.T @ (z - mean)
        shrink = self.s2 / (self.s2 + penalty)
        leverage = 1 / len(z) + self.U.square() @ shrink
        residual = z - mean - self.U @ (shrink[:, None] * inner)
        loo = (residual / (1 - leverage).clamp(min=1e-12)[:, None]).square().sum(0)
        return mean + self.T @ ((shrink / self.s2.sqrt())[:, None] * inner), loo


def _information(layer: _Layer, z_train: Float[np.ndarray, "n k"], z_test: Float[np.ndarray, "m k"],
                 ridge: float | str) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:  # fmt: skip
    """``max(0, Var(z) R^2)`` of every feature, and the penalty of its decoder."""
    (n, d), z = layer.shape, torch.from_numpy(z_train)
    if (n, layer.rows_test) != (len(z_train), len(z_test)) or z_train.shape[1] != z_test.shape[1]:
        raise InputError(f"{layer.name}: has {n} and {layer.rows_test} rows, the features {z_train.shape} and "
                         f"{z_test.shape}; each row must be the same image in both")  # fmt: skip
    if ridge == "cv":
        penalties = [share * layer.total / min(n, d) for share in RIDGES]
    elif isinstance(ridge, bool) or not isinstance(ridge, int | float) or not 0 <= ridge < np.inf:
        raise InputError(f"ridge: got {ridge!r}; it must be 'cv' or a number of at least 0")
    elif ridge == 0 and d >= n:
        raise InputError(f"ridge: is 0, but layer {layer.name} has {d} columns for {n} images, so the decoder is not "
                         "determined; give 'cv', a penalty above 0, more images, or pool to fewer places")  # fmt: skip
    else:
        penalties = [float(ridge)]
    best = np.full(z.shape[1], np.inf)
    chosen, predicted = np.zeros(z.shape[1]), np.empty_like(z_test)
    for penalty in penalties:
        found, loo = layer.fit(z, penalty)
        better = loo.numpy() < best
        best[better], chosen[better], predicted[:, better] = loo.numpy()[better], penalty, found.numpy()[:, better]
    return np.maximum(0.0, z_test.var(0) - ((z_test - predicted) ** 2).mean(0)), chosen


def _eigh(gram: Any) -> tuple[Float[Tensor, " r"], Float[Tensor, "q r"]]:
    """Eigenvalues and eigenvectors of what is not zero to rounding."""
    values, vectors = torch.linalg.eigh(gram)
    kept = values > 1e-12 * values[-1].clamp(min=torch.finfo(values.dtype).tiny)
    return values[kept], vectors[:, kept]


def _blocks(matrix: Matrix, name: str) -> Iterator[Float[Tensor, "rows d"]]:
    step = max(1, _CELLS // matrix.shape[1])
    for start in range(0, len(matrix), step):
        yield _double(matrix[start : start + step], name, start)


def _columns(matrix: Matrix, name: str, step: int) -> Iterator[Float[Tensor, "n columns"]]:
    for start in range(0, matrix.shape[1], step):
        yield _double(matrix[:, start : start + step], name, 0)


def _double(part: Any, name: str, start: int) -> Float[Tensor, "rows columns"]:
    """In float64, and finite."""
    block = part.detach().cpu().double() if isinstance(part, Tensor) else torch.from_numpy(np.array(part, np.float64))
    if not bool(torch.isfinite(block).all()):
        row = start + int((~torch.isfinite(block)).any(1).nonzero()[0])
        raise DataError(f"{name}: row {row} is not finite")
    return block
