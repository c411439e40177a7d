"""Networks with fewer channels than their class or configuration says, and the small file that tells.

Weights of other shapes than a `transformers` configuration announces cannot be loaded from it. A narrowed model
is therefore saved with a list of its new shapes beside the weights, as plain JSON:

    {"salience_shapes": 1, "shapes": {"layer1.conv1.weight": [9, 16, 3, 3], ...}, "identity": ["layer1.bn1", ...]}

`shapes` has every tensor whose shape changed, and new biases; `identity` the batch normalisations that were folded
into the layer before. `salience.model.load` reads it. The list is not trusted: it can only make known layers smaller.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from salience.errors import DataError, InputError, nearest

SHAPES = "salience_shapes.json"  # in a directory; FILE.safetensors has FILE.safetensors.shapes.json beside it
VERSION = 1
MAX_RATIO = 200  # entries of the network that a configuration announces, for each entry that is stored


class Shapes(NamedTuple):
    """What differs from the network that the class or configuration builds.

    Parameters
    ----------
    shapes : dict of str to tuple of int
        New shape of each tensor that changed or is new.
    identity : tuple of str
        Batch normalisations that do nothing any more.
    """

    shapes: dict[str, tuple[int, ...]]
    identity: tuple[str, ...] = ()


def shapes_file(path: Path) -> Path:
    """Where the list for a model directory, or for a safetensors file, lies."""
    return path.with_name(f"{path.name}.shapes.json") if path.suffix == ".safetensors" else path / SHAPES


def differences(wide: nn.Module, narrow: nn.Module) -> Shapes:
    """The list that turns the structure of `wide` into that of `narrow`."""
    before = {name: tuple(value.shape) for name, value in wide.state_dict().items()}
    after = {name: tuple(value.shape) for name, value in narrow.state_dict().items()}
    folded = tuple(
        name
        for name, module in wide.named_modules()
        if isinstance(module, _BatchNorm) and isinstance(dict(narrow.named_modules()).get(name), nn.Identity)
    )
    return Shapes({name: shape for name, shape in after.items() if before.get(name) != shape}, folded)


def write_shapes(path: Path, shapes: Shapes) -> None:
    """Write the list as JSON."""
    content = {"salience_shapes": VERSION, "shapes": shapes.shapes, "identity": shapes.identity}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_shapes(path: str | os.PathLike) -> Shapes:
    """Read and check a list; says nothing yet about the model that it belongs to.

    Raises
    ------
    DataError
        Not such a list: another version, another form, or sizes that are no sizes.
    """
    file = Path(path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(content, dict) or set(content) != {"salience_shapes", "shapes", "identity"}:
        raise DataError(f"{file}: must be an object with 'salience_shapes', 'shapes' and 'identity', and nothing else")
    if content["salience_shapes"] != VERSION or isinstance(content["salience_shapes"], bool):
        raise DataError(f"{file}: version {content['salience_shapes']!r}; this salience reads version {VERSION}")
    shapes, identity = content["shapes"], content["identity"]
    if not isinstance(shapes, dict) or not isinstance(identity, list) or not all(isinstance(n, str) for n in identity):
        raise DataError(f"{file}: 'shapes' must map names to lists of sizes, and 'identity' must list names")
    for name, shape in shapes.items():
        sizes = isinstance(shape, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in shape)
        if not sizes or not 1 <= len(shape) <= 5 or not all(0 < n < 2**31 for n in shape):
            raise DataError(f"{file}: shape of {name!r} is {str(shape)[:80]}; give a list of 1 to 5 positive sizes")
    return Shapes({name: tuple(shape) for name, shape in shapes.items()}, tuple(identity))


def reshape(model: nn.Module, shapes: Shapes, where: str = "shapes") -> None:
    """Give the layers of `model` the listed shapes, in place; their values are undefined afterwards.

    Parameters
    ----------
    model : torch.nn.Module
        Built by its class; may lie on the meta device.
    shapes : Shapes
    where : str
        What the messages name: the file.

    Raises
    ------
    DataError
        A name that the model has not, a layer that is no linear, convolution or batch normalisation layer, a
        shape that grows or has other dimensions, tied weights, or sizes within a layer that do not fit together.
    """
    modules = dict(model.named_modules())
    for name in shapes.identity:
        if not isinstance(modules.get(name), _BatchNorm):
            known = [key for key, module in modules.items() if isinstance(module, _BatchNorm)]
            raise DataError(f"{where}: {name!r} is no batch normalisation of the model; {nearest(name, known)}")
        model.set_submodule(name, nn.Identity())
    state = model.state_dict(keep_vars=True)
    ids = [id(value) for value in state.values()]
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.shapes.items():
        owner, _, leaf = name.rpartition(".")
        layer, old = modules.get(owner), state.get(name)
        if layer is None or layer_kind(layer) is None or (old is None and leaf != "bias"):
            raise DataError(f"{where}: {name!r} is no tensor of a layer that can be narrowed; {nearest(name, state)}")
        if old is None:
            if getattr(layer, "bias", 0) is not None or len(shape) != 1 or shape[0] > max(layer.weight.shape):
                raise DataError(f"{where}: {name!r} cannot be a new bias of shape {shape}")
            old = layer.weight
        elif ids.count(id(old)) > 1:
            raise DataError(f"{where}: {name!r} is tied to another tensor, which this list cannot change")
        elif len(shape) != old.ndim or any(new > was for new, was in zip(shape, old.shape)):
            raise DataError(f"{where}: {name!r} has shape {shape}; it must lie within {tuple(old.shape)}")
        tensors[name] = torch.empty(shape, dtype=old.dtype, device=old.device)
    try:
        replace_tensors(model, tensors)
    except InputError as error:
        raise DataError(f"{where}: {error}") from None


def replace_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors of other shapes in the place of parameters and buffers, and set the layers' sizes to fit.

    Raises
    ------
    InputError
        The sizes within a layer do not fit together.
    """
    touched: dict[str, Any] = {}
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        layer = touched[owner] = model.get_submodule(owner)
        if leaf in layer._buffers:
            layer._buffers[leaf] = tensor
        else:
            old = layer._parameters.get(leaf)
            flag = tensor.is_floating_point() if old is None else old.requires_grad
            setattr(layer, leaf, nn.Parameter(tensor, requires_grad=flag))
    for name, layer in touched.items():
        kind = layer_kind(layer)
        if kind == "norm":
            layer.num_features = len(layer.running_mean if layer.running_mean is not None else layer.weight)
        else:
            _resize(layer, kind)
        _check(name, layer)


