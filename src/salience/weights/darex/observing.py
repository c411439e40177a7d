"""What a delta is judged by: the inputs of each linear layer, and how far the outputs move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from salience.model.at import logits_of, run

_TOP = 5  # logits whose change counts for a decoder


def input_axes(model: nn.Module) -> dict[str, int]:
    """The axis of the inputs in the weight of each linear layer: 1, and 0 for GPT-2's Conv1D."""
    axes = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            axes[f"{name}.weight" if name else "weight"] = 1
        elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
            axes[f"{name}.weight"] = 0
    return axes


def input_statistics(model: nn.Module, batches: Sequence[Any], *, norm: bool) -> dict[str, Tensor]:
    """Mean of each input of each linear layer over all tokens, or its Euclidean norm; (in,) in float64.

    Padding does not count: where a batch has an attention mask, rows that it hides are left out.
    """
    sums: dict[str, tuple[Tensor, int]] = {}
    mask: Tensor | None = None
    modules = dict(model.named_modules())
    hooks = []
    try:
        for weight in input_axes(model):
            layer = weight.removesuffix("weight").removesuffix(".")

            def record(module: nn.Module, inputs: tuple, weight: str = weight) -> None:
                rows = _real(inputs[0].detach(), mask).double()
                total, count = sums.get(weight, (0, 0))
                sums[weight] = (total + (rows.square() if norm else rows).sum(0), count + len(rows))

            hooks.append(modules[layer].register_forward_pre_hook(record))
        with torch.no_grad():
            for batch in batches:
                mask = mask_of(batch)
                run(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total.sqrt() if norm else total / count for name, (total, count) in sums.items()}


def mask_of(batch: Any) -> Tensor | None:
    """Which tokens of a batch are real, where it says so."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _real(values: Tensor, mask: Tensor | None) -> Tensor:
    """Rows (tokens, width) of activations, without those of padding where there is one row for each token."""
    if mask is not None and values.shape[:-1] == mask.shape:
        return values[mask.to(values.device)]
    return values.reshape(-1, values.shape[-1])


def outputs_of(model: nn.Module, batch: Any, decoder: bool) -> Tensor:
    """Logits of a decoder; last hidden states of an encoder of `transformers`; what other networks return."""
    backbone = getattr(model, "base_model", None)
    if decoder or not isinstance(backbone, nn.Module) or not hasattr(model, "config"):
        return logits_of(run(model, batch)).float()
    output = run(backbone, batch)
    hidden = getattr(output, "last_hidden_state", None)
    return (hidden if isinstance(hidden, Tensor) else logits_of(output)).float()


class Outputs(NamedTuple):
    """What a batch gave before pruning: all of it, or of a decoder the largest logits of each token and their places.

    Attributes
    ----------
    values : Tensor (tokens, width)
    places : int64 Tensor (tokens, width) or None
    mask : bool Tensor or None
        Which tokens are real.
    """

    values: Tensor
    places: Tensor | None
    mask: Tensor | None

    def change(self, after: Tensor) -> Tensor:
        """Mean absolute change, or of a decoder the mean squared change of its largest logits."""
        now = _real(after, self.mask)
        if self.places is None:
            return (now - self.values).abs().mean()
        return (now.gather(-1, self.places) - self.values).square().mean()


def outputs_before(output: Tensor, batch: Any, top: bool) -> Outputs:
    """What is kept of the outputs of a batch; with `top` five logits a token and not its whole vocabulary."""
    mask = mask_of(batch)
    rows = _real(output, mask)
    if not top:
        return Outputs(rows, None, mask)
    values, places = rows.topk(min(_TOP, rows.shape[-1]), dim=-1)
    return Outputs(values, places, mask)
