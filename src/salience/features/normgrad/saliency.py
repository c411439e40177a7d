"""Saliency maps from any layer, and the known methods as cells of one table.

    method                    extract    aggregate     at
    gradient                  bias       abs_max       the input
    linear approximation      scaling    sum           any layer       (gradient x activation)
    Grad-CAM                  scaling    sum           the last layer  (gradient averaged over space, then ReLU)
    NormGrad                  conv1x1    norm          any layer       |x_u| |g_u|
    selective NormGrad        scaling    filter_norm   any layer       |relu(x_u * g_u)|

Source: Rebuffi, Fong, Ji and Vedaldi, CVPR 2020 (arXiv 2004.02866); the table as in the authors' code.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from captum.attr import Attribution
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate

from salience.errors import InputError
from salience.features.attribution import Target, as_grid, spatial_layers, target_scores
from salience.features.normgrad.contributions import AGGREGATES, EXTRACTS, contribution_map
from salience.features.normgrad.fusion import FUSIONS, fuse, is_flat, layer_weights
from salience.model.at import capture, logits_of, run, training_mode
from salience.model.at import layer as layer_called
from salience.model.batches import map_batches

Images = Float[Tensor, "batch channel height width"]
# A layer by its name in `named_modules` or itself; None is the input image.
Layer = str | nn.Module | None


class LayerSaliency(Attribution):
    """A cell of the extract-and-aggregate table, at one layer or fused over several.

        s_u = aggregate(contribution of position u to the gradient of a weight at the layer)

    One forward and one backward pass, whatever the number of layers. The score whose gradient is taken is the
    class's logit. The model is in evaluation mode meanwhile and is left as it was, after an exception too.

    Parameters
    ----------
    model : torch.nn.Module
        A convolutional network or vision transformer that takes images; it may return a `ModelOutput`.
    layer : str, torch.nn.Module, None, or a sequence of them
        Where to look: a name from ``model.named_modules()``, the module, or None for the input image. Its output
        must be a map (batch, channel, height, width) or tokens (batch, token, channel). A layer that runs more than
        once is looked at in its last run.
    extract : {"bias", "scaling", "conv1x1", "conv3x3", "conv3x3_depthwise", "real"}
        The contribution of a position. "real" takes a convolution of the network, all others a virtual identity
        after the layer.
    aggregate : {"norm", "filter_norm", "sum", "max", "abs_max"}
        What becomes of a contribution's entries.
    average_gradient : bool
        Replace the gradient by its mean over the positions first, as Grad-CAM does.
    relu : bool
        Set negative values to 0 in the end.
    fuse : {"product", "mean"}
        How maps of several layers become one.
    weights : {"uniform", "linear"} or sequence of float
        Of the layers.
    upsample : bool
        Bring maps to the size of the image (bilinear). Several layers of different sizes need it.

    Raises
    ------
    InputError
        An option out of range, no such layer, or for "real" a layer that is no two-dimensional convolution.
    """

    predicts = True  # without a target, the predicted class is read off the same forward pass

    def __init__(
        self,
        model: nn.Module,
        layer: Layer | Sequence[Layer],
        extract: str = "conv1x1",
        aggregate: str = "norm",
        *,
        average_gradient: bool = False,
        relu: bool = False,
        fuse: str = "product",
        weights: str | Sequence[float] = "uniform",
        upsample: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(f"model: got {type(model).__name__}; layers are found in a torch.nn.Module")
        for name, value, allowed in (
            ("extract", extract, EXTRACTS), ("aggregate", aggregate, AGGREGATES), ("fuse", fuse, FUSIONS),
        ):  # fmt: skip
            if value not in allowed:
                raise InputError(f"{name}: got {value!r}; it must be one of {', '.join(map(repr, allowed))}")
        super().__init__(model)
        layers: list[Any] = list(layer) if isinstance(layer, list | tuple) else [layer]
        self.layers = [None if one is None else _name_of(model, one) for one in layers]
        if not layers or len(set(self.layers)) < len(layers):
            raise InputError(f"layer: got {self.layers}; name at least one layer, each once")
        self.extract, self.aggregate = extract, aggregate
        self.average_gradient, self.relu = average_gradient, relu
        self.fuse, self.weights, self.upsample = fuse, weights, upsample
        layer_weights(weights, len(layers))
        if extract == "real":
            for at in self.layers:
                if at is None or not isinstance(layer_called(model, at), nn.Conv2d):
                    kind = "the input" if at is None else type(layer_called(model, at)).__name__
                    raise InputError(f"layer: extract='real' looks at a torch.nn.Conv2d; {at!r} is {kind}")

    def attribute(
        self,
        inputs: Images,
        target: Target = None,
        additional_forward_args: Any = None,
        *,
        internal_batch_size: int | None = None,
    ) -> Float[Tensor, "batch 1 height width"]:
        """Maps of the images.

        Parameters
        ----------
        inputs : Tensor (batch, channel, height, width)
        target : int, sequence of int, Tensor (batch,), or callable, optional
            The class to explain, for all images or for each; or a function of the logits that gives one number per
            image. By default the predicted class.
        additional_forward_args : tuple, optional
            What else the model takes after the images; tensors with a row per image are cut with them.
        internal_batch_size : int, optional
            Images at once; all by default. Halved when memory runs out.

        Returns
        -------
        Tensor (batch, 1, height, width)
            Of the images' size, or the layer's without `upsample`; float32, or float64 for such images. With several
            layers in 0..1.

        Raises
        ------
        InputError
            Images or targets that do not fit, or a layer without a grid, or without a gradient.

        Warns
        -----
        UserWarning
            Maps are flat: they become 0. Before a global average, the gradient is the same everywhere; after a
            transformer's last attention, the prediction reads the class token alone.
        """
        if not isinstance(inputs, Tensor) or inputs.ndim != 4 or not inputs.is_floating_point() or not len(inputs):
            got = (
                f"shape {tuple(inputs.shape)}, {inputs.dtype}" if isinstance(inputs, Tensor) else type(inputs).__name__
            )
            raise InputError(f"inputs: must be images (batch, channel, height, width) of floats; got {got}")
        n = len(inputs)
        _check_rows(target, n)
        extra = () if additional_forward_args is None else additional_forward_args
        extra = extra if isinstance(extra, tuple) else (extra,)

        def maps_of(rows: range) -> Tensor:
            def cut(value: Any) -> Any:
                per_row = isinstance(value, Tensor) and value.ndim and len(value) == n
                return value[rows.start : rows.stop] if per_row else value

            own = target[rows.start : rows.stop] if isinstance(target, list | tuple) else cut(target)
            return self._maps(inputs[rows.start : rows.stop], own, tuple(map(cut, extra)))

        maps = map_batches(maps_of, range(n), batch_size=n if internal_batch_size is None else internal_batch_size)
        return maps[:, None].to(inputs.device)

    def _maps(self, inputs: Images, target: Target, extra: tuple) -> Float[Tensor, "batch height width"]:
        seen, into, score = self._pass(inputs, target, extra)
        gradients = torch.autograd.grad(score, [x for x in seen.values() if x is not None], allow_unused=True)
        maps = []
        for (name, x), g in zip(seen.items(), gradients, strict=True):
            maps.append(self._map(name, x.detach(), torch.zeros_like(x) if g is None else g, into, inputs))
        flat = torch.stack([is_flat(one) for one in maps])
        if bool(flat.any()):
            names = [name or "the input" for name, row in zip(self.layers, flat) if bool(row.any())]
            hint = "nothing there speaks for the class" if self.relu else "an earlier layer may tell more"
            count = f"{int(flat.sum())} of {flat.numel()}"
            warnings.warn(f"flat maps at {', '.join(names)} ({count}) point nowhere and become 0; {hint}", stacklevel=7)
            maps = [one.masked_fill(row[:, None, None], 0.0) for one, row in zip(maps, flat, strict=True)]
        if self.upsample:
            size = inputs.shape[2:]
            maps = [interpolate(one[:, None], size=size, mode="bilinear", align_corners=False)[:, 0] for one in maps]
        return maps[0] if len(maps) == 1 else fuse(maps, self.fuse, self.weights)

    def _pass(self, inputs: Images, target: Target, extra: tuple) -> tuple[dict, dict, Tensor]:
        """One forward pass: activations to differentiate at, inputs of real convolutions, and the score."""
        model: nn.Module = self.forward_func
        names = [name for name in self.layers if name is not None]
        with (
            training_mode(model, False),
            torch.enable_grad(),
            capture(model, names) as outputs,
            _inputs_of(model, names if self.extract == "real" else []) as into,
        ):
            # A clone goes in: an operation in place must not write on the leaf.
            pixels = inputs.detach().clone().requires_grad_()
            logits = logits_of(run(model, (pixels.clone(), *extra)))
            score = target_scores(logits, target).sum()
        if not score.requires_grad:
            raise InputError(
                f"model: {type(model).__name__} gives logits without a gradient; it must be differentiable"
            )
        seen: dict[str | None, Tensor] = {}
        for name in self.layers:
            seen[name] = pixels if name is None else outputs[name]
            if not seen[name].requires_grad:
                raise InputError(f"layer: {name!r} does not depend on the image, so that it has no map of it")
            if as_grid(seen[name], (inputs.shape[2], inputs.shape[3])) is None:
                raise InputError(
                    f"layer: {name!r} gives shape {tuple(seen[name].shape)}, which is no map of the image; layers "
                    f"that give one: {_some(spatial_layers(model, inputs[:1]))}"
                )
        return seen, into, score

    def _map(self, name: str | None, x: Any, g: Any, into: Mapping[str, Tensor], inputs: Images) -> Tensor:
        conv: Any = layer_called(self.forward_func, name) if name is not None and self.extract == "real" else None
        image = (inputs.shape[2], inputs.shape[3])
        x = as_grid(_wide(x if conv is None else into[str(name)]), image)
        g = as_grid(_wide(g), image)
        if self.average_gradient:
            g = g.mean((2, 3), keepdim=True).expand_as(g)
        result = contribution_map(x, g, self.extract, self.aggregate, conv)
        if not bool(torch.isfinite(result).all()):
            raise InputError(f"inputs: the map at {name or 'the input'} is not finite; are images and weights?")
        return result.clamp(min=0) if self.relu else result


class NormGrad(LayerSaliency):
    """NormGrad: how much a position adds to the gradient of a virtual 1x1 convolution.

        s_u = |g_u x_u^T|_F = |g_u| |x_u|          selective:  s_u = |relu(x_u * g_u)|

    Parameters
    ----------
    model, layer
        See `LayerSaliency`.
    selective : bool
        Only what speaks *for* the class: scaling and the norm of the positive part.
    real_conv : bool
        Look at a convolution of the network instead of a virtual one.
    **options
        `fuse`, `weights` and `upsample` of `LayerSaliency`.

    Raises
    ------
    InputError
        `selective` together with `real_conv`, or as in `LayerSaliency`.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: Layer | Sequence[Layer],
        *,
        selective: bool = False,
        real_conv: bool = False,
        **options: Any,
    ) -> None:
        if selective and real_conv:
            raise InputError("selective and real_conv: give one of them, selective looks at a virtual scaling")
        extract, aggregate = ("scaling", "filter_norm") if selective else ("conv1x1", "norm")
        super().__init__(model, layer, "real" if real_conv else extract, aggregate, **options)


