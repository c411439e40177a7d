"""What an M step needs of all patches, added up block by block."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


class Moments:
    """Of each concept, with ``phi a`` as weights; and the patches that are explained worst.

    Parameters
    ----------
    k : int
    emb : Tensor (m, j, d)
        All patches that are to come, for their number and kind.

    Attributes
    ----------
    counts, first, second : Tensor (k,), (k, d), (k, d, d)
        ``sum phi a``, ``sum phi a e`` and ``sum phi a e e^T``.
    worst : Tensor (k, d)
        Attended patches whose highest density is lowest, the lowest first.
    patches : int
        How many there are.
    """

    def __init__(self, k: int, emb: Float[Tensor, "m j d"]) -> None:
        d = emb.shape[2]
        self.counts, self.first, self.second = (torch.zeros(k, *more).to(emb) for more in ((), (d,), (d, d)))
        self.worst, self.patches = emb.new_zeros(0, d), emb.shape[0] * emb.shape[1]
        self._scores = emb.new_zeros(0)

    def add(self, emb: Tensor, attn: Tensor, phi: Tensor, log_density: Tensor) -> None:
        """Count the patches of a block of images in."""
        x, weights = emb.flatten(0, 1), (phi * attn[..., None]).flatten(0, 1)
        self.counts += weights.sum(0)
        self.first += weights.T @ x
        for k in range(weights.shape[1]):
            self.second[k] += (x * weights[:, k : k + 1]).T @ x
        # Patches of more than mean attention: one that counts nothing would leave the concept empty.
        seen = (attn >= attn.mean(1, keepdim=True)).flatten()
        scores = torch.cat([self._scores, log_density.amax(2).flatten()[seen]])
        self._scores, chosen = scores.topk(min(len(self.counts), len(scores)), largest=False)
        self.worst = torch.cat([self.worst, x[seen]])[chosen]
