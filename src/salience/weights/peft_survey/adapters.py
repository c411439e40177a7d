"""Bottleneck adapters after or beside the layers of a block: Houlsby, Pfeiffer, AdapterDrop, parallel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from salience.errors import InputError
from salience.weights.peft_survey.blocks import Block, find_blocks, width_of

Position = Literal["sequential", "parallel"]
ADAPTER, SOURCE = "salience_adapter", "salience_source"  # attributes by which hooks find their adapter
_ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}


class BottleneckAdapter(nn.Module):
    """Down to r units, a nonlinearity, and up again; it does nothing before the first step.

        sequential:  h <- h + s W_up sigma(W_down h + b_down) + s b_up
        parallel:    h <- h + s W_up sigma(W_down x + b_down) + s b_up,   x the input of the layer beside it

    It has 2 d r + r + d parameters.

    Parameters
    ----------
    d : int
        Width of the model.
    r : int
        Units in the middle, 8 to 64 as a rule.
    act : {"gelu", "relu"}
    position : {"sequential", "parallel"}
        What `forward` reads; where it sits is up to `add_adapters`.
    scale : float
        s; 4 in He et al.'s parallel adapters, 1 in Houlsby's.

    Raises
    ------
    InputError
        A size below 1, or an unknown option.

    References
    ----------
    Houlsby et al., ICML 2019; Pfeiffer et al., EACL 2021; He et al., ICLR 2022, equation 7. W_up and the biases begin
    at zero, W_down as LoRA's A.
    """

    def __init__(
        self, d: int, r: int = 16, act: str = "gelu", position: Position = "sequential", scale: float = 1.0
    ) -> None:
        super().__init__()
        if d < 1 or r < 1:
            raise InputError(f"d and r: got {d} and {r}; both must be at least 1")
        if act not in _ACTIVATIONS:
            raise InputError(f"act: got {act!r}; allowed: {', '.join(map(repr, _ACTIVATIONS))}")
        if position not in ("sequential", "parallel"):
            raise InputError(f"position: got {position!r}; allowed: 'sequential', 'parallel'")
        self.down, self.act, self.up = nn.Linear(d, r), _ACTIVATIONS[act](), nn.Linear(r, d)
        self.position, self.scale = position, scale
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    def forward(
        self, hidden: Float[Tensor, "*batch d"], source: Float[Tensor, "*batch d"] | None = None
    ) -> Float[Tensor, "*batch d"]:
        """Add the correction to `hidden`; it is computed from `source` in the parallel position."""
        return hidden + self.scale * self.correction(hidden if source is None else source)

    def correction(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """``W_up sigma(W_down x + b_down) + b_up``, not scaled."""
        return self.up(self.act(self.down(x)))


def add_adapters(
    model: nn.Module,
    *,
    r: int = 16,
    after: Sequence[str] = ("attention", "feed_forward"),
    position: Position = "sequential",
    act: str = "gelu",
    scale: float = 1.0,
    skip: int = 0,
) -> None:
    """Put a bottleneck adapter into every block of a model, in place.

    A sequential adapter reads what the layer's last projection gives, before residual sum and normalisation. A
    parallel one reads what the feed-forward layer reads. The base's tensors keep their names; adapters are new
    modules below the projection, found by a hook, so that a deep copy of the model is one with adapters of its own.

    Parameters
    ----------
    model : nn.Module
    r, act, scale
        As of `BottleneckAdapter`.
    after : sequence of {"attention", "feed_forward"}
        Houlsby has both, Pfeiffer the latter.
    position : {"sequential", "parallel"}
    skip : int
        Blocks without an adapter at the bottom (AdapterDrop).

    Raises
    ------
    InputError
        The model has no blocks, or `skip` leaves none.
    """
    for block in kept_blocks(model, skip):
        for part in after:
            names = getattr(block, part)
            place_adapter(model, block, names, BottleneckAdapter(
                width_of(model.get_submodule(names[-1]))[1], r, act, position, scale))  # fmt: skip


def kept_blocks(model: nn.Module, skip: int) -> list[Block]:
    """The blocks above the first `skip`."""
    blocks = find_blocks(model)
    if not 0 <= skip < len(blocks):
        raise InputError(f"skip: got {skip}; the model has {len(blocks)} blocks, and one at least must be left")
    return blocks[skip:]


def place_adapter(model: nn.Module, block: Block, names: Sequence[str], adapter: nn.Module) -> None:
    """Let `adapter` act on the output of the last of the layers `names`, reading the input of the first if parallel."""
    first, last = (model.get_submodule(name) for name in (names[0], names[-1]))
    where: Any = last.weight
    adapter.to(where.device, where.dtype)
    setattr(last, ADAPTER, adapter)
    last.register_forward_hook(_after)
    if getattr(adapter, "position", "") == "parallel":
        if first is last:
            raise InputError(
                f"model: block {block.name} has one feed-forward layer only; an adapter beside it needs two"
            )
        source = Remembered()
        object.__setattr__(adapter, SOURCE, source)  # plain objects: shared by both, also in a deep copy
        object.__setattr__(first, SOURCE, source)
        first.register_forward_pre_hook(_before)


class Remembered:
    """What one hook leaves for another within a pass."""

    value: Tensor | None = None

    def take(self) -> Tensor:
        """Give it away; nothing is held after the pass."""
        value, self.value = self.value, None
        if value is None:
            raise RuntimeError("the layer beside the adapter did not run before it")
        return value


def _before(layer: nn.Module, args: tuple[Any, ...]) -> None:
    getattr(layer, SOURCE).value = args[0]


def _after(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    adapter = getattr(layer, ADAPTER)
    source = getattr(adapter, SOURCE, None)
    return adapter(output) if source is None else adapter(output, source.take())


class LowRank(nn.Module):
    """The correction ``B A x`` of a linear layer, B zero at first.

    Parameters
    ----------
    in_features, out_features, r : int
    """

    def __init__(self, in_features: int, out_features: int, r: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(r, in_features))
        self.B = nn.Parameter(torch.zeros(out_features, r))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        """``B A x``."""
        return x @ self.A.T @ self.B.T
