"""What a delta is judged by: the inputs of each linear layer, and how far the outputs move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    """Mean of each input of each linear layer over all tokens, or its Euclidean norm; (in,) in float64."""
    sums: dict[str, tuple[Tensor, int]] = {}
    modules = dict(model.named_modules())
    hooks = []
    try:
        for weight in input_axes(model):
            layer = weight.removesuffix("weight").removesuffix(".")

            def record(module: nn.Module, inputs: tuple, weight: str = weight) -> None:
                rows = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).double()
                total, count = sums.get(weight, (0, 0))
                sums[weight] = (total + (rows.square() if norm else rows).sum(0), count + len(rows))

            hooks.append(modules[layer].register_forward_pre_hook(record))
        with torch.no_grad():
            for batch in batches:
                run(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total.sqrt() if norm else total / count for name, (total, count) in sums.items()}


def outputs_of(model: nn.Module, batch: Any, decoder: bool) -> Tensor:
    """Logits of a decoder; last hidden states of an encoder of `transformers`; what other networks return."""
    backbone = getattr(model, "base_model", None)
    if decoder or not isinstance(backbone, nn.Module) or not hasattr(model, "config"):
        return logits_of(run(model, batch)).float()
    output = run(backbone, batch)
    hidden = getattr(output, "last_hidden_state", None)
    return (hidden if isinstance(hidden, Tensor) else logits_of(output)).float()


def change_of(after: Tensor, before: Tensor, top: bool) -> Tensor:
    """Mean absolute change, or for a decoder the mean squared change of its largest logits."""
    if not top:
        return (after - before).abs().mean()
    where = before.topk(min(_TOP, before.shape[-1]), dim=-1).indices
    return (after.gather(-1, where) - before.gather(-1, where)).square().mean()
