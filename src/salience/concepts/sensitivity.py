"""Sobol indices: how much of a function's variance each of its inputs is behind, from quasi-random designs.

    total index of input i     S_Ti = E[Var(Y | all inputs but i)] / Var(Y)

A design of `n_design` points in k dimensions has three blocks of masks in 0..1: `A` and `B`, the two halves of one
low-discrepancy sequence in 2k dimensions, and `C_i` for each input, which is `A` with column i from `B`.

Source: section 3.2 of CRAFT (arXiv 2211.10154); Jansen, "Analysis of variance designs for model output", 1999; the
other estimators as told at `ESTIMATORS`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.stats import qmc

from salience.errors import InputError, nearest

Outputs = Float[np.ndarray, "*batch n"]
Blocks = Float[np.ndarray, "*batch k n"]
SAMPLERS = ("halton", "sobol", "lhs")


def sobol_design(
    n_dims: int, n_design: int, sampler: str = "halton", *, random_state: int | None = None
) -> Float[np.ndarray, "rows k"]:
    """Masks of a design: the blocks A, B, C_1, ..., C_k below one another.

    Parameters
    ----------
    n_dims : int
        k, the number of inputs.
    n_design : int
        Points of a block, at least 2.
    sampler : {"halton", "sobol", "lhs"}
        The sequence in 2k dimensions: Halton, Sobol, or a Latin hypercube.
    random_state : int, optional
        Scramble the sequence. Without one, Halton and Sobol sequences are the plain ones, which begin at 0, and the
        hypercube is drawn with seed 0.

    Returns
    -------
    array (n_design * (k + 2), k)

    Raises
    ------
    InputError
        A number out of range, or no such sampler.
    """
    if n_dims < 1 or n_design < 2:
        raise InputError(f"n_dims and n_design: got {n_dims} and {n_design}; they must be at least 1 and 2")
    if sampler not in SAMPLERS:
        raise InputError(f"sampler: there is no {sampler!r}; {nearest(sampler, SAMPLERS)}")
    scramble = random_state is not None
    with warnings.catch_warnings():  # a Sobol sequence is balanced for powers of 2 only, which is the user's choice
        warnings.simplefilter("ignore", UserWarning)
        if sampler == "lhs":
            points = qmc.LatinHypercube(2 * n_dims, rng=random_state or 0).random(n_design)
        else:
            kind = qmc.Halton if sampler == "halton" else qmc.Sobol
            points = kind(2 * n_dims, scramble=scramble, rng=random_state or 0).random(n_design)
    a, b = points[:, :n_dims], points[:, n_dims:]
    exchanged = np.repeat(a[None], n_dims, axis=0)
    for i in range(n_dims):
        exchanged[i, :, i] = b[:, i]
    return np.concatenate([a, b, exchanged.reshape(-1, n_dims)])


def _jansen(a: Outputs, c: Blocks) -> Blocks:
    n = a.shape[-1]
    return ((a[..., None, :] - c) ** 2).sum(-1) / (2 * n * a.var(-1, ddof=1)[..., None])


def _homma(a: Outputs, c: Blocks) -> Blocks:
    spread = a.var(-1, ddof=1)[..., None]
    return (spread - (a[..., None, :] * c).mean(-1) + a.mean(-1)[..., None] ** 2) / spread


def _saltelli(a: Outputs, c: Blocks) -> Blocks:
    spread = a.var(-1, ddof=1)[..., None]
    return 1 - ((a[..., None, :] * c).mean(-1) - a.mean(-1)[..., None] ** 2) / spread


def _janon(a: Outputs, c: Blocks) -> Blocks:
    n, a = a.shape[-1], a[..., None, :]
    middle = (a + c).mean(-1) / 2
    spread = (a**2 + c**2).sum(-1) / (2 * (n - 1)) - middle**2
    return 1 - ((a * c).mean(-1) - middle**2) / spread


def _glen(a: Outputs, c: Blocks) -> Blocks:
    n, a = a.shape[-1], a[..., None, :]
    product = ((a - a.mean(-1, keepdims=True)) * (c - c.mean(-1, keepdims=True))).sum(-1) / (n - 1)
    return 1 - product / np.sqrt(a.var(-1) * c.var(-1))


# Jansen 1999; Homma and Saltelli 1996; Saltelli et al., The Primer, 2008; Janon et al. 2014; Glen and Isaacs 2012.
ESTIMATORS: dict[str, Callable[[Outputs, Blocks], Blocks]] = {
    "jansen": _jansen, "homma": _homma, "saltelli": _saltelli, "janon": _janon, "glen": _glen,
}  # fmt: skip


def total_indices(outputs: ArrayLike, n_dims: int, estimator: str = "jansen") -> Float[np.ndarray, "*batch k"]:
    """Total Sobol indices from a function's values on a design.

        jansen:  S_Ti = sum_j (Y_A[j] - Y_Ci[j])^2 / (2 n Var(Y_A)),   Var with n - 1

    All estimators read the blocks A and C alone.

    Parameters
    ----------
    outputs : array (..., n_design * (k + 2))
        Values on the rows of `sobol_design`, in their order; leading axes are functions of their own.
    n_dims : int
        k.
    estimator : {"jansen", "homma", "saltelli", "janon", "glen"}

    Returns
    -------
    array (..., k)
        Zeros for a function that does not vary.

    Raises
    ------
    InputError
        Outputs that are not finite or do not fit the design, or no such estimator.

    Warns
    -----
    UserWarning
        A function does not vary over the design.
    """
    if estimator not in ESTIMATORS:
        raise InputError(f"estimator: there is no {estimator!r}; {nearest(estimator, ESTIMATORS)}")
    y = np.asarray(outputs, dtype=np.float64)
    n, rest = divmod(y.shape[-1] if y.ndim else 0, n_dims + 2)
    if rest or n < 2:
        raise InputError(
            f"outputs: have shape {y.shape}; a design in {n_dims} dimensions has n * {n_dims + 2} rows, n >= 2"
        )
    if not np.isfinite(y).all():
        raise InputError("outputs: hold NaN or infinite values")
    a, c = y[..., :n], y[..., 2 * n :].reshape(*y.shape[:-1], n_dims, n)
    flat = np.ptp(a, axis=-1) <= 1e-12 * np.abs(a).max(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        totals = ESTIMATORS[estimator](a, c)
    if flat.any():
        warnings.warn(f"{int(flat.sum())} of {flat.size} functions do not vary over the design: their indices are 0",
                      stacklevel=2)  # fmt: skip
    return np.where(flat[..., None] | ~np.isfinite(totals), 0.0, totals)


def sobol_total(
    fn: Callable[[Float[np.ndarray, "rows k"]], ArrayLike],
    n_dims: int,
    n_design: int = 32,
    *,
    estimator: str = "jansen",
    sampler: str = "halton",
    random_state: int | None = None,
) -> Float[np.ndarray, " k"]:
    """Total Sobol indices of a function of k numbers in 0..1.

    Parameters
    ----------
    fn : callable
        ``fn(points)``: one value for each of the rows, (rows, k). It is called once, with ``n_design * (k + 2)`` rows.
    n_dims, n_design, estimator, sampler, random_state
        See `sobol_design` and `total_indices`. At 32 points the order of inputs can be told, their values hardly.

    Returns
    -------
    array (k,)

    Raises
    ------
    InputError
        As in `sobol_design` and `total_indices`.
    """
    points = sobol_design(n_dims, n_design, sampler, random_state=random_state)
    return total_indices(fn(points), n_dims, estimator)
