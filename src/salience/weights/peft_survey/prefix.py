"""Trained keys and values in front of a model's own attention, through the attention interface of `transformers`."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import dropout as drop

from salience.errors import InputError
from salience.weights.peft_survey.blocks import Block, width_of

PREFIX = "salience_prefix"  # attribute of an attention module; also the name under which attention is registered


class Prefix(nn.Module):
    """m trained keys and values of one attention layer.

        softmax(q [g P_k; K]^T / sqrt(d_h)) [g P_v; V]

    with a gate g in (0, 1) where there is one, else 1.

    Parameters
    ----------
    m : int
        Number of keys.
    heads : int
        Of keys and values (fewer than of queries in grouped-query attention).
    head_dim : int
        d_h.
    gate : nn.Module, optional
        Its `value` (batch, query, 1) or (batch, 1, 1) is g; see `salience.weights.peft_survey.hybrid.Gate`.
    """

    def __init__(self, m: int, heads: int, head_dim: int, gate: nn.Module | None = None) -> None:
        super().__init__()
        if m < 1:
            raise InputError(f"m: got {m}; at least one key is needed")
        self.key = nn.Parameter(torch.randn(heads, m, head_dim) * 0.02)
        self.value = nn.Parameter(torch.randn(heads, m, head_dim) * 0.02)
        object.__setattr__(self, "gate", gate)  # the gates are the block's own


def add_prefix(model: nn.Module, block: Block, m: int, gate: nn.Module | None = None) -> Prefix:
    """Give the attention of one block a prefix, in place; `use_prefixes` makes the model look at it.

    Raises
    ------
    InputError
        Heads and their width cannot be told.
    """
    core = model.get_submodule(block.core)
    config = getattr(core, "config", None) or getattr(model, "config", None)
    head_dim = next((int(value) for name in ("head_dim", "attention_head_size")
                     if (value := getattr(core, name, None) or getattr(config, name, None))), 0)  # fmt: skip
    values = block.projection("value")
    if not head_dim or not values:
        raise InputError(f"model: the heads of attention {block.core!r} cannot be told; a prefix needs them")
    layer: Any = model.get_submodule(values[0])
    width = width_of(layer)[1]
    fused = values[0] in block.projection("query")
    heads = width // head_dim // (3 if fused else 1)
    prefix = Prefix(m, heads, head_dim, gate).to(layer.weight.device, layer.weight.dtype)
    setattr(core, PREFIX, prefix)
    return prefix


def use_prefixes(model: nn.Module) -> None:
    """Let a model of `transformers` compute attention by `attend`, which sees prefixes.

    Raises
    ------
    InputError
        It is no such model, or one whose attention cannot be exchanged.
    """
    can = getattr(model, "_can_set_attn_implementation", None)
    if can is None or not can():
        raise InputError(
            f"model: attention of {type(model).__name__} cannot be exchanged; a prefix needs a model of transformers "
            "with the attention interface"
        )
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(PREFIX, attend)
    AttentionMaskInterface.register(PREFIX, sdpa_mask)
    base: Any = model
    base.set_attn_implementation(PREFIX)


def attend(
    module: nn.Module,
    query: Float[Tensor, "batch heads q_len head_dim"],
    key: Float[Tensor, "batch kv_heads k_len head_dim"],
    value: Float[Tensor, "batch kv_heads k_len head_dim"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch q_len heads head_dim"], None]:
    """Attention over a module's prefix and its own keys; with no prefix it is plain attention.

    The prefix comes first and every query sees it, whatever the mask says of the rest; a bias by position, as T5 has
    it, is that of the own keys.

    Raises
    ------
    InputError
        The model asks for capped scores or attention sinks, which are not known here.
    """
    for option in ("softcap", "s_aux"):
        if kwargs.get(option) is not None:
            raise InputError(f"model: its attention has {option}, which goes with no prefix")
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(2, 3) * scale
    scores = scores if position_bias is None else scores + position_bias
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scores = _masked(scores, attention_mask, causal)
    prefix: Any = getattr(module, PREFIX, None)
    if prefix is None:
        weights = drop(_softmax(scores), dropout, module.training)
        return (weights @ value).transpose(1, 2), None
    m = prefix.key.shape[1]
    gate = 1.0 if prefix.gate is None else prefix.gate.value[:, None]  # (batch, 1, q_len or 1, 1)
    p_key, p_value = (tensor.repeat_interleave(groups, 0) for tensor in (prefix.key, prefix.value))
    extra = query @ p_key.transpose(1, 2) * scale * gate  # q (g P_k)^T = g q P_k^T
    weights = drop(_softmax(torch.cat([extra, scores], -1)), dropout, module.training)
    return (gate * (weights[..., :m] @ p_value) + weights[..., m:] @ value).transpose(1, 2), None


def _softmax(scores: Tensor) -> Tensor:
    """In float32 at least, given back in the type of the scores."""
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)


def _masked(scores: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    low = torch.finfo(scores.dtype).min
    if mask is not None:
        mask = mask[..., : scores.shape[-1]]
        return scores.masked_fill(~mask, low) if mask.dtype == torch.bool else scores + mask
    queries, keys = scores.shape[-2:]
    if causal and queries > 1:  # the mask is left out where it is plainly causal
        seen = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril(keys - queries)
        return scores.masked_fill(~seen, low)
    return scores
