r"""How much each token matters, from what a decoder layer does with it.

The default is *attention concentration*: how much attention a token receives,

    r_j = \sum_h \sum_i A_{h, i, j}

over heads h and the tokens i that look at it, in the layer as it is just before it is quantised.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from salience.errors import DataError, InputError

STRATEGIES = ("attncon", "actnorm", "actdiff", "tokensim", "tokenfreq", "first", "firstlast", "uniform")
_CHUNKS = {"first": "0_8", "firstlast": "0_31_32"}
_QUERIES = 128  # whose attention is held at once


class TokenImportance:
    """Importance of the tokens of each sequence, by name.

    ==============  =========================================================================
    attncon         attention received, over all heads and queries
    actnorm         norm of the layer's input
    actdiff         minus the distance between the layer's input and output
    tokensim        mean squared distance to all tokens of the sequence
    tokenfreq       minus how often the token occurs in the calibration text
    first           1 on the first of 8 chunks, else 0; ``"0_8"``; other numbers likewise
    firstlast       1 on the first and last of 32 chunks, else 0; ``"0_31_32"``
    uniform         1: plain GPTQ
    ==============  =========================================================================

    Within a sequence all but the last three rows are scaled to ``r_min`` … ``r_max``; where all tokens are alike, all
    get ``r_max``. Padding gets 0.

    Parameters
    ----------
    name : str
    r_min, r_max : float
        Importance of the least and of the most important token of a sequence.

    Raises
    ------
    InputError
        Another name, or a range that is not ``0 <= r_min < r_max``.
    """

    def __init__(self, name: str = "attncon", r_min: float = 0.005, r_max: float = 1.0) -> None:
        if name not in STRATEGIES and not re.fullmatch(r"\d+(_\d+)+", name):
            raise InputError(f"importance: got {name!r}; allowed are {', '.join(STRATEGIES)} and chunks such as '0_8'")
        if not 0 <= r_min < r_max < float("inf"):
            raise InputError(f"r_min, r_max: got {r_min} and {r_max}; 0 <= r_min < r_max is wanted")
        self.name, self.r_min, self.r_max = name, r_min, r_max
        self.chunks = (
            [int(part) for part in _CHUNKS.get(name, name).split("_")] if name[0].isdigit() or name in _CHUNKS else []
        )
        if self.chunks and max(self.chunks[:-1]) >= self.chunks[-1]:
            raise InputError(f"importance: chunk {max(self.chunks[:-1])} of {self.chunks[-1]} in {name!r} is not there")

    @property
    def needs_attention(self) -> bool:
        """Whether the attention that tokens receive must be given."""
        return self.name == "attncon"

    @property
    def needs_outputs(self) -> bool:
        """Whether the layer's outputs must be given."""
        return self.name == "actdiff"

    def __call__(
        self,
        inputs: Float[Tensor, "batch token dim"],
        mask: Bool[Tensor, "batch token"],
        *,
        outputs: Float[Tensor, "batch token dim"] | None = None,
        received: Float[Tensor, "batch token"] | None = None,
        counts: Int[Tensor, "batch token"] | None = None,
        given: Float[Tensor, "batch token"] | None = None,
    ) -> Float[Tensor, "batch token"]:
        """Importance of each token.

        Parameters
        ----------
        inputs, outputs : Tensor (batch, token, dim)
            Of the decoder layer.
        mask : bool Tensor (batch, token)
            Which tokens are real.
        received : Tensor (batch, token)
            From `attention_received`.
        counts : int Tensor (batch, token)
            How often each token occurs in the calibration text.
        given : Tensor (batch, token), optional
            Importance from elsewhere, which is only scaled.

        Raises
        ------
        InputError
            What the strategy needs is missing.
        DataError
            An importance is not finite.
        """
        raw = given if given is not None else self._raw(inputs, mask, outputs, received, counts)
        raw = raw.to(inputs.device, torch.float32)
        if not torch.isfinite(raw[mask]).all():
            raise DataError("importance: NaN or infinite for a token; the activations overflow")
        if given is None and (self.chunks or self.name == "uniform"):
            return raw * mask
        low = raw.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
        high = raw.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
        share = torch.where(high > low, (raw - low) / (high - low), 1.0)
        return (self.r_min + share * (self.r_max - self.r_min)).masked_fill(~mask, 0)

    def _raw(
        self, inputs: Tensor, mask: Tensor, outputs: Tensor | None, received: Tensor | None, counts: Tensor | None
    ) -> Tensor:
        rows, tokens = mask.shape
        if self.name == "uniform":
            return torch.ones(rows, tokens, device=inputs.device)
        if self.chunks:
            *wanted, of = self.chunks
            width = tokens // of
            if not width:
                raise InputError(f"importance: {self.name!r} cuts {of} chunks, and sequences have {tokens} tokens")
            place = torch.arange(tokens, device=inputs.device) // width
            return torch.isin(place, torch.tensor(wanted, device=inputs.device)).float().expand(rows, -1)
        if self.name == "actnorm":
            return inputs.float().norm(dim=-1)
        if self.name == "tokensim":
            # mean_k |z_j - z_k|^2 = |z_j|^2 + mean_k |z_k|^2 - 2 z_j . mean_k z_k: no table of all pairs
            z, share = inputs.float(), (mask / mask.sum(1, keepdim=True).clamp(min=1))[..., None]
            squares, mean = z.square().sum(-1), (z * share).sum(1, keepdim=True)
            return squares + (squares * share[..., 0]).sum(1, keepdim=True) - 2 * (z * mean).sum(-1)
        needed = {"attncon": received, "actdiff": outputs, "tokenfreq": counts}[self.name]
        if needed is None:
            raise InputError(f"importance: {self.name!r} needs the attention received, outputs or counts")
        if self.name == "actdiff":
            return -(inputs.float() - needed.float()).norm(dim=-1)
        return -needed.float() if self.name == "tokenfreq" else needed


