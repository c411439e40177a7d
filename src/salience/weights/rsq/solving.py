r"""GPTQ for one matrix: round column by column, and let the columns that are left make up for each error.

Frantar, Ashkboos, Hoefler, Alistarh: GPTQ, 2022, algorithm 1; with the token weights of RSQ in the Hessian.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from salience.errors import DataError, InputError
from salience.weights.rsq.grids import Grid, Scales, check_group, round_to_nearest, spread

_TRIES = 49  # dampings until the Hessian must be positive definite
_SLACK = 1e-3  # by which sums in float32 may differ where inputs are uncorrelated and both errors the same
_INNER = 32  # columns that are updated at once within a block, so that they stay in the cache


class Solution(NamedTuple):
    """A quantised matrix.

    Attributes
    ----------
    codes : uint8 Tensor (out, in)
        In 0..2^bits - 1.
    weight : Tensor (out, in)
        What the codes stand for.
    scales : Scales
        (out, groups).
    error, rtn_error : float
        ``tr((W_q - W) H (W_q - W)^T)`` with the damped Hessian, of this solution and of rounding to nearest.
    dampings : int
        How often the diagonal was raised.
    """

    codes: UInt8[Tensor, "out in_"]
    weight: Float[Tensor, "out in_"]
    scales: Scales
    error: float
    rtn_error: float
    dampings: int


def weighted_hessian(
    X: Float[Tensor, "tokens in_"], r: Float[Tensor, " tokens"] | None = None
) -> Float[Tensor, "in_ in_"]:
    r"""Second moments of inputs, tokens weighed by their importance.

        H = (2 / T) \sum_j (r_j / mean(r)) x_j x_j^T

    Parameters
    ----------
    X : Tensor (tokens, in)
    r : Tensor (tokens,), optional
        Importance, not negative; it enters once, not squared. All alike by default.

    Returns
    -------
    Tensor (in, in)
        float64 if `X` is, else float32.

    Raises
    ------
    InputError
        No tokens, shapes that do not fit, or negative, infinite or all-zero importance.
    """
    if X.ndim != 2 or not len(X):
        raise InputError(f"X: got shape {tuple(X.shape)}; (tokens, inputs) with at least one token is wanted")
    if not X.is_floating_point():
        raise InputError(f"X: got {X.dtype}; floating point inputs are wanted")
    X = X if X.dtype == torch.float64 else X.float()
    if r is None:
        return (2 / len(X)) * (X.T @ X)
    if r.shape != X.shape[:1]:
        raise InputError(f"r: got shape {tuple(r.shape)} for {len(X)} tokens")
    if not (torch.isfinite(r).all() and bool((r >= 0).all()) and float(r.sum()) > 0):
        raise InputError("r: importance must be finite, not negative, and not zero for all tokens")
    scaled = X * (r.to(X.dtype) / r.mean()).sqrt()[:, None]
    return (2 / len(X)) * (scaled.T @ scaled)


def reconstruction_error(
    W: Float[Tensor, "out in_"],
    W_q: Float[Tensor, "out in_"],
    X: Float[Tensor, "tokens in_"],
    r: Float[Tensor, " tokens"] | None = None,
) -> float:
    r"""How far outputs move, per token: :math:`\|(W_q - W) X R\|_F^2 / T` with :math:`R^2 = diag(r) / mean(r)`.

    Parameters
    ----------
    W, W_q : Tensor (out, in)
        Before and after.
    X : Tensor (tokens, in)
        One token a row.
    r : Tensor (tokens,), optional
        Importance of each.

    Raises
    ------
    InputError
        Shapes do not fit.
    """
    if W.shape != W_q.shape or X.ndim != 2 or X.shape[1] != W.shape[1]:
        raise InputError(f"W, W_q, X: shapes {tuple(W.shape)}, {tuple(W_q.shape)}, {tuple(X.shape)} do not fit")
    moved = (X.double() @ (W_q.double() - W.double()).T).square().sum(1)
    if r is not None:
        moved = moved * (r.double() / r.double().mean())
    return float(moved.mean())


@torch.no_grad()
def gptq_solve(
    W: Float[Tensor, "out in_"],
    H: Float[Tensor, "in_ in_"],
    grid: Grid,
    *,
    group_size: int = -1,
    percdamp: float = 0.01,
    act_order: bool = False,
    block: int = 128,
    scales: Scales | None = None,
    name: str = "W",
) -> Solution:
    r"""Quantise a matrix so that its outputs on the inputs behind a Hessian move little.

        U = chol(H^{-1}) upper,   q_i = quant(w_i),   e_i = (w_i - q_i) / U_ii,   W_{:, i:} -= e_i U_{i, i:}

    for the columns i from left to right, with :math:`H + \lambda\, mean(diag H)\, I` in place of H. Inputs that were
    always 0 get weight 0.

    Parameters
    ----------
    W : Tensor (out, in)
        Solved in float64 if it is float64, else in float32.
    H : Tensor (in, in)
        From `weighted_hessian`. Its scale does not matter.
    grid : Grid
    group_size : int
        Consecutive inputs that share a scale, which is found when their turn comes; -1 for all of a row. With
        `act_order` it is found beforehand, so that groups stay consecutive.
    percdamp : float
        Lambda.
    act_order : bool
        Columns with a large diagonal of H first.
    block : int
        Columns after which the rest is brought up to date. Changes speed and rounding, nothing else.
    scales : Scales, optional
        A grid found elsewhere, (out, groups).
    name : str
        How errors name the matrix.

    Returns
    -------
    Solution

    Raises
    ------
    InputError
        Shapes that do not fit, a `group_size` that does not divide the inputs, `percdamp` or `block` out of range.
    DataError
        A weight or an entry of H is not finite, H cannot be factorised after 49 dampings, or the result is worse than
        rounding to nearest.
    """
    columns = W.shape[1]
    size = check_group(columns, group_size)
    _check(W, H, percdamp, block, name)
    dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
    W, H = W.to(dtype), H.to(W.device, dtype, copy=True)
    static = scales is not None or act_order or size == columns
    if static and scales is None:
        scales = round_to_nearest(W, grid, group_size)[2]
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1
    W = W.masked_fill(dead, 0)
    near = _nearest(W, grid, scales, group_size)
    order = torch.argsort(H.diagonal(), descending=True, stable=True) if act_order else None
    U, dampings = _factor(H if order is None else H[order][:, order], percdamp, name)
    near_error = float(((near - W) @ _damped(H, percdamp, dampings)).mul_(near - W).sum(dtype=torch.float64))
    columns_first = (W if order is None else W[:, order]).T.contiguous()
    found = _sweep(columns_first, U, grid, size, block, scales, order)
    codes = found.codes if order is None else torch.empty_like(found.codes).index_copy_(0, order, found.codes)
    codes = codes.T.contiguous()
    weight = grid.decode(codes, *spread(found.scales, columns))
    error = float(found.errors.square().sum(dtype=torch.float64))
    if not (error <= near_error * (1 + _SLACK) + 1e-12) or not torch.isfinite(weight).all():
        raise DataError(
            f"{name}: quantised with an error of {error:.6g}, rounding to nearest has {near_error:.6g}. GPTQ is greedy "
            "and may lose on a single matrix: leave it as it is (exclude), damp more (percdamp), or choose other bits "
            "or calibration text"
        )
    return Solution(codes.to(torch.uint8), weight, found.scales, error, near_error, dampings)


class _Swept(NamedTuple):
    codes: Tensor  # (in, out), in the order of the sweep
    errors: Tensor  # (in, out), e
    scales: Scales


def _sweep(
    W: Tensor, U: Tensor, grid: Grid, size: int, block: int, scales: Scales | None, order: Tensor | None
) -> _Swept:
    """The columns from left to right; `W` is transposed, so that each of them is consecutive, and is overwritten."""
    columns = len(W)
    codes, errors = torch.empty_like(W), torch.empty_like(W)
    inner = _INNER
    if scales is None:  # a scale is found when all columns before its group have been dealt with
        block, inner = -(-block // size) * size, _INNER if size % _INNER == 0 else size
    found: list[Scales] = []
    # As (groups, out): the scale of a column is then consecutive.
    scale, zero = (None, None) if scales is None else (part.T.contiguous() for part in scales)
    place = list(range(columns)) if order is None else order.tolist()
    inverse = (1 / U.diagonal()).tolist()
    for first in range(0, columns, block):
        last = min(first + block, columns)
        for start in range(first, last, inner):
            stop = min(start + inner, last)
            for i in range(start, stop):
                if scales is None and i % size == 0:
                    found.append(grid.fit(W[i : i + size].T))
                if scales is None:
                    s, z = found[-1].scale[:, 0], found[-1].zero[:, 0]
                else:
                    group = place[i] * scale.shape[0] // columns  # type: ignore[union-attr]
                    s, z = scale[group], zero[group]  # type: ignore[index]
                torch.sub(W[i], grid.decode(_keep(grid.encode(W[i], s, z), codes[i]), s, z), out=errors[i])
                errors[i].mul_(inverse[i])
                W[i + 1 : stop].addr_(U[i, i + 1 : stop], errors[i], alpha=-1)
            W[stop:last].addmm_(U[start:stop, stop:last].T, errors[start:stop], alpha=-1)
        W[last:].addmm_(U[first:last, last:].T, errors[first:last], alpha=-1)
    if scales is None:
        scales = Scales(torch.cat([each.scale for each in found], 1), torch.cat([each.zero for each in found], 1))
    return _Swept(codes, errors, scales)


def _keep(codes: Tensor, into: Tensor) -> Tensor:
    into.copy_(codes)
    return codes


def _factor(H: Tensor, percdamp: float, name: str) -> tuple[Tensor, int]:
    """U with U^T U = H^-1, and how often H had to be damped.

    With P the reversal of rows and columns, PHP = L L^T makes H = R R^T with R = P L P upper, so that U = R^-1: one
    factorisation, and H is never inverted.
    """
    damp = percdamp * float(H.diagonal().mean())
    damped = H.clone()
    for count in range(1, _TRIES + 1):
        damped.diagonal().add_(damp)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            R = lower.flip(0, 1)
            eye = torch.eye(len(R), dtype=R.dtype, device=R.device)
            return torch.linalg.solve_triangular(R, eye, upper=True), count
    raise DataError(f"{name}: its Hessian could not be factorised after {_TRIES} dampings; raise percdamp")


def _damped(H: Tensor, percdamp: float, dampings: int) -> Tensor:
    return H + dampings * percdamp * float(H.diagonal().mean()) * torch.eye(len(H), dtype=H.dtype, device=H.device)


def _nearest(W: Tensor, grid: Grid, scales: Scales | None, group_size: int) -> Tensor:
    if scales is None:
        return round_to_nearest(W, grid, group_size)[1]
    scale, zero = spread(scales, W.shape[1])
    return grid.decode(grid.encode(W, scale, zero), scale, zero)


def _check(W: Tensor, H: Tensor, percdamp: float, block: int, name: str) -> None:
    if W.ndim != 2 or H.shape != (W.shape[1], W.shape[1]) or not W.numel():
        raise InputError(f"{name}: shapes {tuple(W.shape)} and {tuple(H.shape)} do not fit; (out, in) and (in, in)")
    if not W.is_floating_point():
        raise InputError(f"{name}: got {W.dtype}, which is quantised already or no weight")
    if not (0 < percdamp < float("inf")) or block < 1:
        raise InputError(f"percdamp and block: got {percdamp} and {block}; a positive number and at least 1")
    for what, tensor in (("weights", W), ("Hessian", H)):
        if not torch.isfinite(tensor).all():
            raise DataError(f"{name}: its {what} hold NaN or infinite values")
