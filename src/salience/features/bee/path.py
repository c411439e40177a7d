"""Gradients along a straight path from a baseline to the activations of an image, as a map."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import interpolate

from salience.errors import InputError
from salience.features.attribution import as_grid
from salience.model.batches import map_batches
from salience.model.split import Split

Integrand = Literal["relu_grad_act", "grad_act", "ig"]


def path_map(
    split: Split,
    inputs: Float[Tensor, "one_or_rows channels height width"],
    target: Int[Tensor, " rows"] | int,
    activations: Float[Tensor, "rows ..."],
    baseline: Float[Tensor, "rows ..."],
    *,
    n_steps: int = 4,
    integrand: Integrand = "relu_grad_act",
    internal_batch_size: int = 64,
) -> Float[Tensor, "rows height width"]:
    """Follow the gradient of the target's logit from a baseline to the activations, summed over channels.

    With the network ``g`` behind the layer, ``v_k = b + k/n (a - b)`` and ``G_k = d g(v_k)_target / d v_k`` for
    k = 0..n::

        relu_grad_act   sum_k relu(G_k) relu(v_k)
        grad_act        sum_k G_k v_k
        ig              sum_k w_k G_k (a - b)     w_k = 1/n, half of that at the two ends

    The first two are the integrands of BEE's reference code; only `ig` is complete: it sums up to
    ``g(a) - g(b)`` as n grows.

    Parameters
    ----------
    split : Split
        The network, cut at the layer.
    inputs : Tensor (1 or rows, channels, height, width)
        The images; one does for all rows if all explain the same image.
    target : Tensor (rows,) or int
    activations, baseline : Tensor (rows, channels, h, w), or (rows, tokens, channels) of a vision transformer
        The two ends of the path.
    n_steps : int
        n; there are n + 1 points.
    integrand : str
    internal_batch_size : int
        Points per pass at most, whatever n is; halved when memory runs out.

    Returns
    -------
    Tensor (rows, h, w)
        At the layer's own size; float64 sums, in the type of the activations.

    Raises
    ------
    InputError
        An option is out of range, or shapes do not fit.

    Notes
    -----
    The weights ``w_k`` are the trapezoid rule's; BEE's code writes a step factor for `ig` that it never reaches.
    """
    if integrand not in get_args(Integrand):
        raise InputError(f"integrand: got {integrand!r}; it must be one of {', '.join(get_args(Integrand))}")
    if isinstance(n_steps, bool) or not isinstance(n_steps, int) or n_steps < 1:
        raise InputError(f"n_steps: got {n_steps!r}; it must be an integer of at least 1")
    if activations.shape != baseline.shape or len(inputs) not in (1, len(activations)):
        raise InputError(
            f"baseline: has shape {tuple(baseline.shape)}, activations {tuple(activations.shape)} and inputs "
            f"{tuple(inputs.shape)}; the first two must be alike, with one image or one per row"
        )
    rows, points = len(activations), n_steps + 1
    targets = torch.as_tensor(target, device=activations.device).expand(rows)
    a, b = activations.detach(), baseline.detach()
    total = torch.zeros((rows, *grid_of(a, inputs).shape[2:]), dtype=torch.float64, device=a.device)

    def add(index: Tensor) -> Tensor:
        row, k = (index // points).to(a.device), (index % points).to(a.device)
        share = (k.to(a.dtype) / n_steps).view(-1, *(1,) * (a.ndim - 1))
        v = (b[row] + share * (a[row] - b[row])).requires_grad_()
        with torch.enable_grad():
            logits = split.decode(v, inputs if len(inputs) == 1 else inputs[row])
            wanted = logits.gather(1, targets[row, None]).sum()
            (gradient,) = torch.autograd.grad(wanted, v)
        if integrand == "ig":
            weight = torch.where((k == 0) | (k == n_steps), 0.5, 1.0) / n_steps
            part = gradient * (a[row] - b[row]) * weight.to(a.dtype).view(share.shape)
        elif integrand == "grad_act":
            part = gradient * v.detach()
        else:
            part = gradient.relu() * v.detach().relu()
        total.index_add_(0, row, grid_of(part, inputs).double().sum(1))
        return index

    map_batches(add, torch.arange(rows * points), batch_size=internal_batch_size)
    return total.to(a.dtype)


def grid_of(activations: Tensor, inputs: Tensor) -> Float[Tensor, "rows channels height width"]:
    """Activations as maps over the images; an `InputError` where they are none."""
    grid = as_grid(activations, (inputs.shape[2], inputs.shape[3]))
    if grid is None:
        raise InputError(
            f"layer: gives activations of shape {tuple(activations.shape)}; maps (n, channels, height, width) or the "
            "tokens of a vision transformer are needed"
        )
    return grid


def with_grid(activations: Tensor, grid: Float[Tensor, "rows channels height width"]) -> Tensor:
    """`activations` with their maps replaced by `grid`; a transformer's other tokens stay."""
    if activations.ndim == 4:
        return grid
    patches = grid.flatten(2).transpose(1, 2)
    other = activations[:, : activations.shape[1] - patches.shape[1]]
    return torch.cat([other.expand(len(grid), -1, -1), patches], 1)


def enlarged(maps: Float[Tensor, "rows h w"], size: tuple[int, int]) -> Float[Tensor, "rows height width"]:
    """Maps at the size of the image, bicubic as in BEE's reference code."""
    return interpolate(maps[:, None].float(), size, mode="bicubic", align_corners=False)[:, 0]
