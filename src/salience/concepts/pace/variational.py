"""The mathematics of PACE: densities, the local updates, and the three parts of the bound.

    phi (m, j, k)   q(z_mj = k): which concept a patch shows
    gamma (m, k)    q(theta_m) = Dirichlet(gamma_m): how much of each concept an image holds
    a (m, j)        attention as a fractional count: patch j of image m is counted a_mj times
    phibar_m        mean_j phi_mj

Marks: [V] as in the paper's text, [D] derived here from its bound, [R] reconstructed where it says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Gaussians(NamedTuple):
    """Means (k, d) and Cholesky factors (k, d, d) of the concepts' covariances."""

    means: Float[Tensor, "k d"]
    factors: Float[Tensor, "k d d"]

    @property
    def log_det(self) -> Float[Tensor, " k"]:
        """``log |Sigma_k|``."""
        return 2 * self.factors.diagonal(dim1=1, dim2=2).log().sum(1)

    def log_density(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows k"]:
        """``log N(x; mu_k, Sigma_k)``, by triangular solves; no covariance is inverted."""
        flat = x.reshape(-1, x.shape[-1])
        squares = [torch.linalg.solve_triangular(factor, (flat - mean).T, upper=False).square().sum(0)
                   for mean, factor in zip(self.means, self.factors, strict=True)]  # fmt: skip
        constant = x.shape[-1] * math.log(2 * math.pi) + self.log_det
        return (-0.5 * (torch.stack(squares, -1) + constant)).view(*x.shape[:-1], -1)


class Local(NamedTuple):
    """What is known of some images: phi (m, j, k), gamma (m, k), and ``phibar`` (m, k)."""

    phi: Float[Tensor, "m j k"]
    gamma: Float[Tensor, "m k"]

    @property
    def phibar(self) -> Float[Tensor, "m k"]:
        """The mean of phi over the patches."""
        return self.phi.mean(1)


def expected_log_theta(gamma: Float[Tensor, "m k"]) -> Float[Tensor, "m k"]:
    """``E_q[log theta_mk] = psi(gamma_mk) - psi(sum_k gamma_mk)``."""
    return gamma.digamma() - gamma.sum(-1, keepdim=True).digamma()


def update_phi(
    log_density: Float[Tensor, "m j k"],
    attention: Float[Tensor, "m j"],
    gamma: Float[Tensor, "m k"],
    pull: Float[Tensor, "m k"] | None = None,
    *,
    printed: Float[Tensor, " k"] | None = None,
) -> Float[Tensor, "m j k"]:
    """Which concept each patch shows, given how much of each its image holds.

        phi_mjk  prop.  exp[ a_mj (log N(e_mj; mu_k, Sigma_k) + E_q[log theta_mk]) + pull_mk / J ]      [D]

    The count `a_mj` weighs the log-determinant and `E_q[log theta]` as well as the distance: with the update of
    gamma, which is of the same bound, nothing else makes that bound grow.

    Parameters
    ----------
    log_density : Tensor (m, j, k)
    attention : Tensor (m, j)
    gamma : Tensor (m, k)
    pull : Tensor (m, k), optional
        Derivative of the faithfulness and stability terms by `phibar`.
    printed : Tensor (k,), optional
        ``log |Sigma_k|``: then the log-determinant and `E_q[log theta]` stand outside the count, as equation 10 is
        printed [V].
    """
    count, prior = attention[..., None], expected_log_theta(gamma)[:, None]
    if printed is None:
        logits = count * (log_density + prior)
    else:
        logits = count * (log_density + printed / 2) - printed / 2 + prior
    if pull is not None:
        logits = logits + pull[:, None] / attention.shape[1]
    return logits.softmax(-1)


def update_gamma(phi: Float[Tensor, "m j k"], attention: Float[Tensor, "m j"], alpha: float) -> Float[Tensor, "m k"]:
    """``gamma_mk = alpha + sum_j phi_mjk a_mj`` [V]."""
    return alpha + torch.einsum("mjk,mj->mk", phi, attention)


class Patches(NamedTuple):
    """Patches of some images, as local updates need them: log densities (m, j, k), attention (m, j), gamma (m, k)."""

    log_density: Float[Tensor, "m j k"]
    attention: Float[Tensor, "m j"]
    gamma: Float[Tensor, "m k"]


def e_step(
    views: Sequence[Patches],
    alpha: float,
    steps: int,
    pull: Callable[[int, list[Tensor]], Tensor | None],
    *,
    printed: Float[Tensor, " k"] | None = None,
) -> list[Local]:
    """Bring phi and gamma of the images, and of their perturbed twins, up to date in turn, `steps` times.

    Parameters
    ----------
    views : sequence of Patches
        The images, and perhaps their twins; gamma is where to begin.
    alpha : float
    steps : int
    pull : callable
        ``pull(i, phibars)`` is the derivative (m, k) of `L_f` and `L_s` by phibar of view i, at the last phi of all
        views (at first an even one), or None.
    printed
        See `update_phi`.
    """
    gammas = [view.gamma for view in views]
    phis = [torch.full_like(view.log_density, 1 / view.gamma.shape[1]) for view in views]
    phibars = [phi.mean(1) for phi in phis]
    for _ in range(steps):
        for i, view in enumerate(views):
            phis[i] = update_phi(view.log_density, view.attention, gammas[i], pull(i, phibars), printed=printed)
            gammas[i] = update_gamma(phis[i], view.attention, alpha)
            phibars[i] = phis[i].mean(1)
    return [Local(*pair) for pair in zip(phis, gammas, strict=True)]


def mixture_bound(
    local: Local, log_density: Float[Tensor, "m j k"], attention: Float[Tensor, "m j"], alpha: float
) -> Float[Tensor, " m"]:
    """`L_e` of each image: patches under the concepts, and what q keeps open.

    sum_jk a phi (log N + E_q[log theta_k]) - sum_jk phi log phi + E_q[log Dir(theta; alpha)] - E_q[log q(theta)]
    """
    phi, gamma = local
    mean_log, k = expected_log_theta(gamma), gamma.shape[1]
    patches = torch.einsum("mjk,mjk,mj->m", phi, log_density + mean_log[:, None], attention)
    entropy = -torch.xlogy(phi, phi).sum((1, 2))
    prior = math.lgamma(k * alpha) - k * math.lgamma(alpha) + (alpha - 1) * mean_log.sum(1)
    own = torch.lgamma(gamma.sum(1)) - torch.lgamma(gamma).sum(1) + ((gamma - 1) * mean_log).sum(1)
    return patches + entropy + prior - own


def faithfulness(
    phibar: Float[Tensor, "m k"], probs: Float[Tensor, "m n"], heads: Float[Tensor, "k n"]
) -> Float[Tensor, " m"]:
    """`L_f` of each image: ``sum_n y_n eta_n . phibar - log sum_n exp(eta_n . phibar)``, y the model's output [V]."""
    logits = phibar @ heads
    return (probs * logits).sum(1) - logits.logsumexp(1)


def faithfulness_pull(
    phibar: Float[Tensor, "m k"], probs: Float[Tensor, "m n"], heads: Float[Tensor, "k n"]
) -> Float[Tensor, "m k"]:
    """Its derivative: ``sum_n (y_n - softmax(H^T phibar)_n) eta_n``."""
    return (probs - (phibar @ heads).softmax(1)) @ heads.T


def stability(
    phibar: Float[Tensor, "m k"],
    twin: Float[Tensor, "m k"],
    others: Float[Tensor, "f k"],
    own: Float[Tensor, "m f"],
    beta: Float[Tensor, " k"],
) -> Float[Tensor, " m"]:
    """`L_s` of each image: ``beta . (phibar * twin) - log sum_{f != m} exp(beta . (phibar * others_f))`` [V].

    `twin` is phibar of the perturbed image; `own` is ``-inf`` where an image of `others` is the image itself, else 0.
    """
    return ((phibar * twin) @ beta) - ((phibar * beta) @ others.T + own).logsumexp(1)


def stability_pull(
    phibar: Float[Tensor, "m k"],
    twin: Float[Tensor, "m k"],
    others: Float[Tensor, "f k"],
    own: Float[Tensor, "m f"],
    beta: Float[Tensor, " k"],
) -> Float[Tensor, "m k"]:
    """Its derivative by phibar of the image: ``beta * (twin - sum_f w_f others_f)``, w the softmax of `L_s`."""
    return beta * (twin - ((phibar * beta) @ others.T + own).softmax(1) @ others)
