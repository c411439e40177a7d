"""Recommenders that read several interest vectors from a history of items: by self-attention, or by dynamic routing.

Source: Cen, Zhang, Zou, Zhou, Yang, Tang, "Controllable Multi-Interest Framework for Recommendation" (ComiRec), KDD
2020, and its published code; DESMIL trains its extractors with learned weights.
"""

from __future__ import annotations

import math
import warnings

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from salience.errors import InputError

_LEAST = torch.finfo(torch.float32).min


class MultiInterest(nn.Module):
    """What both extractors share: the table of items, readout, loss and recommendation.

    Item 0 is padding. Items are numbered by falling frequency: negatives are drawn log-uniformly over the numbers.

    Parameters
    ----------
    items : int
        V, with padding: items are 1 to V - 1.
    dim : int
        d, width of items and interests.
    length : int
        L, items of a history.
    interests : int
        K.
    generator : torch.Generator, optional
        On the CPU; draws the first weights.

    Raises
    ------
    InputError
        A size below 1 (items: below 2).
    """

    def __init__(
        self,
        items: int,
        dim: int = 64,
        length: int = 20,
        interests: int = 4,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if min(items - 1, dim, length, interests) < 1:
            raise InputError(
                f"items, dim, length, interests: got {items}, {dim}, {length}, {interests}; at least 2, 1, 1, 1 are "
                "needed"
            )
        self.items, self.dim, self.length, self.interests = items, dim, length, interests
        self.item_embedding = nn.Embedding(items, dim, padding_idx=0)
        nn.init.xavier_uniform_(self.item_embedding.weight, generator=generator)
        with torch.no_grad():
            self.item_embedding.weight[0] = 0

    def extract(self, embedded: Float[Tensor, "b L d"], mask: Bool[Tensor, "b L"]) -> Float[Tensor, "b K d"]:
        """The interests, from embeddings that are 0 where the mask is."""
        raise NotImplementedError

    def forward(self, history: Int[Tensor, "b L"], mask: Bool[Tensor, "b L"] | None = None) -> Float[Tensor, "b K d"]:
        """Interests z of histories; zeros, and a warning, for one that is all padding.

        Parameters
        ----------
        history : (b, L) int Tensor
            Oldest first, padded with 0 behind.
        mask : (b, L) bool Tensor, optional
            False at padding; ``history != 0`` by default.

        Raises
        ------
        InputError
            Histories of another length, a number that is no item, or a mask of another shape.
        """
        if history.ndim != 2 or history.shape[1] != self.length:
            raise InputError(f"history: shape {tuple(history.shape)}; (batch, {self.length}) is needed")
        self._check_items("history", history)
        mask = history != 0 if mask is None else mask.bool()
        if mask.shape != history.shape:
            raise InputError(f"mask: shape {tuple(mask.shape)} for histories {tuple(history.shape)}")
        z = self.extract(self.item_embedding(history) * mask[:, :, None], mask)
        empty = ~mask.any(dim=1)
        if bool(empty.any()):
            warnings.warn(
                f"{int(empty.sum())} histories are all padding; their interests are zeros, and nothing can be "
                "recommended from them",
                stacklevel=2,
            )
            z = z.masked_fill(empty[:, None, None], 0.0)
        return z

    def readout(self, z: Float[Tensor, "b K d"], target: Int[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """The interest that fits the target best, ``z_{k*}`` with ``k* = argmax_k <z_k, e_target>``: for training."""
        best = (z @ self._embedded_target(target)[:, :, None]).squeeze(2).argmax(dim=1)
        return z[torch.arange(len(z), device=z.device), best]

    def loss(
        self,
        z: Float[Tensor, "b K d"],
        target: Int[Tensor, " b"],
        negatives: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, " b"]:
        """Sampled softmax of each sample: the target among negatives that all samples of the batch share.

            l = -log( e^{s_t - log q_t} / (e^{s_t - log q_t} + sum_j e^{s_j - log q_j}) ),   s_j = <z_{k*}, e_j>

        q is how often an item is drawn on average. Negatives that are the target are left out.

        Parameters
        ----------
        z : (b, K, d) Tensor
        target : (b,) int Tensor
            Items 1 to V - 1.
        negatives : int, optional
            Drawn with replacement; 10 for each sample by default. Where they are no fewer than the items, every item
            is taken once: the exact softmax.
        generator : torch.Generator, optional
            On the CPU; the global one by default.

        Raises
        ------
        InputError
            Negatives below 1, targets of another shape, or a number that is no item.
        """
        negatives = 10 * len(z) if negatives is None else negatives
        if negatives < 1:
            raise InputError(f"negatives: got {negatives}; at least 1 is needed")
        user = self.readout(z, target)
        if negatives >= self.items - 1:
            return cross_entropy(user @ self.item_embedding.weight[1:].T, target - 1, reduction="none")
        drawn = self._draw(negatives, generator).to(target.device)
        own = (user * self._embedded_target(target)).sum(1) - self._log_often(target, negatives)
        others = user @ self.item_embedding(drawn).T - self._log_often(drawn, negatives)
        others = others.masked_fill(drawn == target[:, None], _LEAST)
        first = torch.zeros_like(target)
        return cross_entropy(torch.cat([own[:, None], others], dim=1), first, reduction="none")

    def scores(self, history: Int[Tensor, "b L"]) -> Float[Tensor, "b V"]:
        """Best inner product of an item with any interest, -inf for padding."""
        scores = (self(history) @ self.item_embedding.weight.T).amax(dim=1)
        scores[:, 0] = -math.inf
        return scores

    def recommend(self, history: Int[Tensor, "b L"], n: int = 50) -> Int[Tensor, "b n"]:
        """The n best items of each history, best first.

        The same as to retrieve n for every interest, merge them by score, and drop repeats.

        Raises
        ------
        InputError
            As of `forward`, or n beyond the number of items.
        """
        if not 1 <= n <= self.items - 1:
            raise InputError(f"n: got {n}; 1 to {self.items - 1} items can be recommended")
        with torch.no_grad():
            return self.scores(history).topk(n, dim=1).indices

    def _embedded_target(self, target: Int[Tensor, " b"]) -> Float[Tensor, "b d"]:
        self._check_items("target", target, least=1)
        return self.item_embedding(target)

    def _draw(self, count: int, generator: torch.Generator | None) -> Int[Tensor, " count"]:
        """Items 1 to V - 1 with P(i) = log((i + 1) / i) / log V, by inversion."""
        drawn = torch.exp(torch.rand(count, generator=generator, dtype=torch.float64) * math.log(self.items))
        return drawn.long().clamp(1, self.items - 1)

    def _log_often(self, item: Int[Tensor, " n"], count: int) -> Float[Tensor, " n"]:
        i = item.to(self.item_embedding.weight.dtype)
        return torch.log(count * torch.log((i + 1) / i) / math.log(self.items))

    def _check_items(self, name: str, numbers: Tensor, least: int = 0) -> None:
        if numbers.is_floating_point() or numbers.dtype == torch.bool:
            raise InputError(f"{name}: got {numbers.dtype}; whole numbers of items are needed")
        wrong = (numbers < least) | (numbers >= self.items)
        if bool(wrong.any()):
            raise InputError(
                f"{name}: {int(numbers[wrong][0])} is no item ({int(wrong.sum())} such); items are {max(least, 1)} to "
                f"{self.items - 1}" + ("" if least else ", 0 is padding")
            )


class ComiRecSA(MultiInterest):
    """Interests by self-attention.

        Z = A E,   A = softmax_L( W2' tanh(W1' (E + pos)) ),   masked places left out

    Positions shape the attention only, not the interests.

    Parameters
    ----------
    items, dim, length, interests, generator
        As of `MultiInterest`.
    hidden : int
        The attention has four times as many hidden units.
    positions : bool
        Whether attention sees places. Without, heads cannot settle on places where the order says nothing.

    Raises
    ------
    InputError
        A size below 1.

    Notes
    -----
    Source: `Model_ComiRec_SA` of the published code.
    """

    def __init__(
        self,
        items: int,
        dim: int = 64,
        length: int = 20,
        interests: int = 4,
        hidden: int = 64,
        *,
        positions: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(items, dim, length, interests, generator=generator)
        if hidden < 1:
            raise InputError(f"hidden: got {hidden}; at least 1 is needed")
        self.position = nn.Parameter(torch.zeros(1, length, dim), requires_grad=positions)
        self.w1, self.w2 = nn.Linear(dim, 4 * hidden), nn.Linear(4 * hidden, interests)
        for weight in (self.w1.weight, self.w2.weight, *([self.position.data[0]] if positions else [])):
            nn.init.xavier_uniform_(weight, generator=generator)
        for layer in (self.w1, self.w2):
            nn.init.zeros_(layer.bias)

    def extract(self, embedded: Float[Tensor, "b L d"], mask: Bool[Tensor, "b L"]) -> Float[Tensor, "b K d"]:
        """The interests, as the class says."""
        logits = self.w2(torch.tanh(self.w1(embedded + self.position))).transpose(1, 2)
        attention = torch.softmax(logits.masked_fill(~mask[:, None], -(2.0**32) + 1), dim=2)
        return attention @ embedded


class ComiRecDR(MultiInterest):
    """Interests as capsules, by dynamic routing.

        e_hat_lk = W_lk e_l,   c = softmax_K(b),   z_k = squash(sum_l c_kl e_hat_lk),   b_kl += <z_k, e_hat_lk>
        squash(s) = |s|^2 / (1 + |s|^2) * s / |s|

    b starts at 0; the rounds before the last are outside the graph. Learning rate 5e-3 is theirs for it.

    Parameters
    ----------
    items, dim, length, interests, generator
        As of `MultiInterest`.
    routing : int
        Rounds.

    Raises
    ------
    InputError
        A size below 1.

    Notes
    -----
    Source: `CapsuleNetwork` of the published code with ``bilinear_type=2``: one W for every place of the history and
    every capsule. First weights are N(0, 1), as theirs.
    """

    def __init__(
        self,
        items: int,
        dim: int = 64,
        length: int = 20,
        interests: int = 4,
        routing: int = 3,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(items, dim, length, interests, generator=generator)
        if routing < 1:
            raise InputError(f"routing: got {routing}; at least 1 is needed")
        self.routing = routing
        self.weight = nn.Parameter(torch.randn(length, interests * dim, dim, generator=generator))

    def extract(self, embedded: Float[Tensor, "b L d"], mask: Bool[Tensor, "b L"]) -> Float[Tensor, "b K d"]:
        """The interests, as the class says."""
        hat = torch.einsum("lod,bld->blo", self.weight, embedded)
        hat = hat.unflatten(2, (self.interests, self.dim)).transpose(1, 2)  # (b, K, L, d)
        fixed = hat.detach()
        b = fixed.new_zeros(hat.shape[:3])
        for _ in range(self.routing - 1):
            z = _squash(_routed(b, mask, fixed))
            b = b + (fixed @ z[:, :, :, None]).squeeze(3)
        return _squash(_routed(b, mask, hat))


def _routed(
    b: Float[Tensor, "n K L"], mask: Bool[Tensor, "n L"], hat: Float[Tensor, "n K L d"]
) -> Float[Tensor, "n K d"]:
    return ((torch.softmax(b, dim=1) * mask[:, None])[:, :, None] @ hat).squeeze(2)


def _squash(s: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    square = s.square().sum(-1, keepdim=True)
    return square / (1 + square) / torch.sqrt(square + 1e-9) * s
