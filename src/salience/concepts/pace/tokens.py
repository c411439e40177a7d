"""What a vision transformer makes of the patches of an image, and which of them its class token attends to."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from salience.errors import InputError
from salience.features.attribution import device_of
from salience.model.at import eager_attention, training_mode

_SINGLE = ("cls_token", "distillation_token")
_SEVERAL = "register_tokens"


class PatchTokens(NamedTuple):
    """Patch embeddings (m, j, d), attention of the class token to patches (m, j), and class probabilities (m, n)."""

    emb: Float[Tensor, "m j d"]
    attn: Float[Tensor, "m j"]
    probs: Float[Tensor, "m n"]


def vit_tokens(model: nn.Module, pixel_values: Float[Tensor, "m channel height width"], layer: int = -1) -> PatchTokens:
    """Patch embeddings behind a block of a vision transformer, its attention, and what the model predicts.

        a_mj = mean_heads attention(class token -> patch j) at that block

    Supported: image classifiers of `transformers` with a class token (ViT, DeiT, DINOv2 and their like, with
    distillation or register tokens or without). A model without one (Swin, mean pooling) gets even attention, and a
    warning.

    Parameters
    ----------
    model : torch.nn.Module
        Left as it was; its attention is computed step by step meanwhile.
    pixel_values : Tensor (m, channel, height, width)
        As the model's processor gives them.
    layer : int
        Number of the block; -1 is the last.

    Returns
    -------
    PatchTokens
        On the model's device, without gradients. Attention is as the model gives it: it does not sum to 1, since the
        class token attends to itself too.

    Raises
    ------
    InputError
        No such block, or a model that gives no hidden states, no class logits, or no attention ("eager").

    Notes
    -----
    Source: section 3 of arXiv 2406.12649. Its code looks one layer earlier, and counts the class token as a patch.
    """
    with training_mode(model, False), eager_attention(model), torch.no_grad():
        output = model(pixel_values.to(device_of(model)), output_attentions=True, output_hidden_states=True)
    name = type(model).__name__
    states, attentions, logits = (getattr(output, key, None) for key in ("hidden_states", "attentions", "logits"))
    if not states or logits is None or logits.ndim != 2:
        raise InputError(f"model: {name} gives no hidden states or no class logits; an image classifier of "
                         "transformers is needed")  # fmt: skip
    blocks = len(states) - 1
    if isinstance(layer, bool) or not -blocks <= layer < blocks:
        raise InputError(f"layer: got {layer!r}; {name} has blocks {-blocks}..{blocks - 1}")
    tokens, probs = states[1:][layer], logits.double().softmax(1).to(logits.dtype)
    if tokens.ndim != 3:
        raise InputError(f"model: {name} gives hidden states of shape {tuple(tokens.shape)}; (m, token, d) is needed")
    extra = _extra_tokens(model)
    if not extra:
        warnings.warn(f"{name} has no class token: every patch counts alike; give PACE other attention if you know "
                      "better", stacklevel=2)  # fmt: skip
        return PatchTokens(tokens, tokens.new_full(tokens.shape[:2], 1 / tokens.shape[1]), probs)
    if not attentions or attentions[layer] is None:
        raise InputError(f"model: {name} gives no attention, as fused kernels do not form it; load it with "
                         "attn_implementation='eager'")  # fmt: skip
    attention = attentions[layer].mean(1)[:, 0, extra:]
    return PatchTokens(tokens[:, extra:], attention, probs)


def _extra_tokens(model: nn.Module) -> int:
    """How many tokens stand before those of the patches; 0 without a class token."""
    sizes = {name.rpartition(".")[2]: value.shape[1] for name, value in model.named_parameters() if value.ndim == 3}
    return sum(sizes.get(name, 0) for name in (*_SINGLE, _SEVERAL)) if "cls_token" in sizes else 0
