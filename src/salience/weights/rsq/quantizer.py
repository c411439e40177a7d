"""RSQ on a model in memory."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from salience.errors import InputError, nearest
from salience.model.at import training_mode
from salience.weights.rsq.calibration import Calibration, calibration_of, check_length
from salience.weights.rsq.grids import Grid
from salience.weights.rsq.importance import TokenImportance
from salience.weights.rsq.layers import (
    GROUPS,
    QuantizedMatrix,
    Rounding,
    Stream,
    excluded,
    nearest_layer,
    quantize_layer,
)
from salience.weights.rsq.rotating import Mode, Rotation, check_supported, decoder_layers, rotate_ends

Told = Callable[[str], None]


@dataclass
class QuantResult:
    """A quantised model.

    Attributes
    ----------
    model : torch.nn.Module
        With the weights that the codes stand for, in the type of the model before.
    matrices : dict of str to QuantizedMatrix
        Codes and errors, by the name of the linear layer.
    grid : Grid
    group_size : int
    online : bool
        Whether the model turns activations while it runs.
    """

    model: nn.Module
    matrices: dict[str, QuantizedMatrix]
    grid: Grid
    group_size: int
    online: bool


@dataclass(frozen=True)
class RSQQuantizer:
    r"""Rotate, scale, then quantise: GPTQ that listens to the tokens which attention uses.

    Each linear layer of the decoder is fitted to its inputs X by

        min_{W_q} \| (W_q - W) X R \|_F^2,    R = diag(\sqrt{r_j / mean(r)}),

    where r_j is the importance of token j (`TokenImportance`), by GPTQ (`gptq_solve`), in a model that was rotated
    before (`rotate_model`). Layers are quantised in order, and each part of a layer sees its inputs as the quantised
    parts before it give them. Embedding and output matrix stay as they are.

    Parameters
    ----------
    bits : int
        2..8.
    group_size : int
        Consecutive inputs that share a scale; -1 for all.
    sym, clip, grid
        Of the grid (`Grid`): symmetric or not, with a search for the clip or not, "uniform" or "nf".
    importance : str
        Strategy of `TokenImportance`; "uniform" is plain GPTQ, after a rotation QuaRot.
    r_min, r_max : float
        Importance of the least and of the most important token of a sequence.
    rotate : {"hadamard", "random", None}
        Kind of the rotation, or none.
    online : bool
        Turn the inputs of ``o_proj`` and ``down_proj`` as well, by hooks.
    expand : int
        Copies of each sequence, rolled by equal parts, so that importance does not follow the position.
    percdamp, act_order, block
        Of `gptq_solve`.
    exclude : sequence of str
        Names or patterns of linear layers that stay as they are.
    rounding : {"gptq", "nearest"}
        "nearest" rounds each weight by itself, without calibration: the baseline.
    batch_size : int
        Sequences that run at once.
    random_state : int
        Of the rotation.

    Raises
    ------
    InputError
        When quantising: parameters out of range, another family, a model that is quantised already, or sequences
        longer than the model's positions.

    References
    ----------
    arXiv 2503.01820, section 3; the authors' code where the two differ: importance enters the Hessian once.

    Examples
    --------
    >>> quantizer = RSQQuantizer(bits=3)
    >>> result = quantizer.quantize(model, [ids])  # doctest: +SKIP
    """

    bits: int = 3
    group_size: int = -1
    sym: bool = True
    clip: bool = True
    grid: Literal["uniform", "nf"] = "uniform"
    importance: str = "attncon"
    r_min: float = 0.005
    r_max: float = 1.0
    rotate: Mode | None = "hadamard"
    online: bool = False
    expand: int = 1
    percdamp: float = 0.01
    act_order: bool = False
    block: int = 128
    exclude: Sequence[str] = ()
    rounding: Literal["gptq", "nearest"] = "gptq"
    batch_size: int = 8
    random_state: int = field(default=0)

    def quantize(self, model: nn.Module, batches: Any = None, *, progress: Told | None = None) -> QuantResult:
        """Quantise a copy of a model.

        Supported: causal language models of `transformers` of type llama, mistral, qwen2, qwen3.

        Parameters
        ----------
        model : transformers causal language model
            It is not changed.
        batches : Tensor, mapping, or iterable of them
            Calibration text as token ids (see `calibration_of`); not needed to round to nearest.
        progress : callable, optional
            Is told the name of each layer.

        Returns
        -------
        QuantResult

        Raises
        ------
        InputError
            See above.
        DataError
            A weight or activation is not finite, or a layer cannot be quantised better than by rounding.
        NothingToDo
            There is no token to calibrate on.
        """
        check_supported(model)
        self.check()
        self.check_exclude(model.config)
        calibration = None if self.rounding == "nearest" else self.calibration(batches, model.config)
        turned: Any = copy.deepcopy(model)
        rotation = self.rotation(model.config)
        if rotation is not None:
            rotate_ends(turned, rotation)
        matrices: dict[str, QuantizedMatrix] = {}
        with training_mode(turned, False), tempfile.TemporaryDirectory() as folder:
            stream = None
            if calibration is not None:
                device, dtype = turned.lm_head.weight.device, turned.lm_head.weight.dtype
                rotary, config = turned.model.rotary_emb, turned.config
                stream = Stream(calibration, rotary, config, dtype, Path(folder), self.batch_size, device)
                embed(stream, turned.get_input_embeddings())
            matrices = dict(self.run(decoder_layers(turned), stream, rotation, progress))
        return QuantResult(turned, matrices, self.values(), self.group_size, self.online)

    def check(self) -> None:
        """Check the parameters that need no model."""
        self.values(), self.weigher()
        if self.rotate not in ("hadamard", "random", None):
            raise InputError(f"rotate: got {self.rotate!r}; allowed are 'hadamard', 'random' and None")
        if self.online and self.rotate is None:
            raise InputError("online: goes with a rotation")
        if self.rounding not in ("gptq", "nearest"):
            raise InputError(f"rounding: got {self.rounding!r}; allowed are 'gptq' and 'nearest'")
        for name in ("expand", "block", "batch_size"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise InputError(f"{name}: got {getattr(self, name)!r}; a whole number of at least 1 is wanted")
        if not 0 < self.percdamp < float("inf"):
            raise InputError(f"percdamp: got {self.percdamp}; a positive number is wanted")

    def check_exclude(self, config: Any) -> None:
        """Refuse a pattern that fits no linear layer of the model, and patterns that leave none."""
        parts = [part for group in GROUPS for part in group]
        names = [f"model.layers.{number}.{part}" for number in range(config.num_hidden_layers) for part in parts]
        for each in self.exclude:
            if not any(excluded(name, each) for name in names):
                near = nearest(each, names if each.startswith("model.") else [part.split(".")[1] for part in parts])
                raise InputError(f"exclude: no linear layer of the decoder fits {each!r}; {near}")
        if all(any(excluded(name, each) for each in self.exclude) for name in names):
            raise InputError("exclude: leaves nothing to quantise")

    def values(self) -> Grid:
        """The grid."""
        return Grid(self.bits, self.sym, self.clip, self.grid)

    def weigher(self) -> TokenImportance:
        """The strategy that weighs tokens."""
        return TokenImportance(self.importance, self.r_min, self.r_max)

    def rotation(self, config: Any) -> Rotation | None:
        """What the model is turned by."""
        if self.rotate is None:
            return None
        return Rotation(config, self.rotate, self.online, torch.Generator().manual_seed(self.random_state))

    def calibration(self, batches: Any, config: Any) -> Calibration:
        """The sequences, checked and expanded."""
        if batches is None:
            raise InputError("batches: calibration text is needed")
        found = calibration_of(batches)
        check_length(found, config)
        return found.expanded(self.expand)

    def run(
        self,
        layers: Iterable[tuple[str, Any]],
        stream: Stream | None,
        rotation: Rotation | None,
        progress: Told | None = None,
    ) -> Iterable[tuple[str, QuantizedMatrix]]:
        """Turn and quantise decoder layers in place, one after the other; gives each matrix when it is done."""
        how = Rounding(self.values(), self.group_size, self.percdamp, self.act_order, self.block, self.exclude)
        for number, (name, layer) in enumerate(layers):
            if progress is not None:
                progress(name)
            if rotation is not None:
                rotation.layer(layer)
            if stream is None:
                yield from nearest_layer(layer, name, how).items()
            else:
                yield from quantize_layer(layer, name, number, stream, self.weigher(), how).items()


@torch.no_grad()
def embed(stream: Stream, embedding: nn.Module) -> None:
    """Fill a stream with the embeddings of its tokens."""
    for rows in stream.batches():
        stream.hidden[rows] = embedding(stream.calibration.ids[rows].to(stream.device)).to(stream.hidden)
