r"""Rotate a decoder so that no weight stands out, without changing what it computes.

The residual stream is turned by an orthogonal Q: what reads it (W) becomes WQ, what writes to it becomes
:math:`Q^T W`. RMSNorm commutes with Q once its weight has gone into the layers that follow it. Ashkboos et al.: QuaRot,
2024; Hadamard matrices of orders other than powers of two by Paley's constructions.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import scipy.linalg
import torch
from jaxtyping import Float
from torch import Tensor, nn

from salience.errors import InputError

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
Mode = Literal["hadamard", "random"]


def check_supported(model: Any) -> None:
    """Refuse what is not a causal decoder of a family that is known here, and what is quantised already.

    Raises
    ------
    InputError
        Another model type, or a quantised model.
    """
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in SUPPORTED or not hasattr(model, "lm_head"):
        raise InputError(
            f"model: {type(model).__name__} (type {kind}) is not supported; causal language models of type "
            f"{', '.join(SUPPORTED)} are"
        )
    if getattr(config, "quantization_config", None) is not None or hasattr(model, "hf_quantizer"):
        raise InputError(f"model: {type(model).__name__} is quantised already; give the model before that")


def hadamard_factors(size: int) -> tuple[Tensor, Tensor] | None:
    """Two matrices whose Kronecker product is a Hadamard matrix of an order; None where none is built here.

    A power of two times 1 or one of Paley's orders: ``q + 1`` for primes ``q = 3 mod 4``, ``2 (q + 1)`` for primes
    ``q = 1 mod 4``. Of all such products the one with the largest power of two is taken.
    """
    power = size & -size
    while power >= 1:
        rest = size // power
        core = torch.ones(1, 1, dtype=torch.float64) if rest == 1 else _paley(rest)
        if core is not None:
            return torch.from_numpy(scipy.linalg.hadamard(power)).double(), core
        power //= 2
    return None


def hadamard(size: int) -> Float[Tensor, "size size"] | None:
    """The Hadamard matrix of an order, entries 1 and -1 in float64; None where none is built here."""
    factors = hadamard_factors(size)
    return None if factors is None else torch.kron(*factors)


def orthogonal(
    size: int, mode: Mode, generator: torch.Generator, what: str = "the hidden size"
) -> Float[Tensor, "size size"]:
    r"""A random orthogonal matrix in float64: :math:`diag(\pm 1) H / \sqrt{n}`, or that of a QR decomposition.

    Warns where there is no Hadamard matrix of this order and takes the other.
    """
    if mode not in ("hadamard", "random"):
        raise InputError(f"mode: got {mode!r}; allowed are 'hadamard' and 'random'")
    H = hadamard(size) if mode == "hadamard" else None
    if H is not None:
        signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
        return signs[:, None] * H / math.sqrt(size)
    if mode == "hadamard":
        warnings.warn(f"no Hadamard matrix of order {size} ({what}): a random orthogonal one instead", stacklevel=2)
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    return q * torch.sign(r.diagonal())


class Rotation:
    """What a decoder is turned by; the same for a model in memory and for one that is read layer by layer.

    Parameters
    ----------
    config : transformers configuration
    mode : {"hadamard", "random"}
        Kind of the matrix for the residual stream.
    online : bool
        Turn the inputs of ``o_proj`` across heads and those of ``down_proj`` as well, while the model runs. Weights
        alone cannot do that: such a model needs hooks.
    generator : torch.Generator

    Attributes
    ----------
    Q : Tensor (hidden, hidden)
    head : Turn
        Turns the values within each head; goes into ``v_proj`` and ``o_proj``.
    across, inner : Turn or None
        Across heads, and over the intermediate size; of `online`.
    """

    def __init__(self, config: Any, mode: Mode, online: bool, generator: torch.Generator) -> None:
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.Q = orthogonal(config.hidden_size, mode, generator)
        self.head = Turn(head_dim, "the size of a head")
        self.across: Turn | None = None
        self.inner: Turn | None = None
        if online:
            self.across, self.inner = online_turns(config)

    @torch.no_grad()
    def layer(self, layer: Any) -> None:
        """Turn one decoder layer in place."""
        attention, mlp = layer.self_attn, layer.mlp
        Q = self.Q.to(attention.q_proj.weight.device)
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.up_proj, mlp.gate_proj)),
        ):
            for linear in readers:
                _put(linear.weight, (_wide(linear.weight) * _wide(norm.weight)) @ Q)
            norm.weight.fill_(1)
        for linear in (attention.o_proj, mlp.down_proj):
            _put(linear.weight, Q.T @ _wide(linear.weight))
            if linear.bias is not None:
                _put(linear.bias, Q.T @ _wide(linear.bias))
        v, o, down = attention.v_proj, attention.o_proj, mlp.down_proj
        _put(v.weight, self.head(_wide(v.weight).T).T)  # the outputs of v are the rows of its weight
        if v.bias is not None:
            _put(v.bias, self.head(_wide(v.bias)))
        _put(o.weight, self.head(_wide(o.weight)))
        if self.across is not None and self.inner is not None:
            _put(o.weight, self.across.heads(_wide(o.weight)))
            _put(down.weight, self.inner(_wide(down.weight)))
            attach(layer, self.across, self.inner)

    @torch.no_grad()
    def embedding(self, weight: Tensor) -> Tensor:
        """The turned embedding, in its type."""
        return (_wide(weight) @ self.Q.to(weight.device)).to(weight.dtype)

    @torch.no_grad()
    def output(self, weight: Tensor, norm: Tensor) -> Tensor:
        """The turned output matrix, with the weight of the last norm in it."""
        return ((_wide(weight) * _wide(norm)) @ self.Q.to(weight.device)).to(weight.dtype)


class Turn:
    r"""Multiply by :math:`H / \sqrt{n}` from the right, H the Hadamard matrix of order n, by its two factors.

    Where there is none of this order it says so and leaves everything as it is.
    """

    def __init__(self, size: int, what: str) -> None:
        self.size = size
        self.factors = hadamard_factors(size)
        if self.factors is None:
            warnings.warn(f"no Hadamard matrix of order {size} ({what}): not turned", stacklevel=2)

    def __call__(self, x: Tensor) -> Tensor:
        """Turn each piece of `size` consecutive entries of the last axis."""
        if self.factors is None:
            return x
        left, right = (factor.to(x) for factor in self.factors)
        split = x.unflatten(-1, (-1, len(left), len(right)))
        turned = left.T @ (split @ right)
        return (turned / math.sqrt(self.size)).flatten(-3)

    def heads(self, x: Tensor) -> Tensor:
        """Mix the heads of ``(…, size * head_dim)``."""
        split = x.unflatten(-1, (self.size, -1)).transpose(-1, -2).flatten(-2)
        return self(split).unflatten(-1, (-1, self.size)).transpose(-1, -2).flatten(-2)


def online_turns(config: Any) -> tuple[Turn, Turn]:
    """What turns the inputs of ``o_proj`` across heads, and those of ``down_proj``."""
    return (
        Turn(config.num_attention_heads, "the number of heads"),
        Turn(config.intermediate_size, "the intermediate size"),
    )


def attach(layer: Any, across: Turn, inner: Turn) -> None:
    """Let a decoder layer turn the inputs of ``o_proj`` and ``down_proj`` while it runs."""
    layer.self_attn.o_proj.register_forward_pre_hook(_Online(across.heads))
    layer.mlp.down_proj.register_forward_pre_hook(_Online(inner))


class _Online:
    """A forward pre-hook that turns the input of a linear layer, in float32 at least."""

    def __init__(self, turn: Callable[[Tensor], Tensor]) -> None:
        self.turn = turn

    def __call__(self, module: nn.Module, inputs: tuple) -> tuple[Tensor]:
        x = inputs[0]
        return (self.turn(x if x.dtype == torch.float64 else x.float()).to(x.dtype),)


def rotate_model(
    model: nn.Module, *, mode: Mode = "hadamard", online: bool = False, generator: torch.Generator | None = None
) -> nn.Module:
    r"""A copy of a decoder with a turned residual stream, which computes the same.

        E \leftarrow E Q,   W_{q,k,v,up,gate,head} \leftarrow W diag(g) Q,   W_{o,down} \leftarrow Q^T W

    g is the weight of the norm before, which becomes 1. A tied output matrix is untied, since g goes into it alone.
    Values are turned within each head, ``v_proj`` against ``o_proj``. Computed in float64.

    Supported: causal language models of `transformers` of type llama, mistral, qwen2, qwen3.

    Parameters
    ----------
    model : transformers causal language model
        It is not changed.
    mode : {"hadamard", "random"}
        A Hadamard matrix with random signs, or a random orthogonal one.
    online : bool
        Turn the inputs of ``o_proj`` across heads and those of ``down_proj`` as well. This needs hooks, which
        `save_pretrained` does not keep.
    generator : torch.Generator, optional
        Of the signs; seed 0 by default.

    Returns
    -------
    torch.nn.Module

    Raises
    ------
    InputError
        Another family, a quantised model, or another mode.

    References
    ----------
    Ashkboos et al.: QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs, arXiv 2404.00456, section 4.
    """
    check_supported(model)
    rotation = Rotation(model.config, mode, online, generator or torch.Generator().manual_seed(0))
    turned = copy.deepcopy(model)
    rotate_ends(turned, rotation)
    for _, layer in decoder_layers(turned):
        rotation.layer(layer)
    return turned


@torch.no_grad()
def rotate_ends(model: Any, rotation: Rotation) -> None:
    """Turn embedding and output matrix of a model in place, and untie them."""
    embedding, norm = model.get_input_embeddings(), model.model.norm
    output = rotation.output(model.lm_head.weight, norm.weight)
    model.lm_head.weight = nn.Parameter(output, requires_grad=model.lm_head.weight.requires_grad)
    model.config.tie_word_embeddings = False
    embedding.weight.copy_(rotation.embedding(embedding.weight))
    norm.weight.fill_(1)


def decoder_layers(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The decoder layers with their names."""
    for number, layer in enumerate(model.model.layers):
        yield f"model.layers.{number}", layer


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().double()


