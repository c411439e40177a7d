"""RSQ on a model directory: one decoder layer in memory at a time, its inputs in a file."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from salience.errors import DataError, InputError
from salience.model.loading import skeleton
from salience.model.shards import INDEX, TensorStore, copy_rest
from salience.weights.rsq.calibration import Calibration
from salience.weights.rsq.layers import QuantizedMatrix, Stream
from salience.weights.rsq.packing import CODES, REST, built_beside, join_files, write_codes
from salience.weights.rsq.quantizer import RSQQuantizer, Told, embed
from salience.weights.rsq.rotating import Rotation, check_supported

_EMBEDDING, _NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass
class QuantizedDirectory:
    """What was written.

    Attributes
    ----------
    path : Path
    errors : dict of str to (float, float)
        Of each matrix, error and that of rounding to nearest, in the metric of its Hessian; NaN without one.
    weights : int
        Entries of the quantised matrices.
    codes_bytes : int
        Size of the file of codes.
    rest_bytes : int
        Size of everything that is not quantised.
    dense_bytes : int
        Size of the model before.
    """

    path: Path
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    weights: int = 0
    codes_bytes: int = 0
    rest_bytes: int = 0
    dense_bytes: int = 0

    @property
    def bits_per_weight(self) -> float:
        """Bits in the file of codes for each quantised weight, scales included."""
        return 8 * self.codes_bytes / max(self.weights, 1)


@torch.no_grad()
def quantize_directory(
    source: str | os.PathLike,
    out: str | os.PathLike,
    batches: Any,
    quantizer: RSQQuantizer,
    *,
    packed: bool = False,
    device: torch.device | str = "cpu",
    progress: Told | None = None,
) -> QuantizedDirectory:
    """Quantise a model directory as `RSQQuantizer.quantize` does a model, and write what that gives.

    Memory holds the embedding or one decoder layer, one Hessian, and one batch of activations; the inputs of the layer
    lie in a file beside `out`, as large as all hidden states of the calibration text.

    Parameters
    ----------
    source : path-like
        A `transformers` directory with safetensors. It is only read.
    out : path-like
        A folder that is not there yet, and appears when it is complete. It gets the weights that the codes stand for,
        one file a layer, which `from_pretrained` loads, and the codes. With `packed` it gets codes and all that is not
        quantised, which `load_packed` loads.
    batches : Tensor, mapping, iterable, or None
        Calibration text as token ids; None to round to nearest.
    quantizer : RSQQuantizer
    packed : bool
        Must be true of a quantizer that turns activations online.
    device : torch.device or str
        Where layers are computed.
    progress : callable, optional
        Is told the name of each layer.

    Returns
    -------
    QuantizedDirectory

    Raises
    ------
    InputError, DataError, NothingToDo
        As `RSQQuantizer.quantize`; `out` exists, `source` is unsafe, or its tensors bear other names.
    """
    quantizer.check()
    target = Path(out)
    if quantizer.online and not packed:
        raise InputError("online: weights alone do not give such a model; write it with packed=True")
    net: Any = skeleton(source)
    check_supported(net)
    quantizer.check_exclude(net.config)
    calibration = None if quantizer.rounding == "nearest" else quantizer.calibration(batches, net.config)
    rotation = quantizer.rotation(net.config)
    with ExitStack() as opened:
        store = opened.enter_context(TensorStore(source))
        writer = _Writer(opened.enter_context(built_beside(target)), store.path, quantizer, packed)
        ends = _Ends(store, net, rotation)
        stream = None
        if calibration is not None:
            stream = _stream(calibration, net, ends, quantizer, target.absolute().parent, device)
        writer.rest(ends)
        layers = _Layers(store, net, device)
        for name, matrix in quantizer.run(layers, stream, rotation, progress):
            writer.matrix(layers, name, matrix)
        writer.layer(layers)
        result = writer.finish(untied=rotation is not None)
    result.path = target
    result.dense_bytes = sum(entry.size * entry.dtype.itemsize for entry in store.entries.values())
    return result


class _Ends:
    """Embedding, last norm and output matrix, turned; read when they are asked for."""

    def __init__(self, store: TensorStore, net: Any, rotation: Rotation | None) -> None:
        self.store, self.rotation = store, rotation
        known = {_EMBEDDING, _NORM, _HEAD} | {name for name, _ in net.named_parameters()}
        missing = {_EMBEDDING, _NORM} - store.entries.keys()
        strange = [n for n in store.entries if n not in known and not n.endswith(".inv_freq")]
        if missing or strange:
            raise DataError(
                f"{store.path}: has no {min(missing)}" if missing else f"{store.path}: has {strange[0]} too"
            )

    def embedding(self) -> Tensor:
        weight = self.store.read(_EMBEDDING)
        return weight if self.rotation is None else self.rotation.embedding(weight)

    def others(self) -> dict[str, Tensor]:
        norm = self.store.read(_NORM)
        own = _HEAD in self.store.entries
        if self.rotation is None:
            return {_NORM: norm, **({_HEAD: self.store.read(_HEAD)} if own else {})}
        head = self.store.read(_HEAD if own else _EMBEDDING)
        return {_NORM: torch.ones_like(norm), _HEAD: self.rotation.output(head, norm)}


class _Layers:
    """The decoder layers, each read when its turn comes."""

    def __init__(self, store: TensorStore, net: Any, device: torch.device | str) -> None:
        self.store, self.net, self.device = store, net, device
        self.name, self.present = "", nn.Module()
        self.done: list[tuple[str, nn.Module]] = []

    def __iter__(self) -> Iterator[tuple[str, nn.Module]]:
        for number, empty in enumerate(self.net.model.layers):
            self.name = f"model.layers.{number}"
            layer = copy.deepcopy(empty).to_empty(device=self.device).eval()
            for part, parameter in list(layer.named_parameters()):
                stored = f"{self.name}.{part}"
                if stored not in self.store.entries:
                    raise DataError(f"{self.store.path}: has no {stored}")
                owner, _, last = part.rpartition(".")
                tensor = self.store.read(stored).to(self.device)
                if tensor.shape != parameter.shape:
                    raise DataError(f"{self.store.path}: {stored} has shape {tuple(tensor.shape)}")
                setattr(layer.get_submodule(owner), last, nn.Parameter(tensor, requires_grad=False))
            self.present = layer
            yield self.name, layer
            self.done.append((self.name, layer))


def _stream(
    calibration: Calibration, net: Any, ends: _Ends, quantizer: RSQQuantizer, folder: Path, device: torch.device | str
) -> Stream:
    weight = ends.embedding()
    rotary = type(net.model.rotary_emb)(net.config).to(device)
    stream = Stream(calibration, rotary, net.config, weight.dtype, folder, quantizer.batch_size, device)
    embed(stream, nn.Embedding.from_pretrained(weight.to(device)))
    return stream


class _Writer:
    """Writes each layer when the next one begins."""

    def __init__(self, out: Path, source: Path, quantizer: RSQQuantizer, packed: bool) -> None:
        self.out, self.quantizer, self.packed = out, quantizer, packed
        copy_rest(source, out)
        (out / INDEX).unlink(missing_ok=True)
        self.result = QuantizedDirectory(out)
        self.matrices: dict[str, QuantizedMatrix] = {}
        self.files: list[tuple[Path, list[str]]] = []
        self.codes: list[Path] = []

    def rest(self, ends: _Ends) -> None:
        self._save({_EMBEDDING: ends.embedding(), **ends.others()})

    def matrix(self, layers: _Layers, name: str, matrix: QuantizedMatrix) -> None:
        self.layer(layers)
        self.matrices[name] = matrix
        self.result.errors[name] = (matrix.error, matrix.rtn_error)
        self.result.weights += matrix.codes.numel()

    def layer(self, layers: _Layers) -> None:
        """Write the layers that are done."""
        while layers.done:
            name, layer = layers.done.pop(0)
            own = {key: value for key, value in self.matrices.items() if key.startswith(f"{name}.")}
            for key in own:
                del self.matrices[key]
            coded = {f"{key}.weight" for key in own} if self.packed else set()
            tensors = {f"{name}.{part}": value.detach().cpu() for part, value in layer.named_parameters()}
            self._save({key: value.contiguous() for key, value in tensors.items() if key not in coded})
            for key, value in tensors.items():
                if key.removesuffix(".weight") not in own:
                    self.result.rest_bytes += value.numel() * value.itemsize
            if own:
                self.codes.append(self.out / f"codes-{len(self.codes):05d}.part")
                grid = self.quantizer.values()
                write_codes(self.codes[-1], own, grid, self.quantizer.group_size, self.quantizer.online)

    def _save(self, tensors: dict[str, Tensor]) -> None:
        path = self.out / f"weights-{len(self.files):05d}.part"
        save_file(tensors, path, {"format": "pt"})
        if not self.files:
            self.result.rest_bytes += sum(value.numel() * value.itemsize for value in tensors.values())
        self.files.append((path, list(tensors)))

    def finish(self, untied: bool) -> QuantizedDirectory:
        """Give all files their names."""
        join_files(self.codes, self.out / CODES)
        self.result.codes_bytes = (self.out / CODES).stat().st_size
        if self.packed:
            join_files([path for path, _ in self.files], self.out / REST)
        else:
            count, where, size = len(self.files), {}, 0
            for number, (path, names) in enumerate(self.files, 1):
                name = f"model-{number:05d}-of-{count:05d}.safetensors"
                size += path.stat().st_size
                os.replace(path, self.out / name)
                where.update(dict.fromkeys(names, name))
            index = {"metadata": {"total_size": size}, "weight_map": where}
            (self.out / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
        for part in [*self.codes, *(path for path, _ in self.files)]:
            part.unlink(missing_ok=True)
        if untied:
            file = self.out / "config.json"
            config = json.loads(file.read_text(encoding="utf-8"))
            file.write_text(json.dumps({**config, "tie_word_embeddings": False}, indent=1), encoding="utf-8")
        return self.result
