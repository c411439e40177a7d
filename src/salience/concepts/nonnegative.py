"""Non-negative factorisation and least squares, in torch, on the device of what they are given.

The room's vocabulary: activations `A` (n, p), codes `U` (n, k), dictionary `V` (k, p), with `A` close to `U V`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from salience.errors import DataError, InputError

Activations = Float[Tensor, "n p"] | Float[np.ndarray, "n p"]
_ROWS = 4096  # of the activations at once: their codes stay in the cache of a core
_OVERSAMPLING, _POWER_PASSES = 10, 2


class Factorization(NamedTuple):
    """What `nmf` found.

    Attributes
    ----------
    codes : Tensor (n, k)
        `U`, on the CPU.
    dictionary : Tensor (k, p)
        `V`, on the CPU.
    relative_error : float
        ``|A - U V| / |A|`` in the Frobenius norm.
    n_iter : int
    """

    codes: Float[Tensor, "n k"]
    dictionary: Float[Tensor, "k p"]
    relative_error: float
    n_iter: int


def nmf(
    activations: Activations,
    n_concepts: int,
    *,
    init: tuple[Float[Tensor, "n k"], Float[Tensor, "k p"]] | None = None,
    max_iter: int = 200,
    tol: float = 1e-4,
    device: torch.device | str | None = None,
    random_state: int = 0,
) -> Factorization:
    """Factorise non-negative activations, by coordinate descent (HALS) over blocks of rows.

        min_{U >= 0, V >= 0}  1/2 |A - U V|^2

    One iteration passes over the rows once: the codes of a block are brought up to date, then their products with
    it are added up, and last the dictionary follows. Only a block and the codes are held, so that `activations` may be
    a memory map. These are the updates of scikit-learn's `NMF(solver="cd")`.

    Parameters
    ----------
    activations : Tensor or ndarray (n, p)
        `A`, not negative; floats.
    n_concepts : int
        k, at most n and at most p; more only with an `init`.
    init : (Tensor (n, k), Tensor (k, p)), optional
        Where to begin; by default NNDSVDa (Boutsidis and Gallopoulos, 2008) from a randomised decomposition.
    max_iter : int
    tol : float
        Stop when the changes of an iteration, weighed by their curvature, fall below this share of the first one's.
    device : torch.device or str, optional
        Where to compute; by default where `activations` are.
    random_state : int
        Of the randomised decomposition.

    Returns
    -------
    Factorization

    Raises
    ------
    InputError
        Sizes or options out of range, or an `init` that does not fit.
    DataError
        Negative activations, or ones that are not finite.

    Notes
    -----
    Source: Cichocki and Phan, "Fast Local Algorithms for Large Scale Nonnegative Matrix and Tensor Factorizations",
    2009 (HALS); section 3.1 of CRAFT (arXiv 2211.10154) for its use.
    """
    n, p = matrix_shape(activations)
    whole = isinstance(n_concepts, int) and not isinstance(n_concepts, bool)
    if not whole or n_concepts < 1 or (init is None and n_concepts > min(n, p)):
        raise InputError(f"n_concepts: got {n_concepts!r}; activations of shape ({n}, {p}) allow 1..{min(n, p)}, "
                         "and more with an init")  # fmt: skip
    if max_iter < 1 or tol < 0:
        raise InputError(f"max_iter and tol: got {max_iter} and {tol}; they must be at least 1 and 0")
    rows = _Rows(activations, device)
    square = rows.check()
    if init is None:
        u, v = _nndsvda(rows, n_concepts, random_state)
    else:
        u, v = (part.to(rows.device, rows.dtype).clone() for part in init)
        if u.shape != (n, n_concepts) or v.shape != (n_concepts, p) or float(u.min()) < 0 or float(v.min()) < 0:
            raise InputError(f"init: must be non-negative, ({n}, {n_concepts}) and ({n_concepts}, {p}); "
                             f"got {tuple(u.shape)} and {tuple(v.shape)}")  # fmt: skip
    u, first, n_iter = u.T.contiguous(), 0.0, 0
    while n_iter < max_iter:
        n_iter += 1
        change = _iterate(rows, u, v)
        first = first or change
        if change <= tol * first:
            break
    residual = sum(float((a - u[:, where].T @ v).double().square().sum()) for where, a in rows)
    return Factorization(u.T.contiguous().cpu(), v.cpu(), (residual / square) ** 0.5 if square else 0.0, n_iter)


def _iterate(rows: _Rows, u: Float[Tensor, "k n"], v: Float[Tensor, "k p"]) -> float:
    """One pass over the rows, codes and dictionary brought up to date in place; the weighed sum of the changes."""
    gram = v @ v.T
    uu = torch.zeros_like(gram, dtype=torch.float64)
    ua = torch.zeros_like(v, dtype=torch.float64)
    change = torch.zeros((), dtype=torch.float64, device=rows.device)
    for where, a in rows:
        part = u[:, where]
        change += _sweep(part, gram, v @ a.T)
        uu += part @ part.T
        ua += part @ a
    change += _sweep(v, uu.to(v.dtype), ua.to(v.dtype))
    return float(change)


class _Rows:
    """The activations block by block, on the device."""

    def __init__(self, activations: Activations, device: torch.device | str | None) -> None:
        self.source = activations
        own = activations.device if isinstance(activations, Tensor) else "cpu"
        self.device = torch.device(own if device is None else device)
        self.dtype = activations[:1].dtype if isinstance(activations, Tensor) else torch.from_numpy(
            np.array(activations[:1])).dtype  # fmt: skip

    def __iter__(self) -> Iterator[tuple[slice, Float[Tensor, "rows p"]]]:
        for start in range(0, len(self.source), _ROWS):
            where = slice(start, min(start + _ROWS, len(self.source)))
            part = self.source[where]
            # A copy of a read-only memory map: torch warns of tensors that must not be written to.
            yield where, (part if isinstance(part, Tensor) else torch.from_numpy(np.array(part))).to(self.device)

    def check(self) -> float:
        """The sum of squares; a `DataError` tells the first row that is negative or not finite."""
        total = 0.0
        for where, a in self:
            square = float(a.double().square().sum())
            if not np.isfinite(square):
                row = where.start + int((~torch.isfinite(a)).any(1).nonzero()[0])
                raise DataError(f"activations: row {row} is not finite")
            refuse_negative(a, where.start)
            total += square
        return total

    def times(self, m: Float[Tensor, "p q"]) -> Float[Tensor, "n q"]:
        """``A m``, block by block."""
        return torch.cat([a @ m for _, a in self])

    def transposed_times(self, m: Float[Tensor, "n q"]) -> Float[Tensor, "p q"]:
        """``A^T m``, block by block."""
        total: Any = 0
        for where, a in self:
            total = total + (a.T @ m[where]).double()
        return total.to(self.dtype)


def refuse_negative(activations: Float[Tensor, "n p"], offset: int = 0) -> None:
    """A `DataError` that says which row is negative, and what would be right."""
    if len(activations) and float(activations.min()) < 0:
        row = int((activations < 0).any(1).nonzero()[0])
        raise DataError(
            f"activations: row {offset + row} goes down to {float(activations[row].min()):.4g}, but non-negative "
            "factorisation needs values of at least 0; choose a layer that ends in a ReLU"
        )


def matrix_shape(activations: Any) -> tuple[int, int]:
    """Rows and columns of a matrix of floats; an `InputError` tells what else came."""
    if getattr(activations, "ndim", 0) != 2 or 0 in activations.shape:
        got = tuple(getattr(activations, "shape", ())) or type(activations).__name__
        raise InputError(f"activations: must be a matrix (n, p) with n, p >= 1; got {got}")
    floats = activations.is_floating_point() if isinstance(activations, Tensor) else activations.dtype.kind == "f"
    if not floats:
        raise InputError(f"activations: must be floats; got {activations.dtype}")
    return tuple(activations.shape)


def _sweep(x: Float[Tensor, "k m"], gram: Float[Tensor, "k k"], target: Float[Tensor, "k m"]) -> Tensor:
    """Bring each row of `x` to its best value given the others, in place; the weighed sum of the changes."""
    curvature = gram.diagonal()
    alive = curvature.gt(0).tolist()
    change = torch.zeros((), dtype=torch.float64, device=x.device)
    for t, row in enumerate(x):
        if alive[t]:
            new = torch.addmv(target[t], x.T, gram[t], alpha=-1).div_(curvature[t]).add_(row).clamp_(min=0)
            change += row.sub_(new).abs_().sum() * curvature[t]
            row.copy_(new)
    return change


def _nndsvda(rows: _Rows, k: int, random_state: int) -> tuple[Float[Tensor, "n k"], Float[Tensor, "k p"]]:
    """Codes and dictionary from the signed parts of the leading singular vectors, zeros filled with the mean."""
    n, p = rows.source.shape
    generator = torch.Generator().manual_seed(random_state)
    width = min(k + _OVERSAMPLING, n, p)
    z = torch.randn(p, width, generator=generator, dtype=torch.float64).to(rows.device, rows.dtype)
    for _ in range(_POWER_PASSES + 1):
        q = torch.linalg.qr(rows.times(z)).Q
        z = rows.transposed_times(q)
        b, z = z, torch.linalg.qr(z).Q
    left, singular, right = torch.linalg.svd(b.T, full_matrices=False)
    left = q @ left
    codes = torch.zeros(n, k, dtype=rows.dtype, device=rows.device)
    dictionary = torch.zeros(k, p, dtype=rows.dtype, device=rows.device)
    for j in range(k):
        x, y = left[:, j], right[j]
        if j == 0:  # of non-negative activations: one sign throughout
            parts = (x.abs(), y.abs())
        else:
            up, down = (x.clamp(min=0), y.clamp(min=0)), (x.neg().clamp(min=0), y.neg().clamp(min=0))
            parts = max(up, down, key=lambda pair: float(pair[0].norm() * pair[1].norm()))
        sizes = [part.norm() for part in parts]
        scale = (singular[j] * sizes[0] * sizes[1]).sqrt()
        for out, part, size in zip((codes[:, j], dictionary[j]), parts, sizes, strict=True):
            out.copy_(scale * part / size.clamp(min=torch.finfo(rows.dtype).tiny))
    mean = sum(float(a.double().sum()) for _, a in rows) / (n * p)
    return codes.masked_fill(codes < 1e-6, mean), dictionary.masked_fill(dictionary < 1e-6, mean)


# Non-negative least squares ------------------------------------------------------------------------------------------


def nnls(activations: Float[Tensor, "n p"], dictionary: Float[Tensor, "k p"]) -> Float[Tensor, "n k"]:
    """Codes of activations under a fixed dictionary, exact and differentiable in the activations.

        U(a) = argmin_{u >= 0} 1/2 |a - u V|^2,   dU_S/da = (V_S V_S^T)^-1 V_S,   0 outside S = {i: u_i > 0}

    The derivative is what the implicit function theorem makes of the optimality conditions; where a code is about to
    become positive it is a subgradient. `V_S V_S^T` gets a ridge of 1e-8 where it is singular.

    Parameters
    ----------
    activations : Tensor (n, p)
    dictionary : Tensor (k, p)
        `V`; fixed, no gradient flows into it. The code of a row of zeros is 0.

    Returns
    -------
    Tensor (n, k)
        Of the activations' dtype and device; solved in float64.

    Raises
    ------
    InputError
        Shapes that do not fit, values that are not finite, or a dictionary that asks for a gradient.

    Notes
    -----
    Source: Kim and Park, "Fast Nonnegative Matrix Factorization: An Active-Set-Like Method and Comparisons", 2011
    (block principal pivoting); section 3.3 of CRAFT (arXiv 2211.10154) for the derivative.
    """
    if activations.ndim != 2 or dictionary.ndim != 2 or activations.shape[1] != dictionary.shape[1]:
        raise InputError(f"activations and dictionary: must be (n, p) and (k, p); got {tuple(activations.shape)} "
                         f"and {tuple(dictionary.shape)}")  # fmt: skip
    if dictionary.requires_grad:
        raise InputError("dictionary: asks for a gradient, but it is held fixed here; detach it")
    if not bool(torch.isfinite(activations).all()) or not bool(torch.isfinite(dictionary).all()):
        raise InputError("activations and dictionary: hold NaN or infinite values")
    return _NNLS.apply(activations, dictionary)


class _NNLS(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activations: Tensor, dictionary: Tensor) -> Tensor:
        """Codes by active sets, in blocks of bounded memory."""
        v = dictionary.double()
        gram = v @ v.T
        step = max(1, 2**22 // len(v) ** 2)
        parts = [_solve(gram, a.double() @ v.T) for a in activations.split(step)]
        codes = torch.cat(parts) if parts else activations.new_zeros(0, len(v))
        ctx.save_for_backward(codes, v, gram)
        return codes.to(activations.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """``(V_S V_S^T)^-1 V_S`` on the positive codes S, 0 elsewhere."""
        codes, v, gram = ctx.saved_tensors
        active = codes > 1e-9 * codes.max() if codes.numel() else codes > 0
        step = max(1, 2**22 // len(v) ** 2)
        parts = [_masked_solve(gram, g.double(), s) @ v for g, s in zip(gradient.split(step), active.split(step))]
        return torch.cat(parts).to(gradient.dtype) if parts else gradient.new_zeros(0, v.shape[1]), None


def _solve(gram: Float[Tensor, "k k"], target: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """Block principal pivoting, from where a few sweeps of coordinate descent lead."""
    n, k = target.shape
    alive = gram.diagonal() > 0
    start = torch.zeros(k, n, dtype=target.dtype, device=target.device)
    for _ in range(20):
        _sweep(start, gram, target.T)
    codes = start.T.contiguous()
    free = (codes > 0) & alive
    todo = torch.arange(n, device=target.device)
    fewest, tries = torch.full_like(todo, k + 1), torch.full_like(todo, 3)
    for _ in range(20 + 5 * k):
        f, b = free[todo], target[todo]
        x = _masked_solve(gram, b, f)
        slope = x @ gram - b
        low = 1e-10 * x.abs().amax(1, keepdim=True)
        wrong = (f & (x < -low)) | (~f & alive & (slope < -1e-10 * b.abs().amax(1, keepdim=True)))
        count = wrong.sum(1)
        done = count == 0
        codes[todo[done]] = x[done].clamp(min=0)
        todo, wrong, count = todo[~done], wrong[~done], count[~done]
        if not len(todo):
            return codes
        # Exchange all that is wrong while that helps, and after three tries that did not the last one alone,
        # which cannot cycle.
        better = count < fewest[todo]
        fewest[todo] = torch.minimum(fewest[todo], count)
        tries[todo] = torch.where(better, 3, tries[todo] - 1)
        last = torch.zeros_like(wrong)
        last[torch.arange(len(todo)), k - 1 - wrong.flip(1).int().argmax(1)] = True
        free[todo] ^= torch.where((better | (tries[todo] >= 0))[:, None], wrong, last)
    return codes  # rows that rounding keeps from settling keep what coordinate descent found


def _masked_solve(gram: Tensor, target: Float[Tensor, "n k"], free: Bool[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """Solve ``gram_SS x_S = target_S`` for the set S of each row; 0 outside it."""
    m = free.to(gram.dtype)
    systems = gram * m[:, :, None] * m[:, None, :] + torch.diag_embed(1 - m)
    factor, info = torch.linalg.cholesky_ex(systems)
    scale = gram.diagonal().max()
    flat = (info > 0) | (factor.diagonal(dim1=1, dim2=2).where(free, scale).amin(1).square() < 1e-13 * scale)
    if bool(flat.any()):
        ridge = torch.diag_embed(1e-8 * scale * m[flat])
        factor[flat] = torch.linalg.cholesky(systems[flat] + ridge)
    return torch.cholesky_solve((target * m)[:, :, None], factor)[:, :, 0] * m
