"""The recognition network: a first guess of every element's probability, and subsets that gradients flow through."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.nn.functional import softplus

from salience.data.inset.utility import SetUtility, encode, feed_forward
from salience.errors import InputError

_EDGE = 1e-6  # the code of EquiVSet has 1e-12, which 1 - u loses in single precision


class Recognition(NamedTuple):
    """Log-odds of every element (batch, n), and for a copula the deviation (batch, n) and the factors (batch, n, r)."""

    log_odds: Tensor
    std: Tensor | None
    factors: Tensor | None


class RecognitionNet(nn.Module):
    """q_0(S | V), with a Gaussian copula between the elements or independent ones.

        h = relu(FF(phi'(x_i))),   mu = sigmoid(w'h),   sigma = softplus(v'h),   U = tanh(W h)
        copula   g = eps * sigma + U eps',   u = Phi(g)           eps, eps' standard normal
        ind      u uniform on (0, 1)
        s = sigmoid((logit(mu) + logit(u)) / tau), rounded at random with a straight-through gradient

    Each element is looked at by itself; only the noise of the copula joins them.

    Parameters
    ----------
    encoder : torch.nn.Module
        phi', a network of its own.
    dim, hidden, layers : int
        As of `SetUtility`.
    copula : bool
    rank : int
        Of U.
    tau : float
        Temperature; 0.1 is nearly hard.

    Raises
    ------
    InputError
        A parameter out of range.

    Notes
    -----
    Source: arXiv 2203.01693, section 4, and its published code. g is not standardised there, nor here, so that an
    element's probability of being drawn is not exactly mu.
    """

    def __init__(
        self, encoder: nn.Module, *, dim: int = 256, hidden: int = 500, layers: int = 2, copula: bool = True,
        rank: int = 5, tau: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__()
        if rank < 1 or not 0 < tau < math.inf:
            raise InputError(f"rank and tau: got {rank} and {tau}; a rank of at least 1 and a positive tau are needed")
        self.encoder, self.dim, self.tau = encoder, dim, tau
        self.body = feed_forward(dim, hidden, hidden, max(layers - 1, 0))
        self.to_log_odds = nn.Linear(hidden, 1)
        self.to_std = nn.Linear(hidden, 1) if copula else None
        self.to_factors = nn.Linear(hidden, rank) if copula else None

    def forward(self, V: Shaped[Tensor, "batch n ..."], valid: Bool[Tensor, "batch n"]) -> Recognition:
        """What the network makes of every element."""
        h = torch.relu(self.body(encode(self.encoder, V, valid, self.dim)))
        log_odds = self.to_log_odds(h).squeeze(-1).float()
        if self.to_std is None or self.to_factors is None:
            return Recognition(log_odds, None, None)
        return Recognition(log_odds, softplus(self.to_std(h)).squeeze(-1).float(), self.to_factors(h).tanh().float())

    def sample(self, found: Recognition, count: int, generator: torch.Generator) -> Float[Tensor, "batch samples n"]:
        """`count` subsets per set: bits, with the gradient of the relaxed ones."""
        log_odds, std, factors = found
        batch, n = log_odds.shape
        at = log_odds.device
        if std is None or factors is None:
            u = torch.rand(batch, count, n, generator=generator).to(at)
        else:
            own = torch.randn(batch, count, n, generator=generator).to(at)
            shared = torch.randn(batch, count, factors.shape[2], generator=generator).to(at)
            u = torch.special.ndtr(own * std[:, None] + shared @ factors.transpose(1, 2))
        relaxed = torch.sigmoid((log_odds[:, None] + torch.logit(u, eps=_EDGE)) / self.tau)
        hard = (torch.rand(batch, count, n, generator=generator).to(at) < relaxed).to(relaxed.dtype)
        return relaxed + (hard - relaxed).detach()

    def negative_elbo(
        self,
        utility: SetUtility,
        V: Shaped[Tensor, "batch n ..."],
        valid: Bool[Tensor, "batch n"],
        count: int,
        generator: torch.Generator,
    ) -> Float[Tensor, ""]:
        """Mean over the sets of ``-(mean_m F(S_m; V) + sum_i H(mu_i))``, H the entropy of a Bernoulli variable."""
        found = self(V, valid)
        subsets = self.sample(found, count, generator) * valid[:, None]
        values = utility(V, subsets, valid).mean(1)
        entropy = (softplus(found.log_odds) - found.log_odds * found.log_odds.sigmoid()) * valid
        return -(values + entropy.sum(1)).mean()