def fold_norms(model: nn.Module, norms: Mapping[str, str]) -> None:
    """Fold batch normalisations into the layers before them, in place; they become `nn.Identity`.

    Parameters
    ----------
    model : torch.nn.Module
    norms : dict of str to str
        Name of a normalisation, and of the linear or convolution layer that it alone follows, as
        `salience.model.channels.channel_groups` finds them.
    """
    for norm_name, layer_name in norms.items():
        norm: Any = model.get_submodule(norm_name)
        layer: Any = model.get_submodule(layer_name)
        fuse: Any = fuse_linear_bn_weights if layer_kind(layer) == "linear" else fuse_conv_bn_weights
        # In float64, since a running variance near zero makes large factors.
        mean, variance, scale, shift = (
            None if value is None else value.detach().double()
            for value in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        )
        own = None if layer.bias is None else layer.bias.detach().double()
        weight, bias = fuse(layer.weight.detach().double(), own, mean, variance, norm.eps, scale, shift)
        flag = layer.weight.requires_grad
        layer.weight = nn.Parameter(weight.to(layer.weight.dtype), flag)
        layer.bias = nn.Parameter(bias.to(layer.weight.dtype), flag)
        model.set_submodule(norm_name, nn.Identity())


def check_size(wide: nn.Module, stored: int, where: str) -> None:
    """Refuse a configuration that announces far more than is stored, before any of it is allocated."""
    announced = sum(value.numel() for value in wide.state_dict().values())
    if announced > MAX_RATIO * max(stored, 1):
        raise DataError(
            f"{where}: narrows a network of {announced:,} entries to {stored:,}; more than a factor of {MAX_RATIO} "
            "is refused, since it could be made to exhaust memory"
        )


def layer_kind(layer: nn.Module) -> str | None:
    """Whether a layer can be narrowed: "linear", "transposed" (`Conv1D`), "convolution", "norm", or None."""
    if isinstance(layer, nn.Linear):
        return "linear"
    if isinstance(layer, _ConvNd) and not isinstance(layer, _ConvTransposeNd):
        return "convolution"
    if isinstance(layer, _BatchNorm):
        return "norm"
    return "transposed" if is_conv1d(layer) else None


def is_conv1d(layer: nn.Module) -> bool:
    """Whether it is the `Conv1D` of `transformers`: a linear layer with its weight stored (in, out)."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf") and hasattr(layer, "weight")


def input_rows(layer: nn.Module, inputs: Tensor) -> Float[Tensor, "rows channel"]:
    """What a linear or convolution layer reads, with one column per input channel."""
    if isinstance(layer, nn.Linear) or is_conv1d(layer):
        return inputs.flatten(0, -2)
    return inputs.transpose(0, 1).flatten(1).T


def _resize(layer: Any, kind: str | None) -> None:
    out, into = (1, 0) if kind == "transposed" else (0, 1)
    width = layer.weight.shape[out]
    if kind == "linear":
        layer.out_features, layer.in_features = width, layer.weight.shape[into]
    elif kind == "transposed":
        layer.nf, layer.nx = width, layer.weight.shape[into]
    elif kind == "convolution":
        if layer.groups > 1:  # depthwise: as many groups as channels
            layer.groups = width
        layer.out_channels, layer.in_channels = width, layer.weight.shape[into] * layer.groups


def _check(name: str, layer: Any) -> None:
    kind = layer_kind(layer)
    if kind == "norm":
        sizes = {len(v) for v in (layer.weight, layer.bias, layer.running_mean, layer.running_var) if v is not None}
        fits = len(sizes) == 1
    else:
        sizes = {layer.weight.shape[1 if kind == "transposed" else 0]}
        fits = layer.bias is None or len(layer.bias) in sizes
        if kind == "convolution":
            fits = fits and math.prod(layer.weight.shape[2:]) == math.prod(layer.kernel_size)
    if not fits:
        raise InputError(f"layer {name!r}: sizes of weight, bias and statistics do not fit together")


def slices(tensor: Tensor, axis: int, kept: Sequence[int] | Tensor, block: int = 1) -> Tensor:
    """The entries of some channels, along an axis where each channel owns `block` consecutive ones."""
    index = torch.as_tensor(kept, device=tensor.device)
    if block > 1:
        index = (index[:, None] * block + torch.arange(block, device=tensor.device)).flatten()
    return tensor.index_select(axis, index)
