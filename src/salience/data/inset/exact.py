"""The distribution over subsets by enumeration, to see what mean field loses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from salience.data.inset.utility import SetUtility
from salience.errors import InputError

_MOST = 16


class ExactDistribution(NamedTuple):
    """Log-probabilities (batch, 2^n) of all subsets (2^n, n), and marginals (batch, n)."""

    log_p: Float[Tensor, "batch subsets"]
    subsets: Bool[Tensor, "subsets n"]
    marginals: Float[Tensor, "batch n"]

    def kl_of(self, log_odds: Float[Tensor, "batch n"]) -> Float[Tensor, " batch"]:
        """KL(q || p) in nats, of independent elements with these log-odds."""
        bits = self.subsets.to(self.log_p.dtype)
        chosen = torch.nn.functional.logsigmoid(log_odds.double())
        left = torch.nn.functional.logsigmoid(-log_odds.double())
        log_q = chosen @ bits.T + left @ (1 - bits).T
        return (log_q.exp() * (log_q - self.log_p)).sum(1)


@torch.no_grad()
def exact_distribution(utility: SetUtility, V: Shaped[Tensor, "batch n ..."]) -> ExactDistribution:
    """``p(S | V) = exp F(S; V) / sum_T exp F(T; V)`` over all 2^n subsets, in double precision.

    Parameters
    ----------
    utility : SetUtility
    V : (batch, n, …) Tensor
        Sets of at most 16 elements.

    Raises
    ------
    InputError
        The sets are larger.
    """
    n = V.shape[1]
    if not 1 <= n <= _MOST:
        raise InputError(f"V: sets of {n} elements; all subsets are counted for 1 to {_MOST} elements only")
    subsets = (torch.arange(2**n)[:, None] >> torch.arange(n)) % 2 == 1
    subsets = subsets.to(V.device)
    values = utility(V, subsets.expand(len(V), -1, -1)).double()
    log_p = values.log_softmax(1)
    return ExactDistribution(log_p, subsets, log_p.exp() @ subsets.double())
