"""How dependent several vectors of a sample are: HSIC, random Fourier features, and their sum over pairs of vectors.

All of it may be weighted: samples are then drawn with the weights, which sum to 1.

Source: Liu, Luo, Zeng, Liu, Chang, Kong, Chen, "Improving Multi-Interest Network with Stable Learning", arXiv
2207.07910, abstract and introduction; Gretton, Bousquet, Smola, Schölkopf, "Measuring Statistical Dependence with
Hilbert-Schmidt Norms", ALT 2005; the covariances are those of the published code of Zhang et al., "Deep Stable Learning
for Out-Of-Distribution Generalization", CVPR 2021, here between interests instead of single coordinates.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from salience.errors import InputError

Method = Literal["rff", "hsic", "linear"]


def hsic(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "n e"],
    weights: Float[Tensor, " n"] | None = None,
    bandwidth: float | Literal["median"] = "median",
) -> Float[Tensor, ""]:
    """Hilbert-Schmidt independence criterion with Gaussian kernels, the biased estimator.

        HSIC = tr(K H L H) / (n - 1)^2,   K_st = exp(-|x_s - x_t|^2 / (2 sigma^2)),   H = I - 1 1' / n

    0 for independent vectors and many samples; about 1 / n for few. With weights, means are weighted ones and the
    factor is ``(1 - sum w^2)^-2``, which for equal weights is the above.

    Parameters
    ----------
    x, y : (n, d) and (n, e) Tensor
        Two vectors of each of n >= 2 samples.
    weights : (n,) Tensor, optional
        Not negative, with sum 1.
    bandwidth : float or "median"
        sigma; by default, for each side, the median distance between two samples (their mean where it is 0).

    Raises
    ------
    InputError
        Different numbers of samples, fewer than two, NaN or infinite values, weights of another shape, negative or
        with another sum, a bandwidth that is not positive.
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < 2:
        raise InputError(
            f"x and y: shapes {tuple(x.shape)} and {tuple(y.shape)}; (n, d) and (n, e) with the same n of at least 2 "
            "are needed"
        )
    if bandwidth != "median" and not (isinstance(bandwidth, float | int) and 0 < bandwidth < math.inf):
        raise InputError(f"bandwidth: got {bandwidth!r}; 'median' or a number above 0 is needed")
    with torch.autocast(x.device.type, enabled=False):
        grams = centred(torch.stack([_gaussian(as_float("x", x), bandwidth), _gaussian(as_float("y", y), bandwidth)]))
        w = _checked_weights(weights, x)
        return pairwise_dependence(grams, w) / _left(w)


def rff(
    x: Float[Tensor, "n d"], features: int = 5, joint: bool = False, generator: torch.Generator | None = None
) -> Float[Tensor, "n D"]:
    """Random Fourier features, whose inner products are Gaussian kernels of bandwidth 1 on average.

        u(x) = sqrt(2 / D) cos(omega x + phi),   omega ~ N(0, 1),   phi ~ U(0, 2 pi)

    Parameters
    ----------
    x : (n, d) Tensor
    features : int
        D, for each coordinate.
    joint : bool
        D features of the whole vector, with omega in R^d, instead of D for each coordinate.
    generator : torch.Generator, optional
        On the CPU; the global one by default.

    Returns
    -------
    (n, d D) Tensor, or (n, D) where `joint`
        The features of a coordinate stand side by side.

    Raises
    ------
    InputError
        x that is no finite matrix, or features below 1.
    """
    if x.ndim != 2:
        raise InputError(f"x: shape {tuple(x.shape)}; (n, d) is needed")
    x, d = as_float("x", x), x.shape[1]
    if isinstance(features, bool) or not isinstance(features, int) or features < 1:
        raise InputError(f"features: got {features!r}; a whole number of at least 1 is needed")
    omega = torch.randn(d, features, generator=generator).to(x)
    phi = 2 * math.pi * torch.rand(1 if joint else d, features, generator=generator).to(x)
    angles = x @ omega + phi if joint else (x[:, :, None] * omega + phi).flatten(1)
    return math.sqrt(2 / features) * torch.cos(angles)


