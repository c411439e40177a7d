"""UniPELT and the mix-and-match adapter: adapter, prefix and LoRA together in every block."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from salience.errors import InputError
from salience.weights.peft_survey.adapters import BottleneckAdapter, LowRank, Remembered, place_adapter
from salience.weights.peft_survey.blocks import find_blocks, width_of
from salience.weights.peft_survey.prefix import add_prefix, use_prefixes

GATES, LOW_RANK, MASK = "salience_gates", "salience_low_rank", "salience_mask"


class Gate(nn.Module):
    """How much of one part a sample gets: a small linear map of its hidden states, between 0 and 1.

        g = sigmoid(w . h + b)

    with h the mean of the sample's hidden states over its tokens that are no padding. A causal model may not see later
    tokens: there h is the token's own state, one gate a token, which also keeps generation with a cache exact.

    Parameters
    ----------
    d : int
        Width of the model.
    causal : bool
    mask : Remembered
        Holds the attention mask of the pass, where there is one.

    References
    ----------
    Mao et al., ACL 2022, section 3.2. One gate a token in causal models is ours.
    """

    def __init__(self, d: int, causal: bool, mask: Remembered) -> None:
        super().__init__()
        self.linear = nn.Linear(d, 1)
        self.causal, self.mask = causal, mask
        self.value: Tensor | None = None  # within a pass
        self.last: Tensor | None = None  # of the pass before, without its graph

    def forward(self, hidden: Float[Tensor, "batch token d"]) -> Float[Tensor, "batch token_or_1 1"]:
        """The gate of each sample; a copy stays in `last`."""
        if not self.causal:
            mask = self.mask.value
            if mask is not None and mask.ndim == 2 and mask.shape == hidden.shape[:2]:
                weight = mask.to(hidden.dtype)[..., None]
                hidden = (hidden * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
            else:
                hidden = hidden.mean(1, keepdim=True)
        gate = torch.sigmoid(self.linear(hidden))
        self.last = gate.detach()
        return gate


class UniPELT(nn.Module):
    """The gates of one block, for its LoRA, its prefix and its adapter.

    Parameters
    ----------
    d : int
    causal : bool
    mask : Remembered
    """

    def __init__(self, d: int, causal: bool, mask: Remembered) -> None:
        super().__init__()
        self.lora, self.prefix, self.adapter = (Gate(d, causal, mask) for _ in range(3))


class _GatedAdapter(BottleneckAdapter):
    """A parallel adapter behind a gate that reads what the feed-forward layer reads."""

    gate: list[Gate]

    def __init__(self, d: int, r: int, gate: Gate) -> None:
        super().__init__(d, r, "relu", "parallel")
        object.__setattr__(self, "gate", [gate])  # the gates are the block's own

    def forward(self, hidden: Tensor, source: Tensor | None = None) -> Tensor:
        if source is None:
            source = hidden
        return hidden + self.gate[0](source) * self.correction(source)


class MAMAdapter(BottleneckAdapter):
    """The feed-forward half of the mix-and-match adapter: parallel, ReLU, scaled by 4.

    Parameters
    ----------
    d, r : int
    scale : float

    References
    ----------
    He et al., ICLR 2022, section 4.6; the other half is a small prefix in attention.
    """

    def __init__(self, d: int, r: int = 16, scale: float = 4.0) -> None:
        super().__init__(d, r, "relu", "parallel", scale)


def add_unipelt(model: nn.Module, *, r: int = 8, m: int = 10) -> None:
    """Give every block LoRA on queries and values, a prefix and a parallel adapter, each behind its gate, in place.

    LoRA's correction is ``g B A x``, the prefix ``g P_k, g P_v``, the adapter ``g W_up relu(W_down x)``. LoRA's and the
    prefix's gates read what attention reads, the adapter's what the feed-forward layer reads.

    Raises
    ------
    InputError
        The model is an encoder-decoder (its cross-attention reads two inputs, and only half of it is causal), its
        attention cannot be exchanged, or its parts cannot be told apart.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise InputError(
            f"model: {type(model).__name__} is an encoder-decoder, which unipelt does not take: gates are causal for "
            "the whole model or not at all, and know no cross-attention; lora and houlsby take it"
        )
    use_prefixes(model)
    causal, mask = _is_causal(model), Remembered()
    object.__setattr__(model, MASK, mask)
    model.register_forward_pre_hook(_remember_mask, with_kwargs=True)
    for block in find_blocks(model):
        first = model.get_submodule(block.attention[0])
        where: Any = first.weight
        gates = UniPELT(width_of(first)[0], causal, mask).to(where.device, where.dtype)
        setattr(block.layer, GATES, gates)
        core = model.get_submodule(block.core)
        object.__setattr__(core, GATES, [gates])
        core.register_forward_pre_hook(_open_gates, with_kwargs=True)
        core.register_forward_hook(_close_gates)
        add_prefix(model, block, m, gates.prefix)
        for name in dict.fromkeys(block.projection("query") + block.projection("value")):
            layer = model.get_submodule(name)
            setattr(layer, LOW_RANK, LowRank(*width_of(layer), r).to(where.device, where.dtype))
            object.__setattr__(layer, GATES, [gates])
            layer.register_forward_hook(_add_low_rank)
        names = block.feed_forward
        width = width_of(model.get_submodule(names[-1]))[1]
        place_adapter(model, block, names, _GatedAdapter(width, r, gates.adapter))


def add_mam(model: nn.Module, *, r: int = 16, m: int = 10, scale: float = 4.0) -> None:
    """Give every block a prefix in attention and a scaled adapter beside its feed-forward layer, in place.

    Raises
    ------
    InputError
        As `add_unipelt`.
    """
    use_prefixes(model)
    for block in find_blocks(model):
        add_prefix(model, block, m)
        width = width_of(model.get_submodule(block.feed_forward[-1]))[1]
        place_adapter(model, block, block.feed_forward, MAMAdapter(width, r, scale))


def gate_values(model: nn.Module) -> dict[str, Tensor]:
    """The gates of the last pass: (batch, token or 1) by name of the gate.

    Raises
    ------
    InputError
        The model has no gates, or did not run yet.
    """
    gates = {name: gate.last for name, gate in model.named_modules() if isinstance(gate, Gate)}
    found = {name: value[..., 0] for name, value in gates.items() if value is not None}
    if not found or len(found) < len(gates):
        raise InputError("model: has no gates, or made no pass yet; attach 'unipelt' and run it")
    return found


def _is_causal(model: nn.Module) -> bool:
    """Whether a token may not see later ones, by what attention says of itself."""
    core: Any = model.get_submodule(find_blocks(model)[0].core)
    return bool(getattr(core, "is_causal", getattr(getattr(model, "config", None), "is_decoder", False)))


def _remember_mask(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    try:
        given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    except TypeError:  # the call itself will say what is wrong with it
        given = {}
    mask = {**given, **given.get("kwargs", {})}.get("attention_mask")
    getattr(model, MASK).value = mask if isinstance(mask, Tensor) else None


def _open_gates(core: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor):
        raise InputError(f"model: {type(core).__name__} is called without hidden states, which the gates read")
    (gates,) = getattr(core, GATES)
    gates.lora.value, gates.prefix.value = gates.lora(hidden), gates.prefix(hidden)


def _close_gates(core: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    (gates,) = getattr(core, GATES)
    gates.lora.value = gates.prefix.value = None  # a copy of the model cannot hold a graph


def _add_low_rank(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    (gates,) = getattr(layer, GATES)
    return output + gates.lora.value * getattr(layer, LOW_RANK)(args[0])