class GradCAM(LayerSaliency):
    """Grad-CAM as a cell of the table: scaling by the mean gradient, summed over the channels.

        s_u = relu(sum_c x_uc mean_v g_vc)

    At a layer other than the last the mean over positions destroys the gradient, and the maps with it; it is
    computed all the same where you ask for it.

    Parameters
    ----------
    model, layer
        See `LayerSaliency`.
    relu : bool
        Keep only what speaks for the class.
    **options
        `fuse`, `weights` and `upsample` of `LayerSaliency`.

    Notes
    -----
    Source: Selvaraju et al., "Grad-CAM", ICCV 2017 (arXiv 1610.02391), equations 1 and 2.
    """

    def __init__(self, model: nn.Module, layer: Layer | Sequence[Layer], *, relu: bool = True, **options: Any) -> None:
        super().__init__(model, layer, "scaling", "sum", average_gradient=True, relu=relu, **options)


class LinearApproximation(LayerSaliency):
    """Gradient x activation: how the score would change, to first order, if a position were 0.

        s_u = sum_c x_uc g_uc

    Parameters as in `LayerSaliency`; at the input (None) it is gradient x input.
    """

    def __init__(self, model: nn.Module, layer: Layer | Sequence[Layer] = None, **options: Any) -> None:
        super().__init__(model, layer, "scaling", "sum", **options)


