"""INSET: mean-field steps over a utility that sees the whole set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from salience.data.inset.recognition import RecognitionNet
from salience.data.inset.selector import Objective, SubsetSelector, sampled_negatives, set_cross_entropy
from salience.data.inset.utility import Fuse, SetUtility, encode
from salience.errors import InputError, nearest

Mode = Literal["copula", "ind", "diffMF"]


class INSET(SubsetSelector):
    """Learns from pairs (V, S*) to pick the best subset of a new set.

    The subsets have probabilities in proportion to exp F(S; V), of which the mean-field steps give marginals:

        q_i <- sigmoid( 1/m sum_m [ F(S_m + i; V) - F(S_m - i; V) ] ),   S_m drawn from q

    from a start that a recognition network gives (trained by its evidence lower bound), or from 1/2. F is trained by
    the cross-entropy between the last q and S*, over S* and as many random negatives.

    Parameters
    ----------
    encoder : callable
        Gives a new network from elements (elements, …) to features (elements, dim); called once for F and once for the
        recognition network: ``lambda: nn.Linear(2, 256)``.
    mode : {"copula", "ind", "diffMF"}
        The recognition network's noise; "diffMF" has none and starts from 1/2.
    steps : int
        Mean-field steps, K. Gradients flow through the last one: what is drawn before has none.
    samples : int
        Subsets drawn per element and step, m.
    rank, tau
        As of `RecognitionNet`.
    neg_num : int
        Random negatives per element of S*.
    dim, hidden, layers, fuse, sigma
        As of `SetUtility`; ``fuse="none"`` makes it EquiVSet.

    Attributes
    ----------
    utility : SetUtility
    recognition : RecognitionNet or None

    Raises
    ------
    InputError
        A parameter out of range.

    Notes
    -----
    Source: arXiv 2402.03139, section 3, and arXiv 2203.01693, sections 3 and 4. See `SetUtility` for what is
    reconstructed. Ours: sets of several sizes (`valid`), draws at inference that depend on the set's size and a seed
    only, and a choice by q above 1/2 where no size is given.
    """

    def __init__(
        self, encoder: Callable[[], nn.Module], *, mode: Mode = "copula", steps: int = 1, samples: int = 5,
        rank: int = 5, tau: float = 0.1, neg_num: int = 1, dim: int = 256, hidden: int = 500, layers: int = 2,
        fuse: Fuse = "hidden", sigma: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if mode not in get_args(Mode):
            raise InputError(f"mode: got {mode!r}; {nearest(str(mode), get_args(Mode))}")
        if min(steps, samples, neg_num) < 1:
            raise InputError(f"steps, samples, neg_num: got {steps}, {samples}, {neg_num}; each must be at least 1")
        if isinstance(encoder, nn.Module):
            raise InputError("encoder: a function that gives a new network is needed, since two are trained")
        self.steps, self.samples, self.neg_num = steps, samples, neg_num
        self.utility = SetUtility(encoder(), dim=dim, hidden=hidden, layers=layers, fuse=fuse, sigma=sigma)
        self.recognition = None
        if mode != "diffMF":
            self.recognition = RecognitionNet(
                encoder(), dim=dim, hidden=hidden, layers=layers, copula=mode == "copula", rank=rank, tau=tau
            )

    def objectives(self) -> list[Objective]:
        """First the recognition network's evidence lower bound, then the utility's cross-entropy."""
        utility = Objective("utility", self.utility_loss, self.utility.parameters())
        if self.recognition is None:
            return [utility]
        return [Objective("recognition", self.recognition_loss, self.recognition.parameters()), utility]

    def utility_loss(
        self,
        V: Shaped[Tensor, "batch n ..."],
        S: Bool[Tensor, "batch n"],
        valid: Bool[Tensor, "batch n"],
        generator: torch.Generator,
    ) -> Float[Tensor, ""]:
        """Cross-entropy of the last marginals over S* and sampled negatives; no gradient to the recognition network."""
        batch, n = S.shape
        counted = S | sampled_negatives(S, valid, self.neg_num, generator)
        uniforms = [torch.rand(batch, self.samples, n, n, generator=generator).to(S.device) for _ in range(self.steps)]
        return set_cross_entropy(self._mean_field(V, valid, uniforms), S, counted)

    def recognition_loss(
        self,
        V: Shaped[Tensor, "batch n ..."],
        S: Bool[Tensor, "batch n"],
        valid: Bool[Tensor, "batch n"],
        generator: torch.Generator,
    ) -> Float[Tensor, ""]:
        """Minus the evidence lower bound; S* does not enter."""
        if self.recognition is None:
            raise InputError("mode='diffMF' has no recognition network")
        return self.recognition.negative_elbo(self.utility, V, valid, self.samples, generator)

    def _values(self, V: Tensor, valid: Tensor, seed: int) -> Float[Tensor, "batch n"]:
        sizes = valid.sum(1).tolist()
        by_size = {n: self._draws(n, seed) for n in set(sizes)}
        uniforms = []
        for step in range(self.steps):
            placed = torch.ones(len(V), self.samples, V.shape[1], V.shape[1])  # 1 draws nothing
            for row, size in enumerate(sizes):
                where = valid[row].nonzero().flatten().cpu()
                placed[row][:, where[:, None], where] = by_size[size][step]
            uniforms.append(placed.to(valid.device))
        return self._mean_field(V, valid, uniforms)

    def _draws(self, n: int, seed: int) -> Float[Tensor, "steps samples n n"]:
        return torch.rand(self.steps, self.samples, n, n, generator=torch.Generator().manual_seed(seed))

    def _mean_field(self, V: Tensor, valid: Tensor, uniforms: list[Tensor]) -> Float[Tensor, "batch n"]:
        if self.recognition is None:
            log_odds = torch.zeros(valid.shape, device=valid.device)
        else:
            log_odds = self.recognition(V, valid).log_odds.detach()
        features = encode(self.utility.encoder, V, valid, self.utility.dim)
        for drawn in uniforms:
            log_odds = mean_field_step(self.utility, features, log_odds.sigmoid(), drawn)
        return log_odds


def mean_field_step(
    utility: SetUtility,
    features: Float[Tensor, "batch n dim"],
    q: Float[Tensor, "batch n"],
    uniforms: Float[Tensor, "batch samples n n"],
) -> Float[Tensor, "batch n"]:
    """Log-odds of the next marginals: mean over the samples of F(S + i; V) - F(S - i; V).

    Parameters
    ----------
    utility : SetUtility
    features : (batch, n, dim) Tensor
        Of the elements, by the utility's encoder; zeros for padding.
    q : (batch, n) Tensor
        Marginals so far.
    uniforms : (batch, samples, n, n) Tensor
        Numbers in [0, 1); an element j is in the subset drawn for i where ``uniforms[…, i, j] < q_j``, and i's own bit
        is set and cleared.
    """
    return utility.gains(features, uniforms < q.detach()[:, None, None, :]).mean(1)
