"""What INSET is compared with. EquiVSet is ``INSET(..., fuse="none")``."""

from __future__ import annotations

import zlib

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from salience.data.inset.selector import Objective, SubsetSelector, sampled_negatives, set_cross_entropy
from salience.data.inset.utility import SetUtility, encode, feed_forward
from salience.errors import InputError


class RandomSelector(SubsetSelector):
    """Ranks the elements of every set at random; nothing is trained."""

    has_marginals = False

    def objectives(self) -> list[Objective]:
        """None."""
        return []

    def _values(self, V: Tensor, valid: Tensor, seed: int) -> Float[Tensor, "batch n"]:
        found = torch.zeros(valid.shape)
        for row, (elements, which) in enumerate(zip(V, valid)):
            own = zlib.crc32(elements[which].cpu().numpy().tobytes(), seed)  # the same set, the same draw
            found[row, which.cpu()] = torch.rand(int(which.sum()), generator=torch.Generator().manual_seed(own))
        return found.to(V.device)


class _Direct(SubsetSelector):
    """Log-odds of every element from a network that sees the set, without a utility: "NoSetFn" in the papers."""

    def __init__(self, neg_num: int) -> None:
        super().__init__()
        if neg_num < 1:
            raise InputError(f"neg_num: got {neg_num}; it must be at least 1")
        self.neg_num = neg_num

    def forward(self, V: Shaped[Tensor, "batch n ..."], valid: Bool[Tensor, "batch n"]) -> Float[Tensor, "batch n"]:
        """Log-odds of every element."""
        raise NotImplementedError

    def objectives(self) -> list[Objective]:
        """Cross-entropy over S* and sampled negatives, as of INSET's utility."""
        return [Objective("cross-entropy", self._loss, self.parameters())]

    def _loss(self, V: Tensor, S: Tensor, valid: Tensor, generator: torch.Generator) -> Tensor:
        counted = S | sampled_negatives(S, valid, self.neg_num, generator)
        return set_cross_entropy(self(V, valid), S, counted)

    def _values(self, V: Tensor, valid: Tensor, seed: int) -> Float[Tensor, "batch n"]:
        return self(V, valid)


class DeepSetSelector(_Direct):
    """Log-odds by a network of each element beside the sum of all: ``FF([e_i, sum_j e_j])``.

    Parameters
    ----------
    encoder : torch.nn.Module
        Elements (elements, …) to features (elements, dim).
    dim, hidden, layers : int
        Sizes of the features and of FF.
    neg_num : int
        Random negatives per element of S*.

    Notes
    -----
    Source: Zaheer and others, "Deep Sets", NeurIPS 2017, as a baseline of arXiv 2203.01693. Reconstructed: its sizes,
    and that negatives are sampled.
    """

    def __init__(
        self, encoder: nn.Module, *, dim: int = 256, hidden: int = 500, layers: int = 2, neg_num: int = 1
    ) -> None:
        super().__init__(neg_num)
        self.encoder, self.dim = encoder, dim
        self.head = feed_forward(2 * dim, hidden, 1, layers)

    def forward(self, V: Shaped[Tensor, "batch n ..."], valid: Bool[Tensor, "batch n"]) -> Float[Tensor, "batch n"]:
        """Log-odds of every element."""
        features = encode(self.encoder, V, valid, self.dim)
        whole = features.sum(1, keepdim=True).expand_as(features)
        return self.head(torch.cat([features, whole], 2)).squeeze(-1)