class Gradient(LayerSaliency):
    """The gradient's largest entry in size over the channels, at the input unless a layer is given.

        s_u = max_c |g_uc|

    Parameters as in `LayerSaliency`.

    Notes
    -----
    Source: Simonyan, Vedaldi and Zisserman, "Deep Inside Convolutional Networks", 2013 (arXiv 1312.6034).
    """

    def __init__(self, model: nn.Module, layer: Layer | Sequence[Layer] = None, **options: Any) -> None:
        super().__init__(model, layer, "bias", "abs_max", **options)


def _name_of(model: nn.Module, layer: str | nn.Module) -> str:
    if isinstance(layer, str):
        if not layer:
            raise InputError("layer: '' is the model itself; None looks at the input image")
        layer_called(model, layer)
        return layer
    for name, module in model.named_modules():
        if module is layer and name:
            return name
    raise InputError(f"layer: got a {type(layer).__name__} that is no part of {type(model).__name__}")


def _check_rows(target: Target, n: int) -> None:
    """Before images are cut into batches, where a target of another length could fit one of them."""
    count = len(target) if isinstance(target, list | tuple) else None
    if isinstance(target, Tensor) and target.ndim:
        count = len(target)
    if count is not None and count != n:
        raise InputError(f"target: has {count} entries; there are {n} images")


@contextmanager
def _inputs_of(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Record what goes into each named layer."""
    into: dict[str, Tensor] = {}
    handles = []
    try:
        for name in names:

            def hook(module: nn.Module, args: Any, name: str = name) -> None:
                into[name] = args[0].detach().clone()

            handles.append(layer_called(model, name).register_forward_pre_hook(hook))
        yield into
    finally:
        for handle in handles:
            handle.remove()


def _wide(values: Tensor) -> Tensor:
    """Half precision as float32, in which norms neither overflow nor vanish."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _some(layers: Mapping[str, Any]) -> str:
    names = list(layers)
    return ", ".join(names[-8:]) + (f" and {len(names) - 8} before them" if len(names) > 8 else "")
