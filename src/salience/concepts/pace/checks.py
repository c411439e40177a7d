"""What PACE is given: checked, and as float64 tensors on one device."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from salience.errors import DataError, InputError, NothingToDo


class Given(NamedTuple):
    """Patch embeddings (m, j, d), attention (m, j), the model's output (m, n), and the perturbed twins' patches."""

    emb: Float[Tensor, "m j d"]
    attn: Float[Tensor, "m j"]
    probs: Float[Tensor, "m n"] | None
    emb_aug: Float[Tensor, "m j d"] | None
    attn_aug: Float[Tensor, "m j"] | None

    def take(self, rows: slice) -> Given:
        """Some of the images."""
        probs, emb_aug, attn_aug = (None if part is None else part[rows] for part in self[2:])
        return Given(self.emb[rows], self.attn[rows], probs, emb_aug, attn_aug)


def given(emb: Any, attn: Any, probs: Any, emb_aug: Any, attn_aug: Any) -> Given:
    """Check what came; the twins of a single image are left out, as it has no other image to be told from."""
    emb = _tensor("emb", emb, 3)
    if 0 in emb.shape:
        raise NothingToDo(f"emb: has shape {tuple(emb.shape)}; there are no patches")
    attn = _attention("attn", attn, emb)
    if probs is not None:
        probs = _tensor("probs", probs, 2).to(emb.device)
        if len(probs) != len(emb):
            raise InputError(f"probs: {len(probs)} rows for {len(emb)} images of emb")
        off = ((probs.sum(1) - 1).abs() > 1e-3) | (probs < 0).any(1)
        if bool(off.any()):
            row = int(off.nonzero()[0])
            raise DataError(f"probs: row {row} sums to {float(probs[row].sum()):.4g}, its least is "
                            f"{float(probs[row].min()):.4g}; give the softmax of the logits")  # fmt: skip
    if (emb_aug is None) != (attn_aug is None):
        raise InputError("emb_aug and attn_aug: give both, or neither")
    if emb_aug is not None:
        emb_aug = _tensor("emb_aug", emb_aug, 3).to(emb.device)
        if emb_aug.shape != emb.shape:
            raise InputError(f"emb_aug: has shape {tuple(emb_aug.shape)}; that of emb, {tuple(emb.shape)}, is needed")
        attn_aug = _attention("attn_aug", attn_aug, emb_aug)
        if len(emb) == 1:
            emb_aug = attn_aug = None
    return Given(emb, attn, probs, emb_aug, attn_aug)


def check_options(model: Any) -> None:
    """Refuse parameters of the estimator that are out of range."""
    for name, least in (("n_concepts", 1), ("max_iter", 1), ("e_steps", 1), ("batch_size", 1), ("reduce_dim", 1)):
        value = getattr(model, name)
        if name == "reduce_dim" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise InputError(f"{name}: got {value!r}; it must be an integer of at least {least}")
    for name, above in (("alpha", True), ("cov_floor", True), ("faithfulness", False), ("stability", False)):
        value = getattr(model, name)
        if not _finite(value) or value < 0 or (above and value == 0):
            raise InputError(f"{name}: got {value!r}; it must be finite, {'above' if above else 'at least'} 0")
    scale = model.attention_scale
    if not (scale is None or scale == "J" or (_finite(scale) and scale > 0)):
        raise InputError(f"attention_scale: got {scale!r}; it must be 'J', a number above 0, or None")


def _finite(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and bool(np.isfinite(value))


def _tensor(name: str, value: Any, ndim: int) -> Tensor:
    tensor = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    if tensor.ndim != ndim or not tensor.is_floating_point():
        raise InputError(f"{name}: must be floats of {ndim} dimensions; got {tensor.dtype} {tuple(tensor.shape)}")
    if not bool(torch.isfinite(tensor).all()):
        row = int((~torch.isfinite(tensor)).flatten(1).any(1).nonzero()[0])
        raise DataError(f"{name}: image {row} holds values that are not finite")
    return tensor.detach().double()


def _attention(name: str, value: Any, emb: Tensor) -> Tensor:
    attention = _tensor(name, value, 2).to(emb.device)
    if attention.shape != emb.shape[:2]:
        raise InputError(f"{name}: has shape {tuple(attention.shape)}; {emb.shape[1]} patches of {emb.shape[0]} images "
                         f"need {tuple(emb.shape[:2])} (without the class token)")  # fmt: skip
    bad = (attention < 0).any(1) | (attention.sum(1) <= 0)
    if bool(bad.any()):
        raise DataError(f"{name}: image {int(bad.nonzero()[0])} has negative attention, or none at all")
    return attention