class SetTransformerSelector(_Direct):
    """Log-odds by self-attention blocks over the elements, without positions.

    Parameters
    ----------
    encoder : torch.nn.Module
        Elements (elements, …) to features (elements, dim).
    dim, hidden : int
        Of the features and of the blocks' feed-forward part.
    layers, heads : int
        Of attention.
    neg_num : int
        Random negatives per element of S*.

    Notes
    -----
    Source: Lee and others, "Set Transformer", ICML 2019 (its blocks SAB), as a baseline of arXiv 2402.03139.
    Reconstructed: its sizes, and that negatives are sampled.
    """

    def __init__(
        self, encoder: nn.Module, *, dim: int = 256, hidden: int = 500, layers: int = 2, heads: int = 4,
        neg_num: int = 1,
    ) -> None:  # fmt: skip
        super().__init__(neg_num)
        if heads < 1 or dim % heads:
            raise InputError(f"heads: got {heads}; it must divide dim = {dim}")
        self.encoder, self.dim = encoder, dim
        block = nn.TransformerEncoderLayer(dim, heads, hidden, dropout=0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.head = nn.Linear(dim, 1)

    def forward(self, V: Shaped[Tensor, "batch n ..."], valid: Bool[Tensor, "batch n"]) -> Float[Tensor, "batch n"]:
        """Log-odds of every element."""
        features = encode(self.encoder, V, valid, self.dim)
        return self.head(self.blocks(features, src_key_padding_mask=~valid)).squeeze(-1)


class PGMSelector(SubsetSelector):
    """Greedy choice with a learnt utility: a probabilistic greedy model.

        p(s_1, …, s_k | V) = prod_j exp(F({s_1..s_j}) / gamma) / sum_{s not in S_{j-1}} exp(F(S_{j-1} + s) / gamma)

    trained by the likelihood of S* in a random order, a new one at every step; the choice is the greedy one.

    Parameters
    ----------
    encoder : torch.nn.Module
        Elements (elements, …) to features (elements, dim).
    dim, hidden, layers : int
        As of `SetUtility`.
    gamma : float
        Temperature.

    Notes
    -----
    Source: Tschiatschek, Sahin, Krause, "Differentiable Submodular Maximization", IJCAI 2018, as a baseline of arXiv
    2203.01693. Reconstructed: its utility is that of EquiVSet, and one order is drawn per step.
    """

    has_marginals = False

    def __init__(
        self, encoder: nn.Module, *, dim: int = 256, hidden: int = 500, layers: int = 2, gamma: float = 1.0
    ) -> None:
        super().__init__()
        if gamma <= 0:
            raise InputError(f"gamma: got {gamma}; it must be positive")
        self.utility = SetUtility(encoder, dim=dim, hidden=hidden, layers=layers, fuse="none")
        self.gamma = gamma

    def objectives(self) -> list[Objective]:
        """Minus the log-likelihood of S* in a random order."""
        return [Objective("likelihood", self._loss, self.utility.parameters())]

    def _loss(self, V: Tensor, S: Tensor, valid: Tensor, generator: torch.Generator) -> Tensor:
        features = encode(self.utility.encoder, V, valid, self.utility.dim)
        keys = torch.rand(S.shape, generator=generator).to(S.device).masked_fill(~S, 2.0)
        order, sizes = keys.argsort(1), S.sum(1)
        taken, total = torch.zeros_like(S), features.new_zeros(len(S))
        for step in range(int(sizes.max())):
            picked = order[:, step]
            losses = nn.functional.cross_entropy(self._logits(features, taken, valid), picked, reduction="none")
            total = total + torch.where(step < sizes, losses, 0)  # a set that is complete adds nothing more
            taken = taken.scatter(1, picked[:, None], True)
        return total.mean()

    def _logits(self, features: Tensor, taken: Tensor, valid: Tensor) -> Float[Tensor, "batch n"]:
        own = torch.eye(features.shape[1], dtype=torch.bool, device=features.device)
        values = self.utility.value(features, taken[:, None] | own) / self.gamma
        return values.masked_fill(taken | ~valid, -1e9)

    def _values(self, V: Tensor, valid: Tensor, seed: int) -> Float[Tensor, "batch n"]:
        features = encode(self.utility.encoder, V, valid, self.utility.dim)
        taken, place = torch.zeros_like(valid), torch.zeros(valid.shape, device=V.device)
        for step in range(valid.shape[1]):
            picked = self._logits(features, taken, valid).argmax(1, keepdim=True)
            fresh = ~taken.gather(1, picked)
            place.scatter_(1, picked, torch.where(fresh, -float(step), place.gather(1, picked)))
            taken = taken.scatter(1, picked, True)
        return place
