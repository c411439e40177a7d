"""One decoder layer after the other: weigh its tokens, quantise it part by part, and pass on what it gives then."""

from __future__ import annotations

import fnmatch
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from salience.errors import DataError
from salience.weights.rsq.calibration import Calibration
from salience.weights.rsq.grids import Grid, Scales, round_to_nearest
from salience.weights.rsq.importance import TokenImportance, attention_received
from salience.weights.rsq.solving import gptq_solve

# Linear layers with one input, in the order in which a layer uses them: each group sees the groups before it quantised.
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


class QuantizedMatrix(NamedTuple):
    """Codes of one matrix, and what they cost.

    Attributes
    ----------
    codes : uint8 Tensor (out, in)
    scales : Scales
    error, rtn_error : float
        In the metric of the (weighted, damped) Hessian, of this and of rounding to nearest; NaN without a Hessian.
    """

    codes: Tensor
    scales: Scales
    error: float
    rtn_error: float


class Rounding(NamedTuple):
    """How matrices are rounded.

    Attributes
    ----------
    grid : Grid
    group_size : int
    percdamp : float
    act_order : bool
    block : int
    exclude : sequence of str
        Names or patterns of linear layers that stay as they are.
    """

    grid: Grid
    group_size: int = -1
    percdamp: float = 0.01
    act_order: bool = False
    block: int = 128
    exclude: Sequence[str] = ()

    def excludes(self, name: str) -> bool:
        """Whether a linear layer stays as it is."""
        return any(excluded(name, each) for each in self.exclude)


def excluded(name: str, pattern: str) -> bool:
    """Whether the name of a linear layer is `pattern`, ends with its words, or fits it."""
    return name == pattern or name.endswith(f".{pattern}") or fnmatch.fnmatch(name, pattern)


class Stream:
    """The hidden states of all sequences between two decoder layers, in a file, and what layers are called with.

    Parameters
    ----------
    calibration : Calibration
    hidden : int
        Width of the hidden states.
    dtype : torch.dtype
    rotary : torch.nn.Module
        Gives cosines and sines for positions.
    config : transformers configuration
    folder : Path
        Where the file lies; it is as large as all hidden states.
    batch_size : int
        Sequences that run at once.
    device : torch.device
    """

    def __init__(
        self,
        calibration: Calibration,
        rotary: Any,
        config: Any,
        dtype: torch.dtype,
        folder: Path,
        batch_size: int = 8,
        device: torch.device | str = "cpu",
    ) -> None:
        self.calibration, self.config, self.device = calibration, config, torch.device(device)
        self.batch_size = batch_size
        rows, tokens = calibration.ids.shape
        shape = (rows, tokens, config.hidden_size)
        with tempfile.NamedTemporaryFile(dir=folder) as file:  # mapped memory stays after the name is gone
            self.hidden = torch.from_file(file.name, shared=True, size=rows * tokens * shape[2], dtype=dtype).view(
                shape
            )
        places = torch.arange(tokens, device=self.device)[None]
        example = torch.empty(1, dtype=dtype, device=self.device)
        self.position_ids, self.position_embeddings = places, rotary(example, places)
        self._causal = places <= places.T
        self._distance = places.T - places
        self.counts = calibration.counts()

    def batches(self) -> Iterator[slice]:
        """Rows that run together."""
        for start in range(0, len(self.hidden), self.batch_size):
            yield slice(start, start + self.batch_size)

    def mask(self, rows: slice) -> Tensor:
        """Which tokens are real."""
        return self.calibration.mask[rows].to(self.device)

    def weighed(self, rows: slice) -> Tensor:
        """Which tokens may have weight."""
        return self.calibration.weighed()[rows].to(self.device)

    def read(self, rows: slice) -> Tensor:
        """Hidden states of some sequences, on the device."""
        return self.hidden[rows].to(self.device)

    def allowed(self, rows: slice, number: int) -> Tensor:
        """Whether query i may look at key j in a layer: (batch or 1, token, token)."""
        window = _window(self.config, number)
        allowed = self._causal if window is None else self._causal & (self._distance < window)
        mask = self.mask(rows)
        if bool(mask.all()):
            return allowed[None]
        # Padding looks at itself, so that no row of attention is empty.
        itself = torch.eye(mask.shape[1], dtype=torch.bool, device=self.device)
        return (allowed & mask[:, None]) | itself

    def call(self, layer: nn.Module, rows: slice, number: int) -> Tensor:
        """What a decoder layer gives for some sequences."""
        hidden = self.read(rows)
        allowed = self.allowed(rows, number)
        # Without a mask fused kernels are causal by themselves, and faster.
        plain = len(allowed) == 1 and torch.equal(allowed[0], self._causal)
        bias = None
        if not plain or getattr(self.config, "_attn_implementation", "") == "eager":
            bias = torch.zeros(allowed.shape, dtype=hidden.dtype, device=self.device)
            bias = bias.masked_fill_(~allowed, torch.finfo(hidden.dtype).min)[:, None]
        output = layer(
            hidden, attention_mask=bias, position_ids=self.position_ids, position_embeddings=self.position_embeddings
        )
        return output[0] if isinstance(output, tuple) else output

    def input_of(self, layer: nn.Module, linear: nn.Module, rows: slice, number: int) -> Tensor:
        """The input of a linear layer within a decoder layer; what comes after it is not computed."""

        def stop(module: nn.Module, inputs: tuple) -> None:
            raise _Reached(inputs[0])

        handle = linear.register_forward_pre_hook(stop)  # after hooks that turn the input
        try:
            self.call(layer, rows, number)
        except _Reached as reached:
            return reached.value
        finally:
            handle.remove()
        raise DataError(f"{type(layer).__name__}: its pass does not reach {type(linear).__name__}")