def interest_dependence(
    z: Float[Tensor, "n K d"],
    weights: Float[Tensor, " n"] | None = None,
    method: Method = "rff",
    *,
    features: int = 5,
    joint: bool = False,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """Dependence between a sample's K vectors, summed over their pairs.

        L_dec(w) = sum_{i<j} |C_ij|_F^2,   C_ij = sum_s w_s u_i^s u_j^s' - (sum_s w_s u_i^s) (sum_s w_s u_j^s)'

    Only pairs of vectors count: coordinates within one are free. K = 1 gives 0.

    Parameters
    ----------
    z : (n, K, d) Tensor
    weights : (n,) Tensor, optional
        Not negative, with sum 1; equal by default.
    method : {"rff", "hsic", "linear"}
        u are random Fourier features, as of `rff`; those of a Gaussian kernel, so that it is the sum of `hsic`; or z
        itself, so that it is that of squared covariances.
    features, joint, generator
        As of `rff`.

    Raises
    ------
    InputError
        z that is no finite (n, K, d) with n >= 2, weights as of `hsic`, or an unknown method.
    """
    if method not in get_args(Method):
        raise InputError(f"method: got {method!r}; it must be 'rff', 'hsic' or 'linear'")
    check_blocks(z)
    if len(z) < 2:
        raise InputError(f"z: {len(z)} samples; at least 2 are needed")
    w = _checked_weights(weights, z)
    with torch.autocast(z.device.type, enabled=False):
        total = pairwise_dependence(grams_of(z, method, features, joint, generator), w)
        return total / _left(w) if method == "hsic" else total


def hsic_with_and_without(z: Float[Tensor, "n K d"], w: Float[Tensor, " n"]) -> tuple[float, float]:
    """Sum of HSIC over pairs of vectors under equal weights and under `w`; zeros for a single sample."""
    if len(z) < 2:
        return 0.0, 0.0
    with torch.autocast(z.device.type, enabled=False), torch.no_grad():
        grams = grams_of(z.detach(), "hsic", 1, False, None)
        both = (torch.full_like(w, 1 / len(w)), w)
        equal, weighted = (float(pairwise_dependence(grams, u) / _left(u)) for u in both)
    return equal, weighted


def grams_of(
    z: Float[Tensor, "n K d"], method: Method, features: int, joint: bool, generator: torch.Generator | None
) -> Float[Tensor, "K n n"]:
    """Centred inner products of the samples, for each of the K vectors."""
    blocks = as_float("z", z).transpose(0, 1)
    if method == "hsic":
        return centred(torch.stack([_gaussian(block, "median") for block in blocks]))
    if method == "rff":
        blocks = torch.stack([rff(block, features, joint, generator) for block in blocks])
    blocks = blocks - blocks.mean(dim=1, keepdim=True)
    return blocks @ blocks.transpose(1, 2)


def pairwise_dependence(
    grams: Float[Tensor, "K n n"], w: Float[Tensor, " n"], products: Float[Tensor, "n n"] | None = None
) -> Float[Tensor, ""]:
    """Sum of ``|C_ij|_F^2`` over pairs i < j, from inner products of samples: the features are never multiplied out.

        |C_ij|^2 = w' (G_i * G_j) w - 2 w' (G_i w * G_j w) + (w' G_i w) (w' G_j w)

    with products by entry, and sums over pairs as ``((sum_i a_i)^2 - sum_i a_i^2) / 2``. `products` may hold the sum of
    ``G_i * G_j`` where many weights are tried.
    """
    products = sum_of_pairs(grams) if products is None else products
    means = grams @ w
    return w @ products @ w - 2 * w @ sum_of_pairs(means) + sum_of_pairs(means @ w)


def sum_of_pairs(a: Float[Tensor, "K ..."]) -> Float[Tensor, ...]:
    """``sum_{i<j} a_i a_j`` over the first dimension."""
    return (a.sum(0).square() - a.square().sum(0)) / 2


def centred(grams: Float[Tensor, "K n n"]) -> Float[Tensor, "K n n"]:
    """H G H: weighted dependences stay the same, and less is lost to rounding."""
    grams = grams - grams.mean(dim=1, keepdim=True)
    return grams - grams.mean(dim=2, keepdim=True)


def as_float(name: str, values: Tensor) -> Tensor:
    """In float32 at least, all of it finite."""
    if not values.is_floating_point():
        raise InputError(f"{name}: got {values.dtype}; floating point numbers are needed")
    bad = ~values.isfinite()
    if bool(bad.any()):
        raise InputError(
            f"{name}: {int(bad.sum())} of {values.numel()} values are NaN or infinite, the first in sample "
            f"{int(bad.nonzero()[0, 0])}"
        )
    return values if values.dtype == torch.float64 else values.float()


def check_blocks(z: Tensor) -> None:
    """Refuse what is not (n, K, d) with at least one vector."""
    if z.ndim != 3 or not z.shape[1] or not z.shape[2]:
        raise InputError(f"z: shape {tuple(z.shape)}; (samples, vectors, width) is needed")


def _left(w: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """The factor of weighted HSIC; away from 0, so that it is 0 where one sample has all the weight."""
    return (1 - w.square().sum()).clamp(min=0.1).square()


def _gaussian(x: Float[Tensor, "n d"], bandwidth: float | Literal["median"]) -> Float[Tensor, "n n"]:
    squares = x.square().sum(1)
    distances = (squares[:, None] + squares - 2 * x @ x.T).clamp(min=0)
    if bandwidth == "median":
        each = torch.pdist(x.detach()).square()
        sigma2 = each.median()
        if not float(sigma2) > 0:  # most samples are alike: the mean tells the others apart
            sigma2 = each.mean() if each.any() else torch.ones_like(sigma2)
    else:
        sigma2 = torch.as_tensor(float(bandwidth) ** 2)
    return torch.exp(-distances / (2 * sigma2))


def _checked_weights(weights: Tensor | None, rows: Tensor) -> Tensor:
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    if weights is None:
        return torch.full((len(rows),), 1 / len(rows), dtype=dtype, device=rows.device)
    w = as_float("weights", weights).to(rows.device, dtype)
    if w.shape != (len(rows),):
        raise InputError(f"weights: shape {tuple(w.shape)} for {len(rows)} samples")
    if bool((w < 0).any()) or abs(float(w.sum()) - 1) > 1e-4:
        raise InputError(
            f"weights: sum {float(w.sum()):.6g}, smallest {float(w.min()):.3g}; weights of at least 0 with sum 1 are "
            "needed"
        )
    return w
