"""The largest size of a method that a budget of parameters pays for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from salience.errors import InputError
from salience.weights.peft_survey.blocks import linear_layers, width_of, without_storage
from salience.weights.peft_survey.cards import MethodCard

_LARGEST = 1 << 14
_POWERS = ("oft_block_size", "boft_block_size")  # they must divide widths


def largest_size(
    model: nn.Module,
    card: MethodCard,
    options: Mapping[str, Any],
    limit: int,
    build: Callable[[nn.Module, Mapping[str, Any]], nn.Module],
    head: set[str],
) -> dict[str, Any]:
    """Options with the size set so that at most `limit` parameters train besides the head.

    Parameters
    ----------
    model : nn.Module
        Copied without its storage, once for every size tried; itself left alone.
    card : MethodCard
    options : mapping
    limit : int
    build : callable
        ``build(model, options)`` puts the method on.
    head : set of str
        Parameters that do not count.

    Raises
    ------
    InputError
        Even the smallest size trains more than `limit`; names its count.
    """

    def count(size: int | None) -> int:
        tried = dict(options) if size is None else _with(card, options, size)
        if card.name == "shira":  # needs real weights to draw from; it trains as many as LoRA of its rank
            layers = linear_layers(model, options.get("target", "auto"))
            return (size or 1) * sum(sum(width_of(model.get_submodule(name))) for name in layers)
        with torch.random.fork_rng(devices=[]):
            built = build(without_storage(model), {**tried, "dry": True} if card.via == "own" else tried)
        inner = getattr(built, "model", built) if card.via == "own" else built
        return sum(p.numel() for name, p in inner.named_parameters() if p.requires_grad and name not in head
                   and "modules_to_save" not in name)  # fmt: skip

    if card.size == "keep":
        total = count(None)
        if limit < 1:
            raise InputError(f"budget: got {limit}; {card.name} needs at least 1")
        return {**options, "keep": min(1.0, limit / total)}
    if not card.size:
        if (needed := count(None)) > limit:
            raise InputError(
                f"budget: {limit} parameters are too few; {card.name} has one size only and needs {needed}"
            )
        return dict(options)
    sizes = [2**power for power in range(1, 14)] if card.size in _POWERS else list(range(1, _LARGEST + 1))
    smallest = count(sizes[0])
    if smallest > limit:
        raise InputError(
            f"budget: {limit} parameters are too few; {card.name} needs at least {smallest} ({card.size}={sizes[0]})"
        )
    low, high = 0, len(sizes)  # sizes[low] is paid for; sizes[high] is not, or is impossible
    step = 1
    while low + step < high:  # doubling first: large sizes are costly to try
        if not _paid(count, sizes[low + step], limit):
            high = low + step
            break
        low, step = low + step, 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _paid(count, sizes[middle], limit) else (low, middle)
    return _with(card, options, sizes[low])


def _paid(count: Callable[[int], int], size: int, limit: int) -> bool:
    try:
        return count(size) <= limit
    except InputError:  # more layers than there are, a block that does not divide a width
        return False


def _with(card: MethodCard, options: Mapping[str, Any], size: int) -> dict[str, Any]:
    chosen = {**options, card.size: size}
    if card.size == "init_r":  # AdaLoRA ends with fewer ranks than it begins with
        chosen["target_r"] = max(1, size * 2 // 3)
    return chosen