class _Reached(Exception):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


def _window(config: Any, number: int) -> int | None:
    """Width of the sliding window of a layer, where it has one."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return config.sliding_window if kinds[number] == "sliding_attention" else None
    window = getattr(config, "sliding_window", None)
    return window if window and getattr(config, "use_sliding_window", True) else None


@torch.no_grad()
def layer_importance(
    layer: Any, stream: Stream, importance: TokenImportance, number: int
) -> Float[Tensor, "sequence token"]:
    """Importance of every token for one decoder layer as it is, before it is quantised; mean 1 in each sequence."""
    parts = []
    for rows in stream.batches():
        hidden, mask = stream.read(rows), stream.weighed(rows)
        given = None if stream.calibration.given is None else stream.calibration.given[rows]
        received = outputs = None
        if given is None and importance.needs_attention:
            allowed = stream.allowed(rows, number)
            normed = layer.input_layernorm(hidden)
            received = attention_received(
                layer.self_attn, normed, stream.position_embeddings, allowed, stream.mask(rows)
            )
        if given is None and importance.needs_outputs:
            outputs = stream.call(layer, rows, number)
        r = importance(hidden, mask, outputs=outputs, received=received, counts=stream.counts[rows], given=given)
        mean = r.sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        parts.append(torch.where(mean > 0, r / mean, 0).cpu())
    return torch.cat(parts)


@torch.no_grad()
def quantize_layer(
    layer: Any, name: str, number: int, stream: Stream, importance: TokenImportance, rounding: Rounding
) -> dict[str, QuantizedMatrix]:
    """Quantise the linear layers of one decoder layer in place, and pass the stream through it."""
    r = layer_importance(layer, stream, importance, number)
    modules = dict(layer.named_modules())
    found: dict[str, QuantizedMatrix] = {}
    for group in GROUPS:
        wanted = [part for part in group if not rounding.excludes(f"{name}.{part}")]
        if not wanted:
            continue
        H = input_hessian(layer, modules[group[0]], number, stream, r)
        for part in wanted:
            weight: Any = modules[part].weight
            solution = gptq_solve(
                weight, H, rounding.grid, group_size=rounding.group_size, percdamp=rounding.percdamp,
                act_order=rounding.act_order, block=rounding.block, name=f"{name}.{part}",
            )  # fmt: skip
            weight.copy_(solution.weight)
            found[f"{name}.{part}"] = QuantizedMatrix(
                solution.codes.cpu(), _cpu(solution.scales), solution.error, solution.rtn_error
            )
    for rows in stream.batches():
        output = stream.call(layer, rows, number)
        if not torch.isfinite(output).all():
            raise DataError(f"{name}: gives NaN or infinite values")
        stream.hidden[rows] = output.to(stream.hidden)
    return found


@torch.no_grad()
def nearest_layer(layer: Any, name: str, rounding: Rounding) -> dict[str, QuantizedMatrix]:
    """Round the linear layers of one decoder layer to nearest, in place."""
    modules = dict(layer.named_modules())
    found = {}
    for part in (part for group in GROUPS for part in group):
        if rounding.excludes(f"{name}.{part}"):
            continue
        weight: Any = modules[part].weight
        codes, near, scales = round_to_nearest(weight.float(), rounding.grid, rounding.group_size)
        weight.copy_(near)
        found[f"{name}.{part}"] = QuantizedMatrix(codes.cpu(), _cpu(scales), float("nan"), float("nan"))
    return found


def input_hessian(layer: Any, linear: nn.Module, number: int, stream: Stream, r: Tensor) -> Tensor:
    """The weighted Hessian of the inputs of a linear layer, over all sequences: 2 / T sum_j r_j x_j x_j^T."""
    total: Tensor | None = None
    for rows in stream.batches():
        X = stream.input_of(layer, linear, rows, number)
        X = (X if X.dtype == torch.float64 else X.float()) * r[rows].to(X.device).sqrt()[..., None]
        X = X.flatten(0, 1)
        if total is None:
            total = torch.zeros(X.shape[1], X.shape[1], dtype=X.dtype, device=X.device)
        total.addmm_(X.T, X)
    assert total is not None  # there is at least one sequence
    return total.mul_(2 / float(stream.calibration.weighed().sum()))


def _cpu(scales: Scales) -> Scales:
    return Scales(*(part.cpu() for part in scales))