def _put(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value.to(parameter.dtype))


def _paley(size: int) -> Tensor | None:
    """A Hadamard matrix of order q + 1 or 2 (q + 1), q a prime."""
    if size % 4:
        return None
    q, half = size - 1, size // 2 - 1
    if q % 4 == 3 and _prime(q):
        S = _skew(q)
        return S + torch.eye(size, dtype=torch.float64)
    if half % 4 == 1 and _prime(half):
        C = _skew(half)
        pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(C, pair) + torch.kron(torch.eye(half + 1, dtype=torch.float64), diagonal)
    return None


def _skew(q: int) -> Tensor:
    """Paley's matrix of order q + 1 with a zero diagonal: Legendre symbols, bordered by ones."""
    residues = {x * x % q for x in range(1, q)}
    symbol = torch.tensor([0.0] + [1.0 if x in residues else -1.0 for x in range(1, q)], dtype=torch.float64)
    places = torch.arange(q)
    border = torch.ones(q, dtype=torch.float64)
    C = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    C[1:, 1:] = symbol[(places[:, None] - places) % q]
    C[0, 1:], C[1:, 0] = border, border if q % 4 == 1 else -border
    return C


def _prime(q: int) -> bool:
    return q > 2 and all(q % divisor for divisor in range(2, math.isqrt(q) + 1))
