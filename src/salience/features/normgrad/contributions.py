"""The two phases of the framework: what each position contributes to a weight's gradient, and how large that is.

The gradient of a weight that all positions share is a sum over the positions ``u``; its terms say what each of
them contributes. With the activation ``x_u`` and the gradient ``g_u`` in R^C of the score at that activation:

    bias                g_u                          the gradient of a bias
    scaling             x_u * g_u                    of a scale per channel
    conv1x1             g_u x_u^T                    of a 1x1 convolution, C x C
    conv3x3             g_u vec(N(x)_u)^T            of a 3x3 convolution, C x 9C; N: the 3x3 neighbourhood
    conv3x3_depthwise   N(x)_u * g_u                 of a 3x3 convolution per channel, 9C
    real                of a convolution of the network itself: its input's neighbourhoods, its output's gradient

All but the last belong to a *virtual identity*: a layer, thought into the network, that would change nothing.

Outer products are never formed: every aggregate of ``g v^T`` follows from aggregates of ``g`` and of ``v``.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad, unfold

Map = Float[Tensor, "batch height width"]
Grid = Float[Tensor, "batch channel height width"]

EXTRACTS = ("bias", "scaling", "conv1x1", "conv3x3", "conv3x3_depthwise", "real")
AGGREGATES = ("norm", "filter_norm", "sum", "max", "abs_max")


def contribution_map(x: Grid, g: Grid, extract: str, aggregate: str, conv: nn.Conv2d | None = None) -> Map:
    """Phases one and two at once.

    Parameters
    ----------
    x : Tensor (batch, channel, height, width)
        Activation of the layer; for ``real`` the input of `conv`.
    g : Tensor (batch, channel, height, width)
        Gradient of the score at the activation; for ``real`` at the output of `conv`.
    extract : str
        One of `EXTRACTS`.
    aggregate : {"norm", "filter_norm", "sum", "max", "abs_max"}
        Over the entries of a position's contribution: Euclidean norm, norm of the positive ones, sum, largest,
        largest in size.
    conv : torch.nn.Conv2d
        For ``real``.

    Returns
    -------
    Tensor (batch, height, width)
    """
    if extract == "bias":
        return _aggregate(g, aggregate)
    if extract == "scaling":
        return _aggregate(x * g, aggregate)
    if extract == "conv1x1":
        return _aggregate_outer(g[:, None], x[:, None], aggregate)
    if extract == "real":
        assert conv is not None
        v, groups = _neighbourhoods(x, conv), conv.groups
        return _aggregate_outer(g.unflatten(1, (groups, -1)), v.unflatten(1, (groups, -1)), aggregate)
    around = unfold(x, 3, padding=1).unflatten(2, x.shape[2:])
    if extract == "conv3x3":
        return _aggregate_outer(g[:, None], around[:, None], aggregate)
    return _aggregate((around.unflatten(1, (-1, 9)) * g[:, :, None]).flatten(1, 2), aggregate)


def _neighbourhoods(x: Grid, conv: nn.Conv2d) -> Grid:
    """What `conv` reads at each position of its output, (batch, channel * kernel, height, width)."""
    before_and_after = conv._reversed_padding_repeated_twice  # of the width first; padding="same" is resolved there
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = pad(x, list(before_and_after), mode=mode)
    columns = unfold(padded, conv.kernel_size, dilation=conv.dilation, stride=conv.stride)
    sides = zip(padded.shape[2:], conv.kernel_size, conv.dilation, conv.stride, strict=True)
    return columns.unflatten(2, [(side - d * (k - 1) - 1) // s + 1 for side, k, d, s in sides])


def _aggregate(c: Grid, how: str) -> Map:
    if how == "norm":
        return torch.linalg.vector_norm(c, dim=1)
    if how == "filter_norm":
        return torch.linalg.vector_norm(c.clamp(min=0), dim=1)
    if how == "sum":
        return c.sum(1)
    return c.amax(1) if how == "max" else c.abs().amax(1)


def _aggregate_outer(
    g: Float[Tensor, "batch group p height width"], v: Float[Tensor, "batch group q height width"], how: str
) -> Map:
    """The aggregate over all ``g_i v_j`` of each group, and over the groups."""
    if how == "norm":
        return torch.linalg.vector_norm(_norm(g) * _norm(v), dim=1)
    if how == "filter_norm":  # a product is positive where both factors are, or both are not
        both = _norm(g.clamp(min=0)) * _norm(v.clamp(min=0))
        neither = _norm(g.clamp(max=0)) * _norm(v.clamp(max=0))
        return torch.linalg.vector_norm(torch.cat([both, neither], 1), dim=1)
    if how == "sum":
        return (g.sum(2) * v.sum(2)).sum(1)
    if how == "max":  # a product of two ranges is largest at one of their corners
        corners = [a * b for a in (g.amax(2), g.amin(2)) for b in (v.amax(2), v.amin(2))]
        return torch.cat(corners, 1).amax(1)
    return (g.abs().amax(2) * v.abs().amax(2)).amax(1)


def _norm(values: Float[Tensor, "batch group p height width"]) -> Float[Tensor, "batch group height width"]:
    return torch.linalg.vector_norm(values, dim=2)