@torch.no_grad()
def attention_received(
    attention: Any,
    hidden: Float[Tensor, "batch token dim"],
    position_embeddings: tuple[Tensor, Tensor],
    allowed: Bool[Tensor, "batch token token"],
    mask: Bool[Tensor, "batch token"],
    block: int = _QUERIES,
) -> Float[Tensor, "batch token"]:
    r"""Attention that each token receives, :math:`\sum_h \sum_i A_{h,i,j}`, without holding A.

    Queries are taken in blocks, so that memory holds (heads, block, tokens) at once; a fused kernel would give no
    attention at all.

    Parameters
    ----------
    attention : transformers attention module
        Of Llama, Mistral, Qwen2 or Qwen3.
    hidden : Tensor (batch, token, dim)
        Its input, after the norm.
    position_embeddings : pair of Tensor (batch, token, head_dim)
        Cosines and sines.
    allowed : bool Tensor (batch or 1, token, token)
        Whether query i may look at key j.
    mask : bool Tensor (batch, token)
        Which tokens are real: padding gives no attention.
    block : int
        Queries at once.
    """
    split = (*hidden.shape[:2], -1, attention.head_dim)
    q, k = (projection(hidden).view(split) for projection in (attention.q_proj, attention.k_proj))
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    cos, sin = (part[:, :, None] for part in position_embeddings)
    q, k = ((x * cos + _half_turned(x) * sin).transpose(1, 2).float() for x in (q, k))
    groups = q.shape[1] // k.shape[1]
    q = q.unflatten(1, (-1, groups)) * attention.scaling  # (batch, kv heads, groups, token, head_dim)
    keys = k.transpose(2, 3)[:, :, None]
    total = torch.zeros(mask.shape, device=hidden.device)
    for first in range(0, mask.shape[1], block):
        part = slice(first, first + block)
        # Causal: no query of this block sees a key after its last one.
        end = min(first + block, mask.shape[1])
        scores = q[:, :, :, part] @ keys[..., :end]
        scores.masked_fill_(~allowed[:, None, None, part, :end], -torch.inf)
        weights = scores.softmax(-1) * mask[:, None, None, part, None]
        total[:, :end] += weights.sum((1, 2, 3))
    return total


def _half_turned(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)
